"""LoRA in a network: gradients, merged weights, and the network without its adapter."""

from pathlib import Path

import families
import peft
import pytest
import tiny
import torch
from packed import random_pairs

from fpocli.config import TrainConfig
from fpocli.features.encoder import SparseEncoder
from fpocli.features.pretrained import load_encoder
from fpocli.features.site import Site
from fpocli.features.top_features import TopFeatures
from fpocli.model.adapter import LoRA
from fpocli.model.language_model import FrozenReference, LanguageModel, WithoutAdapter
from fpocli.model.packing import pack
from fpocli.scoring.score import score
from fpocli.store.records import ReferenceValues
from fpocli.system.errors import UserError
from fpocli.system.model_folder import ModelFolder
from fpocli.training.objective import objective

# Transposed weights; layers for images; experts; several projections in one layer; biases.
PECULIAR = ("gpt2", "gemma3", "mixtral", "phi3", "opt")
CPU = torch.device("cpu")
IDS = torch.randint(5, tiny.VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))


def add_adapter(network, targets: list[str] | None = None, rank: int = 3) -> LoRA:
    """An adapter as after some training: B is not 0."""
    folder = ModelFolder("base", Path("base"), None)
    adapter = LoRA(network, folder, rank=rank, alpha=5, targets=targets or [], seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


@torch.no_grad()
def logits(network) -> torch.Tensor:
    return network(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in PECULIAR else pytest.mark.slow)
        for family in families.FAMILIES
        # fpo refuses these two; llama4's router is a linear layer that returns a tuple.
        if family not in ("deepseek_v3", "llama4_text")
    ],
)
def test_merged_weights_compute_what_the_adapter_does(family):
    """Of all families, also those with the transpose of a weight, or with layers for images."""
    network = families.network(family)
    plain = logits(network)
    adapter = add_adapter(network)
    adapted = logits(network)
    with adapter.off():
        assert torch.equal(logits(network), plain)
    assert torch.equal(logits(network), adapted)
    merged = adapter.merge(network.state_dict())
    again = families.network(family)
    again.load_state_dict(merged)
    assert (logits(again) - adapted).abs().max() < 2e-4 < (adapted - plain).abs().max()


def test_layers_for_images_get_no_adapter():
    network = families.network("gemma3")
    adapter = add_adapter(network)
    names = [name for name, one in network.named_parameters() if one.requires_grad]
    assert len(names) == len(adapter.parameters()) == 2 * 7 * tiny.LAYERS
    assert all("language_model" in name for name in names)


# -- the gradient --------------------------------------------------------------------------------


def values_of(network, encoders: dict[str, SparseEncoder], batch) -> ReferenceValues:
    """What a store would hold of a network."""
    sites = [Site.parse(name) for name in encoders]
    with torch.no_grad():
        scores = score(LanguageModel(network, sites), encoders, batch)
    features = {}
    for site, pooled in scores.pooled.items():
        value, index = pooled.topk(60)
        none = torch.zeros(*pooled.shape[:2], 0)
        nonzero = (pooled > 0).sum(-1)
        features[site] = TopFeatures(index, value, nonzero, none, torch.zeros(0, dtype=torch.long))
    margin = scores.average[:, 0] - scores.average[:, 1]
    return ReferenceValues(scores.logp, margin, features)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen2"])
def test_the_gradient_follows_from_that_of_all_weights(family, checkpointing, tmp_path):
    """dL/dA = s B^T G and dL/dB = s G A^T, where G is the gradient of W + s B A when all weights
    are trained, by the same loss of fpo on the same pairs, features included."""
    batch, site = pack(random_pairs(5)), "layer_2.resid_post"
    encoders = {site: load_encoder(str(tiny.sae_folder(tmp_path / "sae")), CPU)}
    reference = values_of(families.network(family), encoders, batch)
    settings = TrainConfig(cache="unused", alpha=2.0, beta=0.5, k=20)

    def backward(network) -> None:
        model = LanguageModel(network, [Site.parse(site)]).train()
        if checkpointing:
            network.activation_checkpointing_enable()
        loss, _ = objective(score(model, encoders, batch), reference, encoders, settings)
        loss.sum().backward()

    adapted, whole = families.network(family), families.network(family)
    adapter = add_adapter(adapted)
    backward(adapted)
    layers = {
        name: layer
        for name, layer in adapted.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert len(layers) == 7 * tiny.LAYERS
    pairs = {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for name, layer in layers.items()
    }
    whole.load_state_dict(adapter.merge(adapted.state_dict()))
    backward(whole)
    for name, (a, b) in pairs.items():
        full = whole.get_submodule(name).weight.grad
        for own, expected in ((a.grad, b.T @ full), (b.grad, full @ a.T)):
            expected = expected * 5 / 3
            assert expected.norm() > 0
            assert (own - expected).norm() < 2e-3 * expected.norm(), name


# -- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_without_its_adapter_the_policy_is_the_reference(family):
    """Its hidden states and the KL to it are those of a second model, bit for bit, and the gradient
    is as if it had not run."""
    batch = pack(random_pairs(4))
    network = tiny.network(family)
    policy = LanguageModel(network, [Site(1, "resid_post")]).train()
    policy.adapter = add_adapter(network)
    second = FrozenReference(tiny.network(family), [])
    gradients = []
    for reference in (WithoutAdapter(policy), second):
        output = reference(batch)
        assert torch.equal(output.final, second(batch).final) and policy.training
        scores = score(policy, {}, batch, output)
        assert scores.kl.min() > 0
        gradients.append(torch.autograd.grad(scores.kl.sum(), policy.adapter.parameters()))
    assert all(map(torch.equal, *gradients))


# -- what it is put on ---------------------------------------------------------------------------


def test_targets():
    network = tiny.network("llama")
    add_adapter(network, ["q_proj", "layers.1.mlp.up_proj"])
    trained = {name for name, one in network.named_parameters() if one.requires_grad}
    ends = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(tiny.LAYERS)]
    ends.append("model.layers.1.mlp.up_proj")
    assert trained == {f"{end}.lora_{part}.default.weight" for end in ends for part in "AB"}


def test_experts_beside_linear_layers_of_their_names_are_refused():
    """For those PEFT would train the experts as well, which are parameters in transformers 5."""
    network = families.network("qwen3_moe", mlp_only_layers=[0])
    with pytest.raises(UserError, match="PEFT would also train the experts of Qwen3Moe"):
        add_adapter(network)
    add_adapter(families.network("qwen3_moe", mlp_only_layers=[0]), ["q_proj", "o_proj"])


@pytest.mark.parametrize("target", ["query", "lm_head", "mlp", "proj", "embed_tokens"])
def test_a_target_that_is_no_linear_layer_is_refused(target):
    with pytest.raises(UserError, match=f"--lora-target {target}: .* no such") as caught:
        add_adapter(tiny.network("llama"), ["q_proj", target])
    assert "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in caught.value.hint


def test_the_first_weights_depend_on_the_seed_alone():
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(made))
        folder = ModelFolder("base", Path("base"), None)
        adapter = LoRA(tiny.network("llama"), folder, rank=2, alpha=4, targets=[], seed=seed)
        made.append(torch.cat([parameter.flatten() for parameter in adapter.parameters()]))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
