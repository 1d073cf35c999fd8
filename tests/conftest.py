"""Every test runs offline, on one thread, in a folder of its own where it writes."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import settings
from stores import cache_config, write_pairs

torch.set_num_threads(1)
# Tests time nothing; a busy machine is no failure.
settings.register_profile("fpo", deadline=None)
settings.load_profile("fpo")


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
