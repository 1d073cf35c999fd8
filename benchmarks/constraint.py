"""What the feature constraint costs: forward and backward of fpo beside simpo on the same rows.

    .venv/bin/python benchmarks/constraint.py --data PAIRS.jsonl

Both methods take turns on the same packed rows in one process, so their ratio holds when the
machine's speed drifts. A step's memory is the most the process held during it, which Linux tells
when it is asked to forget the earlier peak. A random SAE of 16,384 features stands in for a real
one. The default model is the demo's (run `make demo` first), the pairs are this repository's.
"""

import argparse
import gc
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from common import machine, middle, model_width, random_sae, write_page

from fpocli import CacheConfig, cache
from fpocli.catalog import find_model
from fpocli.config import TrainConfig
from fpocli.model import Site, load_model
from fpocli.objective import objective
from fpocli.scoring import score
from fpocli.sparse import load_encoder
from fpocli.stream import Stream

FEATURES, PAIRS = 16_384, 24


def main() -> None:
    """Time both methods and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="examples/preferences.jsonl")
    parser.add_argument("--layer", type=int, default=24)
    parser.add_argument("--max-length", type=int, default=512)
    arguments = parser.parse_args()
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        sae = random_sae(f"{folder}/sae", model_width(arguments.model), FEATURES)
        store = cache(
            CacheConfig(
                model=arguments.model,
                layer=[arguments.layer],
                sae=[sae],
                data=arguments.data,
                limit=PAIRS,
                max_length=arguments.max_length,
                max_prompt_length=arguments.max_length - 1,
                out=f"{folder}/ref.zarr",
            )
        )
        stream = Stream(
            store, batch_size=PAIRS, tokens_per_row=2048, eval_fraction=0, seed=0, rank=0, world=1
        )
        rows = next(iter(stream.steps(0, 1, device)))
        encoder = load_encoder(sae, device)
    site = Site(arguments.layer, "resid_post")
    model = load_model(find_model(arguments.model), [site], torch.bfloat16, device).train()
    model.network.activation_checkpointing_enable()
    methods = {"simpo": {}, "fpo": {str(site): encoder}}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    peaks: dict[str, list[float]] = {name: [] for name in methods}
    # The first row warms up.
    for number, row in enumerate([rows[0], *rows]):
        for name in methods if number % 2 else reversed(methods):
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
            began = time.perf_counter()
            scores = score(model, methods[name], row.batch)
            settings = TrainConfig(cache="unused", method=name)
            loss, _ = objective(scores, row.reference, methods[name], settings)
            loss.mean().backward()
            if number:
                seconds[name].append(time.perf_counter() - began)
                peaks[name].append(peak())
            del scores, loss
    report(arguments, seconds, peaks)


def peak() -> float:
    """GB, the most memory held since the peak was forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def report(
    arguments: argparse.Namespace, seconds: dict[str, list[float]], peaks: dict[str, list[float]]
) -> None:
    """The page."""

    def ratio(values: dict[str, list[float]]) -> str:
        pairs = zip(values["fpo"], values["simpo"], strict=True)
        return middle((fpo / simpo for fpo, simpo in pairs), ".3f")

    rows = "\n".join(
        f"| {name} | {sum(seconds[name]):.1f} | {statistics.median(peaks[name]):.3f} |"
        for name in seconds
    )
    write_page(
        "constraint",
        f"""# The cost of the constraint, {datetime.now(UTC):%Y-%m-%d}

Forward and backward of {PAIRS} real pairs of at most {arguments.max_length} tokens a sequence, in
{len(seconds["fpo"])} rows of at most 2,048 tokens, bfloat16, activation checkpointing on, without
the optimiser. m = {FEATURES:,}, K = 256, k = 50. The methods in turn, row by row.

{machine()}
Command: `python benchmarks/constraint.py --data PAIRS.jsonl`.

| method | seconds, all rows | peak GB, median row |
|---|---|---|
{rows}

fpo / simpo, row by row: time {ratio(seconds)}, of all rows
{sum(seconds["fpo"]) / sum(seconds["simpo"]):.3f}; peak memory {ratio(peaks)}. The weights of the
SAE are in memory for both, {FEATURES * model_width(arguments.model) * 4 / 1e6:.0f} MB of them.
""",
    )


if __name__ == "__main__":
    main()
