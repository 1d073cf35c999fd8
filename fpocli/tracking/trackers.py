"""The trackers of a run: opened together, continued when the run is resumed, never its end.

A tracker that cannot start is an error before any model is loaded. One that fails later is dropped
with a warning: metrics.jsonl has everything.
"""

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from fpocli.system.console import say, warn
from fpocli.system.errors import UserError
from fpocli.system.files import replace_text
from fpocli.system.json_yaml import read_json
from fpocli.system.ranks import Ranks
from fpocli.system.signals import run_if_stopped
from fpocli.tracking.mlflow import MLflow
from fpocli.tracking.tensorboard import TensorBoard
from fpocli.tracking.tracker import Rows, Tracker
from fpocli.tracking.trackio import Trackio
from fpocli.tracking.wandb import Wandb

# Of each tracker the run's id there, and the last step that it got of each split.
TRACKING = "tracking.json"
# By name the tracker and the package that it needs.
_KINDS: dict[str, tuple[type[Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "wandb": (Wandb, "wandb"),
    "mlflow": (MLflow, "mlflow"),
    "trackio": (Trackio, "trackio"),
}


class Trackers:
    """The trackers that --track names. Rank 0 alone sends; all ranks must make and open them.

    A context in which their clients, which print, cannot reach stdout.

    Args:
        names: of the trackers.
        ranks: the processes of the run.

    Raises:
        UserError: a client is not installed, or not logged in.
    """

    def __init__(self, names: list[str], ranks: Ranks) -> None:
        self._used = bool(names)
        self._names = list(dict.fromkeys(names)) if ranks.rank == 0 else []
        self._ranks = ranks
        self._open: dict[str, Tracker] = {}
        self._state: dict[str, dict[str, Any]] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._names:
            self._stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            self._stack.enter_context(run_if_stopped(lambda: self._close(complete=False)))
        try:
            if self._used:
                self._ranks.on_first(self._check)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self._stack:
            if kind is None and self._used:
                # The other ranks wait: one that has left would seem to be lost.
                self._ranks.on_first(lambda: self._close(complete=True))
            else:
                self._close(complete=False)

    def _check(self) -> None:
        for name in self._names:
            kind, package = _KINDS[name]
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"--track {name} needs the package {package}, which is not installed",
                    f'pip install "fpocli[{name}]"',
                )
            with _starting(name):
                kind.check()

    def open(self, folder: Path, settings: dict[str, Any]) -> None:
        """Begin a run in every tracker, or continue the one that an earlier command began.

        Args:
            folder: of the run, where the runs of the trackers are noted.
            settings: of the run.

        Raises:
            UserError: a tracker cannot be reached.
        """
        if self._used:
            self._ranks.on_first(lambda: self._open_all(folder, settings))

    def _open_all(self, folder: Path, settings: dict[str, Any]) -> None:
        self._file = folder / TRACKING
        if self._file.is_file():
            self._state = read_json(self._file)
        for name in self._names:
            state = self._state.setdefault(name, {"run": None, "sent": {}})
            with _starting(name):
                tracker = _KINDS[name][0](folder, settings, state["run"])
            self._open[name], state["run"] = tracker, tracker.run
            say(f"--track {name}: {tracker.where}")
        self._write_state()

    def log(self, line: dict[str, Any]) -> None:
        """Send a line of metrics.jsonl to the trackers that have not got it yet.

        A run that is resumed repeats the steps after its checkpoint, and trackers keep them.
        """
        split, step = line["split"], line["step"]
        metrics = {name: value for name, value in line.items() if name not in ("split", "step")}
        numbers = {f"{split}/{name}": value for name, value in metrics.items()}
        missing = {
            name: tracker
            for name, tracker in self._open.items()
            if step > self._state[name]["sent"].get(split, -1)
        }
        for name in missing:
            self._state[name]["sent"][split] = step
        if missing:
            # Before they are sent: a line that is lost when the process is killed does less harm
            # than one that is there twice.
            self._write_state()
        for name, tracker in missing.items():
            self._try(name, tracker, lambda one: one.log(numbers, step))

    def results(
        self, numbers: dict[str, float], images: dict[str, Path], tables: dict[str, Rows]
    ) -> None:
        """Send what was measured after training: numbers, PNG files and tables by name."""
        sent = [step for name in self._open for step in self._state[name]["sent"].values()]
        step = max(sent, default=0)
        for name, tracker in [*self._open.items()]:
            self._try(name, tracker, lambda one: one.results(numbers, images, tables, step))

    def _close(self, *, complete: bool) -> None:
        # First of all, as at a signal another thread goes on training.
        closing, self._open = self._open, {}
        for name, tracker in closing.items():
            self._try(name, tracker, lambda one: one.close(complete=complete))

    def _try(self, name: str, tracker: Tracker, work: Callable[[Tracker], None]) -> None:
        try:
            with _silent():
                work(tracker)
        except Exception as error:
            self._open.pop(name, None)
            # As the message of a UserError it is one printable line.
            warn(
                f"warning: {name} failed and gets nothing more from this command: "
                f"{UserError(str(error))}"
            )

    def _write_state(self) -> None:
        replace_text(self._file, json.dumps(self._state, indent=1))


@contextlib.contextmanager
def _starting(name: str) -> Iterator[None]:
    """Report why a tracker does not start."""
    try:
        with _silent():
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{name} cannot start: {error}",
            f"see whether {name} works without fpo, or leave out --track {name}",
        ) from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What clients print while they are called, such as a greeting, is left out."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
