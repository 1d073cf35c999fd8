"""How long training waits for a store in a bucket whose server takes 20 ms longer for each request.

    .venv/bin/python benchmarks/bucket.py

The same epoch of `fpo train` on the same pairs: from a folder, from the bucket, and from the
bucket with a local cache (FPO_CACHE_DIR), whose second run finds everything there. The server is
moto's, on this machine, behind a proxy that delays and counts requests; server, proxy and training
share its cores. Models are random, pairs made up, and made on the spot.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import machine, make_store, middle, table, write_page

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/support"))

import tiny
from buckets import faults, s3_server
from stores import write_pairs

TOKENS = 64
# By method what its store holds besides features.
METHODS = {"fpo": {}, "tdpo2": {"distributions": str(TOKENS)}}
# By row of the table whether the store is in the bucket, and whether there is a local cache.
PLACES = {
    "folder": (False, False),
    "bucket": (True, False),
    "bucket, first run with a local cache": (True, True),
    "bucket, second run with it": (True, True),
}


def main() -> None:
    """Train from every place and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=640)
    parser.add_argument("--block", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=96, help="of the model")
    parser.add_argument("--layers", type=int, default=4, help="of the model")
    parser.add_argument("--delay", type=float, default=0.02, help="seconds of each request")
    parser.add_argument("--places", nargs="*", default=list(PLACES))
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        about = material(folder, arguments)
        for method, settings in METHODS.items():
            store = make_store(
                about, f"{folder}/{method}", arguments.pairs, block=arguments.block,
                dtype="float32", **settings,
            ).path  # fmt: skip
            with s3_server() as bucket:
                copy(store, f"{bucket}/ref.zarr")
                for place in arguments.places:
                    in_bucket, cached = PLACES[place]
                    where = f"{bucket}/ref.zarr" if in_bucket else store
                    out = folder / method / place
                    own = {"FPO_CACHE_DIR": f"{folder}/{method}/local"} if cached else {}
                    rows.append((method, place, *train(arguments, method, where, out, own)))
    report(arguments, rows)


def material(folder: Path, arguments: argparse.Namespace) -> argparse.Namespace:
    """A random model, SAE and pairs, as make_store takes them."""
    width = {"hidden_size": arguments.width, "intermediate_size": 3 * arguments.width}
    tiny.model_folder(
        folder / "model", "llama", num_hidden_layers=arguments.layers, head_dim=24, **width
    )
    tiny.sae_folder(folder / "sae", width=arguments.width, features=1024)
    write_pairs(folder / "pairs.jsonl", arguments.pairs)
    return argparse.Namespace(
        model=f"{folder}/model", sae=f"{folder}/sae", data=f"{folder}/pairs.jsonl",
        layer=arguments.layers - 1, max_length=512, features=None,
    )  # fmt: skip


def copy(store: Path, url: str) -> None:
    """Copy a store into the bucket."""
    from fpocli.store.place import Folder, place_of

    one, other = Folder(store), place_of(url)
    for key in one.files():
        other.write(key, one.read(key))


def train(
    arguments: argparse.Namespace, method: str, cache: object, out: Path, own: dict[str, str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """An epoch; the lines of metrics.jsonl, and the method of every request."""
    seen: list[str] = []
    with faults(lambda verb, path: seen.append(verb), arguments.delay):
        subprocess.run(
            [
                *(sys.executable, "-m", "fpocli", "train", "--quiet", "--method", method),
                *("--cache", str(cache), "--out", str(out), "--eval-fraction", "0"),
                *("--batch-size", str(arguments.batch), "--no-bf16"),
            ],
            env=os.environ | own,
            check=True,
        )
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["split"] == "train"], seen


def report(
    arguments: argparse.Namespace,
    rows: list[tuple[str, str, list[dict[str, Any]], list[str]]],
) -> None:
    """The page."""
    heads = (
        "method", "store", "requests a step", "of them HEAD", "seconds a step",
        "waited, seconds a step", "share of the time", "of the first step",
    )  # fmt: skip
    cells = []
    for method, place, lines, seen in rows:
        first, *others = lines
        waits = [line["data_wait"] * line["seconds"] for line in others]
        share = sum(waits) / sum(line["seconds"] for line in others)
        cells.append(
            (
                method, place, f"{len(seen) / len(lines):.1f}",
                f"{seen.count('HEAD') / len(lines):.1f}",
                middle(line["seconds"] for line in others), middle(waits, ".4f"),
                f"{share:.2%}", f"{first['data_wait']:.0%}",
            )
        )  # fmt: skip
    write_page(
        "bucket",
        f"""# Training from a bucket, {datetime.now(UTC):%Y-%m-%d}

{arguments.pairs} made-up pairs in blocks of {arguments.block}, batches of {arguments.batch}, one
epoch; a random Llama of {arguments.layers} layers, d = {arguments.width}, float32, with one site
of 1,024 features; the store of tdpo2 holds the {TOKENS} likeliest next tokens. The server answers
{arguments.delay * 1000:.0f} ms late. It is moto's, on the same machine as the proxy before it and
the training.

{machine()}
Command: `{" ".join(["python benchmarks/bucket.py", *sys.argv[1:]])}`.

{table(heads, cells)}

Medians, with minimum and maximum, and the share are without the first step, for which nothing can
be read ahead. Requests are all of the run, those that open the store among them.
""",
    )


if __name__ == "__main__":
    main()
