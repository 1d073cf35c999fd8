"""torchrun for `fpo train --gpus N`: python -m fpocli.system.torchrun N train --gpus N ...

It ends with the exit code of the process that failed first. torchrun's own command ends with 1, and
its traceback hides what that process has said.
"""

import logging
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from fpocli.system.console import show_error
from fpocli.system.output import output


def main() -> None:
    """Run fpo in N processes."""
    number, *words = sys.argv[1:]
    output.json_logs = "--json-logs" in words
    # It warns of every process that ends by itself.
    logging.disable(logging.ERROR)
    flags = ["--standalone", "--nproc-per-node", number, "-m", "fpocli", *words]
    try:
        run.run(run.parse_args(flags))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            show_error(
                f"the process of rank {rank} was ended by {signal.Signals(-failure.exitcode).name}",
                "the same command goes on from the last checkpoint; if this machine had no memory "
                "left, its kernel's log says so",
            )
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException as stopped:
        # The first process has printed the command that resumes.
        sys.exit(128 + stopped.sigval)


if __name__ == "__main__":
    # Until torchrun listens to signals, one ends this without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    main()
