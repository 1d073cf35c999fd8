"""Per-feature weights: the file, and their effect on D."""

import json

import pytest
import torch

from fpocli.features.distance import compared_features, feature_distance
from fpocli.features.top_features import TopFeatures
from fpocli.features.weights import FeatureWeights, load_feature_weights
from fpocli.system.errors import UserError

SITES = {"layer_3.resid_post": 96, "layer_1.mlp_out": 20}


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
    site = weights["layer_3.resid_post"]
    assert torch.equal(site.weight, expected)
    assert site.named.tolist() == [7, 95] and not site.direction.any() and not site.groups


def test_a_missing_default_is_1(tmp_path):
    file = tmp_path / "weights.yaml"
    file.write_text("layer_1.mlp_out: {3: 4.0}")
    (omega,) = load_feature_weights(str(file), SITES).values()
    assert omega.weight[3] == 4 and omega.weight.sum() == 19 + 4


def test_groups_and_directions(tmp_path):
    file = tmp_path / "weights.yaml"
    file.write_text(
        """
layer_3.resid_post:
  default: 0.5
  5: {weight: 2, direction: up}
  7: {direction: down}
  groups:
    french: [9, 5, 4]
    json: {features: [7, 8], weight: 3, direction: up}
"""
    )
    (weights,) = load_feature_weights(str(file), SITES).values()
    assert weights.named.tolist() == [4, 5, 7, 8, 9]
    assert {name: f.tolist() for name, f in weights.groups.items()} == {
        "french": [4, 5, 9],
        "json": [7, 8],
    }
    # Feature 7's own entry overrides that of its group; what is not said is the default.
    assert weights.weight[[4, 5, 7, 8, 9, 0]].tolist() == [0.5, 2, 0.5, 3, 0.5, 0.5]
    assert weights.direction[[4, 5, 7, 8, 9, 0]].tolist() == [0, 1, -1, 1, 0, 0]


def test_an_entry_of_its_own_settles_what_groups_disagree_on(tmp_path):
    file = tmp_path / "weights.yaml"
    file.write_text(
        "layer_3.resid_post: {default: 0, 3: {direction: up}, 5: 9, groups: "
        "{a: {features: [5, 6], weight: 1}, b: {features: [5], weight: 2}}}"
    )
    (weights,) = load_feature_weights(str(file), SITES).values()
    assert weights.weight[[3, 5, 6]].tolist() == [0, 9, 1] and weights.direction[3] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer_3.resid_post: {96: 1}", "a weight for feature 96"),
        ("layer_3.resid_post: {-1: 1}", "a weight for feature -1"),
        ("layer_3.resid_post: {one: 1}", "a weight for feature one"),
        ("layer_3.resid_post: {1.5: 1}", "a weight for feature 1.5"),
        ("layer_3.resid_post: {true: 1}", "a weight for feature True"),
        ("layer_3.resid_post: {1: .nan}", "the weight nan"),
        ("layer_3.resid_post: {1: -2}", "the weight -2"),
        ("layer_3.resid_post: {default: .inf}", "the weight inf for default"),
        ("layer_3.resid_post: {1: heavy}", "the weight heavy"),
        ("layer_3.resid_post: {1: {weight: 1, sign: up}}", "1 has sign"),
        ("layer_3.resid_post: {1: {direction: left}}", "the direction left"),
        ("layer_3.resid_post: {1: {weight: [1]}}", "the weight"),
        ("layer_3.resid_post: {groups: [1]}", "groups is not a mapping"),
        ("layer_3.resid_post: {groups: {a: []}}", "the group a has no features"),
        ("layer_3.resid_post: {groups: {a: 1}}", "the group a has no features"),
        ("layer_3.resid_post: {groups: {a: [96]}}", "feature 96"),
        ("layer_3.resid_post: {groups: {a b: [1]}}", "no plain name"),
        ("layer_3.resid_post: {groups: {a: {weight: 2}}}", "the group a has no features"),
        (
            "layer_3.resid_post: {groups: {a: {features: [1], weight: 2}, "
            "b: {features: [1], weight: 3}}}",
            "groups give feature 1 different weights",
        ),
        ("layer_3.resid_post: {1: {direction: [up]}}", "the direction"),
        ("layer_3.resid_post: {5: 1, '05': 2}", "two entries for feature 5"),
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
    none = torch.zeros(0, dtype=torch.int64)
    stored = TopFeatures(index, value, (reference > 0).sum(-1), reference[..., none], none)
    omega = torch.rand(m) * 3
    direction = torch.randint(-1, 2, (m,), dtype=torch.int8)
    named = torch.randperm(m)[:5].sort().values
    weights = FeatureWeights(omega, direction, named, {})
    compared = compared_features(pooled, stored, k, named)
    policy = pooled.gather(-1, compared.index)
    actual = feature_distance(policy, compared, k, weights)
    for pair in range(pairs):
        for side in range(2):
            own, other = (x[pair, side] for x in (pooled, reference))
            union = {int(i) for x in (own, other) for i in x.topk(k).indices if x[i] > 0}
            expected = 0.0
            for i in union | set(named.tolist()):
                change = float(own[i]) - float(other[i])
                wrong = {0: True, 1: change > 0, -1: change < 0}[int(direction[i])]
                expected += float(omega[i]) * change**2 * wrong / k
            assert actual[pair, side].item() == pytest.approx(expected, rel=1e-5)
            used = compared.index[pair, side][compared.used[pair, side]].tolist()
            assert len(used) == len(set(used))
    plain = FeatureWeights(torch.ones(m), torch.zeros(m, dtype=torch.int8), named, {})
    ones = feature_distance(policy, compared, k, plain)
    assert torch.equal(ones, feature_distance(policy, compared, k))
