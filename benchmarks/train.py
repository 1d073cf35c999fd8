"""Training beside TRL: pairs per second and peak memory, one optimiser step of each in turn.

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
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Any

from common import (
    RESULTS,
    Contestant,
    machine,
    middle,
    model_width,
    random_sae,
    serve,
    take_stdout,
    write_page,
)

OURS = ("fpo", "dpo_norm", "simpo", "dpo")
TITLES = {
    "trl_dpo": "trl_dpo: TRL DPO, bf16 weights and optimiser",
    "trl_dpo_master": "TRL DPO, float32 weights, bf16 autocast",
    "trl_simpo": "TRL SimPO, bf16 weights and optimiser",
}
PRECISION = """fpo keeps float32 master weights and float32 moments beside bfloat16 weights, and
so does TRL with float32 weights under autocast. With bfloat16 weights TRL has no master weights and
bfloat16 moments: 8 bytes a weight less, and steps of a small learning rate are lost.
"""
BATCH = 4


def main() -> None:
    """Let all contestants take turns and write the page and the chart."""
    arguments = parse()
    if arguments.contestant:
        contend(arguments)
        return
    names = [name for name in (*OURS, *TITLES) if name not in arguments.without]
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/ref.zarr"
        prepare(arguments, store)
        words = [f"--model={arguments.model}", f"--store={store}", f"--rounds={arguments.rounds}"]
        figures: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        with ExitStack() as stack:
            contestants = {}
            for name in names:
                contestants[name] = Contestant([*words, f"--contestant={name}"])
                stack.callback(contestants[name].close)
            for number in range(arguments.rounds + 1):
                for name in names if number % 2 else reversed(names):
                    figures[name].append(contestants[name].round(number))
        from fpocli.store import Store

        report(arguments, figures, Store.open(store))


def parse() -> argparse.Namespace:
    """Arguments of the benchmark and of its contestants."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo/SmolLM2-135M-Instruct")
    parser.add_argument("--sae", default="demo/sae")
    parser.add_argument("--features", type=int, help="a random SAE of so many, not --sae")
    parser.add_argument("--layer", type=int, default=24)
    parser.add_argument("--data", default="examples/preferences.jsonl")
    parser.add_argument("--rounds", type=int, default=5, help="steps that count")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--page", default="train", help="name of the result's page")
    parser.add_argument("--without", nargs="*", default=[], help="contestants to leave out")
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(arguments: argparse.Namespace, out: str) -> None:
    """The store of the pairs that are trained on: a warm-up step and the rounds."""
    from fpocli import CacheConfig, cache

    sae = arguments.sae
    if arguments.features:
        sae = random_sae(f"{out}.sae", model_width(arguments.model), arguments.features)
    cache(
        CacheConfig(
            model=arguments.model,
            layer=[arguments.layer],
            sae=[sae],
            data=arguments.data,
            limit=BATCH * (arguments.rounds + 1),
            max_length=arguments.max_length,
            max_prompt_length=arguments.max_length - 1,
            out=out,
        )
    )


# -- one contestant --------------------------------------------------------------------------------


def contend(arguments: argparse.Namespace) -> None:
    """Serve optimiser steps until the parent has enough."""
    line = take_stdout()
    (theirs if arguments.contestant in TITLES else ours)(arguments, line)


def ours(arguments: argparse.Namespace, line: Any) -> None:
    """fpo's loop, one step for each round."""
    import torch

    from fpocli.batches import default_tokens_per_row
    from fpocli.catalog import find_model
    from fpocli.config import TrainConfig
    from fpocli.engine import backward, deepspeed_config, make_engine, start_processes, take_step
    from fpocli.losses import METHODS
    from fpocli.model import Site, choose_device, load_model
    from fpocli.objective import objective
    from fpocli.scoring import score
    from fpocli.sparse import load_encoder
    from fpocli.store import Store
    from fpocli.stream import Stream
    from fpocli.training import peak_memory

    device = choose_device(None)
    start_processes(device)
    store = Store.open(arguments.store)
    config = TrainConfig(cache=arguments.store, method=arguments.contestant, batch_size=BATCH)
    sites = [Site.parse(name) for name in store.sites]
    model = load_model(find_model(arguments.model), sites, torch.bfloat16, device)
    model.network.activation_checkpointing_enable()
    encoders = {
        name: load_encoder(about["sae"]["source"], device)
        for name, about in store.sites.items()
        if "features" in METHODS[config.method].needs
    }
    engine = make_engine(model, config, deepspeed_config(config))
    stream = Stream(
        store, batch_size=BATCH, tokens_per_row=default_tokens_per_row(device), eval_fraction=0,
        seed=0, rank=0, world=1,
    )  # fmt: skip
    steps = iter(stream.steps(0, stream.steps_per_epoch, device))

    def step(number: int) -> dict[str, Any]:
        began = time.perf_counter()
        engine.train()
        rows = next(steps)
        for row in rows:
            scores = score(engine, encoders, row.batch)
            loss, _ = objective(scores, row.reference, encoders, config)
            backward(engine, (row.weights * loss).sum(), row is rows[-1])
        take_step(engine, config.lr)
        return {"seconds": time.perf_counter() - began, "peak": peak_memory(device)}

    serve(line, step)


def theirs(arguments: argparse.Namespace, line: Any) -> None:
    """TRL's own training loop, held before each step until its turn comes."""
    import numpy as np
    import peers
    import torch
    from transformers import TrainerCallback

    from fpocli.model import choose_device
    from fpocli.store import Store
    from fpocli.stream import Stream
    from fpocli.training import peak_memory

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
    stream = Stream(
        store, batch_size=BATCH, tokens_per_row=1, eval_fraction=0, seed=0, rank=0, world=1
    )
    order = np.concatenate([stream.pairs(step) for step in range(stream.steps_per_epoch)])
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
    memory = {name: rounds[-1]["peak"] / 1e9 for name, rounds in figures.items()}
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
    spans, features = store.whole("spans"), next(iter(store.sites.values()))
    lengths = spans[:, 3] - spans[:, 0]
    chart = draw(arguments.page, memory)
    write_page(
        arguments.page,
        f"""# Training beside TRL, {datetime.now(UTC):%Y-%m-%d}

{store.meta["model"]["architecture"]}, bfloat16, batches of {BATCH} pairs, at most
{arguments.max_length} tokens a sequence, activation checkpointing on; one optimiser step of each
contestant in turn, {arguments.rounds} rounds after a warm-up. {store.pairs} real pairs of
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
    figure.savefig(RESULTS / name, dpi=120)
    return name


if __name__ == "__main__":
    main()
