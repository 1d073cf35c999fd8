"""DeepSpeed's configuration: the flags of fpo train, overridden by the user's file."""

import sys
from typing import Any

from fpocli.config import TrainConfig
from fpocli.system.errors import UserError
from fpocli.system.json_yaml import read_json

# Elements of a group of parameters, which the optimiser updates at once.
GROUP_SIZE = 2**25
_OFFLOADS = ("offload_optimizer", "offload_param")


def deepspeed_config(settings: TrainConfig) -> dict[str, Any]:
    """What DeepSpeed is given.

    Args:
        settings: of the run.

    Raises:
        UserError: the file cannot be read, or contradicts the flags.
    """
    config: dict[str, Any] = {
        # The number of packed sequences varies from step to step, so DeepSpeed cannot count them:
        # `backward` says which is the last.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.grad_clip,
        "bf16": {"enabled": settings.bf16},
        "zero_optimization": {
            "stage": settings.zero,
            # Gradients are copied into a bucket; DeepSpeed's default takes a gigabyte.
            "reduce_bucket_size": GROUP_SIZE,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": sys.maxsize,
    }
    if settings.deepspeed is None:
        return config
    content = read_json(settings.deepspeed)
    if not isinstance(content, dict):
        raise UserError(f"{settings.deepspeed} is not a JSON object", 'write {"name": value, ...}')
    merged = _merge(config, content)
    # Otherwise config.yaml would not describe the run.
    own = config.keys() - {"zero_optimization"}
    decided = (*own, "optimizer", "scheduler", "train_batch_size", "fp16")
    changed = sorted(name for name in decided if merged.get(name) != config.get(name))
    if merged["zero_optimization"]["stage"] != settings.zero:
        changed.append("the ZeRO stage")
    if merged["zero_optimization"].get("compute_grad_norm") is False:
        changed.append("the gradient norm")
    _check_offload(settings, merged["zero_optimization"])
    if changed:
        raise UserError(
            f"{settings.deepspeed} contradicts the flags about {', '.join(changed)}",
            'leave it out of the file, or write "auto" there, and use the flags',
        )
    return merged


def offloads(zero: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is offloaded, and how: `offload_optimizer`, `offload_param`.

    Args:
        zero: DeepSpeed's `zero_optimization`.
    """
    parts = {name: zero.get(name) or {} for name in _OFFLOADS}
    return {name: part for name, part in parts.items() if part.get("device", "none") != "none"}


def _check_offload(settings: TrainConfig, zero: dict[str, Any]) -> None:
    """Refuse an offload that DeepSpeed would not do, or with which checkpoints lack a part.

    Args:
        settings: of the run.
        zero: DeepSpeed's `zero_optimization`.

    Raises:
        UserError: it is no object, is of a part of the optimiser's state, or needs ZeRO-3.
    """
    for name in _OFFLOADS:
        if not isinstance(zero.get(name) or {}, dict):
            raise UserError(
                f"{name} in {settings.deepspeed} is not an object", 'write {"device": "cpu"}'
            )
    for name, part in offloads(zero).items():
        if part.get("ratio", 1) != 1:
            raise UserError(
                f"{settings.deepspeed} offloads a part of the optimiser, which checkpoints do not "
                "find again",
                "leave out the ratio",
            )
        if settings.zero == 0:
            raise UserError(
                f"{name} in {settings.deepspeed} needs ZeRO, and would otherwise not be done",
                "add --zero 2, or 3",
            )
        if settings.zero < 3 and (name == "offload_param" or part["device"] == "nvme"):
            raise UserError(
                f"{name} to {part['device']} in {settings.deepspeed} needs ZeRO-3, and would "
                "otherwise not be done",
                "add --zero 3",
            )


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` overridden by `over`, recursively; "auto" keeps the value of `base`."""
    merged = dict(base)
    for name, value in over.items():
        if isinstance(base.get(name), dict) and not isinstance(value, dict):
            raise UserError(f"{name} in the DeepSpeed file is not an object", "write it as {...}")
        if isinstance(value, dict):
            merged[name] = _merge(base.get(name) or {}, value)
        elif value != "auto":
            merged[name] = value
    return merged
