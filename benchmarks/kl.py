"""What the sequential KL costs in training: by the store's distributions, and by the reference.

    .venv/bin/python benchmarks/kl.py --model FOLDER --sae FOLDER --layer N --data PAIRS.jsonl

Optimiser steps of fpo, of its reward without the features, and of tdpo2, once from the reference's
64 likeliest tokens in the store and once with the reference in memory. Every contestant is a
process of its own, so that each has its own memory; they take turns, step by step, on the same
pairs. fpo takes part twice, which shows how exact the ratios are. Defaults are the demo's model and
SAE (run `make demo` first) and this repository's pairs.
"""

import argparse
import statistics
import tempfile
from datetime import UTC, datetime
from typing import Any

from common import (
    BATCH,
    machine,
    make_store,
    middle,
    table,
    take_stdout,
    take_turns,
    turns_parser,
    write_page,
)

TOKENS = 64
# By contestant its title and its settings.
CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fpo": ("fpo", {"method": "fpo"}),
    "again": ("fpo once more", {"method": "fpo"}),
    "dpo_norm": ("dpo_norm: fpo without the features", {"method": "dpo_norm"}),
    "tdpo2": ("tdpo2 from the store", {"method": "tdpo2"}),
    "exact": ("tdpo2 with the reference in memory", {"method": "tdpo2", "exact_kl": True}),
}
# What tdpo2 from the store may take of fpo's time and memory.
GOALS = {"seconds": 1.03, "peak": 1.02}


def main() -> None:
    """Let the contestants take turns and write the page."""
    parser = turns_parser(__doc__, page="tdpo2", rounds=8)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args()
    if arguments.contestant:
        contend(arguments)
        return
    names = [name for name in CONTESTANTS if name not in arguments.without]
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(
            arguments, folder, BATCH * (arguments.rounds + 1), dtype=arguments.dtype,
            distributions=str(TOKENS),
        )  # fmt: skip
        words = [f"--{name}={getattr(arguments, name)}" for name in ("model", "dtype")]
        words.append(f"--store={store.path}")
        report(arguments, take_turns(names, words, arguments.rounds), store)


def contend(arguments: argparse.Namespace) -> None:
    """Serve optimiser steps until the parent has enough."""
    line = take_stdout()
    from ours import serve_steps

    from fpocli.config import TrainConfig

    _, settings = CONTESTANTS[arguments.contestant]
    config = TrainConfig(
        cache=arguments.store,
        model=arguments.model,
        batch_size=BATCH,
        bf16=arguments.dtype == "bfloat16",
        **settings,
    )
    serve_steps(line, config)


def report(
    arguments: argparse.Namespace, figures: dict[str, list[dict[str, Any]]], store: Any
) -> None:
    """The page."""

    def values(name: str, figure: str) -> list[float]:
        return [found[figure] for found in figures[name][1:]]

    def ratios(name: str, figure: str, base: str = "fpo") -> list[float]:
        pairs = zip(values(name, figure), values(base, figure), strict=True)
        return [own / other for own, other in pairs]

    heads = ("contestant", "seconds a step", "of fpo's", "peak GB", "of fpo's")
    rows = [
        (
            CONTESTANTS[name][0],
            middle(values(name, "seconds")),
            middle(ratios(name, "seconds"), ".3f"),
            middle((peak / 1e9 for peak in values(name, "peak")), ".3f"),
            middle(ratios(name, "peak"), ".3f"),
        )
        for name in figures
    ]
    found = {name: statistics.median(ratios("tdpo2", name)) for name in GOALS}
    words = {
        name: "reached" if found[name] <= goal else "not reached" for name, goal in GOALS.items()
    }
    noise = ""
    if "again" in figures:
        again = [statistics.median(ratios("again", name)) for name in GOALS]
        noise = "\nfpo against itself: {:.3f} and {:.3f}.".format(*again)
    spans, features = store.read_array("spans"), next(iter(store.sites.values()))
    lengths, scored = spans[:, 3] - spans[:, 0], spans[:, 3] - spans[:, 1]
    write_page(
        arguments.page,
        f"""# The sequential KL in training, {datetime.now(UTC):%Y-%m-%d}

{store.meta["model"]["architecture"]}, {arguments.dtype}, batches of {BATCH} pairs, at most
{arguments.max_length} tokens a sequence, activation checkpointing on; one optimiser step of each
contestant, alternating, {arguments.rounds} rounds after a warm-up. {store.pairs} real pairs of
{lengths.min()} to {lengths.max()} tokens, the prompt once ({lengths.mean():.0f} on average, of
which {scored.mean():.0f} are scored). fpo has one site with {features["d_sae"]:,} features, K =
{features["k"]}, k = 50; the store holds the {TOKENS} likeliest tokens of every scored position.

{machine()}
Command: `python benchmarks/kl.py --data PAIRS.jsonl --rounds {arguments.rounds} --dtype {
            arguments.dtype
        }`.

{table(heads, rows)}

Medians, with minimum and maximum; ratios are step by step. Both rows of fpo do the same, so their
difference is noise. Only fpo's processes have an SAE, and sae-lens, in memory.

The goal of tdpo2 from the store is at most {GOALS["seconds"]} of fpo's time and {GOALS["peak"]} of
its memory: {found["seconds"]:.3f} ({words["seconds"]}) and {found["peak"]:.3f} ({words["peak"]}).{
            noise
        }
tdpo2 from the store against dpo_norm, step by step: time {
            middle(ratios("tdpo2", "seconds", "dpo_norm"), ".3f")
        }, peak
memory {middle(ratios("tdpo2", "peak", "dpo_norm"), ".3f")}.
""",
    )


if __name__ == "__main__":
    main()
