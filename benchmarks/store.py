"""The store's size and speed: bytes per pair, writing, opening, reading in order, streaming.

`.venv/bin/python benchmarks/store.py --pairs 10000 100000 1000000`; a million pairs take about
5 GB of disk and 4 GB of memory. The content is made up, with the layout of a real store: one site
of 16,384 features, K = 256, texts as long as UltraFeedback's. What is read is read in a fresh
process, after its pages were dropped from the page cache. The result goes to benchmarks/results/
as Markdown.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import forget_peak, machine, memory, write_page

from fpocli.features.top_features import TopFeatures
from fpocli.store.place import Folder
from fpocli.store.reader import Store
from fpocli.store.records import FeatureTotals, ReferenceValues, TokenPairs
from fpocli.store.writer import StoreWriter
from fpocli.system.console import progress
from fpocli.training.pair_loader import PairLoader

SITE, D_SAE, K, BLOCK, VOCABULARY = "layer_12.resid_post", 16_384, 256, 1024, 256_000
BATCH_SIZE, TOKENS_PER_ROW = 32, 8192
# The content of this many made-up blocks is used in turn; only the tokens of each block differ.
POOL = 4


def main() -> None:
    """Measure every size and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--folder", type=Path, help="where stores are made, for a while")
    arguments = parser.parse_args()
    rows = []
    with progress("Measuring", len(arguments.pairs)) as bar:
        for pairs in arguments.pairs:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                rows.append((pairs, *measure(Path(folder) / "ref.zarr", pairs)))
            bar.advance()
    write(rows)


def measure(path: Path, pairs: int) -> tuple[float, ...]:
    """Bytes per pair, pairs/s written, and what `read` measures."""
    seconds = make(path, pairs)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return size / pairs, pairs / seconds, *process.submit(read, path).result()


def make(path: Path, pairs: int) -> float:
    """Write a store; the seconds that the store took."""
    rng = np.random.default_rng(0)
    tokens = make_tokens(rng, pairs)
    pool = [make_block(rng) for _ in range(POOL)]
    began = time.perf_counter()
    store = StoreWriter.create(Folder(path), attributes(pairs), tokens)
    for block in range(store.blocks):
        reference, totals = pool[block % POOL]
        store.write_block(block, first(reference, store.block_length(block)), {SITE: totals})
    store.finish()
    return time.perf_counter() - began


def attributes(pairs: int) -> dict[str, Any]:
    """The metadata of a store, made up."""
    made = {"source": "random", "revision": None}
    layer, kind = SITE.removeprefix("layer_").split(".")
    sae = {"source": "random", "architecture": "jumprelu", "hash": ""}
    site = {"layer": int(layer), "kind": kind, "sae": sae, "k": K, "d_sae": D_SAE}
    return {
        "block": BLOCK,
        "pairs": {"read": pairs, "kept": pairs, "dropped": {}},
        "sites": {SITE: site | {"value_dtype": "float32"}},
        "writer": {},
        "data": made | {"split": None, "fingerprint": ""},
        "tokenizer": made | {"vocabulary": "", "chat_template": {"name": "none", "text": ""}},
        "limits": {"max_length": 2048, "max_prompt_length": 1024},
        "model": made
        | {"architecture": "none", "hash": "", "dtype": "bfloat16", "attention": "none"},
    }


def make_tokens(rng: np.random.Generator, pairs: int) -> TokenPairs:
    """Token ids with lengths like UltraFeedback's; ids are distributed as words are."""
    lengths = np.exp(rng.normal(np.log([110, 240, 240]), [0.8, 0.6, 0.6], (pairs, 3)))
    ends = lengths.clip(4, [1024, 2048, 2048]).astype(np.int64).cumsum().reshape(-1, 3)
    # Longer than a chunk, so that none repeats itself.
    ids = (VOCABULARY ** rng.random(2**22)).astype(np.uint32)
    return TokenPairs(
        ids=np.resize(ids, ends[-1, -1]),
        spans=np.column_stack([np.concatenate([[0], ends[:-1, -1]]), ends]),
        source_row=np.arange(pairs),
    )


def make_block(rng: np.random.Generator) -> tuple[ReferenceValues, FeatureTotals]:
    """Reference values of a whole block, and its totals."""
    features = TopFeatures(
        index=rng.random((BLOCK, 2, D_SAE), np.float32).argpartition(K)[..., :K].astype(np.uint16),
        value=-np.sort(-rng.exponential(size=(BLOCK, 2, K)).astype(np.float32)),
        nonzero=rng.integers(K, 8 * K, (BLOCK, 2), np.int32),
        kept_value=np.empty((BLOCK, 2, 0), np.float32),
        kept=np.empty(0, np.int64),
    )
    logp = rng.normal(-300, 100, (BLOCK, 2)).astype(np.float32)
    margin = rng.normal(0, 0.3, BLOCK).astype(np.float32)
    totals = FeatureTotals(rng.exponential(size=D_SAE), rng.integers(0, BLOCK, (2, D_SAE)))
    return ReferenceValues(logp, margin, {SITE: features}), totals


def first(reference: ReferenceValues, rows: int) -> ReferenceValues:
    """The first pairs of a block, for the shorter last block of a store."""
    whole = vars(reference.features[SITE])
    features = TopFeatures(**whole | {n: a[:rows] for n, a in whole.items() if n != "kept"})
    return ReferenceValues(reference.logp[:rows], reference.margin[:rows], {SITE: features})


def read(path: Path) -> tuple[float, ...]:
    """Seconds to open a store, pairs/s in order and streamed, and MB that streaming needs."""
    torch.set_num_threads(1)
    drop_pages(path)
    began = time.perf_counter()
    store = Store.open(path)
    opened = time.perf_counter()
    for block in range(store.blocks):
        store.reference(block, store.tokens(block))
    in_order = store.pairs / (time.perf_counter() - opened)
    drop_pages(path)
    before = memory("VmRSS")
    forget_peak()
    loader = PairLoader(
        store,
        batch_size=BATCH_SIZE,
        packed_length=TOKENS_PER_ROW,
        eval_fraction=0.0,
        seed=0,
        rank=0,
        world=1,
    )
    start = time.perf_counter()
    steps = loader.steps(0, loader.steps_per_epoch, torch.device("cpu"))
    count = sum(len(row.pair_weights) for step in steps for row in step)
    streamed = count / (time.perf_counter() - start)
    assert count == store.pairs
    return opened - began, in_order, streamed, memory("VmHWM") - before


def drop_pages(path: Path) -> None:
    """Drop a store from the page cache, so that it is read from the disk."""
    os.sync()
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write(rows: list[tuple[float, ...]]) -> None:
    """The result as a dated page."""
    table = "\n".join(
        f"| {pairs:,} | {size:,.0f} | {written:,.0f} | {opened:.3f} | {in_order:,.0f} | "
        f"{streamed:,.0f} | {peak:.0f} |"
        for pairs, size, written, opened, in_order, streamed, peak in rows
    )
    write_page(
        "store",
        f"""# The store

Made-up content in the real layout: one site with {D_SAE:,} features, K = {K}, float32, blocks of
{BLOCK:,}, about 720 tokens a pair. Streaming is one epoch of `PairLoader.steps`, the first window
included: steps of {BATCH_SIZE} pairs, sequences of {TOKENS_PER_ROW:,} tokens, one rank. The page
cache was emptied of the store before reading; the disk's own cache may be warm.

{machine()}
Command: `python benchmarks/store.py {" ".join(sys.argv[1:])}`.

| pairs | bytes/pair | written pairs/s | open s | in order pairs/s | streamed pairs/s | peak MB |
|---|---|---|---|---|---|---|
{table}

Peak MB: the most memory that streaming took beyond what the process held before.
""",
    )


if __name__ == "__main__":
    main()
