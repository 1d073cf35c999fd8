"""What the reference's n likeliest tokens in a store say of the sequential KL, and what they cost.

    .venv/bin/python benchmarks/distributions.py --model FOLDER --data PAIRS.jsonl

Writes a store for each n and dtype, and trains tdpo2 at two learning rates, from the store of
n = 64 and with the reference in memory: the two curves are compared step by step. For the policies
trained from the store, and those of --run, the bound of every store is compared with the exact KL,
which needs the reference. Blocks are cached with and without n = 64, by turns, in two processes.
Defaults are the demo's model and SAE (run `make demo` first) and this repository's pairs.

Shapes: N pairs; column 0 is chosen, column 1 rejected.
"""

import argparse
import gc
import json
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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

BLOCK = 8
DTYPES = ("float32", "float16")
# Stores by name: what the trainings read, and what the costs of caching are compared with.
TRAINED, WITHOUT = "64-float32", "0-float32"
CURVES = ("loss", "u", "margin", "kl_chosen", "kl_rejected")


class Curves(NamedTuple):
    """Two trainings that differ in where the KL comes from, step by step, and the policy of the
    one from the store."""

    store: dict[str, np.ndarray]
    reference: dict[str, np.ndarray]
    policy: Path


def main() -> None:
    """Write the stores, let the caching take turns, train, measure and write the page."""
    parser = turns_parser(__doc__, page="distributions", rounds=3)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 64, 256, 1024], metavar="n")
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-5, 1e-4])
    parser.add_argument("--run", nargs="*", default=[], help="folders of fpo train, other policies")
    arguments = parser.parse_args()
    if arguments.contestant:
        contend(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        stores = {
            f"{n}-{dtype}": store_of(arguments, folder, n, dtype)
            for n in sorted({64, *arguments.tokens})
            for dtype in DTYPES
        }
        store_of(arguments, folder, 0, "float32")
        words = [f"--model={arguments.model}", f"--store={folder}"]
        caching = take_turns([WITHOUT, TRAINED], words, arguments.rounds)
        curves = {lr: train_both(arguments, stores[TRAINED], folder, lr) for lr in arguments.lr}
        policies = {f"tdpo2, learning rate {lr:g}": both.policy for lr, both in curves.items()}
        policies |= {run: Path(run) / "final" for run in arguments.run}
        bounds = {title: measure(arguments, stores, path) for title, path in policies.items()}
        report(arguments, stores, caching, curves, bounds)


def store_of(arguments: argparse.Namespace, folder: str, n: int, dtype: str) -> Any:
    """A store with the n likeliest tokens; all have the same pairs."""
    return make_store(
        arguments, f"{folder}/{n}-{dtype}", BLOCK * (arguments.rounds + 1), block=BLOCK,
        dtype=arguments.dtype, distributions=str(n), distribution_dtype=dtype,
    )  # fmt: skip


def contend(arguments: argparse.Namespace) -> None:
    """Serve the blocks of one of the stores until the parent has enough."""
    line = take_stdout()
    from ours import serve_blocks

    from fpocli.store.reader import Store

    store = Store.open(f"{arguments.store}/{arguments.contestant}/ref.zarr")
    serve_blocks(line, store, arguments.model)


def train_both(arguments: argparse.Namespace, store: Any, folder: str, lr: float) -> Curves:
    """Train on all pairs once, from the store and with the reference."""
    from fpocli import TrainConfig, train

    finals = {}
    for exact in (False, True):
        config = TrainConfig(
            cache=str(store.path), method="tdpo2", exact_kl=exact, batch_size=BATCH, lr=lr,
            warmup=0, bf16=arguments.dtype == "bfloat16", out=f"{folder}/{lr:g}-{exact}",
        )  # fmt: skip
        finals[exact] = train(config)
        # The engine is part of cycles.
        gc.collect()
    curves = [curve(final.parent / "metrics.jsonl") for final in finals.values()]
    return Curves(*curves, finals[False])


def curve(file: Path) -> dict[str, np.ndarray]:
    """The metrics of a training, step by step."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    steps = [line for line in lines if line["split"] == "train"]
    return {name: np.array([step[name] for step in steps]) for name in CURVES}


def measure(
    arguments: argparse.Namespace, stores: dict[str, Any], policy: Path
) -> dict[str, np.ndarray]:
    """The KL of every response, [N, 2] in nats: "exact", and its bound by the name of the store."""
    import torch

    from fpocli.model.head import logprobs_and_bound, logprobs_and_kl
    from fpocli.model.language_model import load_model
    from fpocli.model.network import choose_device
    from fpocli.model.packing import default_packed_length
    from fpocli.scoring.loading import load_reference
    from fpocli.system.model_folder import find_model
    from fpocli.training.pair_loader import PairLoader

    device, dtype = choose_device(None), getattr(torch, arguments.dtype)
    model = load_model(find_model(str(policy)), [], dtype, device).eval()
    reference = load_reference(find_model(arguments.model), [], dtype, device)
    streams = [
        PairLoader(
            store, batch_size=BATCH, packed_length=default_packed_length(device), eval_fraction=0,
            seed=0, rank=0, world=1, sites=[],
        ).evaluation(device, "all", with_top=True)
        for store in stores.values()
    ]  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in ("exact", *stores)}
    with torch.inference_mode():
        for micros in zip(*streams, strict=True):
            batch = micros[0].batch
            # The decoder runs once, for all of the stores.
            head = model.network, model.states(batch)[0], batch.targets
            other = reference(batch)
            kl = {"exact": logprobs_and_kl(*head, other.network, other.final)[1]}
            for name, micro in zip(stores, micros, strict=True):
                kl[name] = logprobs_and_bound(*head, micro.top)[1]
            for name, tokens in kl.items():
                found[name] += [part.sum().item() for part in tokens.double().split(batch.counts)]
    return {name: np.array(values).reshape(-1, 2) for name, values in found.items()}


# -- the page --------------------------------------------------------------------------------------


def report(
    arguments: argparse.Namespace,
    stores: dict[str, Any],
    caching: dict[str, list[dict[str, Any]]],
    curves: dict[float, Curves],
    bounds: dict[str, dict[str, np.ndarray]],
) -> None:
    """The page."""
    store = stores[TRAINED]
    scored = store.meta["distribution_rows"]["scored"]
    steps = {len(both.store["loss"]) for both in curves.values()}.pop()
    of_policies = "\n\n".join(
        f"{title}: the exact KL is {kl['exact'].sum() / scored:.4f} nats per token, "
        f"{kl['exact'].mean():.3g} per response.\n\n{table_of_bounds(arguments.tokens, kl)}"
        for title, kl in bounds.items()
    )
    write_page(
        arguments.page,
        f"""# The reference's distributions in the store, {datetime.now(UTC):%Y-%m-%d}

{store.meta["model"]["architecture"]}, {arguments.dtype}, {store.pairs} real pairs of at most
{arguments.max_length} tokens a sequence; {scored:,} scored positions.

{machine()}
Command: `python benchmarks/distributions.py --data PAIRS.jsonl --rounds {
            arguments.rounds
        } --dtype {arguments.dtype}`.

## What is stored

{table_of_stores(arguments.tokens, stores)}

Coverage is the probability of the n tokens together, over positions. The last four columns are
bytes of a scored position: before compression, and all files of `ref/top` by their positions.

## How much of the KL it gives

{of_policies}

Share: the sum of all bounds, of the sum of all KLs. Correlations are between bound and KL, over
responses, and over pairs of K(l) - K(w). The last two columns are the difference of a response's
bound from the stores of float16 and float32, in nats.

## Training from the store

tdpo2 on the same pairs in {steps} steps of {BATCH} pairs, same order, constant learning rate, from
n = 64 and with the reference in memory.

{table_of_curves(curves)}

The mean size is that with the reference.

## Caching

Blocks of {BLOCK} pairs by turns, {arguments.rounds} rounds after a warm-up, with one site of
{next(iter(store.sites.values()))["d_sae"]:,} features. Compressing and writing are included; `fpo
cache` does both in a thread during the next block. Ratios are block by block.

{table_of_caching(caching)}
""",
    )


def table_of_stores(counts: list[int], stores: dict[str, Any]) -> str:
    """Coverage and bytes by n."""
    heads = ("n", "coverage", "5th percentile", "float32", "on disk", "float16", "on disk")
    rows = []
    for n in counts:
        both = [stores[f"{n}-{dtype}"] for dtype in DTYPES]
        rest = np.concatenate([both[0].rest(block) for block in range(both[0].blocks)])
        coverage = -np.expm1(rest.astype(np.float64))
        row = [f"{n:,}", f"{coverage.mean():.4f}", f"{np.percentile(coverage, 5):.4f}"]
        for store in both:
            row += [f"{store.distributions.row_bytes:,}", f"{bytes_on_disk(store):,.0f}"]
        rows.append(row)
    return table(heads, rows)


def bytes_on_disk(store: Any) -> float:
    """Bytes of a store's distributions per scored position."""
    files = (store.path / "ref/top").rglob("*")
    size = sum(file.stat().st_size for file in files if file.is_file())
    return size / store.meta["distribution_rows"]["scored"]


def table_of_bounds(counts: list[int], kl: dict[str, np.ndarray]) -> str:
    """How near the bounds are to the KL of a policy, by n."""

    def correlation(one: np.ndarray, other: np.ndarray) -> str:
        return f"{np.corrcoef(one.ravel(), other.ravel())[0, 1]:.4f}"

    heads = ("n", "share", "over responses", "over margins", "float16, mean", "float16, largest")
    exact, rows = kl["exact"], []
    for n in counts:
        bound, rounded = (kl[f"{n}-{dtype}"] for dtype in DTYPES)
        error = np.abs(rounded - bound)
        margins = (np.diff(values, axis=1) for values in (bound, exact))
        correlations = correlation(bound, exact), correlation(*margins)
        share = bound.sum() / exact.sum()
        errors = f"{error.mean():.1e}", f"{error.max():.1e}"
        rows.append((f"{n:,}", f"{share:.4f}", *correlations, *errors))
    return table(heads, rows)


def table_of_curves(curves: dict[float, Curves]) -> str:
    """The largest differences of two trainings."""
    heads = ("learning rate", "value", "largest difference", "in step", "mean size")
    rows = []
    for lr, both in curves.items():
        for name, values in both.reference.items():
            apart = np.abs(both.store[name] - values)
            size = f"{np.abs(values).mean():.1e}"
            rows.append((f"{lr:g}", name, f"{apart.max():.1e}", str(apart.argmax() + 1), size))
    return table(heads, rows)


def table_of_caching(caching: dict[str, list[dict[str, Any]]]) -> str:
    """What the distributions add to a block."""
    heads = ("blocks", "pairs/s", "time, of that without", "compressing and writing", "peak GB")
    rows = []
    for name, title in ((WITHOUT, "without distributions"), (TRAINED, "with n = 64")):
        rounds, base = caching[name][1:], caching[WITHOUT][1:]
        seconds = [block["seconds"] for block in rounds]
        ratios = (own / other["seconds"] for own, other in zip(seconds, base, strict=True))
        written = (block["write"] / block["seconds"] for block in rounds)
        peak = max(block["peak"] for block in caching[name]) / 1e9
        shown = middle(ratios, ".3f"), middle(written, ".1%"), f"{peak:.2f}"
        rows.append((title, f"{BLOCK / statistics.median(seconds):.2f}", *shown))
    return table(heads, rows)


if __name__ == "__main__":
    main()
