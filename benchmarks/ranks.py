"""One store read by 64 ranks: bytes, seconds and memory per rank, and how even their work is.

    .venv/bin/python benchmarks/ranks.py --data PAIRS.jsonl

A store with made-up values and the lengths of real pairs, drawn again and again, is read for an
epoch as each of 1, 8 and 64 ranks would read it, one after the other in one process; nothing is
computed. Bytes are those that the process reads from files (rchar of /proc/self/io). A second,
smaller store has next-token distributions.
"""

import argparse
import gc
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import store as made
import torch
from common import forget_peak, machine, measure_parser, memory, table, write_page
from scaling import store_attributes

from fpocli.data.top_tokens import TopTokens
from fpocli.model.packing import plan_packing
from fpocli.store.place import Folder
from fpocli.store.reader import Store
from fpocli.store.records import TokenPairs
from fpocli.store.schema import raw_bytes
from fpocli.store.writer import StoreWriter
from fpocli.system.console import progress
from fpocli.training.pair_loader import PairLoader

LIKELIEST = 64  # tokens of a distribution in the second store


def main() -> None:
    """Make the stores, read them as every rank, and write the page."""
    parser = measure_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=8192)
    parser.add_argument("--with-distributions", type=int, default=512, help="pairs of the second")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--packed-length", type=int, default=8192)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lengths = real_lengths(arguments)
    with tempfile.TemporaryDirectory() as name:
        plain, top = Path(name) / "plain.zarr", Path(name) / "top.zarr"
        make(plain, draw(lengths, arguments.pairs), 0)
        make(top, draw(lengths, arguments.with_distributions), LIKELIEST)
        rows = []
        for path, with_top in ((plain, False), (top, True)):
            rows += [
                measure(path, arguments, world, with_top=with_top) for world in arguments.ranks
            ]
        report(arguments, lengths, rows, sizes(plain))


def real_lengths(arguments: argparse.Namespace) -> np.ndarray:
    """Tokens of prompt, chosen and rejected of every pair of the data: [n, 3]."""
    from fpocli.data.dropped import DroppedRows
    from fpocli.data.layouts import read_pairs
    from fpocli.data.pair_tokenizer import PairTokenizer
    from fpocli.data.sources import open_source
    from fpocli.system.model_folder import find_model

    folder, most = find_model(arguments.model), arguments.max_length
    source = open_source(arguments.data, None, None)
    tokenize = PairTokenizer(folder, None, most, most - 1, DroppedRows())
    pairs = tokenize(read_pairs(source, tokenize.dropped))
    return np.array([[len(pair.prompt), len(pair.chosen), len(pair.rejected)] for pair in pairs])


def draw(lengths: np.ndarray, pairs: int) -> TokenPairs:
    """Pairs of these lengths, with random ids."""
    rng = np.random.default_rng(0)
    ends = lengths[rng.integers(0, len(lengths), pairs)].cumsum().reshape(-1, 3)
    return TokenPairs(
        ids=(made.VOCABULARY ** rng.random(ends[-1, -1])).astype(np.uint32),
        spans=np.column_stack([np.concatenate([[0], ends[:-1, -1]]), ends]),
        source_row=np.arange(pairs),
    )


def make(path: Path, tokens: TokenPairs, likeliest: int) -> None:
    """Write a store, with distributions of so many tokens unless 0."""
    rng = np.random.default_rng(0)
    pool = made.make_block(rng)
    about = made.attributes(len(tokens))
    if likeliest:
        vocabulary = {"n": likeliest, "dtype": "float32", "vocabulary": made.VOCABULARY}
        about["distributions"] = vocabulary
    store = StoreWriter.create(Folder(path), about, tokens)
    with progress("Writing a store", store.blocks) as bar:
        for block in range(store.blocks):
            top = None
            if likeliest:
                scored = int(tokens.counts[store.pairs_in(block)].sum())
                ids = rng.integers(0, made.VOCABULARY, (scored, likeliest), np.uint32)
                logp = -np.sort(rng.exponential(4, (scored, likeliest)).astype(np.float32)) - 3
                top = TopTokens(ids, logp, np.full(scored, -1, np.float32))
            reference = made.first(pool[0], store.block_length(block))
            store.write_block(block, reference, {made.SITE: pool[1]}, top)
            bar.advance()
    store.finish()


def measure(
    path: Path, arguments: argparse.Namespace, world: int, *, with_top: bool
) -> dict[str, Any]:
    """Read an epoch as each of `world` ranks."""
    store = Store.open(path)
    epochs = [read(store, arguments, rank, world, with_top) for rank in range(world)]
    work = np.array([epoch["work"] for epoch in epochs])
    content = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {
        "pairs": f"{store.pairs:,}" + f", distributions of {LIKELIEST}" * with_top,
        "ranks": str(world),
        "store MB": f"{content / 1e6:,.1f}",
        "read MB per rank": f"{np.mean([epoch['bytes'] for epoch in epochs]) / 1e6:,.1f}",
        "of the store": f"{np.mean([epoch['bytes'] for epoch in epochs]) / content:.2f}",
        "ms per step": f"{1e3 * np.median([epoch['seconds'] for epoch in epochs]):.1f}",
        "peak MB": f"{np.max([epoch['peak'] for epoch in epochs]):,.0f}",
        "longest rank / mean": f"{(work.max(0) / work.mean(0)).mean():.3f}",
    }


def read(
    store: Store, arguments: argparse.Namespace, rank: int, world: int, with_top: bool
) -> dict[str, Any]:
    """Read an epoch as one rank.

    Returns:
        bytes read, seconds a step, the most MB held beyond what was before, and the tokens that
        this rank has to score in each step but the last, which may be shorter.
    """
    gc.collect()
    forget_peak()
    before, held, began = bytes_read(), memory("VmRSS"), time.perf_counter()
    loader = PairLoader(
        store,
        batch_size=arguments.batch_size,
        packed_length=arguments.packed_length,
        eval_fraction=0.0,
        seed=0,
        rank=rank,
        world=world,
    )
    steps = loader.steps(0, loader.steps_per_epoch, torch.device("cpu"), with_top=with_top)
    work = [sum(len(micro.batch.ids) for micro in step) for step in steps]
    return {
        "bytes": bytes_read() - before,
        "seconds": (time.perf_counter() - began) / loader.steps_per_epoch,
        "peak": memory("VmHWM") - held,
        "work": work[:-1] or work,
    }


def bytes_read() -> int:
    """What this process has read so far, whether from the disk or the page cache."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def balance(lengths: np.ndarray, batch: int, ranks: int, budget: int, steps: int = 50) -> float:
    """Tokens of the rank that has most over the ranks' mean, mean over steps; without reading."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(steps):
        tokens = lengths[rng.integers(0, len(lengths), batch)].sum(1).tolist()
        packed = plan_packing(tokens, budget, ranks)
        work = [sum(tokens[i] for row in packed[r::ranks] for i in row) for r in range(ranks)]
        found.append(max(work) / (sum(work) / ranks))
    return float(np.mean(found))


def sizes(path: Path) -> tuple[int, int, int]:
    """Bytes of a store: by the formula, in memory and on disk, without padding of distributions."""
    store = Store.open(path)
    scored = sum(int(store.tokens(block).counts.sum()) for block in range(store.blocks))
    formula = raw_bytes(store_attributes(store.pairs, store.meta["tokens"], scored))
    there = sum(store.read_array(name).nbytes for name in store.sizes() if "blocks/" not in name)
    blocks = sum(raw for name, (raw, _) in store.sizes().items() if "blocks/" in name)
    return formula, there + blocks, sum(stored for _, stored in store.sizes().values())


def report(
    arguments: argparse.Namespace,
    lengths: np.ndarray,
    rows: list[dict[str, str]],
    found: tuple[int, int, int],
) -> None:
    """The page."""
    formula, there, stored = found
    prompt, chosen, rejected = lengths.mean(0)
    ranked = [ranks for ranks in arguments.ranks if ranks > 1]
    even = [
        [str(batch)]
        + [f"{balance(lengths, batch, ranks, arguments.packed_length):.3f}" for ranks in ranked]
        for batch in (32, 64, 128, 256, 1024)
    ]
    write_page(
        "ranks",
        f"""# One store, many ranks, {datetime.now(UTC):%Y-%m-%d}

A store with one site of {made.D_SAE:,} features, K = {made.K}, in blocks of {made.BLOCK:,}, and
the lengths of {len(lengths):,} real pairs: {prompt:.0f} tokens of prompt, {chosen:.0f} and
{rejected:.0f}
of the responses on average, at most {arguments.max_length} of a prompt and a response together.
An epoch in steps of {arguments.batch_size} pairs and sequences of {arguments.packed_length:,},
read as each rank in turn, in one process; the page cache is warm. Seconds are those of the loader
alone. "longest rank / mean": tokens of the rank that has most to score in a step over the ranks'
mean, averaged over the steps. Later ranks use the memory that the first one took.

{machine()}
Command: `python benchmarks/ranks.py --data PAIRS.jsonl`.

{table(rows[0], (row.values() for row in rows))}

Every rank reads every block: the pairs of a step are shuffled over windows of four blocks, so each
block has pairs of each rank, and a block is a chunk, which is read whole. What a rank reads in an
epoch is therefore the store once, however many ranks there are, and with distributions its own
pairs' in whole chunks besides. Ranks of a host share the page cache.

The same ratio for other numbers of pairs in a step, 50 steps each, from the lengths alone:

{table(("pairs of a step", *(f"{ranks} ranks" for ranks in ranked)), even)}

The first store takes {formula:,} bytes by the formula of docs/scaling.md and {there:,} in memory;
{stored:,} on disk, compressed.
""",
    )


if __name__ == "__main__":
    main()
