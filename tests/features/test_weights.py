"""Per-feature weights: the file, and their effect on D."""

import json

import pytest
import torch

from fpocli.features.distance import compared_features, feature_distance
from fpocli.features.top_features import TopFeatures
from fpocli.features.weights import load_feature_weights
from fpocli.system.errors import UserError

SITES = {"layer_3.resid_post": {"d_sae": 96}, "layer_1.mlp_out": {"d_sae": 20}}


@pytest.mark.parametrize("as_json", [False, True])
def test_default_and_values_by_site(tmp_path, as_json):
    file = tmp_path / "weights.yaml"
    file.write_text(
        json.dumps({"layer_3.resid_post": {"default": 0.5, "7": 2, "95": 0}})
        if as_json
        else "layer_3.resid_post:\n  default: 0.5\n  7: 2\n  95: 0\n"
    )
    weights = load_feature_weights(str(file), SITES)
    expected = torch.full((96,), 0.5)
    expected[7], expected[95] = 2, 0
    assert weights.keys() == {"layer_3.resid_post"}
    assert torch.equal(weights["layer_3.resid_post"], expected)


def test_a_missing_default_is_1(tmp_path):
    file = tmp_path / "weights.yaml"
    file.write_text("layer_1.mlp_out: {3: 4.0}")
    (omega,) = load_feature_weights(str(file), SITES).values()
    assert omega[3] == 4 and omega.sum() == 19 + 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer_3.resid_post: {96: 1}", "has a weight for feature 96"),
        ("layer_3.resid_post: {-1: 1}", "has a weight for feature -1"),
        ("layer_3.resid_post: {one: 1}", "has a weight for feature one"),
        ("layer_3.resid_post: {1.5: 1}", "has a weight for feature 1.5"),
        ("layer_3.resid_post: {true: 1}", "has a weight for feature True"),
        ("layer_3.resid_post: {1: .nan}", "the weight nan"),
        ("layer_3.resid_post: {1: -2}", "the weight -2"),
        ("layer_3.resid_post: {default: .inf}", "for default of"),
        ("layer_3.resid_post: {1: heavy}", "the weight heavy"),
        ("layer_9.resid_post: {1: 1}", "is not a site of the store"),
        ("default: 1", "does not hold weights by site"),
        ("- 1", "does not hold weights by site"),
        ("", "does not hold weights by site"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_wrong_weights_file_is_refused_with_the_reason(tmp_path, text, message):
    file = tmp_path / "weights.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_feature_weights(str(file), SITES)


@pytest.mark.parametrize("seed", range(5))
def test_weighted_distance_equals_a_loop(seed):
    torch.manual_seed(seed)
    m, k, pairs = 30, 6, 3
    pooled, reference = (torch.rand(pairs, 2, m).mul(torch.rand(pairs, 2, m) > 0.4) for _ in "ab")
    value, index = reference.sort(descending=True, stable=True)
    stored = TopFeatures(index, value, (reference > 0).sum(-1))
    omega = torch.rand(m) * 3
    compared = compared_features(pooled, stored, k)
    policy = pooled.gather(-1, compared.index)
    actual = feature_distance(policy, compared, k, omega)
    for pair in range(pairs):
        for side in range(2):
            own, other = (x[pair, side] for x in (pooled, reference))
            union = {int(i) for x in (own, other) for i in x.topk(k).indices if x[i] > 0}
            expected = sum(float(omega[i] * (own[i] - other[i]) ** 2) for i in union) / k
            assert actual[pair, side].item() == pytest.approx(expected, rel=1e-5)
    ones = feature_distance(policy, compared, k, torch.ones(m))
    assert torch.equal(ones, feature_distance(policy, compared, k))
