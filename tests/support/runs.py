"""Runs of `fpo train` on the tests' tiny models and pairs."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Command, results, together

# Wall-clock and memory of a step are not part of its result.
MEASURED = ("seconds", "tokens_per_second", "data_wait", "memory_gb", "peak_memory_gb")


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
    for done in finish_all(command(*arguments, **settings), processes):
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout == ""
    return read(arguments[1])


def start(words: list[str], **settings: object) -> Command:
    """Start `python -m fpocli ...` in a process that is forked."""
    return Command(*words[3:], **settings)


def kill_at_checkpoint(words: list[str], out: Path) -> None:
    """Run such a command and kill it as soon as it has saved a checkpoint."""
    process = start(words)
    process.until(lambda: list(out.glob("checkpoints/step-*")))
    process.close()
    assert not (out / "final").exists()


def finish(words: list[str]) -> subprocess.CompletedProcess:
    """Run such a command in one process, as subprocess.run does."""
    (done,) = finish_all(words, 1)
    return done


def finish_all(
    words: list[str], processes: int, prepare: Callable[[], object] | None = None
) -> list[subprocess.CompletedProcess]:
    """Run such a command in several processes; `prepare` is called in each, see Command."""
    if processes == 1:
        return results(start(words, prepare=prepare))
    return results(*together(words[3:], processes, [prepare] * processes))


def read(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same(one: list[dict], other: list[dict], tolerance: float) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for name in left.keys() - {*MEASURED, "split"}:
            assert left[name] == pytest.approx(right[name], rel=tolerance, abs=tolerance), name
