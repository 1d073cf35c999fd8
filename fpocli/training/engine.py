"""DeepSpeed: the processes, its engine, the optimiser step.

Only this file and checkpoints.py import deepspeed.
"""

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from fpocli.config import TrainConfig
from fpocli.model.language_model import FrozenReference, LanguageModel
from fpocli.system.errors import UserError
from fpocli.system.ranks import same_on_all_ranks
from fpocli.training.deepspeed_config import GROUP_SIZE, offloads

# What each optimiser keeps of every weight, beside the number of steps.
MOMENTS = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq"),
    torch.optim.RMSprop: ("square_avg",),
}


def start_processes(device: torch.device) -> tuple[int, int]:
    """Initialise the process group that the launcher describes, or one of this process alone.

    Args:
        device: where the policy runs.

    Returns:
        rank and number of processes.
    """
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    if "RANK" not in os.environ:
        os.environ.update(alone)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # DeepSpeed prints to stdout, which is reserved for data.
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed
        from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
        from deepspeed.utils import logger

        logger.setLevel("WARNING")
        # DeepSpeed still calls collectives that torch has renamed, in every step.
        warnings.filterwarnings("ignore", r".*torch\.distributed\..* is deprecated", FutureWarning)
        # Compiling it takes 40 seconds, for what gloo already does on one machine.
        ShareMemCommBuilder.is_compatible = lambda self, verbose=False: False
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


@contextlib.contextmanager
def partitioned(config: dict[str, Any]) -> Iterator[None]:
    """Let transformers load models as ZeRO-3 holds them: rank 0 reads the files, every other rank
    gets its part of one parameter after the other. Without ZeRO-3 each rank loads the whole.

    Args:
        config: DeepSpeed's, from `deepspeed_config`.

    Raises:
        UserError: they are to be offloaded to NVMe, for which this host lacks a library.
    """
    if config["zero_optimization"]["stage"] < 3:
        yield
        return
    _require_aio(config["zero_optimization"])
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # transformers keeps a weak reference to it.
    found = HfDeepSpeedConfig(config)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        unset_hf_deepspeed_config()
        del found
        # Left behind by DeepSpeed; it would hide that of Generic from classes made later, such as
        # sae-lens's.
        if "__init_subclass__" in vars(torch.nn.Module):
            del torch.nn.Module.__init_subclass__


def _require_aio(zero: dict[str, Any]) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    to_nvme = any(part["device"] == "nvme" for part in offloads(zero).values())
    if to_nvme and not AsyncIOBuilder().is_compatible():
        raise UserError(
            "DeepSpeed's offload to NVMe is compiled with libaio, which is not installed",
            "apt-get install libaio-dev g++, or offload to the CPU",
        )


@contextlib.contextmanager
def whole(weight: torch.Tensor) -> Iterator[None]:
    """Gather a parameter on all ranks if ZeRO-3 has partitioned it; all must call this."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(weight):
        yield


def make_engine(model: LanguageModel, settings: TrainConfig, config: dict[str, Any]) -> Any:
    """Wrap the policy in a DeepSpeed engine.

    With bf16 the weights are bfloat16 and the optimiser works on float32 master weights.

    Args:
        model: the policy.
        settings: of the run.
        config: DeepSpeed's, from `deepspeed_config`.
    """
    kind: Any = {
        # The fused version makes no temporary copies of the weights, on a CPU either.
        "adamw": partial(torch.optim.AdamW, fused=True),
        "rmsprop": torch.optim.RMSprop,
    }[settings.optimizer]
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed

        engine, *_ = deepspeed.initialize(
            model=model,
            # With bf16 and no ZeRO, DeepSpeed allocates the optimiser's state by a step of its own,
            # which must not change the weights. take_step sets the rate of every real step.
            optimizer=kind(_parameter_groups(model), lr=0.0, weight_decay=0.0),
            config=config,
        )
    for group in engine.optimizer.param_groups:
        group["weight_decay"] = settings.weight_decay
    _create_states(engine)
    return engine


def _create_states(engine: Any) -> None:
    """Create the optimiser's state, so that a checkpoint can be loaded into it.

    DeepSpeed would tell parameters where their state is after the first group's first step, when
    the other groups have none yet.
    """
    for tensor, state in optimizer_states(engine):
        # A step of DeepSpeed's own would count as Adam's first and scale the next update by 0.744.
        state["step"] = torch.tensor(0.0, device=tensor.device)
        for moment in MOMENTS[type(engine.basic_optimizer)]:
            state.setdefault(moment, torch.zeros_like(tensor))
    if engine.zero_optimization_stage() in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def optimizer_states(engine: Any) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """What torch's optimiser updates on this rank, and its state of each: parts of the flattened
    weights, or without ZeRO the float32 weights of each parameter, in the parameters' order."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        updated = optimizer.fp32_partitioned_groups_flat
    else:
        updated = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    return [(tensor, optimizer.state[tensor]) for tensor in updated]


def shard(model: FrozenReference, config: dict[str, Any]) -> Any:
    """Shard the frozen reference over the ranks, as ZeRO-3 does the policy, without an optimiser.

    Args:
        model: the reference.
        config: DeepSpeed's for the policy.
    """
    zero = config["zero_optimization"]
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed

        engine, *_ = deepspeed.initialize(
            model=model,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "bf16": config["bf16"],
                "zero_optimization": {k: v for k, v in zero.items() if k != "offload_optimizer"},
            },
        )
    engine.eval()
    return engine


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that have a gradient: all, or those of an adapter."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _parameter_groups(model: LanguageModel) -> list[dict[str, Any]]:
    """The parameters in groups of moderate size: ZeRO updates them group by group, and its copies
    of the gradients are no larger than a group."""
    groups: list[list[torch.nn.Parameter]] = [[]]
    for parameter in trained(model):
        if groups[-1] and sum(p.numel() for p in groups[-1]) + parameter.numel() > GROUP_SIZE:
            groups.append([])
        groups[-1].append(parameter)
    return [{"params": group} for group in groups]


def backward(engine: Any, loss: torch.Tensor, last: bool) -> None:
    """Accumulate the gradient of a micro-batch; after the last one, average over the ranks.

    Args:
        engine: whose forward pass made the loss.
        loss: scalar.
        last: whether this is the rank's last micro-batch of the step.
    """
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss, scale_wrt_gas=False)


def take_step(engine: Any, lr: float, step: int) -> float:
    """Update the weights.

    Args:
        engine: after the backward pass of the step's last micro-batch.
        lr: learning rate of this step.
        step: its number, for the error.

    Returns:
        norm of the gradient before clipping.

    Raises:
        UserError: the gradient is non-finite; weights and optimiser state are unchanged. All
            ranks raise.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    if engine.zero_optimization() or engine.bfloat16_enabled():
        # DeepSpeed skips the step if the norm of the gradient is non-finite.
        engine.step()
        norm = float(engine.get_global_grad_norm())
    else:
        # DeepSpeed computes no norm in this case.
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(norm):
            engine.step()
    if not math.isfinite(norm):
        error = UserError(
            f"step {step}: the gradient is non-finite although the loss is finite; the weights "
            "were not updated",
            "start again with a lower --lr (new --out, or --overwrite)",
        )
        raise same_on_all_ranks(error)
    return norm


def gather_weights(engine: Any) -> dict[str, torch.Tensor] | None:
    """The network's full state dict on rank 0, None elsewhere; all ranks must call it."""
    if engine.zero_optimization_stage() == 3:
        state = engine._zero3_consolidated_16bit_state_dict()
    else:
        state = engine.module.state_dict()
    if torch.distributed.get_rank() != 0:
        return None
    return {name.removeprefix("network."): value for name, value in state.items()}
