"""A worker on another host refuses files that are not those the store was made with."""

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file
from stores import attributes, cache_config

from fpocli import UserError
from fpocli.caching.block_scorer import BlockScorer


@pytest.fixture
def copied(material, store_path, tmp_path):
    """Model and SAE as another host has them, and the attributes of the store."""
    for name in ("model", "sae"):
        shutil.copytree(material / name, tmp_path / name)
    config = cache_config(material, tmp_path / "ref.zarr")
    names = {"model": str(tmp_path / "model"), "sae": [str(tmp_path / "sae")]}
    return config, names, attributes(store_path)


def test_equal_files_are_taken(copied):
    config, names, meta = copied
    BlockScorer.on_worker(replace(config, **names), meta)


@pytest.mark.parametrize("file", ["model/model.safetensors", "sae/sae_weights.safetensors"])
def test_other_weights_are_refused(copied, tmp_path, file):
    config, names, meta = copied
    weights = load_file(tmp_path / file)
    for tensor in weights.values():
        tensor[0] += 0.25
    save_file(weights, tmp_path / file, {"format": "pt"})
    with pytest.raises(UserError, match=f"{tmp_path / file.partition('/')[0]} is not the same"):
        BlockScorer.on_worker(replace(config, **names), meta)


def test_another_setting_of_an_sae_is_refused(copied, tmp_path):
    """Its weights are equal."""
    config, names, meta = copied
    file = tmp_path / "sae" / "cfg.json"
    about = json.loads(file.read_text())
    about["apply_b_dec_to_input"] = not about["apply_b_dec_to_input"]
    file.write_text(json.dumps(about))
    with pytest.raises(UserError, match=f"{tmp_path / 'sae'} is not the same on all hosts"):
        BlockScorer.on_worker(replace(config, **names), meta)
