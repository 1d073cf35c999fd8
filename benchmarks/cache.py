"""Caching compared with TRL's precomputation, and with the bare forward pass.

    .venv/bin/python benchmarks/cache.py --model FOLDER --sae FOLDER --layer N --data PAIRS.jsonl

Each contestant is a separate process and takes its turn on the same 16 pairs, in the same dtype:
TRL in batches of 4, fpo as a block: scored in packed sequences, features pooled, the largest taken,
compressed and written. The bare forward pass scores the same packed sequences and keeps nothing.
Defaults are the demo's model and SAE (run `make demo` first) and this repository's pairs.
"""

import argparse
import statistics
import tempfile
import time
from datetime import UTC, datetime
from typing import Any

from common import (
    BATCH,
    machine,
    make_store,
    middle,
    serve,
    take_stdout,
    take_turns,
    turns_parser,
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
    arguments = turns_parser(__doc__, page="cache", rounds=3).parse_args()
    if arguments.contestant:
        line = take_stdout()
        {"trl": trl, "fpo": fpo, "bare": bare}[arguments.contestant](arguments, line)
        return
    names = [name for name in NAMES if name not in arguments.without]
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(arguments, folder, BLOCK * (arguments.rounds + 1), block=BLOCK)
        words = [f"--model={arguments.model}", f"--store={store.path}"]
        report(arguments, take_turns(names, words, arguments.rounds), store)


# -- the contestants -------------------------------------------------------------------------------


def fpo(arguments: argparse.Namespace, line: Any) -> None:
    """What `fpo cache` does for a block."""
    from ours import serve_blocks

    from fpocli.store.reader import Store

    serve_blocks(line, Store.open(arguments.store), arguments.model)


def bare(arguments: argparse.Namespace, line: Any) -> None:
    """The same packed sequences through the model, and nothing else."""
    import torch

    from fpocli.model.attention import length_multiple
    from fpocli.model.language_model import load_model
    from fpocli.model.network import choose_device
    from fpocli.model.packing import default_packed_length, pack, plan_packing
    from fpocli.store.reader import Store
    from fpocli.system.model_folder import find_model
    from fpocli.training.memory import peak_memory

    device = choose_device(None)
    store = Store.open(arguments.store)
    model = load_model(find_model(arguments.model), [], torch.bfloat16, device).eval()

    def block(number: int) -> dict[str, Any]:
        tokens = store.tokens(number)
        pairs = [tokens.pair(row) for row in range(len(tokens))]
        rows = plan_packing([len(pair) for pair in pairs], default_packed_length(device))
        batches = [
            pack([pairs[i] for i in row], length_multiple(device)).to(device) for row in rows
        ]
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

    from fpocli.model.network import choose_device
    from fpocli.store.reader import Store
    from fpocli.training.memory import peak_memory

    store = Store.open(arguments.store)
    rows = peers.rows_of(store, list(range(store.pairs)))
    with tempfile.TemporaryDirectory() as out:
        trainer = peers.dpo(arguments.model, rows.select(range(4)), out, torch.bfloat16)

        def block(number: int) -> dict[str, Any]:
            mine = [rows[i] for i in range(BLOCK * number, BLOCK * (number + 1))]
            began = time.perf_counter()
            for start in range(0, BLOCK, BATCH):
                peers.reference_logps(trainer, mine[start : start + BATCH])[0].sum().item()
            seconds = time.perf_counter() - began
            return {"seconds": seconds, "peak": peak_memory(choose_device(None))}

        serve(line, block)


# -- the result ------------------------------------------------------------------------------------


def report(
    arguments: argparse.Namespace, figures: dict[str, list[dict[str, Any]]], store: Any
) -> None:
    """The page."""
    seconds = {name: [f["seconds"] for f in rounds[1:]] for name, rounds in figures.items()}
    memory = {name: max(f["peak"] for f in rounds) / 1e9 for name, rounds in figures.items()}

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
    spans, features = store.read_array("spans"), next(iter(store.sites.values()))
    lengths = spans[:, 3] - spans[:, 0]
    write_page(
        arguments.page,
        f"""# Caching compared with TRL, {datetime.now(UTC):%Y-%m-%d}

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

fpo cache / bare forward pass over the same sequences: {against("fpo", "bare")}. Compressing and
writing took {middle(written, ".1%")} of a block; `fpo cache` does it in a thread during the next
block, here it is added.
""",
    )


if __name__ == "__main__":
    main()
