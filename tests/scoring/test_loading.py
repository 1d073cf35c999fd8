"""The model, tokeniser and SAEs of a store, found again and checked."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from stores import attributes, cache_config, write_pairs, write_root

from fpocli import InspectConfig, UserError, cache, inspect
from fpocli.scoring.loading import find_reference, sites_of
from fpocli.scoring.saes import load_encoders
from fpocli.store.reader import Store

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_another_sae_or_another_setting_of_it_is_refused(material, tmp_path, kind):
    """Features may differ though parameters are equal, as with another k of a top-k SAE."""
    own = tiny.sae_folder(tmp_path / "own", architecture=kind)
    store = cache(cache_config(material, tmp_path / "ref.zarr", sae=[str(own)], limit=2))
    load_encoders(store, sites_of(store, []), [], tiny.WIDTH, CPU)
    other = tiny.sae_folder(tmp_path / "other", architecture=kind, seed=1)
    with pytest.raises(UserError, match="is not the one"):
        load_encoders(store, sites_of(store, []), [str(other)], tiny.WIDTH, CPU)
    changes = {"apply_b_dec_to_input": False} | ({"k": 5} if kind == "topk" else {})
    about = json.loads((own / "cfg.json").read_text())
    for name, value in changes.items():
        (own / "cfg.json").write_text(json.dumps(about | {name: value}))
        with pytest.raises(UserError, match="is not the one"):
            load_encoders(store, sites_of(store, []), [], tiny.WIDTH, CPU)
        with pytest.raises(UserError, match=rf"settings\.{name}"):
            cache(cache_config(material, store.path, sae=[str(own)], limit=2))


# -- local files that are elsewhere now ----------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with model, SAE and data, and a store made in it by relative paths."""
    folder = tmp_path / "project"
    folder.mkdir()
    tiny.model_folder(folder / "demo" / "model")
    tiny.sae_folder(folder / "demo" / "sae")
    write_pairs(folder / "pairs.jsonl", 3)
    monkeypatch.chdir(folder)
    cache(relative(folder))
    return folder


def relative(folder, **changes):
    settings = {"model": "demo/model", "sae": ["demo/sae"], "data": "pairs.jsonl"}
    return cache_config(folder, Path("ref.zarr"), **(settings | changes))


def read_everything(path):
    """Everything that needs the model, the tokeniser or the SAEs of a store."""
    store = Store.open(path)
    find_reference(store, None)
    load_encoders(store, sites_of(store, []), [], tiny.WIDTH, CPU)
    return inspect(InspectConfig(store=str(path), pair=0, json=True))


def test_a_store_is_used_from_another_folder(project, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert read_everything(project / "ref.zarr")["text"]["prompt"]


def test_a_store_is_used_after_its_project_moved(project, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    project.rename(tmp_path / "moved")
    assert read_everything(tmp_path / "moved" / "ref.zarr")["text"]["prompt"]


def test_a_model_that_is_gone_is_named_as_a_path_with_the_flag(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = (project / "ref.zarr").rename(tmp_path / "ref.zarr")
    shutil.move(project / "demo", tmp_path / "elsewhere")
    store = Store.open(path)
    with pytest.raises(UserError, match=f"demo/model, .* is not found at {project}/demo") as caught:
        find_reference(store, None)
    assert "--reference" in caught.value.hint
    with pytest.raises(UserError, match="demo/sae") as caught:
        load_encoders(store, sites_of(store, []), [], tiny.WIDTH, CPU)
    assert "--sae" in caught.value.hint
    with pytest.raises(UserError, match="demo/model") as caught:
        inspect(InspectConfig(store=str(path), pair=0))
    assert "--model" in caught.value.hint
    assert find_reference(store, str(tmp_path / "elsewhere/model"))


def test_inspect_takes_the_models_new_place_and_refuses_another_tokeniser(
    project, tmp_path, monkeypatch, capsys
):
    shutil.move(project / "demo", tmp_path / "elsewhere")
    config = InspectConfig(
        store="ref.zarr", pair=0, json=True, model=str(tmp_path / "elsewhere/model")
    )
    assert inspect(config)["text"]["prompt"]
    tiny.model_folder(tmp_path / "other")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"is not the one that ref\.zarr was made with"):
        inspect(replace(config, model=str(tmp_path / "other")))


def test_the_same_files_by_another_spelling_are_the_same(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project / "demo")
    again = relative(project, model="../demo/model", sae=["./sae"], data="../pairs.jsonl")
    again = replace(again, out="../ref.zarr")
    assert cache(again).meta["model"]["source"] == "demo/model"


def test_a_store_without_paths_says_that_its_model_was_local(project, tmp_path, monkeypatch):
    """As version 0.1 wrote it."""
    about = attributes(Path("ref.zarr"))
    del about["paths"]
    write_root(Path("ref.zarr"), about)
    read_everything(project / "ref.zarr")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"demo/model, from which .* is not found at demo/model"):
        find_reference(Store.open(project / "ref.zarr"), None)
