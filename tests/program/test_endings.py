"""Runs that are interrupted, lose a process or meet a full disk: real processes, real signals and
writes that fail. Afterwards the same command is repeated until it completes."""

import json
import os
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from runs import command, read, run, same
from safetensors.torch import load_file
from stores import cache_config, contents, write_pairs

from fpocli import Store, cache

SETTINGS = {"epochs": 4, "save_every": 1, "keep_checkpoints": 2}


@pytest.fixture(scope="module")
def unbroken(material, store_path, tmp_path_factory) -> Path:
    """Two processes, 20 steps."""
    out = tmp_path_factory.mktemp("unbroken") / "run"
    run(material, out, "--no-bf16", processes=2, **SETTINGS)
    return out


def start(words: list[str], limit: int | None = None, **environment: str) -> subprocess.Popen:
    """Start a command whose files may not grow beyond `limit` bytes."""

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        words,
        env=os.environ
        | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        | environment,
        preexec_fn=restrict,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(moment: Callable[[], object], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not moment():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


def stop(process: subprocess.Popen, number: int, moment: Callable[[], object]) -> list[str]:
    """Send a signal at a moment; return the command that the process prints."""
    wait_for(lambda: hears_sigterm(process) and moment(), process)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == 128 + number, stderr[-3000:]
    assert "Traceback" not in stderr
    return printed(stderr)


def printed(stderr: str) -> list[str]:
    assert stderr.count("resume from what was last saved with") == 1, stderr[-3000:]
    after = stderr.partition("resume from what was last saved with\n")[2]
    return shlex.split(after.splitlines()[0])


def hears_sigterm(process: subprocess.Popen) -> bool:
    """Whether the process has its own handler for SIGTERM; Python installs none."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def fails(words: list[str], limit: int, sentence: str) -> None:
    process = start(words, limit)
    _, stderr = process.communicate()
    assert process.returncode == 2, stderr[-3000:]
    assert sentence in stderr and "Traceback" not in stderr


def equal(out: Path, unbroken: Path, tolerance: float) -> None:
    same(read(out), read(unbroken), tolerance)
    one, other = (load_file(folder / "final/model.safetensors") for folder in (out, unbroken))
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=0, atol=tolerance), name


def test_a_run_interrupted_in_every_way_resumes_to_the_same_weights(
    unbroken, material, store_path, tmp_path
):
    out = tmp_path / "run"
    held, checkpoints = tmp_path / "run.writers", out / "checkpoints"
    words = command(material, out, "--no-bf16", "--overwrite", **SETTINGS)

    # As soon as possible.
    words = stop(start(words), signal.SIGINT, lambda: True)
    assert words == command(material, out, "--no-bf16", **SETTINGS)
    # The run folder is locked and the model is being loaded.
    assert stop(start(words), signal.SIGTERM, (out / "run.json").exists) == words
    assert not held.exists()

    # No checkpoint is written, so the first file that is too large is metrics.jsonl here, and the
    # final model below.
    rare = [*words, "--save-every", "99"]
    fails(rare, 1500, f"{out} cannot be written: File too large")
    assert stop(start(words), signal.SIGINT, lambda: list(checkpoints.glob("step-*"))) == words
    assert not held.exists()
    whole = files(checkpoints)
    assert whole
    fails(words, 100_000, "cannot be written: [enforce fail at inline_container.cc")
    assert files(checkpoints) == whole
    process = start(words)
    wait_for(lambda: not list(checkpoints.glob("partial-*")), process)
    assert stop(process, signal.SIGINT, lambda: list(checkpoints.glob("partial-*"))) == words
    fails(rare, 100_000, "final.partial cannot be written: ")
    assert not (out / "final").exists() and not held.exists()
    subprocess.run(words, check=True, capture_output=True)
    equal(out, unbroken, 2e-5)


def files(checkpoints: Path) -> dict[Path, bytes]:
    """The contents of complete checkpoints."""
    return {file: file.read_bytes() for file in checkpoints.glob("step-*/*")}


def test_torchrun_is_in_the_command_that_resumes(unbroken, material, store_path, tmp_path):
    out = tmp_path / "run"
    words = command(material, out, "--no-bf16", processes=2, **SETTINGS)
    process = start(words)
    wait_for(lambda: list(out.glob("checkpoints/step-*")), process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    again = printed(stderr)
    assert again[:5] == ["torchrun", "--nproc-per-node", "2", "--standalone", "-m"]
    assert again[5:] == words[words.index("fpocli") :]
    # torchrun's own traceback comes after it.
    assert stderr.count("Traceback") == 1
    assert not out.with_name("run.writers").exists()
    process = start(again)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr[-3000:]
    equal(out, unbroken, 0)


PAUSED = """
import sys, time
from fpocli.system import heartbeat
from fpocli.training import train as training
from fpocli.__main__ import main

beat, step = float(sys.argv.pop(1)), int(sys.argv.pop(1))
heartbeat._BEAT = beat
take_step = training.take_step


def paused(engine, lr, number):
    if number == step:
        time.sleep(600)
    return take_step(engine, lr, number)


training.take_step = paused
main()
"""


def test_a_lost_process_is_noticed_and_the_run_can_be_resumed(
    unbroken, material, store_path, tmp_path
):
    """Without torchrun, which would end the others itself."""
    out, script = tmp_path / "run", tmp_path / "paused.py"
    script.write_text(PAUSED)
    own = command(material, out, "--no-bf16", **SETTINGS)
    own = own[own.index("train") :]

    def lose(victim: int, step: int, number: int | None) -> list[str]:
        """Start two processes of which one hangs at a step, or cannot save; returns what they
        print."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        processes = [
            start(
                [sys.executable, str(script), "0.5", str(step if rank == victim else 0), *own],
                100_000 if rank == victim and number is None else None,
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                **place,
            )
            for rank in range(2)
        ]
        lost, other = processes[victim], processes[1 - victim]
        # Before it saves, if it cannot.
        begun = "metrics.jsonl" if number is None else f"checkpoints/step-{step - 1}"
        wait_for((out / begun).exists, other)
        if number is not None:
            lost.send_signal(number)
        _, stderr = other.communicate(timeout=60)
        assert other.returncode == 1, stderr[-3000:]
        if number is not None:
            lost.kill()
        _, own_stderr = lost.communicate()
        assert "Traceback" not in stderr + own_stderr
        assert printed(stderr)[-len(own) :] == own
        return [stderr, own_stderr]

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
    store = tmp_path / "ref.zarr"
    words = [sys.executable, "-m", "fpocli", "cache", "--model", str(material / "model")]
    words += ["--layer", str(tiny.LAYERS - 1), "--sae", str(material / "sae"), "--block", "1"]
    words += ["--data", str(tmp_path / "pairs.jsonl"), "--dtype", "float32", "--device", "cpu"]
    config = tmp_path / "cache.yaml"
    config.write_text(json.dumps({"overwrite": True}))
    process = start([*words, "--out", str(store), "--config", str(config)])
    wait_for((store / "zarr.json").exists, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130 and f"removing overwrite from {config}" in stderr
    config.write_text("{}")
    words = printed(stderr)
    begun = store / "blocks/digest/c/3"
    assert stop(start(words), signal.SIGTERM, begun.exists) == words
    done = set(begun.parent.iterdir())
    assert 0 < len(Store.open(store).unscored_blocks()) < 30
    fails(words, 400, "cannot be written: File too large")
    assert not store.with_name("ref.zarr.writers").exists()
    before = {file: file.stat().st_mtime_ns for file in done}
    subprocess.run(words, check=True, capture_output=True)
    assert before == {file: file.stat().st_mtime_ns for file in done}, "scored again"
    settings = {"block": 1, "data": str(tmp_path / "pairs.jsonl"), "top_k": "1000"}
    cache(cache_config(material, tmp_path / "whole.zarr", **settings))
    one, other = contents(store), contents(tmp_path / "whole.zarr")
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
