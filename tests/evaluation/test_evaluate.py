"""fpo eval against plain transformers on each sequence alone, and its parts against definitions."""

import json
import shutil

import numpy as np
import pytest
import scipy.stats
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import naive_kl
from stores import cache_config, contents

import fpocli
from fpocli import EvalConfig, cache, evaluate
from fpocli.evaluation.summary import summarise
from fpocli.features.encoder import SparseEncoder
from fpocli.features.kl_bound import operator_norm, squared_change
from fpocli.features.pretrained import load_decoder
from fpocli.store.reader import Store
from fpocli.system.errors import UserError

SITE = "layer_3.resid_post"


def config(material, out, model="policy", **changes) -> EvalConfig:
    settings = {
        "model": str(material / model),
        "cache": str(material / "ref.zarr"),
        "reference": str(material / "model"),
        "packed_length": 200,
        "device": "cpu",
        "out": str(out),
    }
    return EvalConfig(**(settings | changes))


@pytest.fixture(scope="module")
def measured(material, store_path, tmp_path_factory):
    """The policy has other weights than the reference; all pairs."""
    out = tmp_path_factory.mktemp("eval")
    return evaluate(config(material, out)), out


def test_every_pair_equals_plain_transformers_on_separate_sequences(measured, store_path):
    result, out = measured
    policy, reference, arrays = (
        tiny.network("gemma2", 1),
        tiny.network("gemma2"),
        contents(store_path),
    )
    lines = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert [line["pair"] for line in lines] == list(range(21))
    tokens = arrays["tokens"].astype(np.int64)
    logp, average = np.zeros((2, 21, 2))
    for pair, line in enumerate(lines):
        start, chosen, rejected, end = arrays["spans"][pair].tolist()
        prompt = tokens[start:chosen]
        for side, (name, response) in enumerate(
            (("chosen", tokens[chosen:rejected]), ("rejected", tokens[rejected:end]))
        ):
            ids = torch.tensor(np.concatenate([prompt, response]))[None]
            with torch.no_grad():
                logs = policy(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                kl = naive_kl(policy, reference, prompt, response).item()
            logp[pair, side] = logs.gather(-1, torch.tensor(response)[:, None]).sum().item()
            average[pair, side] = logp[pair, side] / len(response)
            assert line[f"logp_{name}"] == pytest.approx(logp[pair, side], abs=1e-3)
            assert line[f"kl_{name}"] == pytest.approx(kl, rel=1e-4)
    ratio = logp - arrays["ref/logp"]
    assert result["accuracy"]["share"] == (average[:, 0] > average[:, 1]).mean()
    assert result["reward_accuracy"]["share"] == (ratio[:, 0] > ratio[:, 1]).mean()
    gaps = ratio[:, 0] - ratio[:, 1]
    assert result["reward_margin"]["mean"] == pytest.approx(gaps.mean(), abs=1e-3)
    counts = np.diff(arrays["spans"][:, 1:])
    for side, name in enumerate(("chosen", "rejected")):
        expected = np.exp(-logp[:, side].sum() / counts[:, side].sum())
        assert result["perplexity"][name] == pytest.approx(expected, rel=1e-5)
    assert {file.name for file in out.iterdir()} == {
        "eval.json", "pairs.jsonl", "features.npz", "reward_margin.png", "consistency.png",
        "bound.png",
    }  # fmt: skip
    assert json.loads((out / "eval.json").read_text()) == result


def test_the_reference_itself_is_at_distance_0(material, store_path, tmp_path):
    result = evaluate(config(material, tmp_path, model="model"))
    for values in (result["kl"], result["distance"][SITE]):
        assert all(abs(value) < 1e-8 for value in values.values())
    assert result["reward_margin"]["mean"] == pytest.approx(0, abs=1e-4)
    assert result["consistency"][SITE]["responses"] == {"pearson": None, "spearman": None}


def test_without_the_reference_no_kl_is_measured(material, store_path, tmp_path):
    result = evaluate(config(material, tmp_path, reference=None, split="train", eval_fraction=0.4))
    assert "kl" not in result and "distance" in result
    assert result["pairs"] == 13
    assert not (tmp_path / "consistency.png").exists()


def test_splits_of_a_model_make_the_whole(material, store_path, tmp_path):
    parts = [
        evaluate(config(material, tmp_path, reference=None, split=split, eval_fraction=0.4))
        for split in ("eval", "train", "all")
    ]
    assert [part["pairs"] for part in parts] == [8, 13, 21]
    total = sum(part["margin_per_token"]["mean"] * part["pairs"] for part in parts[:2])
    assert total == pytest.approx(21 * parts[2]["margin_per_token"]["mean"], abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "policy"}, "are not those"),
        ({"model": "is-not-there"}, "is-not-there"),
        ({"split": "eval"}, "is empty"),
        ({"split": "some"}, "--split some is unknown"),
        ({"temperature": [-1.0]}, "--temperature"),
        ({"sae": ["a", "b"]}, "--sae is used 2 times"),
    ],
)
def test_mistakes_are_reported(material, store_path, tmp_path, changes, message):
    if "reference" in changes:
        changes["reference"] = str(material / changes["reference"])
    with pytest.raises(UserError, match=message):
        evaluate(config(material, tmp_path, **changes))


def test_an_unfinished_run_is_refused(material, store_path, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    with pytest.raises(UserError, match="has no final model yet"):
        evaluate(config(material, tmp_path, model=str(run)))


def test_a_run_of_another_store_is_refused(material, store_path, tmp_path):
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    (run / "run.json").write_text('{"store": "another"}')
    (run / "config.yaml").write_text("cache: ref.zarr")
    for model in (run, run / "final"):
        with pytest.raises(UserError, match="was trained on another store"):
            evaluate(config(material, tmp_path, model=str(model)))


def test_another_tokeniser_is_refused(material, store_path, tmp_path):
    folder = shutil.copytree(material / "policy", tmp_path / "policy")
    file = folder / "tokenizer.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}})
    )
    with pytest.raises(UserError, match="is not the one"):
        evaluate(config(material, tmp_path, model=str(folder)))


def test_evaluation_is_part_of_the_api():
    assert fpocli.evaluate is evaluate


# -- the parts -------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(2, 12), st.integers(1, 40), st.integers(1, 40), st.integers(0, 10**6))
def test_operator_norm_is_that_of_the_whole_product(d, m, vocabulary, seed):
    torch.manual_seed(seed)
    head, decoder = torch.randn(vocabulary, d), torch.randn(m, d)
    exact = torch.linalg.matrix_norm((head @ decoder.T).double(), 2).item()
    assert operator_norm(head, decoder) == pytest.approx(exact, rel=1e-4)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(1e-3, 0.5))
def test_appendix_bs_bound_holds_where_its_conditions_do(seed, size):
    """Logits that are W_out of the reconstruction."""
    torch.manual_seed(seed)
    head, decoder = torch.randn(30, 8, dtype=torch.float64), torch.randn(20, 8).double()
    one = torch.rand(20).double()
    other = one + size * torch.randn(20).double()
    target, guess = ((head @ (decoder.T @ c)).log_softmax(-1) for c in (one, other))
    kl = (target.exp() * (target - guess)).sum().item()
    assert kl <= operator_norm(head, decoder) ** 2 / 2 * (one - other).square().sum().item() + 1e-12


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_squared_change_is_that_of_the_whole_encoding(architecture):
    sae = tiny.sae(architecture)
    states = torch.randn(2, 300, tiny.WIDTH)
    expected = (sae.encode(states[0]) - sae.encode(states[1])).square().sum().item()
    actual = squared_change(SparseEncoder(tiny.sae(architecture)), states[0], states[1]).item()
    assert actual == pytest.approx(expected, rel=1e-5)


def test_decoder_turns_features_into_states(material):
    sae = tiny.sae()
    decoder = load_decoder(str(material / "sae"), torch.device("cpu"))
    features = sae.encode(torch.randn(5, tiny.WIDTH))
    assert torch.allclose(features @ decoder + sae.b_dec, sae.decode(features), atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_scipys(seed):
    rng = np.random.default_rng(seed)
    kl = rng.gamma(1, 1, (40, 2))
    values = {
        "tokens": rng.integers(1, 9, (40, 2)).astype(float),
        "logp": -rng.gamma(2, 9, (40, 2)),
        "ref_logp": -rng.gamma(2, 9, (40, 2)),
        "distance.x": (kl + rng.gamma(1, 1, (40, 2))).round(1),
        "kl": kl,
        "bound.x": kl * rng.gamma(1, 1, (40, 2)),
    }
    found = summarise(values)
    x, y = values["distance.x"], kl / values["tokens"]
    for over, (one, other) in {
        "responses": (x.ravel(), y.ravel()),
        "margins": (abs(x[:, 1] - x[:, 0]), abs(y[:, 1] - y[:, 0])),
    }.items():
        correlations = found["consistency"]["x"][over]
        assert correlations["pearson"] == pytest.approx(scipy.stats.pearsonr(one, other)[0])
        assert correlations["spearman"] == pytest.approx(scipy.stats.spearmanr(one, other)[0])
    assert found["bound"]["x"]["kept"] == (kl <= values["bound.x"]).mean()
    assert found["kl"]["margin"] == pytest.approx(abs(kl[:, 0] - kl[:, 1]).mean())


def test_each_of_several_sites_is_reported(material, tmp_path):
    store = cache(
        cache_config(
            material,
            tmp_path / "ref.zarr",
            layer=[1, 3],
            site=["mlp_out", "resid_post"],
            sae=[str(material / "sae")] * 2,
        )
    )
    result = evaluate(config(material, tmp_path / "out", cache=str(store.path)))
    assert list(result["distance"]) == list(Store.open(store.path).sites) == [
        "layer_1.mlp_out", SITE,
    ]  # fmt: skip
    assert result["bound"].keys() == result["consistency"].keys() == result["distance"].keys()
