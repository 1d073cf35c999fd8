"""The best step, early stopping, a second store, and limits: also after interruptions."""

import json
import shutil

import pytest
import tiny
import torch
from processes import results, together
from runs import command, finish, finish_all, read, run, same
from safetensors.torch import load_file
from stores import cache_config, write_pairs

from fpocli import EvalConfig, ExportConfig, TrainConfig, UserError, cache, evaluate, export
from fpocli.training.schedule import learning_rate
from fpocli.training.stopping import TimeLimit

# At this rate the loss of the held-out pairs falls, and soon rises.
FAST = {"lr": 1e-2, "epochs": 3, "eval_every": 1, "best": "loss", "patience": 2}


@pytest.fixture(scope="module")
def chosen(material, store_path, tmp_path_factory):
    """A run that ends early, because the loss has risen for two evaluations."""
    out = tmp_path_factory.mktemp("chosen") / "run"
    run(material, out, "--no-bf16", **FAST)
    return out


@pytest.fixture(scope="module")
def other_store(material, store_path):
    """Thirteen pairs of their own, with the same reference and SAE."""
    path = material / "other.zarr"
    data = write_pairs(material / "other.jsonl", 13, seed=7)
    cache(cache_config(material, path, data=str(data)))
    return path


def weights(out):
    return load_file(out / "final/model.safetensors")


def equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def held_out(lines):
    return {line["step"]: line["loss"] for line in lines if line["split"] == "eval"}


def test_final_is_the_policy_of_the_best_step(chosen, material, tmp_path):
    """Its weights are, to the bit, those of a run that ends at that step."""
    losses = held_out(read(chosen))
    best = min(set(losses) - {0}, key=losses.get)
    assert 1 < best < 13 and list(losses) == list(range(best + 3)), "two evaluations later"
    card = (chosen / "final/README.md").read_text()
    assert f"| weights of | step {best}, whose loss of" in card
    copy = export(ExportConfig(source=str(chosen), out=str(tmp_path / "copy")))
    at = str(chosen / "final"), str(copy)
    assert (
        card.replace(at[0], at[1]).replace("# run\n", "# copy\n")
        == (copy / "README.md").read_text()
    )
    assert [path.name for path in (chosen / "checkpoints").iterdir()] == [f"step-{best}"]
    run(material, tmp_path / "run", "--no-bf16", **FAST | {"patience": 9}, max_steps=best)
    equal(weights(tmp_path / "run"), weights(chosen))


def test_a_run_in_many_commands_ends_with_the_same_weights(chosen, material, tmp_path):
    """Each has time for one step; the best checkpoint stays beside the newest."""
    out, losses = tmp_path / "run", held_out(read(chosen))
    words = command(material, out, "--no-bf16", **FAST, max_minutes=0)
    for step in range(1, max(losses)):
        done = finish(words)
        assert done.returncode == 0, done.stderr
        assert f"ended by --max-minutes at step {step} of 15; the same command" in done.stderr
        assert not (out / "final").exists()
        best = min(range(1, step + 1), key=losses.get)
        kept = {path.name for path in (out / "checkpoints").iterdir()}
        assert kept == {f"step-{step}", f"step-{best}"}
    assert finish(words).returncode == 0
    same(read(out), read(chosen), 0)
    equal(weights(out), weights(chosen))


def test_killed_after_the_best_step_and_before_the_next_checkpoint(chosen, material, tmp_path):
    """What was seen after the checkpoint is forgotten and comes again."""
    out = shutil.copytree(chosen, tmp_path / "run")
    shutil.rmtree(out / "final")
    run(material, out, "--no-bf16", **FAST)
    same(read(out), read(chosen), 0)
    equal(weights(out), weights(chosen))


@pytest.mark.slow
def test_all_ranks_choose_and_stop_alike(material, store_path, tmp_path):
    """Under ZeRO-3, also where the clock of rank 1 says something else."""
    out = tmp_path / "run"
    settings = FAST | {"zero": 3}
    words = command(material, out, "--no-bf16", **settings, max_minutes=60)
    for done in results(*together(words[3:], 2, [stop_after_two, None])):
        assert done.returncode == 0, done.stderr
    assert not (out / "final").exists() and max(held_out(read(out))) == 2
    for done in finish_all(words, 2):
        assert done.returncode == 0, done.stderr
    run(material, tmp_path / "alone", "--no-bf16", **settings)
    same(read(out), read(tmp_path / "alone"), 1e-4)
    one, other = weights(out), weights(tmp_path / "alone")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-5)


def stop_after_two() -> None:
    """Let the time of this process be over after two steps."""
    over, asked = TimeLimit.over, iter([False, True])

    def later(limit):
        limit._end = float("-inf" if next(asked) else "inf")
        return over(limit)

    TimeLimit.over = later


def test_the_schedule_ends_at_max_steps(material, store_path, tmp_path):
    settings = {"schedule": "linear", "warmup": 0.5, "epochs": 2, "max_steps": 6}
    rates = [line["lr"] for line in run(material, tmp_path / "run", "--no-bf16", **settings)[1:-1]]
    expected = TrainConfig(cache="unused", lr=1e-3, **settings)
    assert rates == [learning_rate(step, 6, expected) for step in range(6)]
    assert rates[2] == 1e-3 and rates[5] == pytest.approx(1e-3 / 3)


def test_the_pairs_of_a_second_store(material, store_path, other_store, tmp_path):
    """All pairs of the first are trained on, and the metrics are those that fpo eval measures."""
    out = tmp_path / "run"
    lines = run(material, out, "--no-bf16", eval_fraction=0, eval_cache=other_store, eval_every=3)
    alone = run(material, tmp_path / "alone", "--no-bf16", eval_fraction=0)
    same([line for line in lines if line["split"] == "train"], alone, 0)
    first, *_, last = (line for line in lines if line["split"] == "eval")
    assert first["step"] == 0 and abs(first["u"]) < 1e-5 and first["distance_chosen"] < 1e-5
    config = {"model": str(out), "device": "cpu", "packed_length": 300}
    found = evaluate(EvalConfig(cache=str(other_store), **config))
    assert (found["split"], found["pairs"]) == ("eval", 13)
    assert last["accuracy"] == pytest.approx(found["accuracy"]["share"])
    assert last["reward_accuracy"] == pytest.approx(found["reward_accuracy_per_token"]["share"])
    distance = found["distance"][f"layer_{tiny.LAYERS - 1}.resid_post"]
    assert last["distance_chosen"] == pytest.approx(distance["chosen"], rel=1e-4)
    with pytest.raises(UserError, match="was trained on all pairs of") as error:
        evaluate(EvalConfig(cache=str(store_path), **config))
    assert "--cache" in error.value.hint
    assert evaluate(EvalConfig(cache=str(store_path), split="train", **config))["pairs"] == 21


def test_a_run_is_not_resumed_with_another_second_store(
    material, store_path, other_store, tmp_path
):
    out, settings = tmp_path / "run", {"eval_fraction": 0, "max_minutes": 0}
    words = command(material, out, "--no-bf16", **settings, eval_cache=other_store)
    assert finish(words).returncode == 0
    done = finish(command(material, out, "--no-bf16", **settings, eval_cache=store_path))
    assert done.returncode == 2 and "eval_store is" in done.stderr
    moved = shutil.copytree(other_store, tmp_path / "moved.zarr")
    done = finish(command(material, out, "--no-bf16", **settings, eval_cache=moved))
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "run.json").read_text())["eval_store"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "policy"}, "model is"),
        ({"sae": "other-sae"}, "SAE.layer_"),
        ({"top_k": "16"}, "--k 50 compares more features than"),
    ],
)
def test_a_second_store_of_something_else_is_refused(
    material, store_path, tmp_path, changes, sentence
):
    tiny.sae_folder(material / "other-sae", seed=3)
    changes = {name: value if name == "top_k" else str(material / value)
               for name, value in changes.items()}  # fmt: skip
    if "sae" in changes:
        changes["sae"] = [changes["sae"]]
    cache(cache_config(material, tmp_path / "other.zarr", **changes))
    words = command(
        material, tmp_path / "run", "--no-bf16", eval_fraction=0, eval_cache=tmp_path / "other.zarr"
    )
    done = finish(words)
    assert done.returncode == 2 and sentence in done.stderr and "hint: " in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"best": "loss", "eval_every": 1}, "--eval-every and --best need held-out pairs"),
        ({"best": "loss", "eval_fraction": 0.1}, "there is one after training alone"),
        ({"patience": 2, "eval_fraction": 0.1}, "--patience needs a metric"),
        ({"eval_cache": "other", "eval_fraction": 0.1}, "holds out pairs of the store, and"),
        (
            {"best": "kl_chosen", "eval_every": 1, "eval_fraction": 0.1},
            "needs the KL, which fpo does not measure",
        ),
        (
            {"best": "distance_chosen", "eval_every": 1, "eval_fraction": 0.1, "method": "dpo"},
            "needs the distance, which dpo does not measure",
        ),
        ({"best": "lr", "eval_every": 1, "eval_fraction": 0.1}, "--best lr is unknown"),
        ({"track": ["neptune"]}, "--track neptune is unknown"),
        ({"max_steps": 0}, "--max-steps 0 is out of range"),
        ({"max_minutes": -1}, "--max-minutes -1.0 is out of range"),
    ],
)
def test_settings_that_contradict_each_other(settings, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        TrainConfig(cache="unused", **settings)
    assert error.value.hint
