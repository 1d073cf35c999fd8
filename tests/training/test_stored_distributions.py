"""Constraints on the KL from the distributions in a store, against the reference in memory."""

import json
import shutil
from itertools import pairwise

import pytest
from runs import command, finish, read, run, same
from stores import cache_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from fpocli import EvalConfig, cache, evaluate
from fpocli.system.errors import UserError

KL_METHODS = ["tdpo1", "tdpo2", "simpo_kl", "dpo_norm+kl"]


@pytest.fixture(scope="module")
def stores(material, tmp_path_factory):
    """Stores of the same pairs with the whole distributions, and with their 8 likeliest tokens."""
    folder = tmp_path_factory.mktemp("distributions")
    for name, settings in (("all", {}), ("8", {"layer": [], "sae": []})):
        out = folder / f"{name}.zarr"
        cache(cache_config(material, out, distributions=name, **settings))
    return folder


@pytest.fixture(scope="module")
def in_memory(material, store_path, tmp_path_factory):
    """tdpo2 with the reference in memory, from other starting weights."""
    out = tmp_path_factory.mktemp("in-memory") / "run"
    settings = {"model": material / "policy", "alpha": 2}
    return run(material, out, "--no-bf16", method="tdpo2", **settings)


@pytest.mark.parametrize("method", KL_METHODS)
def test_whole_distributions_train_as_the_reference_does(
    material, store_path, stores, tmp_path, method
):
    settings = {"model": material / "policy", "method": method, "alpha": 2}
    own, other = (
        run(material, tmp_path / name, "--no-bf16", cache=path, **settings)
        for name, path in (("own", stores / "all.zarr"), ("other", store_path))
    )
    same(own, other, 2e-5)
    assert own[-1]["kl_rejected"] > 1


@pytest.mark.parametrize(("zero", "processes"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_stages_and_ranks(material, stores, in_memory, tmp_path, zero, processes):
    settings = {"model": material / "policy", "method": "tdpo2", "alpha": 2}
    own = run(
        material, tmp_path / "run", "--no-bf16", cache=stores / "all.zarr", zero=zero,
        processes=processes, **settings,
    )  # fmt: skip
    same(own, in_memory, 5e-5)


def test_a_few_tokens_give_a_lower_bound_and_need_no_reference(
    material, stores, in_memory, tmp_path
):
    """The model that the store was made from is not read again."""
    moved = tmp_path / "moved"
    moved.mkdir()
    copied = shutil.copytree(stores / "8.zarr", moved / "ref.zarr")
    settings = {"model": material / "policy", "method": "tdpo2", "alpha": 2}
    own = run(
        material, tmp_path / "run", "--no-bf16", cache=copied, reference="is/not/there", **settings
    )
    for side in ("kl_chosen", "kl_rejected"):
        assert 0.1 * in_memory[0][side] < own[0][side] < in_memory[0][side]
    assert own[0]["logp_chosen"] == pytest.approx(in_memory[0]["logp_chosen"], rel=1e-6)


def test_the_kl_is_0_at_the_start_and_measured_with_any_method(material, stores, tmp_path):
    """--measure-kl of a method without the KL reads the store, and --exact-kl the reference."""
    settings = {"cache": stores / "8.zarr", "method": "dpo"}
    own = run(material, tmp_path / "own", "--no-bf16", "--measure-kl", **settings)
    other = run(material, tmp_path / "exact", "--no-bf16", "--measure-kl", "--exact-kl", **settings)
    for lines in (own, other):
        assert [line["split"] for line in lines if "kl_chosen" in line] == ["eval", "eval"]
    assert abs(own[0]["kl_chosen"]) < 1e-6 and other[0]["kl_chosen"] == 0
    assert 0 < own[-1]["kl_chosen"] <= other[-1]["kl_chosen"]


def test_fpo_eval_takes_the_stores_distributions(material, stores, tmp_path, capsys):
    settings = {
        "model": str(material / "policy"),
        "cache": str(stores / "8.zarr"),
        "out": str(tmp_path / "eval"),
        "device": "cpu",
    }
    bound = evaluate(EvalConfig(**settings))
    assert bound["kl_from"] == "store" and "bound" not in bound
    assert "lower bound by the store" in capsys.readouterr().out
    both = evaluate(EvalConfig(**settings, reference=str(material / "model")))
    assert both["kl_from"] == "reference"
    found = both["kl_of_store"]
    assert found["share"] == pytest.approx(
        (bound["kl"]["chosen"] + bound["kl"]["rejected"])
        / (both["kl"]["chosen"] + both["kl"]["rejected"])
    )
    assert 0 < found["share"] < 1 and found["missed_per_token"] > 0
    assert 0 < found["responses"]["pearson"] <= 1
    lines = (tmp_path / "eval/pairs.jsonl").read_text().splitlines()
    assert {"kl_chosen", "kl_of_store_chosen"} <= json.loads(lines[0]).keys()


def test_a_held_divergence_resumes_where_it_was(material, stores, tmp_path):
    """Alpha is in the checkpoint, so a resumed run goes on with it, also without its metrics."""
    settings = {
        "model": material / "policy", "method": "tdpo2", "cache": stores / "8.zarr", "hold": 5,
        "save_every": 2,
    }  # fmt: skip
    whole = run(material, tmp_path / "run", "--no-bf16", **settings)
    train = [line for line in whole if line["split"] == "train"]
    assert train[0]["alpha"] == 0.5 and len({line["alpha"] for line in train}) == len(train)
    for line in train:
        assert line["held"] == pytest.approx(line["kl_rejected"])
        apart = line["kl_rejected"] - line["kl_chosen"]
        assert line["delta"] == pytest.approx(0.1 * line["alpha"] * apart, rel=1e-5)
    shutil.rmtree(tmp_path / "run/final")
    same(run(material, tmp_path / "run", "--no-bf16", **settings), whole, 1e-6)
    shutil.rmtree(tmp_path / "run/final")
    (tmp_path / "run/metrics.jsonl").unlink()
    left = run(material, tmp_path / "run", "--no-bf16", **settings)
    same(left, whole[-len(left) :], 1e-6)


@pytest.mark.parametrize("method", ["fpo", "tdpo2"])
def test_a_value_that_cannot_be_held_does_no_harm(material, stores, tmp_path, method):
    """Alpha stays where it pulls, the loss stays small, and the end says that it was not held."""
    words = command(
        material, tmp_path / "run", "--no-bf16", cache=stores / "all.zarr", method=method,
        hold=1e-5, lr=3e-3, epochs=10,
    )  # fmt: skip
    done = finish(words)
    assert done.returncode == 0 and "was not reached" in done.stderr, done.stderr[-2000:]
    train = [line for line in read(tmp_path / "run") if line["split"] == "train"]
    assert len(train) == 50
    for before, line in pairwise(train):
        most = max(before["held"], before["held_chosen"], 1e-5)
        assert line["alpha"] * 0.1 * most <= 10 + 1e-6 and line["loss"] < 50
    # Were there no gradient, nothing would bring the value down.
    assert all(line["gradient_norm"] > 0 for line in train[20:])


def test_exact_kl_without_a_kl_is_refused(material, store_path, tmp_path):
    done = finish(command(material, tmp_path / "run", "--no-bf16", "--exact-kl", method="dpo"))
    assert done.returncode == 2 and "dpo needs no KL" in done.stderr


def test_a_policy_of_another_vocabulary_is_refused(material, stores, tmp_path):
    """Whatever the KL is taken from."""
    wide = AutoModelForCausalLM.from_pretrained(material / "policy")
    wide.resize_token_embeddings(320)
    wide.save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(material / "policy").save_pretrained(tmp_path / "wide")
    settings = {"model": tmp_path / "wide", "method": "tdpo2"}
    for name, flags in (("all", ()), ("8", ()), ("8", ("--exact-kl",))):
        words = command(
            material, tmp_path / "run", "--no-bf16", *flags, cache=stores / f"{name}.zarr",
            **settings,
        )  # fmt: skip
        done = finish(words)
        assert done.returncode == 2, done.stderr[-2000:]
        assert "head has 320 tokens and the reference's 300" in done.stderr
    with pytest.raises(UserError, match="head has 320 tokens"):
        evaluate(
            EvalConfig(
                model=str(tmp_path / "wide"),
                cache=str(stores / "8.zarr"),
                device="cpu",
                out=str(tmp_path / "eval"),
            )
        )
