"""fpo train --lora-rank: against plain transformers with PEFT, and against itself."""

import json
import shutil
import sys

import numpy as np
import peft
import pytest
import tiny
import torch
from naive_tdpo2 import follow
from runs import command, finish, finish_all, kill_at_checkpoint, read, run, same
from safetensors.torch import load_file
from stores import cache_config, contents, make_loader, write_pairs
from transformers import AutoModelForCausalLM

from fpocli import EvalConfig, TrainConfig, UserError, cache, evaluate, train
from fpocli.store.reader import Store

# PEFT asks transformers by an old name whether activations are recomputed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

RANK = {"lora_rank": 3, "lr": 1e-2}
# Also of parameters that DeepSpeed would keep whole, as all are here.
PARTITION = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def adapted(material, store_path, tmp_path_factory):
    """A float32 run, ZeRO 2, one process."""
    out = tmp_path_factory.mktemp("lora") / "run"
    run(material, out, "--no-bf16", **RANK)
    return out


@pytest.fixture(scope="module")
def adapted_kl(material, store_path, tmp_path_factory):
    """The same with a constraint on the KL, for which the store has no distributions."""
    out = tmp_path_factory.mktemp("lora") / "run"
    run(material, out, "--no-bf16", method="tdpo2", alpha=2, **RANK)
    return out


def logits(network) -> torch.Tensor:
    ids = torch.randint(5, tiny.VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network.eval()(input_ids=ids, use_cache=False).logits


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# -- what it computes ----------------------------------------------------------------------------


def test_tdpo2_equals_a_naive_loop_with_peft(adapted_kl, store_path):
    """Plain transformers, PEFT's adapter, each sequence by itself, and a second model as the
    reference: losses, gradients and trained matrices."""
    lines = read(adapted_kl)
    loader, arrays = make_loader(Store.open(store_path)), contents(store_path)
    policy, reference = tiny.network("gemma2"), tiny.network("gemma2")
    torch.manual_seed(0)
    policy = peft.get_peft_model(
        policy, peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")
    )
    follow(lines[1:-1], loader, arrays, policy, reference, 1e-2)
    assert lines[-1]["kl_rejected"] > 0.01
    expected = peft.get_peft_model_state_dict(policy)
    found = load_file(adapted_kl / "adapter/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=2e-4), name


def test_the_final_model_is_the_adapter_on_the_base_model(adapted, material):
    base = load(material / "model")
    plain, final = logits(base), logits(load(adapted / "final"))
    with_adapter = logits(peft.PeftModel.from_pretrained(base, adapted / "adapter"))
    assert (final - with_adapter).abs().max() < 2e-5 < 0.1 < (final - plain).abs().max()
    about = json.loads((adapted / "adapter/adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(material / "model")
    assert about["task_type"] == "CAUSAL_LM" and about["r"] == 3 and about["lora_alpha"] == 6


def test_an_evaluation_measures_what_training_did(adapted, material, store_path, tmp_path):
    """fpo eval reads the merged model, training had the adapter beside it."""
    settings = {"cache": str(store_path), "out": str(tmp_path / "eval"), "device": "cpu"}
    evaluate(EvalConfig(model=str(adapted), **settings))
    rows = (tmp_path / "eval/pairs.jsonl").read_text().splitlines()
    for side in ("chosen", "rejected"):
        mean = np.mean([json.loads(row)[f"logp_{side}"] for row in rows])
        assert read(adapted)[-1][f"logp_{side}"] == pytest.approx(mean, rel=1e-6)


# -- the reference beside the policy -------------------------------------------------------------


def test_the_adapter_off_equals_a_second_model(adapted_kl, material, tmp_path):
    """--model loads one, here with the same weights: every number is the same to the bit."""
    model = material / "model"
    lines = run(
        material, tmp_path / "run", "--no-bf16", method="tdpo2", alpha=2, model=model, **RANK
    )
    same(lines, read(adapted_kl), 0)


def test_a_second_model_where_training_starts_elsewhere(material, store_path, tmp_path):
    lines = run(
        material, tmp_path / "run", "--no-bf16", method="tdpo2", model=material / "policy", **RANK
    )
    assert lines[0]["kl_chosen"] > 0.01


# -- ranks, checkpoints --------------------------------------------------------------------------


@pytest.mark.parametrize(("zero", "processes"), [(0, 1), (2, 2)])
def test_zero_stages(adapted, material, tmp_path, zero, processes):
    lines = run(material, tmp_path / "run", "--no-bf16", zero=zero, processes=processes, **RANK)
    same(lines, read(adapted), 1e-5)


def test_without_activation_checkpointing(adapted, material, tmp_path):
    flags = ("--no-bf16", "--no-activation-checkpointing")
    same(run(material, tmp_path / "run", *flags, **RANK), read(adapted), 1e-6)


@pytest.mark.slow
def test_zero_3_partitions_weights_and_adapter(adapted_kl, material, tmp_path):
    """With the adapter off in between, for the KL; stopped after the second step and resumed on
    another number of processes."""
    out = tmp_path / "run"
    (tmp_path / "deepspeed.json").write_text(json.dumps(PARTITION))
    words = command(
        material, out, "--no-bf16", method="tdpo2", alpha=2, zero=3, save_every=2,
        keep_checkpoints=9, deepspeed=tmp_path / "deepspeed.json", **RANK,
    )  # fmt: skip
    for processes in (2, 1):
        for done in finish_all(words, processes):
            assert done.returncode == 0, done.stderr[-3000:]
        same(read(out), read(adapted_kl), 5e-5)
        found, expected = (
            load_file(folder / "final/model.safetensors") for folder in (out, adapted_kl)
        )
        assert found.keys() == expected.keys()
        assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in expected)
        shutil.rmtree(out / "final")
        shutil.rmtree(out / "checkpoints/step-4")


def test_a_killed_run_resumes_to_the_bit(adapted, material, tmp_path):
    """Its checkpoints have the adapter alone."""
    out = tmp_path / "run"
    words = command(material, out, "--no-bf16", save_every=2, **RANK)
    kill_at_checkpoint(words, out)
    (saved,) = out.glob("checkpoints/step-*/*.safetensors")
    names = load_file(saved).keys()
    assert len(names) == 3 * 2 * 7 * tiny.LAYERS and all(".lora_" in name for name in names)
    same(run(material, out, "--no-bf16", save_every=2, **RANK), read(adapted), 0)
    for file in ("final/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / file).read_bytes() == (adapted / file).read_bytes()


@pytest.mark.parametrize("settings", [RANK, {"feature_weights": "logits"}])
def test_a_run_is_not_resumed_on_other_starting_weights(material, store_path, tmp_path, settings):
    """An adapter belongs to its base, and so do feature weights by the logits."""
    model, kept, out = tmp_path / "sft", tmp_path / "kept", tmp_path / "run"
    shutil.copytree(material / "policy", model)
    shutil.copytree(model, kept)
    words = command(material, out, "--no-bf16", model=model, **settings)
    assert finish([*words, "--max-minutes", "0"]).returncode == 0
    tiny.network("gemma2", seed=9).save_pretrained(model)
    done = finish(words)
    assert done.returncode == 2
    assert f"{model} are not those that {out} started from" in done.stderr
    shutil.rmtree(model)
    kept.rename(model)
    assert finish(words).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_bfloat16(material, store_path, tmp_path, zero):
    """Frozen weights and adapter in bfloat16, float32 in the optimiser; a run that goes on after
    its second step ends with the same weights."""
    out, settings = tmp_path / "run", {"zero": zero, "method": "dpo_norm", "save_every": 2, **RANK}
    losses = [line["loss"] for line in run(material, out, **settings)]
    assert losses[0] == pytest.approx(np.log(2), abs=2e-3) and losses[-1] < losses[0]
    final = load_file(out / "final/model.safetensors")
    assert {value.dtype for value in final.values()} == {torch.bfloat16}
    shutil.rmtree(out / "final")
    assert losses == [line["loss"] for line in run(material, out, **settings)]
    again = load_file(out / "final/model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in final.items())


# -- weights in 4 bits ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """A store of a reference in 4 bits, and what it was made from."""
    folder = tmp_path_factory.mktemp("quantised")
    wide = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    tiny.model_folder(folder / "model", **wide)
    tiny.sae_folder(folder / "sae", width=64)
    write_pairs(folder / "pairs.jsonl", 21)
    cache(cache_config(folder, folder / "ref.zarr", load_in_4bit=True))
    return folder


def test_qlora(quantised, tmp_path):
    """The policy starts from the store's reference, bit for bit; the adapter off is the reference;
    and the final model computes what was trained."""
    out, flags = tmp_path / "run", ("--no-bf16", "--load-in-4bit", "--measure-kl")
    lines = run(quantised, out, *flags, **RANK)
    assert lines[0]["kl_chosen"] == 0 and lines[0]["distance_chosen"] < 1e-9
    assert abs(lines[0]["u"]) < 1e-9 and lines[-1]["kl_chosen"] > 1e-3
    about = json.loads((out / "final/config.json").read_text())
    assert "quantization_config" not in about
    settings = {"cache": str(quantised / "ref.zarr"), "device": "cpu"}
    settings |= {"reference": str(quantised / "model"), "out": str(tmp_path / "eval")}
    evaluate(EvalConfig(model=str(out), **settings))
    rows = list(map(json.loads, (tmp_path / "eval/pairs.jsonl").read_text().splitlines()))
    for name in ("logp_chosen", "logp_rejected", "kl_chosen", "distance_rejected"):
        key = name.replace("distance", "distance.layer_3.resid_post")
        assert lines[-1][name] == pytest.approx(np.mean([row[key] for row in rows]), rel=1e-4)


def test_qlora_on_two_processes_is_resumed(quantised, tmp_path):
    flags, out = ("--no-bf16", "--load-in-4bit"), tmp_path / "run"
    whole = run(quantised, tmp_path / "whole", *flags, **RANK)
    same(run(quantised, out, *flags, processes=2, save_every=2, **RANK), whole, 1e-5)
    shutil.rmtree(out / "final")
    same(run(quantised, out, *flags, save_every=2, **RANK), whole, 1e-5)


def test_store_and_policy_in_4_bits_or_neither(quantised, material, store_path, tmp_path):
    lora = {"out": str(tmp_path / "run"), "lora_rank": 2, "bf16": False, "device": "cpu"}
    with pytest.raises(UserError, match="was run in 4 bits") as caught:
        train(TrainConfig(cache=str(quantised / "ref.zarr"), **lora))
    assert "add --lora-rank and --load-in-4bit" in caught.value.hint
    with pytest.raises(UserError, match="with all bits of its weights") as caught:
        train(TrainConfig(cache=str(store_path), load_in_4bit=True, **lora))
    assert "cache again with --load-in-4bit" in caught.value.hint
    lines = run(
        quantised, tmp_path / "other", "--no-bf16", model=quantised / "model", method="dpo_norm",
        **RANK,
    )  # fmt: skip
    assert lines[0]["average_logp_chosen_change"] != 0, "full weights against the 4-bit reference"
    # Nor are held-out pairs compared with the other one.
    cache(cache_config(quantised, tmp_path / "full.zarr"))
    held_out = {"eval_cache": tmp_path / "full.zarr", "eval_fraction": 0}
    done = finish(
        command(
            quantised, tmp_path / "held", "--no-bf16", model=quantised / "model", **held_out, **RANK
        )
    )
    assert done.returncode == 2 and "in 4 bits is" in done.stderr


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lora_rank": 0}, "--lora-rank 0 is out of range"),
        ({"lora_alpha": 8}, "--lora-alpha is of an adapter, and none is trained"),
        ({"lora_target": ["q_proj"]}, "--lora-target is of an adapter"),
        ({"load_in_4bit": True}, "--load-in-4bit is of an adapter"),
        ({"lora_rank": 4, "lora_alpha": 0}, "--lora-alpha 0 is out of range"),
        ({"lora_rank": 4, "load_in_4bit": True, "zero": 3}, "cannot be partitioned"),
    ],
)
def test_settings_that_contradict_each_other(settings, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        TrainConfig(cache="unused", **settings)
    assert caught.value.hint


def test_an_unknown_target(material, store_path, tmp_path):
    done = finish(command(material, tmp_path / "run", lora_rank=2, lora_target="query"))
    assert done.returncode == 2
    assert "--lora-target query: Gemma2ForCausalLM has no such linear layer" in done.stderr
    assert "it has q_proj, k_proj" in done.stderr


def test_a_store_is_resumed_in_as_many_bits(quantised, monkeypatch):
    with pytest.raises(UserError, match=r"model\.quantization is nf4 there, None here"):
        cache(cache_config(quantised, quantised / "ref.zarr"))
    config = cache_config(quantised, quantised / "ref.zarr", load_in_4bit=True)
    assert cache(config).meta["model"]["quantization"] == "nf4"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="need the package bitsandbytes"):
        cache(config)


@pytest.mark.parametrize(
    ("package", "extra", "settings"),
    [("peft", "lora", {}), ("bitsandbytes", "qlora", {"load_in_4bit": True})],
)
def test_what_is_missing_is_named(monkeypatch, package, extra, settings):
    """Before the store is opened."""
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"package {package}") as caught:
        train(TrainConfig(cache="unused", lora_rank=4, **settings))
    assert caught.value.hint == f'pip install "fpocli[{extra}]"'
