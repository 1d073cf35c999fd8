"""Caching beside TRL's precomputation, and what fpo does on top of the bare forward pass.

    .venv/bin/python benchmarks/cache.py --model FOLDER --sae FOLDER --layer N --data PAIRS.jsonl

Each contestant is a process of its own and takes its turn on the same 16 pairs, in the same dtype:
TRL in batches of 4, fpo as a block: scored in packed rows, features pooled, the largest taken,
compressed and written. The bare forward pass scores the same rows and keeps nothing. Defaults are
the demo's model and SAE (run `make demo` first) and this repository's pairs.
"""

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import (
    Contestant,
    machine,
    middle,
    model_width,
    random_sae,
    serve,
    take_stdout,
    write_page,
)

BLOCK = 16
NAMES = {
    "fpo": "fpo cache",
    "bare": "the bare forward pass",
    "trl": "TRL's precomputation (log-probabilities only)",
}


def main() -> None:
    """Let the contestants take turns and write the page."""
    arguments = parse()
    if arguments.contestant:
        line = take_stdout()
        {"trl": trl, "fpo": fpo, "bare": bare}[arguments.contestant](arguments, line)
        return
    from fpocli import CacheConfig, cache

    names = [name for name in NAMES if name not in arguments.without]
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        sae = arguments.sae
        if arguments.features:
            sae = random_sae(f"{folder}/sae", model_width(arguments.model), arguments.features)
        store = cache(
            CacheConfig(
                model=arguments.model,
                layer=[arguments.layer],
                sae=[sae],
                data=arguments.data,
                limit=BLOCK * (arguments.rounds + 1),
                max_length=arguments.max_length,
                max_prompt_length=arguments.max_length - 1,
                block=BLOCK,
                out=f"{folder}/ref.zarr",
            )
        )
        words = [f"--model={arguments.model}", f"--store={store.path}"]
        contestants = {}
        for name in names:
            contestants[name] = Contestant([*words, f"--contestant={name}"])
            stack.callback(contestants[name].close)
        for number in range(arguments.rounds + 1):
            for name in names if number % 2 else reversed(names):
                figures[name].append(contestants[name].round(number))
        report(arguments, figures, store)


def parse() -> argparse.Namespace:
    """Arguments of the benchmark and of its contestants."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo/SmolLM2-135M-Instruct")
    parser.add_argument("--sae", default="demo/sae")
    parser.add_argument("--features", type=int, help="a random SAE of so many, not --sae")
    parser.add_argument("--layer", type=int, default=24)
    parser.add_argument("--data", default="examples/preferences.jsonl")
    parser.add_argument("--rounds", type=int, default=3, help="blocks that count")
    parser.add_argument("--max-length", dest="max_length", type=int, default=512)
    parser.add_argument("--without", nargs="*", default=[], help="contestants to leave out")
    parser.add_argument("--page", default="cache", help="name of the result's page")
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    return parser.parse_args()


# -- the contestants -------------------------------------------------------------------------------


def fpo(arguments: argparse.Namespace, line: Any) -> None:
    """What fpo cache does for a block."""
    import torch

    from fpocli.batches import default_tokens_per_row
    from fpocli.blocks import score_block
    from fpocli.catalog import find_model
    from fpocli.console import progress
    from fpocli.model import Site, choose_device, load_model
    from fpocli.rows import Tokens
    from fpocli.sparse import load_encoder
    from fpocli.store import Store
    from fpocli.training import peak_memory

    device = choose_device(None)
    store = Store.open(arguments.store)
    tokens = Tokens(*(store.whole(name) for name in ("tokens", "spans", "source_row")))
    with tempfile.TemporaryDirectory() as folder:
        out = Store.create(Path(folder) / "ref.zarr", dict(store.meta), tokens)
        sites = [Site.parse(name) for name in store.sites]
        model = load_model(find_model(arguments.model), sites, torch.bfloat16, device).eval()
        encoders = {
            name: load_encoder(about["sae"]["source"], device)
            for name, about in store.sites.items()
        }

        def block(number: int) -> dict[str, Any]:
            began = time.perf_counter()
            with progress("", 1) as bar:
                budget = default_tokens_per_row(device)
                rows = score_block(model, encoders, out, out.tokens(number), budget, bar)
                scored = time.perf_counter()
                out.write_block(number, *rows)
            now = time.perf_counter()
            return {"seconds": now - began, "write": now - scored, "peak": peak_memory(device)}

        serve(line, block)


def bare(arguments: argparse.Namespace, line: Any) -> None:
    """The same rows through the model, and nothing else."""
    import torch

    from fpocli.attention import row_multiple
    from fpocli.batches import default_tokens_per_row, fill_rows, pack
    from fpocli.catalog import find_model
    from fpocli.model import choose_device, load_model
    from fpocli.store import Store
    from fpocli.training import peak_memory

    device = choose_device(None)
    store = Store.open(arguments.store)
    model = load_model(find_model(arguments.model), [], torch.bfloat16, device).eval()

    def block(number: int) -> dict[str, Any]:
        tokens = store.tokens(number)
        pairs = [tokens.pair(row) for row in range(len(tokens))]
        rows = fill_rows([len(pair) for pair in pairs], default_tokens_per_row(device))
        batches = [pack([pairs[i] for i in row], row_multiple(device)).to(device) for row in rows]
        began = time.perf_counter()
        with torch.inference_mode():
            for batch in batches:
                model(batch)[0].sum().item()
        return {"seconds": time.perf_counter() - began, "peak": peak_memory(device)}

    serve(line, block)


def trl(arguments: argparse.Namespace, line: Any) -> None:
    """TRL's own function for a batch, as its constructor calls it."""
    import peers
    import torch

    from fpocli.model import choose_device
    from fpocli.store import Store
    from fpocli.training import peak_memory

    store = Store.open(arguments.store)
    rows = peers.rows_of(store, list(range(store.pairs)))
    with tempfile.TemporaryDirectory() as out:
        trainer = peers.dpo(arguments.model, rows.select(range(4)), out, torch.bfloat16)

        def block(number: int) -> dict[str, Any]:
            mine = [rows[i] for i in range(BLOCK * number, BLOCK * (number + 1))]
            began = time.perf_counter()
            for start in range(0, BLOCK, peers.BATCH):
                batch = trainer.data_collator(mine[start : start + peers.BATCH])
                batch = {name: part.to(trainer.model.device) for name, part in batch.items()}
                trainer.compute_ref_log_probs(trainer.model, batch)[0].sum().item()
            seconds = time.perf_counter() - began
            return {"seconds": seconds, "peak": peak_memory(choose_device(None))}

        serve(line, block)


# -- the result ------------------------------------------------------------------------------------


def report(
    arguments: argparse.Namespace, figures: dict[str, list[dict[str, Any]]], store: Any
) -> None:
    """The page."""
    seconds = {name: [f["seconds"] for f in rounds[1:]] for name, rounds in figures.items()}
    memory = {name: rounds[-1]["peak"] / 1e9 for name, rounds in figures.items()}

    base = "trl" if "trl" in figures else "bare"

    def against(name: str, other: str) -> str:
        return middle(a / b for a, b in zip(seconds[name], seconds[other], strict=True))

    rows = "\n".join(
        f"| {title} | {BLOCK / statistics.median(seconds[name]):.2f} | {against(base, name)} | "
        f"{memory[name]:.2f} |"
        for name, title in NAMES.items()
        if name in figures
    )
    written = [f["write"] / f["seconds"] for f in figures["fpo"][1:]]
    spans, features = store.whole("spans"), next(iter(store.sites.values()))
    lengths = spans[:, 3] - spans[:, 0]
    write_page(
        arguments.page,
        f"""# Caching beside TRL, {datetime.now(UTC):%Y-%m-%d}

{store.meta["model"]["architecture"]}, bfloat16, at most {arguments.max_length} tokens a sequence,
blocks of {BLOCK} pairs in turn, {arguments.rounds} rounds after a warm-up. {store.pairs} real
pairs of {lengths.min()} to {lengths.max()} tokens, the prompt once ({lengths.mean():.0f} on
average). fpo also takes the features of a site: {features["d_sae"]:,} of them, K =
{features["k"]}.

{machine()}
Command: `python benchmarks/cache.py --data PAIRS.jsonl --rounds {arguments.rounds}`.

| | pairs/s | speed over {base}, round by round | peak GB |
|---|---|---|---|
{rows}

fpo cache / bare forward pass over the same rows: {against("fpo", "bare")}. Compressing and
writing took {middle(written, ".1%")} of a block; `fpo cache` does it in a thread beside the next
block, here it is added.
""",
    )


if __name__ == "__main__":
    main()
