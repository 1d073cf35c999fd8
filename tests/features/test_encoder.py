"""The SAE against sae-lens's own encode, values and gradients."""

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

from fpocli.features.encoder import SparseEncoder, top_k
from fpocli.features.pretrained import check_encoder, load_encoder
from fpocli.features.site import Site
from fpocli.system.errors import UserError


@pytest.fixture(params=tiny.ARCHITECTURES)
def architecture(request):
    return request.param


def states(positions: int = 700, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(positions, tiny.WIDTH)


def test_pooled_features_are_the_mean_of_encode(architecture):
    """More positions than one chunk holds."""
    expected = tiny.sae(architecture).encode(states()).double().mean(0)
    actual = SparseEncoder(tiny.sae(architecture)).pool(states())
    assert torch.allclose(actual.double(), expected, atol=1e-6)
    assert (expected > 0).any()
    assert (expected == 0).any()


def test_columns_and_their_gradient_equal_those_of_the_whole_encoding(architecture):
    index = torch.tensor([3, 90, 17, 0, 44])
    own, full = states(40).requires_grad_(), states(40).requires_grad_()
    weights = torch.rand(5)
    actual = SparseEncoder(tiny.sae(architecture)).pool_selected(own, index)
    expected = tiny.sae(architecture).encode(full).mean(0)[index]
    assert torch.allclose(actual, expected, atol=1e-6)
    (weights * actual).sum().backward()
    (weights * expected).sum().backward()
    assert torch.allclose(own.grad, full.grad, atol=1e-7)
    assert own.grad.abs().max() > 0


def test_a_threshold_below_zero_is_still_a_relu():
    """jumprelu is relu times (pre-activation > threshold)."""
    sae = tiny.sae("jumprelu")
    with torch.no_grad():
        sae.threshold.fill_(-1.0)
    expected = sae.encode(states(50)).mean(0).detach()
    index = torch.arange(tiny.FEATURES)
    assert torch.allclose(SparseEncoder(sae).pool_selected(states(50), index), expected, atol=1e-6)


def test_the_backward_pass_keeps_no_tensor_as_wide_as_the_sae(architecture):
    kept = []
    encoder = SparseEncoder(tiny.sae(architecture))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        encoder.pool_selected(states(40).requires_grad_(), torch.tensor([1, 2, 3]))
    assert kept
    assert not any(tiny.FEATURES in shape for shape in kept)


def test_normalised_inputs_and_decoder_norms_follow_sae_lens():
    """Settings of sae-lens that change encode: input norm, decoder bias, rescaling by the
    decoder."""
    settings = {"d_in": tiny.WIDTH, "d_sae": tiny.FEATURES}
    normed = StandardSAE(
        StandardSAEConfig(**settings, normalize_activations="layer_norm", apply_b_dec_to_input=True)
    )
    rescaled = TopKSAE(TopKSAEConfig(**settings, k=5, rescale_acts_by_decoder_norm=True))
    for sae in (normed, rescaled):
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
        expected = sae.encode(states(30)).mean(0).detach()
        index = torch.arange(tiny.FEATURES)
        encoder = SparseEncoder(sae)
        assert torch.allclose(encoder.pool(states(30)), expected, atol=1e-5)
        assert torch.allclose(encoder.pool_selected(states(30), index), expected, atol=1e-5)


@given(
    hnp.arrays(np.float32, (2, 17), elements=st.sampled_from([0.0, -0.0, 0.25, 3.0, 1e-30, 6e4])),
    st.integers(1, 17),
)
def test_top_k_orders_by_value_then_by_lower_index(pooled, k):
    index, value = top_k(torch.from_numpy(pooled), k)
    for row, own_index, own_value in zip(pooled, index, value, strict=True):
        expected = sorted(range(17), key=lambda i: (-row[i], i))[:k]
        assert own_index.tolist() == expected
        assert own_value.tolist() == row[expected].tolist()


def test_folder_round_trip_and_hash(tmp_path, architecture):
    path = tiny.sae_folder(tmp_path / "sae", architecture=architecture)
    device = torch.device("cpu")
    loaded = load_encoder(str(path), device)
    made = SparseEncoder(tiny.sae(architecture))
    assert torch.equal(loaded.pool(states()), made.pool(states()))
    assert loaded.hash() == made.hash()
    assert loaded.hash() != SparseEncoder(tiny.sae(architecture, seed=1)).hash()


def test_an_sae_of_another_width_or_site_is_refused():
    sae = tiny.sae()
    sae.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    encoder = SparseEncoder(sae)
    check_encoder(encoder, "sae", Site(2, "resid_post"), tiny.WIDTH)
    for site, width in (
        (Site(2, "resid_post"), tiny.WIDTH + 1),
        (Site(3, "resid_post"), tiny.WIDTH),
        (Site(2, "mlp_out"), tiny.WIDTH),
    ):
        with pytest.raises(UserError, match="the SAE sae"):
            check_encoder(encoder, "sae", site, width)


@pytest.mark.parametrize(
    "hook",
    [
        "blocks.2.hook_resid_pre",
        "blocks.2.hook_resid_mid",
        "blocks.2.hook_attn_out",
        "blocks.2.attn.hook_z",
        "blocks.2.hook_mlp_in",
        "blocks.2.ln2.hook_normalized",
        "model.layers.2.self_attn",
        "blocks.2.hook_mlp_out",
        "blocks.1.hook_resid_post",
        "hook_embed",
    ],
)
def test_an_sae_of_another_hook_point_is_refused(hook):
    """Features of other hidden states would have no meaning."""
    sae = tiny.sae()
    sae.cfg.metadata.hook_name = hook
    with pytest.raises(UserError, match=r"trained at .* not the hook point layer_2\.resid_post"):
        check_encoder(SparseEncoder(sae), "sae", Site(2, "resid_post"), tiny.WIDTH)


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.2.hook_resid_post", Site(2, "resid_post")),
        ("blocks.3.hook_resid_pre", Site(2, "resid_post")),
        ("model.layers.2", Site(2, "resid_post")),
        ("model.language_model.layers.2", Site(2, "resid_post")),
        ("transformer.h.2", Site(2, "resid_post")),
        ("blocks.2.hook_mlp_out", Site(2, "mlp_out")),
        ("model.layers.2.post_feedforward_layernorm", Site(2, "mlp_out")),
        ("", Site(2, "resid_post")),
    ],
)
def test_a_hook_point_is_known_by_all_its_names(hook, site):
    sae = tiny.sae()
    sae.cfg.metadata.hook_name = hook
    check_encoder(SparseEncoder(sae), "sae", site, tiny.WIDTH)
