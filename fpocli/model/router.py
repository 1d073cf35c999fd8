"""The auxiliary loss of a mixture of experts: how unevenly its routers load the experts.

With E experts, k per token, f_e the mean number of times that a token is sent to expert e (their
sum is k) and P_e the router's mean probability of e, both over all tokens and layers, it is
E sum_e f_e P_e, which is k where the load is even (Switch Transformer, arXiv 2101.03961, equations
4 to 6). Each model's module in transformers has a function for it.
"""

import inspect
import sys
from typing import Any

from torch import Tensor

from fpocli.system.errors import UserError


class RouterLoss:
    """The auxiliary loss of a network's routers, as transformers computes it for this model.

    Args:
        network: transformers' model with its head.

    Raises:
        UserError: it has no experts, or transformers no such loss for it.
    """

    def __init__(self, network: Any) -> None:
        function = getattr(sys.modules[type(network).__module__], "load_balancing_loss_func", None)
        sizes = (network, network.config.get_text_config())
        self._experts, self._chosen = (
            next((getattr(one, name) for one in sizes if hasattr(one, name)), 0)
            for name in ("num_experts", "num_experts_per_tok")
        )
        # Doge's function takes more than these.
        usual = ["gate_logits", "num_experts", "top_k", "attention_mask"]
        has_it = function and [*inspect.signature(function).parameters] == usual
        if not (has_it and self._experts):
            raise UserError(
                f"{type(network).__name__} has no routers with an auxiliary loss in transformers, "
                "so --router-aux-loss has nothing to act on",
                "leave it out",
            )
        self._function: Any = function

    def __call__(self, logits: tuple[Tensor, ...], tokens: int) -> Tensor:
        """The loss, a float32 scalar with gradient.

        Args:
            logits: of the router of each layer that has one, [L, E].
            tokens: of the L how many count; the rest is padding.
        """
        counted = tuple(layer[:tokens] for layer in logits)
        loss: Tensor = self._function(counted, self._experts, self._chosen)
        return loss
