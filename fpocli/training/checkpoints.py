"""The checkpoints of a run: whole weights and moments by parameter name, for any number of ranks.

Of an adapter's run they have the adapter alone.

DeepSpeed holds them flat and in parts. Here they are put together, parameter by parameter, and
taken apart again for the ranks that go on.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fpocli.system.errors import report_write_errors
from fpocli.system.ranks import Ranks
from fpocli.training.checkpoint_files import (
    Checkpoint,
    open_checkpoint,
    write_document,
    write_tensors,
)
from fpocli.training.engine import MOMENTS, optimizer_states, trained


def save_checkpoint(
    engine: Any, folder: Path, step: int, alpha: float, keep: int, best: int | None = None
) -> None:
    """Write a checkpoint of all ranks, then delete all but the newest and the best.

    Args:
        engine: after the step.
        folder: of the checkpoints.
        step: how many steps are done.
        alpha: of the next step, which --hold changes.
        keep: how many checkpoints to keep.
        best: the step whose checkpoint is kept beside them; None without --best.

    Raises:
        UserError: the disk is full; older checkpoints are unchanged.
    """
    ranks = Ranks.connected()
    partial = folder / f"partial-{step}"
    partial.mkdir(parents=True, exist_ok=True)
    with report_write_errors(partial):
        digests = write_tensors(partial, ranks.rank, _tensors_of_rank(engine, ranks))
    # Rank 0 goes on when all ranks have written theirs.
    gathered = ranks.gather(digests)
    if ranks.rank == 0:
        files = {name: digest for part in gathered for name, digest in part.items()}
        write_document(partial, step, alpha, files)
        # A checkpoint gets its name when it is complete.
        partial.rename(checkpoint_of(folder, step))
        for old in _checkpoints(folder)[:-keep]:
            if best is None or old != checkpoint_of(folder, best):
                shutil.rmtree(old)


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, in the folder of the checkpoints."""
    return folder / f"step-{step}"


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder, or None."""
    found = _checkpoints(folder)
    return found[-1] if found else None


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, the newest last."""
    steps = {path: path.name.removeprefix("step-") for path in folder.glob("step-*")}
    return sorted((path for path in steps if steps[path].isdecimal()), key=lambda p: int(steps[p]))


def load_checkpoint(engine: Any, folder: Path, alpha: float) -> tuple[int, float]:
    """Load the newest checkpoint, whatever the number of ranks that wrote it.

    Args:
        engine: before the first step.
        folder: of the checkpoints.
        alpha: where the weight of the constraint starts.

    Returns:
        the number of steps done, 0 without a checkpoint; alpha of the next step.

    Raises:
        UserError: it is damaged, or of an earlier version. All ranks raise.
    """
    # On another host a listing of the folder may be a minute old.
    newest: Path | None = Ranks.connected().of_first(newest_checkpoint(folder))
    if newest is None:
        return 0, alpha
    checkpoint = load_from(engine, newest)
    return checkpoint.step, checkpoint.alpha


@torch.no_grad()
def load_from(engine: Any, folder: Path) -> Checkpoint:
    """Load one checkpoint.

    Args:
        engine: before or after any step.
        folder: of this checkpoint.

    Raises:
        UserError: it is damaged, or of an earlier version. All ranks raise.
    """
    ranks = Ranks.connected()
    shapes = {state.name: state.shape for state in _states(engine)}
    checkpoint: Checkpoint = ranks.on_each(
        lambda: open_checkpoint(folder, ranks.rank, ranks.world, shapes)
    )
    for _, own in optimizer_states(engine):
        own["step"].fill_(checkpoint.step)
    for state in _states(engine):
        state.set(checkpoint.tensor(state.name))
    _round_weights(engine)
    return checkpoint


@dataclass(frozen=True)
class _State:
    """The float32 weights of a parameter, or a moment of them.

    Args:
        name: in the checkpoint.
        number: of the parameter.
        parameter: of the policy.
        moment: its name, or None for the weights.
        own: the tensor itself, if every rank has it whole: without ZeRO.
    """

    name: str
    number: int
    parameter: Any
    moment: str | None
    own: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole, also if ZeRO-3 has partitioned the parameter."""
        return tuple(getattr(self.parameter, "ds_shape", self.parameter.shape))

    def gather(self) -> torch.Tensor:
        """The whole, on all ranks, which must all call it."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self.own is not None:
            return self.own.detach()
        if self.moment:
            return safe_get_full_optimizer_state(self.parameter, self.moment)
        return safe_get_full_fp32_param(self.parameter)

    def set(self, value: torch.Tensor) -> None:
        """Take this rank's part from the whole."""
        from deepspeed import utils

        if self.own is not None:
            self.own.copy_(value)
        elif not hasattr(self.parameter, "ds_tensor"):
            if self.moment:
                utils.safe_set_full_optimizer_state(self.parameter, value, self.moment)
            else:
                utils.safe_set_full_fp32_param(self.parameter, value)
        else:
            # ZeRO-3. DeepSpeed cannot set a whole that the number of ranks does not divide.
            size = self.parameter.ds_tensor.numel()
            start = size * torch.distributed.get_rank(self.parameter.ds_process_group)
            part = value.flatten()[start : start + size]
            part = torch.nn.functional.pad(part, (0, size - part.numel()))
            if self.moment:
                utils.safe_set_local_optimizer_state(self.parameter, part, self.moment)
            else:
                utils.safe_set_local_fp32_param(self.parameter, part)


def _states(engine: Any) -> Iterator[_State]:
    """The weights and moments of every parameter that is trained, once also if it is tied."""
    moments = MOMENTS[type(engine.basic_optimizer)]
    whole = optimizer_states(engine) if engine.zero_optimization_stage() == 0 else []
    named = [(name, one) for name, one in engine.module.named_parameters() if one.requires_grad]
    for number, (name, parameter) in enumerate(named):
        name = name.removeprefix("network.")
        own, own_moments = whole[number] if whole else (None, {})
        yield _State(name, number, parameter, None, own)
        for moment in moments:
            yield _State(f"{name}.{moment}", number, parameter, moment, own_moments.get(moment))


def _tensors_of_rank(engine: Any, ranks: Ranks) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that this rank writes. All ranks gather each of them, so all must use this up."""
    for state in _states(engine):
        whole = state.gather()
        if state.number % ranks.world == ranks.rank:
            yield state.name, whole.cpu()


def _round_weights(engine: Any) -> None:
    """Make the weights of the forward pass those of the optimiser, in the policy's dtype."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 0:
        updated = [tensor for tensor, _ in optimizer_states(engine)]
        for parameter, tensor in zip(trained(engine.module), updated, strict=True):
            parameter.copy_(tensor)
    elif engine.zero_optimization_stage() < 3:
        optimizer.update_lp_params()
    else:
        # Small parameters are whole on every rank, and are gathered again.
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
