"""Reward accuracy against distance from the reference: what each constraint buys, over alpha.

    .venv/bin/python benchmarks/constraints.py --data PAIRS.jsonl

Trains the rewards dpo and dpo_norm with the constraints none, features and kl, and simpo, over
several alphas and seeds, from one store with features and distributions; and dpo and dpo_norm at
lower learning rates, which keep near the reference without a constraint. Held-out pairs are
measured from a store of their own that has the reference's whole distributions, so their KL is
exact. A run takes minutes and all of them hours, so each one that is done is a line of
constraints.jsonl, beside the page, and is not made again. The page and the figure are written from
the runs that are there, at any time: --report-only.

The default model and SAE are the demo's (run `make demo` first).
"""

import argparse
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from common import RESULTS
from constraints_page import LR, Cell, report

from fpocli.evaluation.measure import read_measurements
from fpocli.evaluation.summary import per_pair
from fpocli.store.reader import Store

# Methods without a constraint are alpha = 0 of the others; dpo and dpo_norm also come near the
# reference by a lower learning rate alone. Each method's cells go away from its first.
CELLS = [
    *(Cell("dpo", None, lr) for lr in (LR, "5e-6")),
    *(Cell("tdpo2", alpha) for alpha in (0.5, 2, 8)),
    *(Cell("dpo+features", alpha) for alpha in (0.5, 2, 8)),
    *(Cell("dpo_norm", None, lr) for lr in (LR, "5e-6")),
    *(Cell("fpo", alpha) for alpha in (0.02, 0.1, 0.5)),
    Cell("simpo", None),
]


def main() -> None:
    """Make the runs that are missing, then the page."""
    arguments = parse()
    file = RESULTS / "constraints.jsonl"
    done = read(file, arguments)
    # Seed by seed, so that every method has a run soon.
    missing = [
        (cell, seed)
        for seed, cell in product(range(arguments.seeds), arguments.cells)
        if seed not in {row["seed"] for row in done[cell]}
    ]
    if missing and not arguments.report_only:
        RESULTS.mkdir(exist_ok=True)
        make_stores(arguments)
        writing = Lock()

        def make_and_write(cell: Cell, seed: int) -> None:
            row = json.dumps(make(arguments, cell, seed))
            with writing, file.open("a") as lines:
                lines.write(row + "\n")

        with ThreadPoolExecutor(arguments.jobs) as pool:
            runs = [pool.submit(make_and_write, cell, seed) for cell, seed in missing]
            try:
                for run in as_completed(runs):
                    run.result()
            finally:
                pool.shutdown(cancel_futures=True)
    if found := {cell: rows for cell, rows in read(file, arguments).items() if rows}:
        report(found)


def parse() -> argparse.Namespace:
    """The command line; --tiny is the round of smoke.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="examples/preferences.jsonl")
    parser.add_argument("--model", default="demo/SmolLM2-135M-Instruct")
    parser.add_argument("--sae", default="demo/sae")
    parser.add_argument("--layer", default="24")
    parser.add_argument("--template", default="chatml")
    parser.add_argument("--max-length", default="64")
    parser.add_argument("--max-prompt-length", default="44")
    parser.add_argument(
        "--held-out", type=int, default=220, help="rows of the data that are held out"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("demo/constraints"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    arguments.cells = CELLS
    if arguments.tiny:
        arguments.cells = [Cell("tdpo2", 2.0), Cell("dpo", None)]
        arguments.seeds, arguments.held_out, arguments.template = 1, 15, "halos"
    return arguments


def make_stores(arguments: argparse.Namespace) -> None:
    """The stores of all runs; finished ones are not made again."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = Path(arguments.data).read_text().splitlines(keepends=True)
    order = np.random.default_rng(0).permutation(len(rows))[: 30 if arguments.tiny else None]
    rows = [rows[row] for row in order]
    parts = {"train": rows[: -arguments.held_out], "held-out": rows[-arguments.held_out :]}
    for name, part in parts.items():
        data = arguments.work / f"{name}.jsonl"
        data.write_text("".join(part))
        # float32, as bfloat16 is slow on many CPUs.
        fpo(
            "cache", "--model", arguments.model, "--layer", arguments.layer,
            "--sae", arguments.sae, "--data", data, "--max-length", arguments.max_length,
            "--max-prompt-length", arguments.max_prompt_length,
            "--chat-template", arguments.template, "--dtype", "float32",
            "--distributions", "64" if name == "train" else "all", "--block", "64",
            "--out", arguments.work / f"{name}.zarr",
        )  # fmt: skip


def make(arguments: argparse.Namespace, cell: Cell, seed: int) -> dict[str, Any]:
    """Train and measure one run; its settings and what was measured of each pair."""
    run = arguments.work / f"{cell.method}-{cell.alpha}-{cell.lr}_{seed}"
    store = arguments.work / "train.zarr"
    weight = [] if cell.alpha is None else ["--alpha", cell.alpha]
    fpo(
        "train", "--cache", store, "--method", cell.method, *weight, "--seed", seed,
        "--lr", cell.lr, "--warmup", "0.1", "--batch-size", "8", "--no-bf16",
        "--no-activation-checkpointing", "--out", run,
    )  # fmt: skip
    fpo("eval", run, "--cache", arguments.work / "held-out.zarr", "--split", "all")
    values = read_measurements(run / "eval/pairs.jsonl")
    train = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = per_pair(values) | {"kl_per_token": (values["kl_of_store"] / values["tokens"]).mean(1)}
    # The weights take half a gigabyte.
    shutil.rmtree(run)
    return {
        "method": cell.method,
        "alpha": cell.alpha,
        "seed": seed,
        "settings": settings(arguments, cell),
        "training_pairs": Store.open(store).scored,
        "held_out": len(values["pair"]),
        "seconds": sum(line["seconds"] for line in train),
        "last_steps": {
            name: float(np.mean([line[name] for line in train[-5:]]))
            for name in ("loss", "margin", "reward_accuracy", "average_logp_chosen_change")
        },
        "pairs": {name: [float(f"{x:.6g}") for x in array] for name, array in found.items()},
    }


def fpo(*words: object) -> None:
    """Run a command of fpo in a process of its own."""
    subprocess.run(
        [sys.executable, "-m", "fpocli", *map(str, words)], check=True, stdout=subprocess.DEVNULL
    )


def read(file: Path, arguments: argparse.Namespace) -> dict[Cell, list[dict[str, Any]]]:
    """The runs of each cell that are done with these settings."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return {cell: [row for row in rows if is_run(row, cell, arguments)] for cell in arguments.cells}


def settings(arguments: argparse.Namespace, cell: Cell) -> dict[str, Any]:
    """What a run was made with, beside its method, alpha and seed."""
    names = ("model", "sae", "layer", "template", "max_length", "max_prompt_length", "held_out")
    shared = {name: getattr(arguments, name) for name in names}
    return {"data": Path(arguments.data).name, **shared, "lr": cell.lr}


def is_run(row: dict[str, Any], cell: Cell, arguments: argparse.Namespace) -> bool:
    """Whether a run is one of a cell, with these settings."""
    same = row["settings"] == settings(arguments, cell)
    return same and (row["method"], row["alpha"]) == (cell.method, cell.alpha)


if __name__ == "__main__":
    main()
