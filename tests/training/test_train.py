"""The training stage end to end, in real processes, against a naive loop in plain PyTorch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from runs import command, finish, finish_all, read, run, same
from safetensors.torch import load_file
from stores import attributes, cache_config, contents, make_loader, set_attributes
from transformers import AutoModelForCausalLM, AutoTokenizer

from fpocli import cache
from fpocli.store.reader import Store
from fpocli.training import engine

SITE = "layer_3.resid_post"
STEPS = 5


def test_curve_equals_a_naive_loop_in_plain_pytorch(baseline, store_path):
    """Each sequence alone, the whole encoding with its gradient, torch's AdamW; no code of fpo
    but the order of the pairs."""
    loader = make_loader(Store.open(store_path))
    arrays = contents(store_path)
    network, sae = tiny.network("gemma2"), tiny.sae().requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0)
    for line in read(baseline)[1:-1]:
        step = line["step"] - 1
        pairs = loader.pairs(step)
        results = [naive_pair(network, sae, arrays, int(pair)) for pair in pairs]
        loss = torch.stack([result[0] for result in results]).mean()
        assert line["loss"] == pytest.approx(loss.item(), abs=2e-6)
        for place, name in enumerate(("u", "distance_chosen", "distance_rejected"), start=1):
            mean = np.mean([result[place] for result in results])
            assert line[name] == pytest.approx(mean, rel=2e-3, abs=2e-5), name
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in network.parameters()])
        assert line["gradient_norm"] == pytest.approx(norm.item(), rel=2e-3)
        optimizer.step()
    assert step == STEPS - 1 and len(pairs) == 1, "the last step is a partial batch"


def naive_pair(network, sae, arrays, pair: int, k: int = 50, beta: float = 0.1, alpha: float = 0.5):
    """Loss, u, D_w and D_l of one pair, as method.md writes them."""
    start, chosen, rejected, end = arrays["spans"][pair].tolist()
    ids = torch.from_numpy(arrays["tokens"].astype(np.int64))
    averages, distances = [], []
    for side, (first, last) in enumerate(((chosen, rejected), (rejected, end))):
        sequence = torch.cat([ids[start:chosen], ids[first:last]])[None]
        seen = []
        hook = network.model.norm.register_forward_pre_hook(lambda m, x, s=seen: s.append(x[0]))
        logits = network(sequence, use_cache=False).logits
        hook.remove()
        predictors = slice(chosen - start - 1, sequence.shape[1] - 1)
        targets = sequence[0, chosen - start :, None]
        averages.append(logits.log_softmax(-1)[0, predictors].gather(-1, targets).mean())
        pooled = sae.encode(seen[0][0, predictors]).mean(0)
        index, value = (
            arrays[f"features/{SITE}/{name}"][pair, side].tolist() for name in ("index", "value")
        )
        known = {i: v for i, v in zip(index, value, strict=True) if v > 0}
        everything = arrays[f"features/{SITE}/nonzero"][pair, side] <= len(index)
        floor = 0.0 if everything else value[-1]
        own = [i for i in pooled.argsort(descending=True).tolist()[:k] if pooled[i] > 0]
        union = {*own, *list(known)[:k]}
        squares = [
            (pooled[i] - known.get(i, min(pooled[i].item(), floor))) ** 2 for i in sorted(union)
        ]
        distances.append(torch.stack(squares).sum() / k)
    margin = arrays["ref/margin"][pair]
    u = beta * (averages[0] - averages[1] - margin)
    u = u - alpha * beta * (distances[1] - distances[0].detach())
    loss = -torch.nn.functional.logsigmoid(u)
    return loss, u.item(), distances[0].item(), distances[1].item()


def test_step_0_is_ln_2_whatever_the_batch(baseline):
    """Invariant 1 of method.md: the policy is the reference, in the same dtype."""
    before, first = read(baseline)[:2]
    for line in (before, first):
        assert line["loss"] == pytest.approx(np.log(2), abs=1e-7)
        assert abs(line["u"]) < 1e-6
        assert line["distance_chosen"] < 1e-9 and line["distance_rejected"] < 1e-9
        assert line["overlap"] == pytest.approx(1, abs=1e-6)
    assert first["gradient_norm"] > 0


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_same_curve_for_every_zero_stage_and_number_of_processes(
    baseline, material, tmp_path, zero, processes
):
    lines = run(material, tmp_path / "run", "--no-bf16", processes=processes, zero=zero)
    same(lines, read(baseline), 2e-5)
    one, other = (
        load_file(out / "final/model.safetensors") for out in (tmp_path / "run", baseline)
    )
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name], other[name], atol=2e-5), name


def grouped() -> None:
    """Let this process update its parameters in many groups."""
    engine.GROUP_SIZE = 2000


@pytest.mark.parametrize(
    ("zero", "processes"),
    [(2, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, 1), (1, 1), (3, 2)])],
)
def test_parameters_in_many_groups_train_in_the_same_way(
    baseline, material, tmp_path, zero, processes
):
    """Real models have more parameters than the optimiser updates at once; here that is 2,000."""
    out = tmp_path / "run"
    words = command(material, out, "--no-bf16", zero=zero)
    for done in finish_all(words, processes, grouped):
        assert done.returncode == 0, done.stderr[-3000:]
    same(read(out), read(baseline), 2e-5)
    one, other = (load_file(folder / "final/model.safetensors") for folder in (out, baseline))
    for name in one:
        assert torch.allclose(one[name], other[name], atol=2e-5), name


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("rmsprop", marks=pytest.mark.slow)])
def test_bfloat16_curve_is_the_same_for_every_zero_stage(material, store_path, tmp_path, optimizer):
    """With weight decay: DeepSpeed's own first step at stage 0 must not move the master weights."""
    settings = {"optimizer": optimizer, "weight_decay": 0.1}
    two, none, three = (run(material, tmp_path / str(z), zero=z, **settings) for z in (2, 0, 3))
    same(none, two, 1e-4)
    same(three, two, 1e-4)


def test_packing_and_recomputation_change_nothing(baseline, material, tmp_path):
    flags = ("--no-bf16", "--no-activation-checkpointing")
    lines = run(material, tmp_path / "run", *flags, packed_length=1)
    same(lines, read(baseline), 2e-5)


def test_final_is_the_trained_model_in_transformers_format(baseline, store_path):
    """Its scores of the held-out pairs, by plain transformers, are those logged at the end."""
    final = baseline / "final"
    network = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32).eval()
    network.set_attn_implementation("eager")
    last = read(baseline)[-1]
    loader = make_loader(Store.open(store_path))
    blocks = range(loader.store.blocks)
    held_out = [pair for block in blocks for pair in loader.held_out(block)]
    arrays, sae = contents(store_path), tiny.sae()
    with torch.no_grad():
        results = [naive_pair(network, sae, arrays, int(pair)) for pair in held_out]
    assert last["loss"] == pytest.approx(np.mean([r[0].item() for r in results]), abs=2e-6)
    assert last["distance_rejected"] == pytest.approx(np.mean([r[3] for r in results]), rel=2e-3)
    start = tiny.network("gemma2").state_dict()
    assert not torch.equal(start["model.norm.weight"], network.state_dict()["model.norm.weight"])
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert "<|assistant|>" in tokenizer.chat_template
    card = (final / "README.md").read_text()
    assert "fpo train --cache" in card and "base_model" not in card  # a local path
    assert yaml.safe_load((baseline / "config.yaml").read_text())["beta"] == 0.1


def test_config_yaml_of_a_run_makes_the_same_run(baseline, material, tmp_path):
    config = yaml.safe_load((baseline / "config.yaml").read_text()) | {"out": str(tmp_path / "run")}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config))
    words = [sys.executable, "-m", "fpocli", "train", "--config", str(tmp_path / "again.yaml")]
    assert finish(words).returncode == 0
    same(read(tmp_path / "run"), read(baseline), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_small_steps_are_not_lost_in_bfloat16(material, store_path, tmp_path, optimizer):
    """85 steps far smaller than a bfloat16 weight can move: float32 master weights add them up,
    a pure bfloat16 optimiser moves hardly anything."""
    lr = 2e-6
    run(
        material,
        tmp_path / "run",
        lr=lr,
        epochs=17,
        batch_size=4,
        eval_fraction=0,
        optimizer=optimizer,
        method="simpo",
    )
    name = "model.layers.1.mlp.up_proj.weight"
    start = tiny.network("gemma2").state_dict()[name].bfloat16()
    end = load_file(tmp_path / "run/final/model.safetensors")[name]
    assert end.dtype == torch.bfloat16
    moved = (start != end).float().mean().item()
    lost = start.clone()
    for _ in range(85):
        lost -= lr  # the size of a single step of Adam
    assert moved > 5 * (start != lost).float().mean().item()
    assert moved > 0.01


@pytest.mark.parametrize("method", ["dpo", "dpo_norm", "simpo", "sft"])
def test_methods_without_features_load_no_sae(material, store_path, tmp_path, method):
    lines = run(material, tmp_path / "run", "--no-bf16", method=method, sae="is-not-there")
    train = [line for line in lines if line["split"] == "train"]
    assert "distance_chosen" not in train[0]
    if method in ("dpo", "dpo_norm"):
        assert train[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    if method == "sft":
        assert train[0]["loss"] == pytest.approx(-train[0]["average_logp_chosen"], abs=1e-6)
    assert lines[-1]["loss"] != lines[0]["loss"]


def test_other_starting_weights(material, store_path, tmp_path):
    """An SFT checkpoint, say: step 0 is no longer ln 2, and the reference stays the store's."""
    lines = run(material, tmp_path / "run", "--no-bf16", model=material / "policy")
    assert abs(lines[0]["u"]) > 1e-3 and lines[0]["distance_chosen"] > 1e-3


def test_deepspeed_file_is_merged_and_may_not_contradict_the_flags(material, store_path, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(
        json.dumps({"zero_optimization": {"reduce_bucket_size": 1000}, "bf16": {"enabled": "auto"}})
    )
    run(material, tmp_path / "run", "--no-bf16", deepspeed=file)
    file.write_text(json.dumps({"gradient_clipping": 1}))
    words = command(material, tmp_path / "other", "--no-bf16", deepspeed=file)
    done = finish(words)
    assert done.returncode == 2
    assert "contradicts the flags about gradient_clipping" in done.stderr


@pytest.mark.slow
def test_deepspeed_needs_no_compiler(material, store_path, tmp_path):
    """With only Python on PATH."""
    environment = os.environ | {"PATH": str(Path(sys.executable).parent), "CC": "", "CXX": ""}
    environment["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "extensions")
    words = command(material, tmp_path / "run", "--no-bf16")
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "extensions").exists()


def test_changed_weights_under_the_same_name_are_noticed(material, store_path, tmp_path):
    """A policy that is silently not the reference would make every number of the run wrong."""
    folder = shutil.copytree(material, tmp_path / "material")
    shutil.copytree(folder / "policy", folder / "model", dirs_exist_ok=True)
    store = folder / "ref.zarr"
    about = attributes(store)["model"] | {"source": str(folder / "model")}
    set_attributes(store, model=about, paths={})
    words = command(folder, tmp_path / "run", "--no-bf16")
    done = finish(words)
    assert done.returncode == 2
    assert "are not those" in done.stderr


def test_several_sites_inside_recomputed_layers(material, tmp_path):
    """mlp_out is taken inside what activation checkpointing recomputes and ZeRO-3 partitions."""
    config = cache_config(
        material,
        tmp_path / "ref.zarr",
        layer=[1, 3],
        site=["mlp_out", "resid_post"],
        sae=[str(material / "sae")] * 2,
    )
    cache(config)
    store = {"cache": tmp_path / "ref.zarr"}
    plain = run(material, tmp_path / "a", "--no-bf16", "--no-activation-checkpointing", **store)
    recomputed = run(material, tmp_path / "b", "--no-bf16", zero=3, **store)
    same(recomputed, plain, 2e-5)
    assert plain[-1]["distance_rejected"] > 1e-4


def test_feature_weights_scale_the_distance(baseline, material, tmp_path):
    file = tmp_path / "weights.yaml"
    file.write_text(f"{SITE}:\n  default: 3.0\n")
    lines = run(material, tmp_path / "three", "--no-bf16", feature_weights=file, alpha=0.5 / 3)
    for one, other in zip(lines, read(baseline), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert one["distance_rejected"] == pytest.approx(
            3 * other["distance_rejected"], rel=1e-3, abs=1e-8
        )
    file.write_text(f"{SITE}:\n  default: 0\n")
    free = run(material, tmp_path / "free", "--no-bf16", feature_weights=file)
    plain = run(material, tmp_path / "plain", "--no-bf16", method="dpo_norm")
    assert [x["loss"] for x in free] == pytest.approx([x["loss"] for x in plain], abs=1e-7)
    file.write_text(f"{SITE}:\n  96: 0\n")
    words = command(material, tmp_path / "wrong", "--no-bf16", feature_weights=file)
    done = finish(words)
    assert done.returncode == 2 and "a weight for feature 96, which does not exist" in done.stderr


def test_sft_first_then_a_store_of_its_result(material, store_path, tmp_path):
    """The paper's two stages: the trained model is the next reference."""
    run(material, tmp_path / "sft", "--no-bf16", method="sft")
    folder = shutil.copytree(material, tmp_path / "material")
    shutil.rmtree(folder / "ref.zarr")
    cache(cache_config(folder, folder / "ref.zarr", model=str(tmp_path / "sft/final")))
    lines = run(folder, tmp_path / "fpo", "--no-bf16")
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-7)
    assert lines[0]["distance_chosen"] < 1e-9
