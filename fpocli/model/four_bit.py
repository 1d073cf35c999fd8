"""Linear layers whose weights are held in 4 bits: QLoRA's NF4 (arXiv 2305.14314), by bitsandbytes.

The weights of a layer are dequantised whenever it runs; nothing trains them. Embeddings, norms and
the head stay as they are.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fpocli.system.errors import UserError

# What a store calls it.
NF4 = "nf4"
# Weights that have a scale in common.
_BLOCK = 64


def require_bitsandbytes() -> None:
    """Refuse weights in 4 bits where bitsandbytes is not installed.

    Raises:
        UserError: it is not.
    """
    if not find_spec("bitsandbytes"):
        raise UserError(
            "weights in 4 bits need the package bitsandbytes", 'pip install "fpocli[qlora]"'
        )


def four_bit_config(dtype: torch.dtype) -> Any:
    """What transformers is given to load a model in 4 bits: NF4 in blocks of 64 weights, whose
    scales are quantised as well.

    Args:
        dtype: to which weights are dequantised.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=NF4,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def prepare(network: Any) -> None:
    """Have a network with weights in 4 bits compute right on a CPU, and the same in training and
    evaluation, for which bitsandbytes would otherwise use another layout and another kernel.

    Args:
        network: on its device.

    Raises:
        UserError: bitsandbytes would dequantise it wrongly.
    """
    for name, layer in _layers(network):
        layer.support_avx512bf16_for_cpu = False
        # Version 0.50.2 takes a block to end with its row there.
        if network.device.type == "cpu" and layer.in_features % _BLOCK:
            raise UserError(
                f"{name} has {layer.in_features} inputs, and on a CPU bitsandbytes is right for "
                f"multiples of {_BLOCK} alone",
                "leave out --load-in-4bit, or use a GPU",
            )


def dequantise(network: Any, state: dict[str, Tensor]) -> None:
    """Replace weights in 4 bits by what the layers compute with, layer by layer, on the CPU.

    Args:
        network: whose state it is.
        state: its state dict, which is changed.
    """
    from bitsandbytes.functional import dequantize_4bit

    for name, layer in _layers(network):
        weight = layer.weight
        # Beside the weight: its scales.
        for key in [key for key in state if key.startswith(f"{name}.weight.")]:
            del state[key]
        whole = dequantize_4bit(weight.data, weight.quant_state)
        state[f"{name}.weight"] = whole.to("cpu", layer.compute_dtype)


def _layers(network: Any) -> Iterator[tuple[str, Any]]:
    from bitsandbytes.nn import Linear4bit

    for name, layer in network.named_modules():
        if isinstance(layer, Linear4bit):
            yield name, layer
