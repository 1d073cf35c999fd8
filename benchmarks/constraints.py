"""Reward accuracy against distance from the reference: what each constraint buys, over alpha.

    .venv/bin/python benchmarks/constraints.py --data PAIRS.jsonl

Trains the rewards dpo and dpo_norm with the constraints none, features and kl, and simpo, over
several alphas and seeds, from one store with features and distributions. Held-out pairs are
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
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from common import RESULTS, machine, table, write_page

from fpocli.comparison.statistics import compare_means, compare_shares
from fpocli.display.charts import figure
from fpocli.evaluation.measure import read_measurements
from fpocli.evaluation.summary import per_pair
from fpocli.scoring.accuracy import wins
from fpocli.store.reader import Store

# By method its alphas: none for methods without a constraint, which are alpha = 0 of the others.
ALPHAS: dict[str, tuple[float, ...]] = {
    "dpo": (),
    "dpo_norm": (),
    "simpo": (),
    "tdpo2": (0.5, 2, 8),
    "fpo": (0.02, 0.1, 0.5),
    "dpo+features": (0.5, 2, 8),
}
# What each is compared with: the same reward without a constraint.
PLAIN = {"tdpo2": "dpo", "dpo+features": "dpo", "fpo": "dpo_norm"}
COLOURS = {
    "dpo": "#777777", "tdpo2": "#2a6f97", "dpo+features": "#e09f3e", "dpo_norm": "#333333",
    "fpo": "#c8553d", "simpo": "#6a4c93",
}  # fmt: skip


class Cell(NamedTuple):
    """A method and its alpha; None without a constraint."""

    method: str
    alpha: float | None

    @property
    def name(self) -> str:
        """Such as fpo-10."""
        return self.method if self.alpha is None else f"{self.method}-{self.alpha:g}"


def main() -> None:
    """Make the runs that are missing, then the page."""
    arguments = parse()
    file = RESULTS / "constraints.jsonl"
    # Seed by seed, so that every method has a run soon.
    missing = [
        (cell, seed)
        for seed, cell in product(range(arguments.seeds), arguments.cells)
        if not any(is_run(row, cell, seed, arguments) for row in read(file))
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
    if found := [row for row in read(file) if row["settings"] == settings(arguments)]:
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
    parser.add_argument("--lr", default="2e-5")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("demo/constraints"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    arguments.cells = [
        Cell(method, alpha) for method, alphas in ALPHAS.items() for alpha in alphas or (None,)
    ]
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
    run = arguments.work / f"{cell.name}_{seed}"
    store = arguments.work / "train.zarr"
    weight = [] if cell.alpha is None else ["--alpha", cell.alpha]
    fpo(
        "train", "--cache", store, "--method", cell.method, *weight, "--seed", seed,
        "--lr", arguments.lr, "--warmup", "0.1", "--batch-size", "8", "--no-bf16",
        "--no-activation-checkpointing", "--out", run,
    )  # fmt: skip
    fpo("eval", run, "--cache", arguments.work / "held-out.zarr", "--split", "all")
    values = read_measurements(run / "eval/pairs.jsonl")
    train = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ratio = (values["logp"] - values["ref_logp"]) / values["tokens"]
    sizes = (np.abs(values["logp"]) + np.abs(values["ref_logp"])) / values["tokens"]
    found = per_pair(values) | {
        "reward_accuracy_per_token": wins(ratio[:, 0], ratio[:, 1], sizes.sum(1)).value,
        "kl_per_token": (values["kl_of_store"] / values["tokens"]).mean(1),
    }
    # The weights take half a gigabyte.
    shutil.rmtree(run)
    return {
        "method": cell.method,
        "alpha": cell.alpha,
        "seed": seed,
        "settings": settings(arguments),
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


def read(file: Path) -> list[dict[str, Any]]:
    """The runs that are done."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all runs of a page have in common."""
    names = (
        "model", "sae", "layer", "template", "max_length", "max_prompt_length", "held_out", "lr"
    )  # fmt: skip
    return {"data": Path(arguments.data).name} | {name: getattr(arguments, name) for name in names}


def is_run(row: dict[str, Any], cell: Cell, seed: int, arguments: argparse.Namespace) -> bool:
    """Whether a run is the one with these settings."""
    same = row["settings"] == settings(arguments)
    return same and (row["method"], row["alpha"], row["seed"]) == (*cell, seed)


# -- the page --------------------------------------------------------------------------------------

# Name of a value of pairs, heading, digits.
COLUMNS = (
    ("reward_accuracy", "reward accuracy (%)", 1),
    ("reward_accuracy_per_token", "per token (%)", 1),
    ("accuracy", "accuracy (%)", 1),
    ("kl_per_token", "KL (nats per token)", 4),
    ("kl_rejected", "KL rejected (nats)", 2),
    ("kl_chosen", "KL chosen (nats)", 2),
    ("distance_rejected", "D rejected", 4),
    ("distance_chosen", "D chosen", 4),
)


def report(rows: list[dict[str, Any]]) -> None:
    """The page, and a figure beside it."""
    groups: dict[Cell, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(Cell(row["method"], row["alpha"]), []).append(row)
    cells = sorted(groups, key=lambda cell: (list(ALPHAS).index(cell.method), cell.alpha or 0))
    draw({cell: groups[cell] for cell in cells}, RESULTS / "constraints.png")
    heads = ["method", "α", "seeds", *(title for _, title, _ in COLUMNS)]
    lines = [
        [cell.method, "" if cell.alpha is None else f"{cell.alpha:g}", str(len(groups[cell])),
         *(cell_text(groups[cell], name, digits) for name, _, digits in COLUMNS)]
        for cell in cells
    ]  # fmt: skip
    compared = [
        [cell.method, f"{cell.alpha:g}", PLAIN[cell.method],
         *(difference(groups[cell], groups[plain], name, digits) for name, _, digits in COLUMNS)]
        for cell in cells
        if cell.alpha is not None and (plain := Cell(PLAIN[cell.method], None)) in groups
    ]  # fmt: skip
    first = rows[0]
    write_page(
        "constraints",
        f"""# What each constraint buys, {datetime.now(UTC):%Y-%m-%d}

{first["training_pairs"]} training pairs (one epoch, batches of 8, learning rate
{first["settings"]["lr"]}), {first["held_out"]} held-out pairs, the same for all; prompts of at most
{first["settings"]["max_prompt_length"]} tokens, prompt and response of at most
{first["settings"]["max_length"]}; float32. Everything is measured on the held-out pairs after
training, the KL over the whole vocabulary.

{machine()}
Command: `python benchmarks/constraints.py --data PAIRS.jsonl`.

![Reward accuracy against KL and D](constraints.png)

{table(heads, lines)}

± is the standard deviation over seeds. Reward accuracy is by S_θ − S_ref, in all and per token.

## Differences to the same reward without a constraint

{table(["method", "α", "to", *(title for _, title, _ in COLUMNS)], compared)}

Paired over the same pairs and seeds, with 95 % intervals over seeds and pairs; **bold** where 0 is
outside. Of {len(compared) * len(COLUMNS)} intervals about {len(compared) * len(COLUMNS) / 20:.0f}
would be by chance alone.
""",
    )


def scale(name: str) -> int:
    """Shares are shown in percent."""
    return 100 if "accuracy" in name else 1


def cell_text(rows: list[dict[str, Any]], name: str, digits: int) -> str:
    """Mean and deviation over seeds."""
    means = scale(name) * np.array([np.mean(row["pairs"][name]) for row in rows])
    spread = f" ± {means.std(ddof=1):.{digits}f}" if len(means) > 1 else ""
    return f"{means.mean():.{digits}f}{spread}"


def difference(
    rows: list[dict[str, Any]], plain: list[dict[str, Any]], name: str, digits: int
) -> str:
    """The paired difference with its interval."""
    others = {row["seed"]: row["pairs"][name] for row in plain}
    both = [(row["pairs"][name], others[row["seed"]]) for row in rows if row["seed"] in others]
    if not both:
        return ""
    one, other = (scale(name) * np.array(part) for part in zip(*both, strict=True))
    found = (compare_shares if scale(name) > 1 else compare_means)(one, other)
    text = f"{found.mean:+.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"
    return f"**{text}**" if found.beyond_noise else text


def draw(groups: dict[Cell, list[dict[str, Any]]], file: Path) -> None:
    """Reward accuracy, in all and per token, against the KL per token and against D of the rejected
    responses: a small point for each run, and for each method a line over its alphas, from 0."""
    shares = {"reward_accuracy": "reward accuracy (%)"}
    shares["reward_accuracy_per_token"] = "reward accuracy per token (%)"
    distances = {"kl_per_token": "KL (nats per token)", "distance_rejected": "D of rejected"}
    with figure(file, 4) as axes:
        for axis, (share, name) in zip(axes, product(shares, distances), strict=True):
            points = {
                cell: np.array([[np.mean(row["pairs"][key]) for key in (name, share)]
                                for row in rows])
                for cell, rows in groups.items()
            }  # fmt: skip
            for method, colour in COLOURS.items():
                own = [cell for cell in points if cell.method == method]
                line = [Cell(PLAIN[method], None), *own] if method in PLAIN else own
                if not own:
                    continue
                single = np.concatenate([points[cell] for cell in own])
                means = np.array([points[cell].mean(0) for cell in line if cell in points])
                axis.scatter(single[:, 0], 100 * single[:, 1], s=8, alpha=0.4, color=colour)
                axis.plot(means[:, 0], 100 * means[:, 1], "o-", ms=5, color=colour, label=method)
            axis.set(xlabel=distances[name], ylabel=shares[share], xscale="log")
            axis.legend(fontsize=7)


if __name__ == "__main__":
    main()
