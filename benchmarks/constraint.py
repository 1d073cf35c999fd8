"""What the feature constraint costs: forward and backward of fpo beside simpo on the same batches.

Run `make demo` first; then `.venv/bin/python benchmarks/constraint.py`. The two methods take turns
on the same pairs in one process, so their ratio holds when the machine's speed drifts. The result
goes to benchmarks/results/ as Markdown.
"""

import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from fpocli.catalog import find_model
from fpocli.config import TrainConfig
from fpocli.console import progress
from fpocli.model import Site, load_model
from fpocli.objective import objective
from fpocli.scoring import score
from fpocli.sparse import load_encoder
from fpocli.store import Store
from fpocli.stream import Stream

STORE = Path("demo/ref.zarr")
ROUNDS, MICRO_BATCH = 8, 2


def main() -> None:
    """Time both methods on the same micro-batches and write the table."""
    if not STORE.is_dir():
        sys.exit("demo/ref.zarr is missing; run `make demo` first.")
    device = torch.device("cpu")
    store = Store.open(STORE)
    sites = [Site.parse(name) for name in store.sites]
    folder = find_model(store.meta["model"]["source"])
    model = load_model(folder, sites, torch.bfloat16, device).train()
    encoders = {
        name: load_encoder(about["sae"]["source"], device) for name, about in store.sites.items()
    }
    stream = Stream(
        store,
        batch_size=ROUNDS * MICRO_BATCH,
        micro_batch=MICRO_BATCH,
        eval_fraction=0.0,
        seed=0,
        rank=0,
        world=1,
    )
    methods = {"simpo": {}, "fpo": encoders}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    with progress("Measuring", ROUNDS) as bar:
        for number, micro in enumerate(stream.step(0, device)):
            order = list(methods) if number % 2 else list(reversed(methods))
            for name in order:
                settings = TrainConfig(cache=str(STORE), method=name)
                began = time.perf_counter()
                scores = score(model, methods[name], micro.batch)
                loss, _ = objective(scores, micro.reference, methods[name], settings)
                loss.mean().backward()
                model.zero_grad()
                seconds[name].append(time.perf_counter() - began)
            bar.advance()
    # The first round warms up.
    ratios = [b / a for a, b in zip(seconds["simpo"][1:], seconds["fpo"][1:], strict=True)]
    write(store, seconds, ratios)


def write(store: Store, seconds: dict[str, list[float]], ratios: list[float]) -> None:
    """The result as a dated page."""
    now = datetime.now(UTC)
    rows = "\n".join(
        f"| {name} | {statistics.median(times[1:]):.2f} | {min(times[1:]):.2f} | "
        f"{max(times[1:]):.2f} |"
        for name, times in seconds.items()
    )
    features = next(iter(store.sites.values()))
    text = f"""# The cost of the constraint, {now:%Y-%m-%d}

Forward and backward of {MICRO_BATCH} pairs of examples/preferences.jsonl (real text lengths),
{store.meta["model"]["architecture"]} of 135 million weights in bfloat16, one site with
{features["d_sae"]:,} features, K = {features["k"]}, k = 50. {len(ratios)} rounds, methods in turn.

Machine: {platform.machine()}, {torch.get_num_threads()} threads, no GPU. torch
{version("torch")}, transformers {version("transformers")}, sae-lens {version("sae-lens")}.
Command: `python benchmarks/constraint.py`.

| method | median s | min | max |
|---|---|---|---|
{rows}

fpo / simpo, round by round: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to
{max(ratios):.3f}.
"""
    path = Path(__file__).parent / "results" / f"{now:%Y-%m-%d}-constraint.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    print(text)


main()
