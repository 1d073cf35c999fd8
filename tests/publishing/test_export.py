"""fpo export: the cards, as huggingface_hub reads them, and pushing to a server like the hub."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
from hub_server import TOKEN, hub_server
from huggingface_hub import DatasetCard, ModelCard
from runs import run
from stores import attributes, cache_config, contents, write_pairs
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from fpocli import EvalConfig, ExportConfig, Store, UserError, cache, evaluate, export
from fpocli.cli import commands as cli


@pytest.fixture(scope="module")
def trained(material, store_path, tmp_path_factory):
    """A run of fpo, and what fpo eval measured of it."""
    out = tmp_path_factory.mktemp("trained") / "my run"
    run(material, out, "--no-bf16", alpha=0.25, k=7)
    evaluate(EvalConfig(model=str(out), cache=str(store_path), device="cpu"))
    return out


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_server() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        yield server


def test_a_models_card(trained, store_path):
    folder = export(ExportConfig(source=str(trained)))
    assert folder == trained / "final"
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["fpo", "preference-optimization"]
    results = json.loads((trained / "eval/eval.json").read_text())
    (accuracy,) = [one for one in card.data.eval_results if one.metric_type == "accuracy"]
    assert accuracy.metric_value == round(results["accuracy"]["share"], 4)
    about = attributes(store_path)
    assert about["fingerprint"] in card.text and card.data.model_name == "my run"
    assert f"{results['perplexity']['chosen']:.4f}"[:5] in card.text
    # Files on this machine are no names on the hub.
    assert "base_model" not in card.data.to_dict() and "datasets" not in card.data.to_dict()


def test_the_command_of_the_card_is_the_runs(trained, tmp_path):
    """It leads to the same settings."""
    from fpocli.training.run_folder import read_run

    card = ModelCard.load(export(ExportConfig(source=str(trained))) / "README.md")
    (line,) = [line for line in card.text.splitlines() if line.startswith("    fpo train ")]
    assert "--alpha 0.25 --k 7" in line
    words = shlex.split(line)[1:]
    words[words.index("--out") + 1] = str(tmp_path / "again")
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fpocli.train", made.append, raising=False)
        done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    _, settings = read_run(trained)
    own, again = vars(settings) | {"out": ""}, vars(made[0]) | {"out": ""}
    assert own == again


def test_a_copy_loads_and_leaves_the_run_alone(trained, tmp_path):
    before = (trained / "final/README.md").read_bytes()
    folder = export(ExportConfig(source=str(trained / "final"), out=str(tmp_path / "copy")))
    assert folder == tmp_path / "copy"
    AutoModelForCausalLM.from_pretrained(folder)
    assert (trained / "final/README.md").read_bytes() == before
    assert "vllm serve" in (folder / "README.md").read_text()
    with pytest.raises(UserError, match="exists already"):
        export(ExportConfig(source=str(trained), out=str(folder)))


def test_names_of_the_hub_are_linked(trained, store_path, tmp_path):
    """Of a model and data that came from there."""
    from fpocli.training.model_card import model_card
    from fpocli.training.run_folder import read_run

    store = Store.open(store_path)
    store.meta["model"]["source"] = "google/gemma-2-2b"
    store.meta["data"]["source"] = "HuggingFaceH4/ultrafeedback_binarized@main"
    del store.meta["paths"]
    _, settings = read_run(trained)
    card = ModelCard(model_card(trained, settings, store, "me/policy", "me/policy"))
    assert card.data.base_model == "google/gemma-2-2b"
    assert card.data.datasets == ["HuggingFaceH4/ultrafeedback_binarized"]
    assert "vllm serve me/policy" in card.text and "Results" not in card.text


def test_figures_are_of_the_data_that_were_measured(trained, material, store_path, tmp_path):
    """Of another store than the run's; if it is gone, the hub lists none."""
    data = write_pairs(tmp_path / "other.jsonl", 13, seed=7)
    cache(cache_config(material, tmp_path / "other.zarr", data=str(data)))
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("eval"))
    other = str(tmp_path / "other.zarr")
    evaluate(EvalConfig(model=str(run), cache=other, split="all", device="cpu"))
    card = ModelCard.load(export(ExportConfig(source=str(run))) / "README.md")
    names = {figure.dataset_name for figure in card.data.eval_results}
    assert names == {f"{data}, all split of the store"}
    assert f"of the store {Store.open(other).meta['fingerprint'][:12]}, of {data}" in card.text
    shutil.rmtree(other)
    card = ModelCard.load(export(ExportConfig(source=str(run))) / "README.md")
    assert card.data.eval_results is None and "## Results" in card.text
    (run / "eval/eval.json").write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        export(ExportConfig(source=str(run)))


def test_starting_weights_that_were_files_are_no_name_on_the_hub(material, store_path, tmp_path):
    """Also after they are gone; those of the hub are named by the repository."""
    model, out = tmp_path / "sft/final", tmp_path / "run"
    shutil.copytree(material / "policy", model)
    run(material, out, "--no-bf16", model=model, max_steps=1)
    shutil.rmtree(model)
    card = ModelCard.load(export(ExportConfig(source=str(out))) / "README.md")
    assert card.data.base_model is None
    file = out / "start.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"source": "a/b", "revision": "c"}))
    card = ModelCard.load(export(ExportConfig(source=str(out))) / "README.md")
    assert card.data.base_model == "a/b"


def test_text_from_elsewhere_ends_no_cell_and_no_front_matter(trained, store_path):
    from fpocli.training.model_card import model_card
    from fpocli.training.run_folder import read_run

    store = Store.open(store_path)
    store.meta["data"]["source"] = "a\n---\n# b | c"
    _, settings = read_run(trained)
    card = ModelCard(model_card(trained, settings, store, "me/policy", "me/policy"))
    assert card.data.library_name == "transformers"
    assert "a --- # b \\| c" in card.text and "\n# b" not in card.text


def test_a_stores_card(material, tmp_path):
    path = tmp_path / "ref.zarr"
    cache(cache_config(material, path))
    before = contents(path)
    file = export(ExportConfig(source=str(path)))
    assert file == tmp_path / "ref.zarr.README.md"
    card = DatasetCard.load(file)
    assert card.data.to_dict()["viewer"] is False
    assert attributes(path)["fingerprint"] in card.text and "layer_3.resid_post" in card.text
    # The store is as it was.
    assert contents(path).keys() == before.keys()
    assert "fpo train --cache ref.zarr" in card.text and "hf download" not in card.text


# -- pushing -------------------------------------------------------------------------------------


def test_a_model_is_pushed(trained, hub):
    config = ExportConfig(source=str(trained), push_to_hub="me/policy", private=True)
    folder = export(config)
    assert hub.repositories[("model", "me/policy")]["visibility"] == "private"
    files = hub.files[("model", "me/policy")]
    assert files.keys() == {file.name for file in folder.iterdir()}
    assert files["README.md"] == (folder / "README.md").read_bytes()
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    # Once more, where there is one already.
    export(config)


def test_a_store_is_pushed_as_a_data_set(material, store_path, hub, tmp_path):
    path = tmp_path / "ref.zarr"
    shutil.copytree(store_path, path)
    export(ExportConfig(source=str(path), push_to_hub="me/pairs"))
    files = hub.files[("dataset", "me/pairs")]
    assert b"hf download me/pairs --repo-type dataset" in files.pop("README.md")
    for name, content in files.items():
        place = tmp_path / "down" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    assert Store.open(tmp_path / "down/ref.zarr").meta == Store.open(path).meta
    assert contents(tmp_path / "down/ref.zarr").keys() == contents(path).keys()


def test_a_fresh_process_finds_the_hub_by_its_variables(trained):
    with hub_server() as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
        words = ["-m", "fpocli", "export", str(trained), "--push-to-hub", "me/policy"]
        done = subprocess.run(
            [sys.executable, *words],
            env=os.environ | variables,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == "" and f"pushed to {hub.url}/me/policy" in done.stderr
        assert "model.safetensors" in hub.files[("model", "me/policy")]


@pytest.mark.parametrize("path", ["repos/create", "commit", "preupload"])
def test_a_refusal_is_a_sentence(trained, hub, path):
    hub.refuse[path] = 403
    with pytest.raises(UserError, match="the hub refused to push to me/policy") as error:
        export(ExportConfig(source=str(trained), push_to_hub="me/policy"))
    assert "token" in error.value.hint


def test_a_hub_that_does_not_answer(trained, hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached") as error:
        export(ExportConfig(source=str(trained), push_to_hub="me/policy"))
    assert "HF_ENDPOINT" in error.value.hint


def test_offline_and_without_a_token(trained, monkeypatch, tmp_path):
    config = ExportConfig(source=str(trained), push_to_hub="me/policy")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(UserError, match="needs a token") as error:
        export(config)
    assert "hf auth login" in error.value.hint
    monkeypatch.setattr("huggingface_hub.get_token", lambda: TOKEN)
    with pytest.raises(UserError, match="cannot be reached"):
        export(config)


# -- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["policy", "a/b/c", "/b", "a/"])
def test_names_that_are_none(name):
    with pytest.raises(UserError, match="no name of a repository"):
        ExportConfig(source="run", push_to_hub=name)


def test_private_alone():
    with pytest.raises(UserError, match="--private is of --push-to-hub"):
        ExportConfig(source="run", private=True)


def test_what_has_no_card(trained, material, store_path, tmp_path):
    for nothing in tmp_path, tmp_path / "nothing":
        with pytest.raises(UserError, match="is neither a run of fpo train nor a store"):
            export(ExportConfig(source=str(nothing)))
    with pytest.raises(UserError, match="is not a run of fpo train"):
        export(ExportConfig(source=str(store_path), out=str(tmp_path / "out")))
    unfinished = tmp_path / "unfinished"
    shutil.copytree(trained, unfinished, ignore=shutil.ignore_patterns("final"))
    with pytest.raises(UserError, match="has no final model yet"):
        export(ExportConfig(source=str(unfinished)))
    with pytest.raises(UserError, match="is needed for the card") as error:
        export(ExportConfig(source=str(trained), cache=str(tmp_path / "gone.zarr")))
    assert "--cache" in error.value.hint
    other = tmp_path / "other.zarr"
    cache(cache_config(material, other, top_k="9"))
    with pytest.raises(UserError, match="is not the store that"):
        export(ExportConfig(source=str(trained), cache=str(other)))
