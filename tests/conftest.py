"""Every test runs offline, on one thread, in a folder of its own where it writes."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
os.environ["OMP_NUM_THREADS"] = "1"

import json
import random
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import settings

torch.set_num_threads(1)
# Tests time nothing; a busy machine is no failure.
settings.register_profile("fpo", deadline=None)
settings.load_profile("fpo")

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


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """A folder with a tiny Gemma-2 (model), other weights of it (policy), a SAE and 21 pairs."""
    folder = tmp_path_factory.mktemp("material")
    tiny.model_folder(folder / "model")
    tiny.model_folder(folder / "policy", seed=1)
    tiny.sae_folder(folder / "sae")
    write_pairs(folder / "pairs.jsonl", 21)
    return folder


@pytest.fixture(scope="session")
def store_path(material) -> Path:
    """A complete store made from the material."""
    from fpocli import cache

    path = material / "ref.zarr"
    cache(cache_config(material, path))
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


def set_attributes(path: Path, **values) -> None:
    """Make a store say something else of itself, with its sums right."""
    from fpocli.store.layout import fingerprint
    from fpocli.store.metadata import attributes, write_root

    about = attributes(path) | values
    write_root(path, about | {"fingerprint": fingerprint(about)})


def make_stream(store, **changes):
    """The stream of one process: batches of 4, a fifth held out, unless changed."""
    from fpocli.training.stream import Stream

    settings = {
        "batch_size": 4,
        "tokens_per_row": 200,
        "eval_fraction": 0.2,
        "seed": 0,
        "rank": 0,
        "world": 1,
    }
    return Stream(store, **(settings | changes))


@contextmanager
def memory(most: float):
    """Take no more than so many bytes of address space above what is taken already."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + int(most), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
