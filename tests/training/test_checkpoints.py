"""Checkpoints: a run goes on with any number of processes, from exactly what was saved."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime.zero import GatheredParameters
from runs import command, finish, finish_all, read, run, same
from safetensors.torch import load_file, save_file

from fpocli.config import TrainConfig
from fpocli.system.errors import UserError
from fpocli.training import checkpoint_files, checkpoints, engine
from fpocli.training import train as training
from fpocli.training.deepspeed_config import deepspeed_config

SAVED = {"save_every": 1, "keep_checkpoints": 9}


def in_many_parts() -> None:
    """Let this process write many files, and update its parameters in many groups."""
    checkpoint_files._HELD = 20_000
    engine.GROUP_SIZE = 2000


def save_what_was_loaded(folder: Path) -> None:
    """Let this process save again what it loads, and the weights of its forward pass."""
    in_many_parts()
    load = training.load_checkpoint

    def loaded(engine, *arguments):
        step, alpha = load(engine, *arguments)
        checkpoints.save_checkpoint(engine, folder, step, alpha, 1)
        named = dict(engine.module.named_parameters())
        with GatheredParameters(list(named.values())):
            weights = {name.removeprefix("network."): p.clone() for name, p in named.items()}
        save_file(weights, folder / f"weights-{torch.distributed.get_rank()}")
        return step, alpha

    training.load_checkpoint = loaded


def train(words: list[str], processes: int, prepare: Callable[[], object]) -> None:
    for done in finish_all(words, processes, prepare):
        assert done.returncode == 0, done.stderr[-3000:]


def go_back(out: Path, step: int) -> Path:
    """Let a finished run be one that was stopped after a step; returns its newest checkpoint."""
    shutil.rmtree(out / "final")
    for checkpoint in out.glob("checkpoints/step-*"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    return out / f"checkpoints/step-{step}"


def contents(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What is in the files of a checkpoint."""
    files = [load_file(file) for file in checkpoint.glob("rank*.safetensors")]
    together = {name: tensor for file in files for name, tensor in file.items()}
    assert sum(map(len, files)) == len(together), "each tensor is written once"
    return together


def exactly_as_saved(saved: Path, again: Path, processes: int) -> None:
    """Every weight and moment of the checkpoint was loaded, and every rank has its rounding."""
    one, other = contents(saved), contents(again / saved.name)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert one["model.layers.1.mlp.up_proj.weight"].any()
    for rank in range(processes):
        weights = load_file(again / f"weights-{rank}")
        moments = {name for name in one if name.endswith((".exp_avg", "_sq", ".square_avg"))}
        assert weights.keys() == one.keys() - moments and moments
        for name, value in weights.items():
            assert torch.equal(value, one[name].to(value.dtype)), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "numbers", "flags"),
    [
        (2, (4, 2, 1), ("--no-bf16",)),
        (3, (1, 3), ("--no-bf16",)),
        (0, (1, 3), ()),
        (0, (4, 2, 1), ("--no-bf16",)),
        (3, (4, 2, 1), ("--no-bf16",)),
        (2, (1, 3), ("--no-bf16",)),
        (0, (1, 3), ("--no-bf16",)),
        (1, (3, 1, 2), ()),
        (2, (1, 3), ()),
        (3, (1, 3), ()),
        (2, (3, 1), ("--no-bf16", "--optimizer", "rmsprop")),
        (3, (3, 1), ("--no-bf16", "--optimizer", "rmsprop")),
        (0, (3, 1), ("--no-bf16", "--optimizer", "rmsprop")),
    ],
)
def test_a_run_goes_on_with_another_number_of_processes(
    baseline, material, tmp_path, zero, numbers, flags
):
    """It stops after the first step, the second and so on; its parts are many."""
    out, unbroken = tmp_path / "run", baseline
    words = command(material, out, *flags, zero=zero, **SAVED)
    if flags != ("--no-bf16",):
        unbroken = tmp_path / "unbroken"
        run(material, unbroken, *flags, zero=zero)
    train(words, numbers[0], in_many_parts)
    for step, processes in enumerate(numbers[1:], 1):
        saved, again = go_back(out, step), tmp_path / f"from-{step}"
        train(words, processes, partial(save_what_was_loaded, again))
        exactly_as_saved(saved, again, processes)
    if "--no-bf16" in flags:
        same(read(out), read(unbroken), 2e-5)
    else:
        # The sum of gradients over ranks is rounded to bfloat16.
        one, other = ([line["loss"] for line in read(folder)] for folder in (out, unbroken))
        assert one == pytest.approx(other, abs=2e-3)


def offload(folder: Path, optimizer: str | None = None, param: str | None = None) -> Path:
    """A DeepSpeed file that offloads to these devices."""
    zero = {}
    if optimizer:
        zero["offload_optimizer"] = {"device": optimizer, "nvme_path": f"{folder}/nvme"}
    if param:
        zero["offload_param"] = {"device": param, "nvme_path": f"{folder}/nvme"}
        # In elements; the largest parameter has to fit.
        zero["offload_param"] |= {"buffer_size": 10**5, "buffer_count": 8, "max_in_cpu": 0}
    file = folder / "offload.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    return file


@pytest.mark.long
@pytest.mark.parametrize("flags", [(), ("--no-bf16",)])
@pytest.mark.parametrize(
    ("zero", "to"),
    [
        (2, {"optimizer": "cpu"}),
        (3, {"optimizer": "cpu"}),
        (3, {"optimizer": "cpu", "param": "cpu"}),
        # These need libaio-dev and g++.
        (3, {"optimizer": "nvme"}),
        (3, {"optimizer": "nvme", "param": "nvme"}),
    ],
)
def test_what_is_offloaded_is_saved_and_loaded(material, store_path, tmp_path, zero, to, flags):
    """On two processes, then on three; as a run without offloading."""
    out, unbroken = tmp_path / "run", tmp_path / "unbroken"
    run(material, unbroken, *flags, processes=2, zero=zero)
    words = command(material, out, *flags, zero=zero, deepspeed=offload(tmp_path, **to), **SAVED)
    train(words, 2, in_many_parts)
    saved = go_back(out, 2)
    train(words, 3, partial(save_what_was_loaded, tmp_path / "again"))
    exactly_as_saved(saved, tmp_path / "again", 3)
    one, other = ([line["loss"] for line in read(folder)] for folder in (out, unbroken))
    assert one == pytest.approx(other, abs=2e-3 if not flags else 2e-5)


def config_of(file: Path, zero: int) -> dict:
    return deepspeed_config(TrainConfig(cache="unused", zero=zero, deepspeed=str(file)))


def test_an_offload_of_a_part_is_refused(tmp_path):
    """No checkpoint would have the rest."""
    file = tmp_path / "offload.json"
    part = {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}
    file.write_text(json.dumps({"zero_optimization": part}))
    with pytest.raises(UserError, match="offloads a part of the optimiser"):
        config_of(file, 3)


def test_an_offload_that_is_no_object_is_refused(tmp_path):
    file = tmp_path / "offload.json"
    file.write_text('{"zero_optimization": {"offload_optimizer": "cpu"}}')
    with pytest.raises(UserError, match="is not an object"):
        config_of(file, 3)


@pytest.mark.parametrize("to", [{"optimizer": "nvme"}, {"param": "nvme"}, {"param": "cpu"}])
def test_an_offload_that_would_not_be_done_is_refused(tmp_path, to):
    file = offload(tmp_path, **to)
    assert config_of(file, 3)
    with pytest.raises(UserError, match="needs ZeRO-3"):
        config_of(file, 2)


def test_offloading_the_optimiser_needs_zero(tmp_path):
    file = offload(tmp_path, optimizer="cpu")
    assert config_of(file, 1)
    with pytest.raises(UserError, match="needs ZeRO, and"):
        config_of(file, 0)


def test_offloading_to_nvme_says_what_is_missing(tmp_path, monkeypatch):
    config = config_of(offload(tmp_path, optimizer="nvme"), 3)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self: False)
    with pytest.raises(UserError, match="libaio, which is not installed"):
        engine.partitioned(config).__enter__()


def test_a_damaged_checkpoint_is_refused(material, store_path, tmp_path):
    """Each file in turn, by one process and by two: a byte changed, cut short, missing."""
    out = tmp_path / "run"
    words = command(material, out, "--no-bf16", save_every=4)
    train(words, 2, in_many_parts)
    shutil.rmtree(out / "final")
    files = sorted((out / "checkpoints/step-4").iterdir())
    assert len(files) > 4
    for number, file in enumerate([files[0], files[1], files[-1]]):
        whole = file.read_bytes()
        changed = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
        for content in (changed, whole[: len(whole) // 2], None):
            if content is None:
                file.unlink()
            else:
                file.write_bytes(content)
            done = finish_all(words, 1 + number % 2)
            assert {process.returncode for process in done} == {2}
            said = "".join(process.stderr for process in done)
            assert said.count("error: ") == 1 and "Traceback" not in said
            assert f"{file} is " in said and "start over with --overwrite" in said
        file.write_bytes(whole)
    train(words, 1, in_many_parts)


def test_a_checkpoint_of_deepspeed_is_refused(material, store_path, tmp_path):
    """Earlier versions wrote them."""
    out = tmp_path / "run"
    words = command(material, out, "--no-bf16", save_every=4)
    train(words, 1, in_many_parts)
    shutil.rmtree(out / "final")
    shutil.rmtree(out / "checkpoints/step-4")
    (out / "checkpoints/step-4").mkdir()
    (out / "checkpoints/step-4/mp_rank_00_model_states.pt").write_bytes(b"")
    done = finish(words)
    assert done.returncode == 2
    assert "step-4 is in DeepSpeed's format, which earlier versions of fpo used" in done.stderr
    assert "start over with --overwrite" in done.stderr
