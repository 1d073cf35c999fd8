"""Every test runs offline, on one thread, and writes only to its own temporary folder."""

import os
import shutil
import tempfile

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
os.environ["OMP_NUM_THREADS"] = "1"
# Where datasets keeps what it made.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()

from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import settings
from stores import cache_config, write_pairs

torch.set_num_threads(1)
# No test measures time, so a slow example is no failure.
settings.register_profile("fpo", deadline=None)
settings.load_profile("fpo")

CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@pytest.fixture(scope="session", autouse=True)
def _without_traces():
    yield
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"])


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """A folder with a tiny Gemma-2 (model), a copy with other weights (policy), an SAE and 21
    pairs."""
    folder = tmp_path_factory.mktemp("material")
    tiny.model_folder(folder / "model")
    tiny.model_folder(folder / "policy", seed=1)
    tiny.sae_folder(folder / "sae")
    write_pairs(folder / "pairs.jsonl", 21)
    return folder


@pytest.fixture(scope="session")
def store_path(material) -> Path:
    """A complete store made from that folder."""
    from fpocli import cache

    path = material / "ref.zarr"
    cache(cache_config(material, path))
    return path


@pytest.fixture(scope="module")
def chromium():
    """Debian's browser, without a window."""
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.fail("no browser is installed; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()
