"""The auxiliary loss of routers on packed sequences, against plain transformers."""

import experts
import families
import pytest
import tiny
import torch
from packed import random_pairs

from fpocli.data.pairs import TokenPair
from fpocli.model.language_model import LanguageModel
from fpocli.model.packing import PackedSequence, pack
from fpocli.model.router import RouterLoss
from fpocli.system.errors import UserError

FAMILIES = ("mixtral", "qwen3_moe")


def with_loss(network) -> LanguageModel:
    model = LanguageModel(network, [])
    model.router_loss = RouterLoss(network)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_of_one_sequence_it_is_transformers_own(family):
    network = families.network(family)
    pair = random_pairs(1, most=30)[0]
    both = pack([TokenPair(pair.prompt, pair.chosen, pair.rejected[:1])])
    spans = both.spans - [0, 0, 0, 1]
    batch = PackedSequence(*(one[:-1] for one in list(vars(both).values())[:4]), spans)
    found = with_loss(network)(batch).router_aux_loss
    assert LanguageModel(network, [])(batch).router_aux_loss is None
    with tiny.plain(network):
        plain = network(batch.ids[None], use_cache=False, output_router_logits=True)
    assert found.item() == pytest.approx(plain.aux_loss.item(), rel=1e-6)
    # GPUs pad packed sequences, which does not count.
    padded = tuple(torch.nn.functional.pad(layer, (0, 0, 0, 9)) for layer in plain.router_logits)
    assert RouterLoss(network)(padded, len(batch.ids)) == plain.aux_loss


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_of_packed_pairs_it_is_that_of_each_response_alone(family, checkpointing):
    """Value and gradient, all tokens together and a prompt once."""
    pairs = random_pairs(4)
    packed, plain = families.network(family), families.network(family)
    model = with_loss(packed).train()
    if checkpointing:
        packed.activation_checkpointing_enable()
    found = model(pack(pairs)).router_aux_loss
    expected = experts.aux_loss(
        [experts.router_logits(plain, p.prompt, p.chosen, p.rejected) for p in pairs]
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    expected.backward()
    routers = 0
    for (name, one), other in zip(packed.named_parameters(), plain.parameters(), strict=True):
        if other.grad is None:
            assert one.grad is None or not one.grad.any(), name
            continue
        assert torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-5), name
        routers += name.endswith("gate.weight") and bool(one.grad.any())
    assert routers == tiny.LAYERS


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        # Its routers balance themselves, so transformers has no loss.
        ("deepseek_v3", {}),
        ("qwen3_moe", {"num_experts": 0}),
    ],
)
def test_a_model_without_it_is_refused(family, changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = tiny.SIZES | families.FAMILIES[family] | changes
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    with pytest.raises(UserError, match=f"{type(network).__name__} has no routers") as caught:
        RouterLoss(network)
    assert caught.value.hint
