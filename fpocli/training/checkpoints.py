"""The checkpoints of a run, written and read by DeepSpeed."""

import contextlib
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fpocli.system.errors import UserError, report_write_errors
from fpocli.system.heartbeat import is_of_a_lost_process

_STEP, _ALPHA = "fpo_step", "fpo_alpha"


def save_checkpoint(engine: Any, folder: Path, step: int, alpha: float, keep: int) -> None:
    """Write a checkpoint of all ranks, then delete all but the newest.

    Args:
        engine: after the step.
        folder: of the checkpoints.
        step: how many steps are done.
        alpha: of the next step, which --hold changes.
        keep: how many checkpoints to keep.

    Raises:
        UserError: the disk is full; older checkpoints are unchanged.
    """
    tag = f"partial-{step}"
    with contextlib.redirect_stdout(sys.stderr), report_write_errors(folder / tag):
        state = {_STEP: step, _ALPHA: alpha}
        engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        # A checkpoint gets its name when it is complete.
        (folder / tag).rename(folder / f"step-{step}")
        for old in _checkpoints(folder)[:-keep]:
            shutil.rmtree(old)


def newest_checkpoint(folder: Path) -> str | None:
    """The name of the newest complete checkpoint in a folder, or None."""
    found = _checkpoints(folder)
    return found[-1].name if found else None


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, the newest last."""
    steps = {path: path.name.removeprefix("step-") for path in folder.glob("step-*")}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda p: int(steps[p]))


def load_checkpoint(engine: Any, folder: Path, alpha: float) -> tuple[int, float]:
    """Load the newest checkpoint.

    Args:
        engine: before the first step.
        folder: of the checkpoints.
        alpha: where the weight of the constraint starts.

    Returns:
        the number of steps done, 0 without a checkpoint; alpha of the next step.

    Raises:
        UserError: it cannot be loaded, or contains code, which is not run.
    """
    tag = newest_checkpoint(folder)
    if tag is None:
        return 0, alpha
    try:
        with contextlib.redirect_stdout(sys.stderr), _data_only():
            path, client_state = engine.load_checkpoint(str(folder), tag=tag)
        if path is None:
            raise FileNotFoundError(folder / tag)
        # A checkpoint of 0.1 has no alpha, which was constant then.
        return int(client_state[_STEP]), float(client_state.get(_ALPHA, alpha))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"the checkpoint {folder / tag} is damaged, or contains code, which is not run",
            "delete it to resume from an older one, or start over with --overwrite",
        ) from error
    except Exception as error:  # DeepSpeed raises assertions and errors of many kinds
        if is_of_a_lost_process(error):
            raise
        raise UserError(
            f"the checkpoint {folder / tag} cannot be loaded: {error}",
            "resume with as many processes as saved it, delete it to resume from an older one, or "
            "start over with --overwrite",
        ) from error


@contextlib.contextmanager
def _data_only() -> Iterator[None]:
    """Restrict torch.load to tensors, plain values and three classes of DeepSpeed's.

    DeepSpeed calls it without that restriction; the environment variable overrides the call.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
