"""The final norm, whatever its parametrisation: its gain, and whether it removes the mean."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpocli.system.errors import UserError


class FinalNorm(NamedTuple):
    """What the norm between the last layer and the head does, its division left out.

    Args:
        gain: float32 [d], what it multiplies by.
        centred: whether it removes the mean over d first, as LayerNorm does and RMSNorm does not.
    """

    gain: Tensor
    centred: bool


@torch.no_grad()
def final_norm(network: Any) -> FinalNorm:
    """The network's final norm, found out by trying.

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
    plus, minus, raised = (norms[-1](x[None])[0].float() for x in (signs, -signs, signs + 1))
    # signs + 1 is 0 and 2 by turns: an RMSNorm does not turn it into plus and minus the gain.
    centred = bool(torch.allclose(raised, plus, rtol=0.05, atol=0.05 * float(plus.abs().max())))
    return FinalNorm((plus - minus) / 2 * signs.float(), centred)
