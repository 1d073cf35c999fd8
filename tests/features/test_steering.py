"""Steering against sae-lens's own encode and decode, and the rows of W_dec."""

import pytest
import tiny
import torch

from fpocli.features.pretrained import load_sae
from fpocli.features.steering import Steering
from fpocli.system.errors import UserError

ADDED = {4: 2.5, 30: -1.0}
SETTINGS = [
    *((architecture, {}) for architecture in tiny.ARCHITECTURES),
    *(
        (architecture, {"normalize_activations": how})
        for architecture in tiny.ARCHITECTURES
        for how in ("layer_norm", "constant_norm_rescale")
    ),
    ("standard", {"apply_b_dec_to_input": False}),
    ("topk", {"rescale_acts_by_decoder_norm": True}),
    ("topk", {"rescale_acts_by_decoder_norm": True, "normalize_activations": "layer_norm"}),
]
settings = pytest.mark.parametrize(("architecture", "changes"), SETTINGS)


def states(*shape: int) -> torch.Tensor:
    """More positions than are encoded at once; means and norms differ from position to position."""
    torch.manual_seed(0)
    return torch.randn(*shape, tiny.WIDTH) * (1 + torch.rand(*shape, 1)) + torch.randn(*shape, 1)


def loaded(tmp_path, architecture: str, **changes):
    folder = tiny.sae_folder(tmp_path / "sae", architecture=architecture, **changes)
    return load_sae(str(folder), torch.device("cpu"))


def most_active(sae, count: int) -> list[int]:
    with torch.no_grad():
        mean = sae.encode(states(3, 70)).mean((0, 1))
    mean[list(ADDED)] = 0
    return mean.topk(count).indices.tolist()


@settings
def test_states_move_as_sae_lens_decodes_them(tmp_path, architecture, changes):
    sae = tiny.sae(architecture, **changes)
    ablated = most_active(sae, 3)
    before = states(3, 70)
    with torch.no_grad():
        features = sae.encode(before)
        reconstruction = sae.decode(features)
        other = sae.encode(before)
        other[..., list(ADDED)] += torch.tensor(list(ADDED.values()))
        other[..., ablated] = 0
        expected = before + sae.decode(other) - reconstruction
    after = Steering(*loaded(tmp_path, architecture, **changes), ADDED, ablated)(before)
    assert (features[..., ablated] > 0).any((0, 1)).all()
    assert torch.allclose(after, expected, atol=2e-5)
    assert (after - before).norm(dim=-1).min() > 0.1


@settings
def test_adding_0_and_ablating_an_inactive_feature_change_nothing(tmp_path, architecture, changes):
    before = states(2, 9)
    with torch.no_grad():
        assert not tiny.sae(architecture, **changes).encode(before)[..., 0].any()
    after = Steering(*loaded(tmp_path, architecture, **changes), {5: 0.0}, [0])(before)
    assert torch.equal(after, before)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_an_added_value_moves_every_state_by_a_row_of_the_decoder(tmp_path, architecture):
    row = tiny.sae(architecture).W_dec[4].detach().double()
    before = states(5)
    after = Steering(*loaded(tmp_path, architecture), {4: 7.0}, [])(before)
    assert torch.allclose(after.double() - before.double(), 7 * row.expand(5, -1), atol=1e-5)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_an_ablated_feature_leaves_the_states(tmp_path, architecture):
    sae = tiny.sae(architecture)
    (feature,) = most_active(sae, 1)
    before = states(50)
    activation = sae.encode(before)[:, feature, None].detach().double()
    after = Steering(*loaded(tmp_path, architecture), {}, [feature])(before)
    gone = activation * sae.W_dec[feature].detach().double()
    assert torch.allclose(before.double() - after.double(), gone, atol=1e-5)
    assert (activation > 0).sum() > 0


def test_bfloat16_is_rounded_once_at_the_end(tmp_path):
    steering = Steering(*loaded(tmp_path, "jumprelu"), ADDED, [7, 8])
    before = states(2, 40).bfloat16()
    after = steering(before)
    assert after.dtype == torch.bfloat16 and after.shape == before.shape
    assert torch.equal(after, steering(before.float()).bfloat16())


def test_states_that_are_not_finite_are_refused(tmp_path):
    steering = Steering(*loaded(tmp_path, "jumprelu"), {4: 1e39}, [])
    with pytest.raises(UserError, match="not finite"):
        steering(states(5))


@pytest.mark.parametrize(("add", "ablate"), [({96: 1.0}, []), ({}, [96]), ({-1: 1.0}, [])])
def test_a_feature_that_the_sae_does_not_have_is_refused(tmp_path, add, ablate):
    with pytest.raises(UserError, match="the SAE has no feature"):
        Steering(*loaded(tmp_path, "jumprelu"), add, ablate)
