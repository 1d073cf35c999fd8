"""Hook points: the module whose output is the hidden state of a site, collecting that output, and
changing it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fpocli.features.site import Site
from fpocli.system.errors import UserError


def hook_module(network: Any, site: Site) -> nn.Module:
    """The module whose output is the hidden state of a site.

    Args:
        network: transformers' model with its head.
        site: of one of its layers.

    Raises:
        UserError: the network has no such module.
    """
    decoder = network.get_decoder()
    # GPT-2 calls its layers h.
    layers = decoder.layers if hasattr(decoder, "layers") else decoder.h
    layer = layers[site.layer]
    if site.kind == "resid_post":
        return layer
    if not hasattr(layer, "mlp"):
        raise UserError(
            f"the layers of {type(network).__name__} have no module mlp, so there is no hook "
            f"point {site}",
            "use --site resid_post",
        )
    # Gemma-2 and Gemma-3 normalise the MLP's output before adding it to the residual stream.
    return getattr(layer, "post_feedforward_layernorm", layer.mlp)


@contextmanager
def captured_outputs(network: Any, sites: Sequence[Site]) -> Iterator[dict[str, Tensor]]:
    """Collect the hidden states of sites during forward passes, [..., d] each, by the site's name.

    Args:
        network: transformers' model with its head.
        sites: of its layers.

    Raises:
        UserError: the network has no such module.
    """
    captured: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            captured[name] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [hook_module(network, site).register_forward_hook(keep(str(site))) for site in sites]
    try:
        yield captured
    finally:
        # Removed before the backward pass, whose recomputation would call them again.
        for hook in hooks:
            hook.remove()


@contextmanager
def changed_output(network: Any, site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the hidden state of a site by a function of it, during forward passes.

    Args:
        network: transformers' model with its head.
        site: of one of its layers.
        change: from the hidden states [..., d] to those that the network goes on with.

    Raises:
        UserError: the network has no such module.
    """

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = hook_module(network, site).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
