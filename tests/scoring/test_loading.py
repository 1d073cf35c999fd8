"""What a store was made with, found again and held to what it says."""

import json

import pytest
import tiny
import torch
from stores import cache_config

from fpocli import UserError, cache
from fpocli.scoring.loading import load_encoders

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_another_sae_or_another_setting_of_it_is_refused(material, tmp_path, kind):
    """Parameters may be equal and the features still others, as with another k of a top-k SAE."""
    own = tiny.sae_folder(tmp_path / "own", architecture=kind)
    store = cache(cache_config(material, tmp_path / "ref.zarr", sae=[str(own)], limit=2))
    load_encoders(store, [], tiny.WIDTH, CPU)
    other = tiny.sae_folder(tmp_path / "other", architecture=kind, seed=1)
    with pytest.raises(UserError, match="is not the one"):
        load_encoders(store, [str(other)], tiny.WIDTH, CPU)
    changes = {"apply_b_dec_to_input": False} | ({"k": 5} if kind == "topk" else {})
    about = json.loads((own / "cfg.json").read_text())
    for name, value in changes.items():
        (own / "cfg.json").write_text(json.dumps(about | {name: value}))
        with pytest.raises(UserError, match="is not the one"):
            load_encoders(store, [], tiny.WIDTH, CPU)
        with pytest.raises(UserError, match=rf"settings\.{name}"):
            cache(cache_config(material, store.path, sae=[str(own)], limit=2))
