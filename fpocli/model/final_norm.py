"""The gain of the final norm, whatever its parametrisation."""

from typing import Any

import torch
from torch import Tensor

from fpocli.system.errors import UserError


@torch.no_grad()
def final_norm_gain(network: Any) -> Tensor:
    """What the norm between the last layer and the head multiplies by: float32 [d].

    An input of alternating signs has mean 0 and mean square 1, so an RMSNorm or LayerNorm returns
    its gain with these signs, and its bias cancels. (Gemma's weight is the gain minus 1.)

    Args:
        network: transformers' model with its head.

    Raises:
        UserError: its decoder has no such norm.
    """
    decoder = network.get_decoder()
    norms = [part for part in decoder.children() if "norm" in type(part).__name__.lower()]
    if not norms:
        raise UserError(
            f"the decoder of {type(network).__name__} has no final norm that is known",
            "name a file with weights, or leave --feature-weights out",
        )
    signs = torch.ones(network.config.get_text_config().hidden_size, device=network.device)
    signs[1::2] = -1
    signs = signs.to(network.dtype)
    norm = norms[-1]
    return ((norm(signs[None]) - norm(-signs[None]))[0].float() / 2 * signs).float()
