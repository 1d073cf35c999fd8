"""Stores made from tiny models and pairs, and their contents."""

import json
import random
from pathlib import Path

import numpy as np
import tiny
import zarr

from fpocli.store import metadata
from fpocli.store.place import Folder
from fpocli.store.schema import fingerprint

_WORDS = [
    "the",
    "cat",
    "and",
    "a",
    "hat",
    "rat",
    "sat",
    "on",
    "one",
    "mat",
    "code",
    ":",
    "x",
    "=",
    "y",
    "with",
    "some",
    "more",
    "to",
    "say",
]


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    """Random pairs of very different lengths, as JSONL."""
    rng = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(1, most)))

    rows = [
        {"prompt": text(15), "chosen": text(25), "rejected": text(25) + "!"} for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cache_config(material: Path, out: Path, **changes):
    """The settings of the store above, with changes."""
    from fpocli import CacheConfig

    settings = {
        "model": str(material / "model"),
        "layer": [tiny.LAYERS - 1],
        "sae": [str(material / "sae")],
        "data": str(material / "pairs.jsonl"),
        "dtype": "float32",
        "device": "cpu",
        "block": 8,
        "top_k": "64",
        "out": str(out),
    }
    return CacheConfig(**(settings | changes))


def attributes(path: Path) -> dict:
    """The attributes of a store under `fpo`."""
    return metadata.attributes(Folder(path))


def write_root(path: Path, about: dict) -> None:
    """Write them, with their checksum."""
    metadata.write_root(Folder(path), about)


def set_attributes(path: Path, **values) -> None:
    """Change attributes of a store, with correct checksums."""

    about = attributes(path) | values
    write_root(path, about | {"fingerprint": fingerprint(about)})


def make_loader(store, **changes):
    """The loader of one process: batches of 4, a fifth held out, unless changed."""
    from fpocli.training.pair_loader import PairLoader

    settings = {
        "batch_size": 4,
        "packed_length": 200,
        "eval_fraction": 0.2,
        "seed": 0,
        "rank": 0,
        "world": 1,
    }
    return PairLoader(store, **(settings | changes))


def contents(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a store, read with plain zarr."""
    group = zarr.open_group(path, mode="r")
    return {
        name: np.asarray(item[:])
        for name, item in group.members(max_depth=None)
        if isinstance(item, zarr.Array)
    }


def assert_equal(path, other):
    """Assert that two stores are equal: every array to the bit, every chunk to the byte."""
    one, two = contents(path), contents(other)
    assert one.keys() == two.keys()
    for name, values in two.items():
        np.testing.assert_array_equal(one[name], values, err_msg=name)
    files = {file.relative_to(other) for file in other.rglob("*") if file.is_file()}
    assert files == {file.relative_to(path) for file in path.rglob("*") if file.is_file()}
    for file in files - {file for file in files if file.name == "zarr.json"}:
        assert (path / file).read_bytes() == (other / file).read_bytes(), file
    assert not path.with_name(path.name + ".writers").exists()
