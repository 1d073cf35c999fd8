"""Training compared with TRL: pairs per second and peak memory, alternating step by step.

    .venv/bin/python benchmarks/train.py --model FOLDER --sae FOLDER --layer N --data PAIRS.jsonl

Every contestant is a process of its own with the same pairs in the same batches of 4, the same
dtype, recomputation on; they take turns, step by step, so the ratios hold when the machine's speed
drifts. Defaults are the demo's model and SAE (run `make demo` first) and this repository's pairs.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from typing import Any

from common import (
    BATCH,
    RESULTS,
    machine,
    make_store,
    middle,
    take_stdout,
    take_turns,
    turns_parser,
    write_page,
)

OURS = ("fpo", "dpo_norm", "simpo", "dpo")
TITLES = {
    "trl_dpo": "trl_dpo: TRL DPO, bf16 weights and optimiser",
    "trl_dpo_master": "TRL DPO, float32 weights, bf16 autocast",
    "trl_simpo": "TRL SimPO, bf16 weights and optimiser",
}
PRECISION = """fpo keeps float32 master weights and float32 moments besides bfloat16 weights, and
so does TRL with float32 weights under autocast. With bfloat16 weights TRL has no master weights and
bfloat16 moments: 8 bytes a weight less, and steps of a small learning rate are lost.
"""


def main() -> None:
    """Let all contestants take turns and write the page and the chart."""
    arguments = turns_parser(__doc__, page="train", rounds=5).parse_args()
    if arguments.contestant:
        contend(arguments)
        return
    names = [name for name in (*OURS, *TITLES) if name not in arguments.without]
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(arguments, folder, BATCH * (arguments.rounds + 1))
        words = [f"--model={arguments.model}", f"--store={store.path}"]
        report(arguments, take_turns(names, words, arguments.rounds), store)


# -- one contestant --------------------------------------------------------------------------------


def contend(arguments: argparse.Namespace) -> None:
    """Serve optimiser steps until the parent has enough."""
    line = take_stdout()
    if arguments.contestant in TITLES:
        theirs(arguments, line)
        return
    from ours import serve_steps

    from fpocli.config import TrainConfig

    config = TrainConfig(
        cache=arguments.store,
        model=arguments.model,
        method=arguments.contestant,
        batch_size=BATCH,
    )
    serve_steps(line, config)


def theirs(arguments: argparse.Namespace, line: Any) -> None:
    """TRL's own training loop, held before each step until its turn comes."""
    import numpy as np
    import peers
    import torch
    from transformers import TrainerCallback

    from fpocli.model.network import choose_device
    from fpocli.store.reader import Store
    from fpocli.training.memory import peak_memory
    from fpocli.training.pair_loader import PairLoader

    class Turns(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            print("{}", file=line, flush=True)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not sys.stdin.readline():
                os._exit(0)
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds = time.perf_counter() - self.began
            figures = {"seconds": seconds, "peak": peak_memory(choose_device(None))}
            print(json.dumps(figures), file=line, flush=True)

    store = Store.open(arguments.store)
    loader = PairLoader(
        store, batch_size=BATCH, packed_length=1, eval_fraction=0, seed=0, rank=0, world=1
    )
    order = np.concatenate([loader.pairs(step) for step in range(loader.steps_per_epoch)])
    rows = peers.rows_of(store, order.tolist())
    with tempfile.TemporaryDirectory() as out:
        if arguments.contestant == "trl_simpo":
            trainer = peers.simpo(arguments.model, rows, out, torch.bfloat16)
        elif arguments.contestant == "trl_dpo_master":
            trainer = peers.dpo(arguments.model, rows, out, torch.float32, bf16=True)
        else:
            trainer = peers.dpo(arguments.model, rows, out, torch.bfloat16)
        trainer.add_callback(Turns())
        trainer.train()


# -- the result ------------------------------------------------------------------------------------


def report(
    arguments: argparse.Namespace, figures: dict[str, list[dict[str, Any]]], store: Any
) -> None:
    """The page and the chart."""
    seconds = {name: [f["seconds"] for f in rounds[1:]] for name, rounds in figures.items()}
    memory = {name: max(f["peak"] for f in rounds) / 1e9 for name, rounds in figures.items()}
    base = "trl_dpo" if "trl_dpo" in figures else "simpo"
    ratios = {
        name: [one / other for one, other in zip(seconds[base], own, strict=True)]
        for name, own in seconds.items()
    }
    rows = "\n".join(
        f"| {TITLES.get(name, name)} | {BATCH / statistics.median(seconds[name]):.3f} | "
        f"{middle(ratios[name])} | {memory[name]:.2f} | {memory[name] / memory[base]:.2f} |"
        for name in figures
    )
    constraint = [fpo / simpo for fpo, simpo in zip(seconds["fpo"], seconds["simpo"], strict=True)]
    spans, features = store.read_array("spans"), next(iter(store.sites.values()))
    lengths = spans[:, 3] - spans[:, 0]
    chart = draw(arguments.page, memory)
    write_page(
        arguments.page,
        f"""# Training compared with TRL, {datetime.now(UTC):%Y-%m-%d}

{store.meta["model"]["architecture"]}, bfloat16, batches of {BATCH} pairs, at most
{arguments.max_length} tokens a sequence, activation checkpointing on; one optimiser step of each
contestant, alternating, {arguments.rounds} rounds after a warm-up. {store.pairs} real pairs of
{lengths.min()} to {lengths.max()} tokens, the prompt once ({lengths.mean():.0f} on average). One
site with {features["d_sae"]:,} features, K = {features["k"]}, k = 50.

{machine()}
Command: `python benchmarks/train.py --data PAIRS.jsonl --rounds {arguments.rounds}`.

| contestant | pairs/s | speed over {base}, round by round | peak GB | of {base}'s |
|---|---|---|---|---|
{rows}

{PRECISION if base == "trl_dpo" else ""}
fpo / simpo, round by round: time {middle(constraint, ".3f")}, peak memory
{memory["fpo"] / memory["simpo"]:.3f}.

![Peak memory of each method]({chart})
""",
    )


def draw(page: str, memory: dict[str, float]) -> str:
    """The paper's Figure 4, left: peak memory of every method. Returns the picture's name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots()
    names = list(reversed(memory))
    bars = axes.barh(
        [TITLES.get(name, name) for name in names],
        [memory[name] for name in names],
        color=["tab:gray" if name in TITLES else "tab:blue" for name in names],
    )
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_xlabel("peak memory, GB")
    axes.margins(x=0.12)
    name = f"{datetime.now(UTC):%Y-%m-%d}-{page}-memory.png"
    RESULTS.mkdir(exist_ok=True)
    for old in RESULTS.glob(f"????-??-??-{page}-memory.png"):
        old.unlink()
    figure.savefig(RESULTS / name, dpi=120)
    return name


if __name__ == "__main__":
    main()
