"""Runs that are interrupted, lose a process or meet a full disk: real processes, real signals and
writes that fail. Afterwards the same command is repeated until it completes."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from processes import Command, limit_files, together, wait_for
from runs import command, read, run, same
from safetensors.torch import load_file
from stores import cache_config, contents, write_pairs

from fpocli import Store, cache
from fpocli.system import heartbeat
from fpocli.training import train as training

SETTINGS = {"epochs": 4, "save_every": 1, "keep_checkpoints": 2}


@pytest.fixture(scope="module")
def unbroken(material, store_path, tmp_path_factory) -> Path:
    """Two processes, 20 steps."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    run(material, out, "--no-bf16", processes=2, **SETTINGS)
    return out


def start(words: list[str]) -> subprocess.Popen:
    """Start a command as a user does, imports included."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # Where another test has trained in this process, it has a rank.
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    return subprocess.Popen(
        words,
        env=environment | {"PATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(words: list[str], number: int, moment: Callable[[], object]) -> None:
    """Run a command and send it a signal at a moment; it prints itself as what resumes it."""
    process = Command(*words)
    process.until(lambda: hears_sigterm(process.pid) and moment())
    process.kill(number)
    code, messages = end_of(process)
    assert code == 128 + number, messages[-3000:]
    assert "Traceback" not in messages
    assert printed(messages) == ["fpo", *words]


def end_of(process: Command, seconds: float | None = None) -> tuple[int | None, str]:
    """Exit code and messages of a command that ends by itself."""
    code, messages = process.wait(seconds), process.messages()
    process.close()
    return code, messages


def printed(messages: str) -> list[str]:
    assert messages.count("resume from what was last saved with") == 1, messages[-3000:]
    after = messages.partition("resume from what was last saved with\n")[2]
    return shlex.split(after.splitlines()[0])


def test_a_stopped_run_says_from_where_it_goes_on(material, store_path, tmp_path):
    words = command(material, tmp_path / "run", epochs=2000, save_every=3)
    process = Command(*words[3:])
    process.until((tmp_path / "run/checkpoints/step-6").exists)
    process.kill(signal.SIGINT)
    code, messages = end_of(process, 60)
    assert code == 130
    (step,) = re.findall(r"it will go on after step (\d+)", messages)
    assert (tmp_path / f"run/checkpoints/step-{step}").is_dir()


def hears_sigterm(pid: int) -> bool:
    """Whether a process has its own handler for SIGTERM; Python installs none."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def fails(words: list[str], limit: int, sentence: str) -> None:
    code, messages = end_of(Command(*words, prepare=partial(limit_files, limit)))
    assert code == 2, messages[-3000:]
    assert sentence in messages and "Traceback" not in messages


def equal(out: Path, unbroken: Path, tolerance: float) -> None:
    same(read(out), read(unbroken), tolerance)
    one, other = (load_file(folder / "final/model.safetensors") for folder in (out, unbroken))
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=0, atol=tolerance), name


def test_a_command_that_is_stopped_while_it_loads_says_how_to_resume(
    material, store_path, tmp_path
):
    process = start(command(material, tmp_path / "run", "--no-bf16", "--overwrite", **SETTINGS))
    wait_for(lambda: hears_sigterm(process.pid), lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate()
    assert process.returncode == 128 + signal.SIGINT, messages[-3000:]
    assert "Traceback" not in messages
    # --overwrite would start over.
    assert printed(messages) == command(material, tmp_path / "run", "--no-bf16", **SETTINGS)


def test_a_run_interrupted_in_every_way_resumes_to_the_same_weights(
    unbroken, material, store_path, tmp_path
):
    out = tmp_path / "run"
    held, checkpoints = tmp_path / "run.writers", out / "checkpoints"
    _, _, _, *words = command(material, out, "--no-bf16", **SETTINGS)

    # The run folder is locked and the model is being loaded.
    stop(words, signal.SIGTERM, (out / "run.json").exists)
    assert not held.exists()

    # No checkpoint is written, so the first file that is too large is metrics.jsonl here, and the
    # final model below.
    rare = [*words, "--save-every", "99"]
    fails(rare, 1500, f"{out} cannot be written: File too large")
    stop(words, signal.SIGINT, lambda: list(checkpoints.glob("step-*")))
    assert not held.exists()
    whole = files(checkpoints)
    assert whole
    fails(words, 100_000, "cannot be written: Error while serializing")
    assert files(checkpoints) == whole
    # What is partly written is removed at the start.
    seen: list[bool] = []

    def writes() -> bool:
        seen.append(bool(list(checkpoints.glob("partial-*"))))
        return seen[-1] and not all(seen)

    stop(words, signal.SIGINT, writes)
    fails(rare, 100_000, "final.partial cannot be written: ")
    assert not (out / "final").exists() and not held.exists()
    assert end_of(Command(*words))[0] == 0
    equal(out, unbroken, 2e-5)


def files(checkpoints: Path) -> dict[Path, bytes]:
    """The contents of complete checkpoints."""
    return {file: file.read_bytes() for file in checkpoints.glob("step-*/*")}


@pytest.mark.slow
def test_torchrun_is_in_the_command_that_resumes(unbroken, material, store_path, tmp_path):
    out = tmp_path / "run"
    words = command(material, out, "--no-bf16", processes=2, **SETTINGS)
    process = start(words)
    wait_for(lambda: list(out.glob("checkpoints/step-*")), lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate()
    again = printed(messages)
    assert again[:5] == ["torchrun", "--nproc-per-node", "2", "--standalone", "-m"]
    assert again[5:] == words[words.index("fpocli") :]
    # torchrun's own traceback comes after it.
    assert messages.count("Traceback") == 1
    assert not out.with_name("run.writers").exists()
    run(material, out, "--no-bf16", processes=2, **SETTINGS)
    equal(out, unbroken, 0)


@pytest.mark.slow
def test_gpus_is_in_the_command_that_resumes(unbroken, material, store_path, tmp_path):
    """fpo train --gpus 2 ends as one process does, and goes on as what it started in its place."""
    out = tmp_path / "run"
    _, _, _, *words = command(material, out, "--no-bf16", gpus=2, **SETTINGS)
    process = start(["fpo", *words])
    wait_for(lambda: list(out.glob("checkpoints/step-*")), lambda: process.poll() is None)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate()
    assert process.returncode == 130
    assert printed(messages) == ["fpo", *words]
    assert "Traceback" not in messages
    # What it starts in its place.
    run(material, out, "--no-bf16", processes=2, **SETTINGS)
    equal(out, unbroken, 0)


def test_with_gpus_an_error_of_all_processes_is_told_once(tmp_path):
    words = ["fpo", "train", "--cache", str(tmp_path / "none.zarr"), "--device", "cpu"]
    process = start([*words, "--gpus", "2"])
    _, messages = process.communicate()
    assert process.returncode == 2
    assert [line.partition(":")[0] for line in messages.splitlines()] == ["error", "hint"]


@pytest.mark.slow
def test_with_gpus_a_process_that_is_killed_is_named(material, store_path, tmp_path):
    _, _, _, *words = command(material, tmp_path / "run", "--no-bf16", gpus=2, **SETTINGS)
    process = start(["fpo", *words])

    def second() -> list[int]:
        """The process of rank 1, once it trains."""
        if not list(tmp_path.glob("run/checkpoints/step-*")):
            return []
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        ranks = {pid: Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in children}
        return [int(pid) for pid, rank in ranks.items() if "RANK=1" in rank]

    wait_for(second, lambda: process.poll() is None)
    os.kill(second()[0], signal.SIGKILL)
    _, messages = process.communicate()
    assert process.returncode == 128 + signal.SIGKILL
    assert "error: the process of rank 1 was ended by SIGKILL" in messages
    assert "Traceback" not in messages


def often() -> None:
    """Let this process send two heartbeats a second."""
    heartbeat._BEAT = 0.5


def hang(step: int) -> None:
    """Let this process hang at a step."""
    often()
    take_step = training.take_step

    def paused(engine, lr, number):
        if number == step:
            time.sleep(600)
        return take_step(engine, lr, number)

    training.take_step = paused


def cannot_save() -> None:
    """Let this process write no checkpoint."""
    often()
    limit_files(100_000)


@pytest.mark.slow
def test_a_lost_process_is_noticed_and_the_run_can_be_resumed(
    unbroken, material, store_path, tmp_path
):
    """Without torchrun, which would end the others itself."""
    out = tmp_path / "run"
    _, _, _, *words = command(material, out, "--no-bf16", **SETTINGS)

    def lose(victim: int, step: int, number: int | None) -> list[str]:
        """Start two processes of which one hangs at a step and gets a signal, or, without one,
        cannot save; returns what they print."""
        prepare = [often, often]
        prepare[victim] = cannot_save if number is None else partial(hang, step)
        processes = together(words, 2, prepare)
        lost, other = processes[victim], processes[1 - victim]
        # Before it saves, if it cannot.
        begun = "metrics.jsonl" if number is None else f"checkpoints/step-{step - 1}"
        wait_for((out / begun).exists, other.running)
        if number is not None:
            lost.kill(number)
        code, messages = end_of(other, 60)
        assert code == 1, messages[-3000:]
        if number is not None:
            lost.kill()
        _, reason = end_of(lost)
        assert "Traceback" not in messages + reason
        assert printed(messages) == ["fpo", *words]
        return [messages, reason]

    message, reason = lose(1, 0, None)
    assert "another process of this run was lost" in message
    assert "partial-1 cannot be written" in reason
    assert "another process of this run was lost" in lose(1, 3, signal.SIGKILL)[0]
    assert "another process of this run was lost" in lose(0, 4, signal.SIGKILL)[0]
    assert "was lost: no heartbeat of rank 0 for" in lose(0, 5, signal.SIGSTOP)[0]
    run(material, out, "--no-bf16", processes=2, **SETTINGS)
    equal(out, unbroken, 0)


def test_interrupted_caching_resumes_also_after_a_full_disk(material, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 30)
    store, config = tmp_path / "ref.zarr", tmp_path / "cache.yaml"
    words = ["cache", "--model", str(material / "model"), "--layer", str(tiny.LAYERS - 1)]
    words += ["--sae", str(material / "sae"), "--data", str(tmp_path / "pairs.jsonl")]
    words += ["--dtype", "float32", "--device", "cpu", "--block", "1"]
    words += ["--out", str(store), "--config", str(config)]
    config.write_text(json.dumps({"overwrite": True}))
    process = Command(*words)
    wait_for((store / "zarr.json").exists, process.running)
    process.kill(signal.SIGINT)
    code, messages = end_of(process)
    assert code == 130 and f"removing overwrite from {config}" in messages
    assert printed(messages) == ["fpo", *words]
    config.write_text("{}")
    begun = store / "blocks/digest/c/3"
    stop(words, signal.SIGTERM, begun.exists)
    done = set(begun.parent.iterdir())
    assert 0 < len(Store.open(store).unscored_blocks()) < 30
    # Its messages, which are a file here, are shorter.
    fails(words, 700, "cannot be written: File too large")
    assert not store.with_name("ref.zarr.writers").exists()
    before = {file: file.stat().st_mtime_ns for file in done}
    code, messages = end_of(Command(*words))
    assert code == 0, messages
    assert before == {file: file.stat().st_mtime_ns for file in done}, "scored again"
    settings = {"block": 1, "data": str(tmp_path / "pairs.jsonl"), "top_k": "1000"}
    cache(cache_config(material, tmp_path / "whole.zarr", **settings))
    one, other = contents(store), contents(tmp_path / "whole.zarr")
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
