"""Memory of the host per rank: while the policy's weights are loaded, and in training.

    .venv/bin/python benchmarks/host_memory.py

A Gemma-2 of random weights (--parameters, 300 million) is written to a folder and loaded in bf16 by
the lines of `fpo train` on 2 and 4 ranks of one CPU: under ZeRO-2, under ZeRO-3 with the whole
model loaded on each rank first, and under ZeRO-3 as `fpo train` does it. Then two steps are taken.
Each rank samples its memory every 5 ms: that of its own (RssAnon), and the pages of files that it
has mapped (RssFile), which ranks share. What tensors hold is compared with docs/scaling.md.
"""

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from common import machine, memory, table, write_page
from scaling import Shape, held_bytes, step_bytes

from fpocli.config import TrainConfig

WAYS = {
    "zero2": "ZeRO-2",
    "whole": "ZeRO-3, each rank loads the whole",
    "zero3": "ZeRO-3, as fpo train loads",
}
KINDS = ("RssAnon", "RssFile")
LENGTH = 128  # tokens of the sequence that is trained on


def main() -> None:
    """Measure every way and number of ranks, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=float, default=300, help="millions")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--file", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        rank(arguments.way, Path(arguments.folder))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = write_model(folder, arguments.parameters * 1e6, arguments.file)
        rows = [measure(arguments, folder, way, ranks) for ranks in arguments.ranks for way in WAYS]
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        report(arguments.file, rows, shape, size)


def write_model(folder: Path, parameters: float, dtype: str) -> Shape:
    """A Gemma-2 of about so many parameters; half of its weights are the embedding."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    width = 64 * max(1, round((parameters / 16 / 16) ** 0.5 / 64))
    config = Gemma2Config(
        vocab_size=max(256, round(parameters / 2 / width)),
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, head_dim=width // 8, sliding_window=64,
    )  # fmt: skip
    torch.manual_seed(0)
    network = Gemma2ForCausalLM(config).to(getattr(torch, dtype))
    network.save_pretrained(folder)
    return Shape.of(config, sum(p.numel() for p in network.parameters()))


def measure(arguments: Any, folder: Path, way: str, ranks: int) -> dict[str, Any]:
    """Run a way on so many ranks; the largest figure of any of them."""
    import json
    import subprocess

    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    words += [sys.argv[0], "--way", way, "--folder", str(folder)]
    done = subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == ranks
    most = {name: max(one[name] for one in found) for name in found[0]}
    least = {f"least_{name}": min(one[name] for one in found) for name in found[0]}
    print({"way": way, "ranks": ranks} | most, file=sys.stderr)
    return {"way": way, "ranks": ranks} | most | least


@contextmanager
def sampled(into: dict[str, float], phase: str):
    """Most of RssAnon and RssFile during a phase, in MB above what there was before it began."""
    before = BEFORE or {name: memory(name) for name in KINDS}
    BEFORE.update(before)
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.005):
            for name in KINDS:
                key = f"{phase}_{name}"
                into[key] = max(into.get(key, 0.0), memory(name) - before[name])

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# What a rank held before it loaded anything.
BEFORE: dict[str, float] = {}


def rank(way: str, folder: Path) -> None:
    """One rank: load, make the engine, take two steps, and print what was held."""
    import json

    import numpy as np

    from fpocli.data.pairs import TokenPair
    from fpocli.model.language_model import load_model
    from fpocli.model.packing import pack
    from fpocli.system.model_folder import find_model
    from fpocli.training.deepspeed_config import deepspeed_config
    from fpocli.training.engine import (
        backward,
        make_engine,
        partitioned,
        start_processes,
        take_step,
    )

    device = torch.device("cpu")
    number, _ = start_processes(device)
    import transformers.models.gemma2.modeling_gemma2  # noqa: F401  before anything is measured

    settings = TrainConfig(cache="unused", zero=2 if way == "zero2" else 3, device="cpu")
    config = deepspeed_config(settings)
    found: dict[str, float] = {}
    time.sleep(1)
    with sampled(found, "load"):
        context = nullcontext() if way == "whole" else partitioned(config)
        model = load_model(find_model(str(folder)), [], torch.bfloat16, device, context)
        model.network.activation_checkpointing_enable()
    gc.collect()
    with sampled(found, "engine"):
        engine = make_engine(model, settings, config)
    gc.collect()
    rng = np.random.default_rng(number)
    third = LENGTH // 3
    ids = rng.integers(0, model.config.vocab_size, (3, third))
    batch = pack([TokenPair(*ids)])
    with sampled(found, "steps"):
        for step in range(2):
            engine.train()
            backward(engine, -engine(batch).logp.mean(), last=True)
            take_step(engine, 1e-6, step)
    gc.collect()
    found["tensors"] = tensor_bytes() / 1e6
    torch.distributed.barrier()
    # At once, as other ranks write to the same pipe.
    os.write(1, f"{json.dumps(found)}\n".encode())


def tensor_bytes() -> int:
    """Bytes of all tensors of this process, each storage once; not of files that are mapped."""
    storages = {}
    for item in gc.get_objects():
        try:
            if isinstance(item, torch.Tensor):
                storage = item.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        except (RuntimeError, ReferenceError):
            continue
    return sum(storages.values())


def report(dtype: str, rows: list[dict[str, Any]], shape: Shape, size: int) -> None:
    """The page."""
    heads = (
        "ranks", "way", "loading: own", "of files", "engine: own", "of files", "two steps: own",
        "by the formula", "tensors", "by the formula",
    )  # fmt: skip
    lines = []
    for row in rows:
        stage = 2 if row["way"] == "zero2" else 3
        held = held_bytes(shape, stage, row["ranks"]) / 1e6
        step = step_bytes(shape, stage, row["ranks"], LENGTH, 24 * 2**20, features=0) / 1e6
        figures = [
            *(row[f"{phase}_{kind}"] for phase in ("load", "engine") for kind in KINDS),
            *(row["steps_RssAnon"], held + step, row["tensors"], held),
        ]
        lines.append([str(row["ranks"]), WAYS[row["way"]], *(f"{one:,.0f}" for one in figures)])
    write_page(
        "host-memory" if dtype == "bfloat16" else "host-memory-float32",
        f"""# Memory of the host per rank, {datetime.now(UTC):%Y-%m-%d}

A Gemma-2 of random weights with {shape.parameters:,} parameters, {size / 1e6:,.0f} MB in {dtype},
loaded in bfloat16 on ranks of one CPU. MB above what a rank held before it loaded anything, of the
rank that holds most. "own" is RssAnon, "of files" RssFile: pages of the weight file that the rank
has mapped, which are in memory once, however many ranks map them. "tensors" are all tensors after
two steps. The formulas are those of benchmarks/scaling.py: `held_bytes` for the tensors, and with
`step_bytes` for the most of two steps.

{machine()}
Command: `python benchmarks/host_memory.py{"" if dtype == "bfloat16" else " --file float32"}`.

{table(heads, lines)}
""",
    )


if __name__ == "__main__":
    main()
