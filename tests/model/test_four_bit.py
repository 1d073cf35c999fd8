"""Weights in 4 bits: what they are, and that a network computes with what they stand for."""

import sys
from dataclasses import replace

import pytest
import tiny
import torch
from packed import random_pairs
from test_adapter import add_adapter

from fpocli.features.site import Site
from fpocli.model.four_bit import dequantise
from fpocli.model.language_model import LanguageModel, load_model
from fpocli.model.packing import pack
from fpocli.system.errors import UserError
from fpocli.system.model_folder import find_model

CPU = torch.device("cpu")
# bitsandbytes needs multiples of 64 on a CPU.
WIDE = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
# The levels of NF4 above 0 (QLoRA, appendix E), and below.
NF4 = [
    -1.0, -0.6961928, -0.5250730, -0.3949175, -0.2844413, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
]  # fmt: skip


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def folder(request, tmp_path_factory):
    path = tiny.model_folder(tmp_path_factory.mktemp("four") / "model", request.param, **WIDE)
    return replace(find_model(str(path)), load_in_4bit=True)


def dequantised(folder, dtype=torch.float32) -> tuple[LanguageModel, LanguageModel]:
    """A model in 4 bits, and a plain one with the weights that these stand for."""
    sites = [Site(1, "resid_post")]
    quantised = load_model(folder, sites, dtype, CPU)
    plain = load_model(replace(folder, load_in_4bit=False), sites, dtype, CPU)
    state = dict(quantised.network.state_dict())
    dequantise(quantised.network, state)
    plain.network.load_state_dict(state)
    return quantised, plain


def test_weights_are_the_nearest_levels_of_nf4(folder):
    """In blocks of 64, whose largest weight is a level too; the scales are rounded to 8 bits."""
    original = load_model(replace(folder, load_in_4bit=False), [], torch.float32, CPU).network
    _, plain = dequantised(folder)
    levels = torch.tensor(NF4)
    changed = []
    for (name, before), after in zip(
        original.named_parameters(), plain.network.parameters(), strict=True
    ):
        if not torch.equal(before, after):
            changed.append(name)
            blocks = before.detach().view(-1, 64)
            scales = blocks.abs().amax(1, keepdim=True)
            nearest = levels[(blocks[..., None] / scales[..., None] - levels).abs().argmin(-1)]
            # Between two levels either may be taken.
            least, found = ((blocks - one).abs() for one in (nearest * scales, after.view(-1, 64)))
            assert ((found - least) / scales).max() < 0.02
    assert len(changed) == 7 * tiny.LAYERS, "all but embeddings, norms and the head"


def test_a_weight_takes_half_a_byte(folder):
    """And its part of a scale of a byte for 64 of them."""
    network = load_model(folder, [], torch.float32, CPU).network
    for layer in (network.model.layers[1].mlp.up_proj, network.model.layers[2].self_attn.o_proj):
        weights = layer.in_features * layer.out_features
        assert layer.weight.nbytes == weights / 2
        assert layer.weight.quant_state.absmax.nbytes == weights / 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_network_computes_with_what_its_weights_stand_for(folder, dtype):
    """Bit for bit: log-probabilities and hidden states in training and evaluation, and the gradient
    of an adapter."""
    batch = pack(random_pairs(4))
    gradients = []
    models = dequantised(folder, dtype)
    for model in models:
        adapter = add_adapter(model.network)
        logp = model.train()(batch).logp
        gradients.append(torch.autograd.grad(logp.sum(), adapter.parameters()))
    with torch.no_grad():
        one, other = (model.eval()(batch) for model in models)
    assert torch.equal(one.logp, other.logp) and torch.equal(one.logp, logp)
    assert all(map(torch.equal, one.states.values(), other.states.values()))
    assert all(map(torch.equal, *gradients))
    assert all(one.any() for one in gradients[0])


def test_merged_weights(folder):
    """What the 4 bits stand for and the adapter, in a plain network that can be saved."""
    batch = pack(random_pairs(4))
    model = load_model(folder, [], torch.float32, CPU)
    adapter = add_adapter(model.network)
    with torch.no_grad():
        adapted = model(batch).logp
        merged = adapter.merge(model.network.state_dict())
        plain = load_model(replace(folder, load_in_4bit=False), [], torch.float32, CPU)
        plain.network.load_state_dict(merged)
        assert torch.allclose(plain(batch).logp, adapted, atol=1e-4)
    assert not hasattr(model.network.config, "quantization_config")


def test_sizes_that_a_cpu_gets_wrong_are_refused(tmp_path):
    path = tiny.model_folder(tmp_path / "model", "llama", **WIDE | {"intermediate_size": 96})
    with pytest.raises(UserError, match="down_proj has 96 inputs"):
        load_model(replace(find_model(str(path)), load_in_4bit=True), [], torch.float32, CPU)


def test_without_bitsandbytes(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="need the package bitsandbytes") as caught:
        load_model(folder, [], torch.float32, CPU)
    assert caught.value.hint == 'pip install "fpocli[qlora]"'
