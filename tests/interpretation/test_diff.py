"""fpo features diff: changes against a loop over whole vectors, runs side by side, contexts."""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from scipy.stats import false_discovery_control
from stores import cache_config

from fpocli import DiffConfig, EvalConfig, UserError, cache, diff, evaluate
from fpocli.evaluation.feature_changes import changes_of
from fpocli.features.encoder import top_k
from fpocli.features.pretrained import load_encoder
from fpocli.features.site import Site
from fpocli.features.top_features import TopFeatures
from fpocli.interpretation.activations import peaks
from fpocli.interpretation.diff import mean_change
from fpocli.interpretation.paired_test import sign_flip_p
from fpocli.model.language_model import load_model
from fpocli.store.reader import Store
from fpocli.system.model_folder import find_model

SITE = f"layer_{tiny.LAYERS - 1}.resid_post"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def evaluated(material, tmp_path_factory):
    """Two models evaluated on a store of all features: one is the reference itself."""
    folder = tmp_path_factory.mktemp("diff")
    store = cache(cache_config(material, folder / "all.zarr", top_k="all"))
    for name in ("policy", "model"):
        evaluate(
            EvalConfig(
                model=str(material / name), cache=str(store.path), device="cpu", json=True,
                out=str(folder / name),
            )
        )  # fmt: skip
    return folder


def whole_vectors(folder, material, name: str) -> np.ndarray:
    """Pooled features [2N, m] of a model."""
    store = Store.open(folder / "all.zarr")
    pairs = [store.pair(number) for number in range(store.pairs)]
    model = load_model(
        find_model(str(material / name)), [Site.parse(SITE)], torch.float32, CPU
    ).eval()
    return peaks(model, load_encoder(str(material / "sae"), CPU), pairs, 400).pooled.astype(float)


def test_changes_equal_those_of_whole_vectors(evaluated, material, capsys):
    policy = str(evaluated / "policy")
    result = diff(DiffConfig(runs=[policy], contexts=0, top=96, json=True))
    assert json.loads(capsys.readouterr().out) == result
    after, before = (whole_vectors(evaluated, material, name) for name in ("policy", "model"))
    change = after - before
    of_pairs = (change[::2] + change[1::2]) / 2
    total, squares = of_pairs.sum(0), (of_pairs**2).sum(0)
    active = squares > 0
    q = false_discovery_control(sign_flip_p(total, squares)[active])
    expected = dict(zip(np.flatnonzero(active).tolist(), q, strict=True))
    assert result["pairs"] == 21 and len(result["features"]) == active.sum()
    for row in result["features"]:
        feature, (one,) = row["feature"], row["runs"]
        spread = of_pairs[:, feature].std(ddof=1) / np.sqrt(21)
        assert one["mean"] == pytest.approx(of_pairs[:, feature].mean(), abs=1e-5)
        assert one["error"] == pytest.approx(spread, rel=1e-3)
        assert one["chosen"] == pytest.approx(change[::2, feature].mean(), abs=1e-5)
        assert one["rejected"] == pytest.approx(change[1::2, feature].mean(), abs=1e-5)
        assert one["before"] == pytest.approx(before[:, feature].mean(), abs=1e-5)
        assert one["after"] == pytest.approx(after[:, feature].mean(), abs=1e-5)
        assert one["q"] == pytest.approx(expected[feature], rel=1e-3)
    (run,) = result["runs"]
    found = [row["runs"][0] for row in result["features"] if row["runs"][0]["q"] <= 0.05]
    assert run["rose"] == sum(one["mean"] > 0 for one in found) > 0
    assert run["fell"] == sum(one["mean"] < 0 for one in found) > 0


def test_the_reference_itself_changes_nothing_beside_a_policy(evaluated, capsys):
    runs = [str(evaluated / name) for name in ("model", "policy")]
    result = diff(DiffConfig(runs=runs, top=5, contexts=0))
    table = capsys.readouterr().out
    assert "change in 1" in table and "change in 2" in table and " *" in table
    assert [run["rose"] + run["fell"] > 0 for run in result["runs"]] == [False, True]
    for row in result["features"]:
        assert abs(row["runs"][0]["mean"]) < 1e-5 < abs(row["runs"][1]["mean"])


def test_contexts_are_of_the_responses_that_changed_most(evaluated, material):
    result = diff(
        DiffConfig(
            runs=[str(evaluated / "policy")], top=3, contexts=2, sae=str(material / "sae"),
            device="cpu", json=True,
        )
    )  # fmt: skip
    after, before = (whole_vectors(evaluated, material, name) for name in ("policy", "model"))
    for row in result["features"]:
        change = np.abs(after - before)[:, row["feature"]]
        shown = [2 * one["pair"] + (one["side"] == "rejected") for one in row["contexts"]]
        np.testing.assert_allclose(change[shown], np.sort(change)[::-1][:2], rtol=1e-3)
        assert all(one["run"].endswith("policy") for one in row["contexts"])


def test_runs_of_other_pairs_and_missing_files_are_errors(evaluated, material, tmp_path):
    policy = str(evaluated / "policy")
    with pytest.raises(UserError, match=r"features\.npz does not exist"):
        diff(DiffConfig(runs=[str(tmp_path)]))
    with pytest.raises(UserError, match="none is not a folder"):
        diff(DiffConfig(runs=[str(tmp_path / "none")]))
    with pytest.raises(UserError, match=r"layer_0\.mlp_out were not measured"):
        diff(DiffConfig(runs=[policy], at="layer_0.mlp_out"))
    other = shutil.copytree(policy, tmp_path / "other")
    about = json.loads((other / "eval.json").read_text())
    about["store"]["fingerprint"] = "another"
    (other / "eval.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="different pairs"):
        diff(DiffConfig(runs=[policy, str(other)]))
    with pytest.raises(UserError, match="not the store"):
        diff(DiffConfig(runs=[str(other)]))
    (other / "eval.json").write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        diff(DiffConfig(runs=[str(other)]))


def test_noise_alone_changes_nothing_however_few_features_are_stored():
    """Policy and reference scatter around the same values. Of vectors that are cut in different
    ways, the reference would seem to have been larger, as its largest values were chosen."""
    torch.manual_seed(0)
    found = 0
    for _ in range(20):
        centre = torch.rand(100, 2, 128)
        reference, policy = ((centre + 0.3 * torch.randn_like(centre)).clamp(min=0) for _ in "ab")
        index, value = top_k(reference, 16)
        none = torch.zeros(0, dtype=torch.int64)
        stored = TopFeatures(index, value, (reference > 0).sum(-1), reference[..., none], none)
        found += bool((mean_change(changes_of(policy, stored)).q <= 0.05).any())
    assert found <= 2
