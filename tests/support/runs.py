"""Runs of `fpo train` on the tests' tiny models and pairs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processes import Command, together

# Time and memory of a step are not part of its result.
MEASURED = ("seconds", "tokens_per_second", "data_wait", "peak_memory_gb")


def command(material: Path, out: Path, *flags: object, processes: int = 1, **settings: object):
    """`fpo train` on the tiny store: 17 training pairs, batches of 4, 5 steps."""
    settings = {
        "cache": material / "ref.zarr",
        "out": out,
        "batch_size": 4,
        "packed_length": 300,
        "lr": 1e-3,
        "warmup": 0,
        "eval_fraction": 0.2,
        "device": "cpu",
    } | settings
    if "--no-bf16" not in flags:
        # The tiny store is float32.
        settings = {"allow": "dtype"} | settings
    launch = ["-m"]
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
        launch.insert(2, "--standalone")
    words = [sys.executable, *launch, "fpocli", "train", *map(str, flags)]
    for name, value in settings.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words


def run(*arguments, processes: int = 1, **settings) -> list[dict]:
    """Train and return the lines of metrics.jsonl."""
    _, _, _, *words = command(*arguments, **settings)
    started = together(words, processes) if processes > 1 else [Command(*words)]
    for process in started:
        assert process.wait(300) == 0, process.printed()[-3000:]
        assert process.data() == ""
        process.close()
    return read(arguments[1])


def finish(words: list[str]) -> subprocess.CompletedProcess:
    """Run a command in one process, as subprocess.run does."""
    _, _, _, *rest = words
    process = Command(*rest)
    code = process.wait(300)
    done = subprocess.CompletedProcess(words, code, process.data(), process.messages())
    process.close()
    return done


def read(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(one: list[dict], other: list[dict], tolerance: float) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - {*MEASURED, "split"}:
            assert left[name] == pytest.approx(right[name], rel=tolerance, abs=tolerance), name
