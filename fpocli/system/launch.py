"""Starting the processes of `fpo train --gpus N`: this process becomes torchrun."""

import os
import sys

from fpocli.system.errors import UserError
from fpocli.system.signals import RESUME, resume_command


def launch(number: int, device: str | None) -> None:
    """Replace this process by a launcher that runs the same command in several processes, unless
    this is one of them.

    Args:
        number: of processes, each with a GPU of its own.
        device: "cpu" for processes without a GPU.

    Raises:
        UserError: another launcher has started several processes, or there are fewer GPUs.
    """
    if RESUME in os.environ:
        return
    # A launcher of one process, such as that of a pod, is no other launcher.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "--gpus starts the processes itself, and a launcher has started this one",
            "leave out --gpus, or start fpo train by itself",
        )
    if device != "cpu":
        import torch

        found = torch.cuda.device_count()
        if found < number:
            raise UserError(
                f"--gpus {number} asks for more GPUs than this machine has: {found}",
                "ask for fewer, or add --device cpu",
            )
    os.environ[RESUME] = resume_command()
    # torchrun would give each process a single core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // number)))
    launcher = [sys.executable, "-m", "fpocli.system.torchrun", str(number)]
    os.execv(sys.executable, [*launcher, *sys.argv[1:]])
