"""Changing the output of a hook point, against what the rest of the network gets."""

import families
import pytest
import torch

from fpocli.features.site import Site
from fpocli.model.hook_point import changed_output


def entering(network, layer: int) -> torch.Tensor:
    """What enters a layer, [1, T, d]."""
    found = []
    hook = (
        network.get_decoder()
        .layers[layer]
        .register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    )
    with torch.no_grad():
        network(torch.arange(10, 19)[None])
    hook.remove()
    return found[0]


# The MLP of gpt_oss returns a tuple.
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("kind", ["resid_post", "mlp_out"])
def test_the_next_layer_gets_the_changed_output(family, kind):
    network = families.network(family)
    before = entering(network, 2)
    added = torch.randn(before.shape[-1])
    with changed_output(network, Site(1, kind), lambda states: states + added):
        changed = entering(network, 2)
        first = entering(network, 1)
    assert torch.allclose(changed, before + added, atol=1e-5)
    assert torch.equal(entering(network, 2), before), "the hook is removed"
    assert torch.equal(entering(network, 1), first)
