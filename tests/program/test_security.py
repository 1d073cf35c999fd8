"""Files from elsewhere: no code in them runs, no name leads out of its folder, none takes more
memory than its size. docs/security.md names these tests."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import tiny
import torch
import yaml
from hub_cache import COMMIT, snapshot, write_scope
from limits import memory
from processes import Command, results
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fpocli import UserError, train
from fpocli.cli.commands import app
from fpocli.comparison.grid import read_grid
from fpocli.comparison.tables import REPORTS
from fpocli.config import EvalConfig, TrainConfig
from fpocli.data.sources import open_source
from fpocli.data.tokenizer import load_tokenizer, vocabulary_hash
from fpocli.evaluation.evaluate import find_policy
from fpocli.features.pretrained import load_encoder
from fpocli.model.language_model import load_model
from fpocli.model.network import load_network, read_config
from fpocli.scoring.loading import find_reference
from fpocli.store.reader import Store
from fpocli.system.model_folder import find_model

CPU = torch.device("cpu")
FLAG = re.compile("--trust-remote-code")


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def model(material, tmp_path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(material / "model", tmp_path / "model"))


def edit(file: Path, **changes) -> None:
    """Change fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def load(folder: Path, **trust):
    return load_model(find_model(str(folder), **trust), [], torch.float32, CPU)


def refusal(call, *arguments, **named) -> UserError:
    with pytest.raises(UserError) as caught:
        call(*arguments, **named)
    return caught.value


# -- nothing is run --------------------------------------------------------------------------------


def train_with_bombs(store: Path) -> None:
    """Train, then resume with a pickle that runs code in place of each file of the checkpoint, then
    with pickles beside them; print what the refusals say."""
    settings = TrainConfig(
        cache=str(store), out="run", bf16=False, batch_size=8, save_every=2, device="cpu", lr=1e-3
    )
    train(settings)
    log = Path("run/metrics.jsonl")
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    shutil.rmtree("run/final")
    (checkpoint,) = Path("run/checkpoints").iterdir()
    bomb, messages = pickle.dumps(Bomb(Path("mark"))), []
    for file in sorted(checkpoint.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(bomb)
        messages.append([str(file), refusal(train, settings).message])
        file.write_bytes(whole)
    document = checkpoint / "checkpoint.json"
    whole = document.read_text()
    document.write_text(whole.replace('"rank0-0', '"../../rank0-0'))
    messages.append([str(document), refusal(train, settings).message])
    document.write_text(whole)
    for name in ("mp_rank_00_model_states.pt", "rank1-0.safetensors"):
        (checkpoint / name).write_bytes(bomb)
    train(settings)
    assert losses == [json.loads(line)["loss"] for line in log.read_text().splitlines()]
    assert not Path("mark").exists()
    pickle.loads(bomb)
    assert Path("mark").exists()
    print(json.dumps(messages))


def test_a_checkpoint_is_data(store_path, tmp_path, monkeypatch):
    """Any of its files is refused if it is a pickle, and a pickle beside them is not read."""
    monkeypatch.chdir(tmp_path)
    (done,) = results(Command(main=partial(train_with_bombs, store_path)))
    assert done.returncode == 0, done.stderr[-3000:]
    messages = json.loads(done.stdout.splitlines()[-1])
    assert len(messages) == 3
    assert all(f"{file} is damaged" in message for file, message in messages)


CODE = """
from pathlib import Path
from transformers import {base}
Path({mark!r}).touch()
class Own({base}):
    model_type = "gemma2"
"""


def with_code(model: Path, mark: Path) -> None:
    """Add Python code to a model folder, for its configuration and its tokeniser."""
    for name, base in (("own_config", "Gemma2Config"), ("own_words", "PreTrainedTokenizerFast")):
        text = CODE.format(base=base, mark=str(mark))
        (model / f"{name}.py").write_text(text)
    edit(model / "config.json", model_type="own", auto_map={"AutoConfig": "own_config.Own"})
    edit(
        model / "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": [None, "own_words.Own"]},
    )


def test_code_of_a_model_is_run_only_with_the_flag(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    mark = tmp_path / "mark"
    with_code(model, mark)
    for call in (read_config, load_tokenizer):
        error = refusal(call, find_model(str(model)))
        assert "needs Python code that comes with it" in error.message
        assert FLAG.search(error.hint)
        assert not mark.exists()
        call(find_model(str(model), trust_remote_code=True))
        assert mark.exists()
        mark.unlink()


@pytest.mark.slow
def test_the_flag_reaches_the_model(model, material, tmp_path):
    """fpo cache, at a terminal that would answer yes to any question."""
    mark = tmp_path / "mark"
    with_code(model, mark)
    words = [sys.executable, "-m", "fpocli", "cache", "--model", str(model), "--layer", "3"]
    words += ["--sae", str(material / "sae"), "--data", str(material / "pairs.jsonl")]
    words += ["--device", "cpu", "--out", str(tmp_path / "ref.zarr")]
    places = os.environ | {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(words, input="y\n" * 9, text=True, capture_output=True, env=places)
    assert done.returncode == 2, done.stderr
    assert FLAG.search(done.stderr)
    assert not mark.exists()
    words.append("--trust-remote-code")
    subprocess.run(words, text=True, capture_output=True, env=places)
    assert mark.exists()


def test_no_file_can_enable_remote_code(model, material, store_path, tmp_path, monkeypatch):
    """Not a YAML file of flags, not a run's config.yaml, not a grid, not a store."""
    taken = []
    monkeypatch.setattr("fpocli.train", taken.append)
    monkeypatch.setattr("fpocli.evaluate", taken.append)
    file = tmp_path / "flags.yaml"
    run = CliRunner().invoke
    for name in ("trust-remote-code", "trust_remote_code"):
        file.write_text(f"cache: s\n{name}: true\n")
        for words in (["train"], ["eval", "m"], ["train", "--trust-remote-code"]):
            result = run(app, [*words, "--config", str(file)])
            assert result.exit_code == 2
            assert "flags.yaml sets trust_remote_code" in " ".join(
                result.output.replace("│", " ").split()
            )
    assert not taken
    file.write_text("cache: s\ntrust_remote_code: false\n")
    assert run(app, ["train", "--config", str(file)]).exit_code == 0
    assert run(app, ["eval", "m", "--config", str(file)]).exit_code == 0
    assert run(app, ["train", "--config", str(file), "--trust-remote-code"]).exit_code == 0
    assert [config.trust_remote_code for config in taken] == [False, False, True]
    for section in ("cache", "train", "eval"):
        grid = {"cache": {"model": "m", "layer": [0]}, "runs": [{"method": "fpo"}]}
        grid[section] = grid.get(section, {}) | {"trust_remote_code": True}
        file.write_text(yaml.safe_dump(grid))
        assert "sets trust_remote_code" in refusal(read_grid, str(file), REPORTS).message
    store = Store.open(store_path)
    assert not find_reference(store, None).trust_remote_code
    folder = tmp_path / "run"
    shutil.copytree(model, folder / "final")
    (folder / "run.json").write_text(json.dumps({"store": store.meta["fingerprint"]}))
    settings = {"cache": "s", "trust_remote_code": True}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    policy, trained = find_policy(EvalConfig(model=str(folder), cache="s"), folder, store)
    assert trained == TrainConfig(**settings)
    assert not policy.trust_remote_code


def test_a_kernel_that_a_configuration_names_is_not_downloaded(model):
    edit(model / "config.json", attn_implementation="somebody/kernel")
    assert (
        load_network(find_model(str(model)), torch.float32).config._attn_implementation == "eager"
    )


def test_weights_and_arrays_are_never_unpickled(model, tmp_path):
    mark = tmp_path / "mark"
    bomb = pickle.dumps(Bomb(mark))
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    (model / "pytorch_model.bin").write_bytes(bomb)
    assert "no *.safetensors" in refusal(find_model, str(model)).message
    (model / "model.safetensors").write_bytes(bomb)
    assert "damaged" in refusal(find_model, str(model)).message
    objects = np.array([Bomb(mark)])
    np.savez(tmp_path / "params.npz", W_enc=objects)
    assert "cannot be loaded" in refusal(load_encoder, str(tmp_path / "params.npz"), CPU).message
    (tmp_path / "params.npz").write_bytes(bomb)
    assert "cannot be loaded" in refusal(load_encoder, str(tmp_path / "params.npz"), CPU).message
    sae = tiny.sae_folder(tmp_path / "sae")
    (sae / "sae_weights.safetensors").write_bytes(bomb)
    assert "cannot be loaded" in refusal(load_encoder, str(sae), CPU).message
    for name in ("file.pickle", "sparsity.pt"):
        (sae / name).write_bytes(bomb)
    assert not mark.exists()


def test_a_hub_saes_pickle_is_not_run(tmp_path, monkeypatch):
    """A release that sae-lens reads from a .pt file."""
    mark = tmp_path / "mark"
    name = "Llama-3.3-70B-Instruct-SAE-l50"
    place = snapshot(tmp_path / "hub", f"Goodfire/{name}")
    torch.save({"encoder_linear.weight": Bomb(mark)}, place / f"{name}.pt")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    release = "goodfire-llama-3.3-70b-instruct"
    error = refusal(load_encoder, f"{release}/layer_50", CPU)
    assert "Weights only load failed" in error.message
    assert not mark.exists()


def test_a_data_set_is_not_a_script(tmp_path):
    """A hub data set that is a loading script, and a saved one beside a script."""
    mark = tmp_path / "mark"
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"open({str(mark)!r}, 'w')")
    assert "is not a data set" in refusal(open_source, str(folder), None, None).message
    with pytest.raises((RuntimeError, datasets.exceptions.DatasetNotFoundError, ValueError)):
        datasets.load_dataset(str(folder / "data.py"))
    assert not mark.exists()


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['touch mark']", "!!python/name:os"]
)
def test_yaml_creates_no_objects(tmp_path, monkeypatch, tag):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(f"cache: {tag}\nruns: [{{}}]\n")
    assert "is not valid YAML" in refusal(read_grid, "x.yaml", REPORTS).message
    result = CliRunner().invoke(app, ["train", "--config", "x.yaml"])
    assert (result.exit_code, "is not valid YAML" in result.stderr) == (2, True)
    assert not Path("mark").exists()


# -- no way out of a folder ------------------------------------------------------------------------


def split(model: Path) -> Path:
    """Make two shards of a model's weights; returns their index."""
    state = load_file(model / "model.safetensors")
    names = sorted(state)
    shards = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, model / file, {"format": "pt"})
    (model / "model.safetensors").unlink()
    index = model / "model.safetensors.index.json"
    weight_map = {name: file for file, part in shards.items() for name in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("outside", ["../other/one.safetensors", "{}/other/one.safetensors", ".."])
def test_shards_stay_in_the_folder(model, tmp_path, outside):
    index = split(model)
    load(model)
    weight_map = json.loads(index.read_text())["weight_map"]
    (tmp_path / "other").mkdir()
    shutil.copy(model / "one.safetensors", tmp_path / "other")
    outside = outside.format(tmp_path)
    weight_map = {k: outside if v == "one.safetensors" else v for k, v in weight_map.items()}
    edit(index, weight_map=weight_map)
    error = refusal(load, model)
    assert f"refer to '{outside}', which is not directly inside" in error.message


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"transformers_weights": "../other.safetensors"}),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../tokenizer.4.0.0.json"]}),
    ],
)
def test_other_names_of_files_stay_in_the_folder(model, file, change):
    edit(model / file, **change)
    assert "not directly inside" in refusal(load, model).message


def test_an_adapter_that_names_another_model_is_refused(model):
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../other"}))
    assert "is an adapter" in refusal(load, model).message


def test_paths_in_a_tokenizer_config_are_not_opened(model, tmp_path):
    """Old configurations hold paths of the machine that wrote them; they are ignored."""
    expected = vocabulary_hash(load_tokenizer(find_model(str(model))))
    other = tmp_path / "other.json"
    other.write_text((model / "tokenizer.json").read_text().replace('"the"', '"teh"'))
    names = ("tokenizer_file", "vocab_file", "special_tokens_map_file", "added_tokens_file")
    names += ("merges_file", "name_or_path", "chat_template_file", "tokenizer_config_file")
    edit(model / "tokenizer_config.json", **dict.fromkeys(names, str(other)))
    opened = []
    audited.append(lambda event, given: opened.append(given[0]) if event == "open" else None)
    tokenizer = load_tokenizer(find_model(str(model)))
    audited.clear()
    assert str(other) not in map(str, opened)
    assert vocabulary_hash(tokenizer) == expected


audited: list = []
sys.addaudithook(lambda event, given: [hook(event, given) for hook in audited])


def test_symlinks_of_a_hub_cache_work(material, tmp_path, monkeypatch):
    """snapshots/COMMIT/file -> ../../blobs/hash, as huggingface_hub lays it out."""
    place = snapshot(tmp_path / "hub", "owner/name")
    blobs = place.parents[1] / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted((material / "model").iterdir())):
        shutil.copy(file, blobs / str(number))
        (place / file.name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = find_model("owner/name", revision=COMMIT)
    assert folder.path == place
    load_tokenizer(folder)
    load_model(folder, [], torch.float32, CPU)
    split(Path(shutil.copytree(material / "model", tmp_path / "shards")))


@pytest.mark.parametrize("file", ["state.json", "dataset_dict.json"])
def test_saved_data_stay_in_the_folder(tmp_path, file):
    rows = datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    rows.save_to_disk(tmp_path / "other")
    if file == "state.json":
        path = Path(shutil.copytree(tmp_path / "other", tmp_path / "data"))
        edit(path / file, _data_files=[{"filename": "../other/data-00000-of-00001.arrow"}])
    else:
        path = tmp_path / "data"
        datasets.DatasetDict(train=rows).save_to_disk(path)
        edit(path / file, splits=["../other"])
    assert "not directly inside" in refusal(open_source, str(path), None, None).message


@pytest.mark.parametrize("value", ["a\nb", "a\\b", "x" * 300])
def test_a_run_of_a_grid_has_a_name_that_a_folder_can_have(tmp_path, value):
    file = tmp_path / "grid.yaml"
    grid = {"cache": {"layer": [0]}}
    file.write_text(yaml.safe_dump(grid | {"runs": [{"model": value}]}))
    error = refusal(read_grid, str(file), REPORTS)
    assert "which no folder can have" in error.message
    assert error.message.isprintable()


def test_runs_of_a_grid_stay_in_its_folder(tmp_path):
    file = tmp_path / "grid.yaml"
    names = ["..", "../..", "/etc/passwd", "a/../../b"]
    grid = {"cache": {"layer": [0]}, "out": "out", "runs": [{"model": names}]}
    file.write_text(yaml.safe_dump(grid))
    for run in read_grid(str(file), REPORTS).runs:
        assert run.folder.parent == Path("out/runs")
        assert ".." not in run.folder.parts
    file.write_text(yaml.safe_dump(grid | {"runs": [{"model": "..\\x"}]}))
    assert "which no folder can have" in refusal(read_grid, str(file), REPORTS).message


# -- sizes before memory ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 10**12},
        {"hidden_size": 2**20},
        {"intermediate_size": 2**40},
        {"num_hidden_layers": 9000, "layer_types": ["full_attention"] * 9000},
        {"num_hidden_layers": 10**12},
        {"num_labels": 10**12},
        {"num_attention_heads": 10**12},
    ],
)
def test_a_configuration_of_absurd_sizes_allocates_no_memory(model, change):
    """With 6 GB of address space left, into which no array of those sizes fits."""
    edit(model / "config.json", **change)
    with memory(6e9):
        message = refusal(load, model).message
    assert "no model has" in message or "larger model than its weights" in message


def test_headers_of_weights_are_checked(model):
    file = model / "model.safetensors"
    whole = file.read_bytes()
    for spoilt in (b"", whole[:7], (2**62).to_bytes(8, "little") + whole[8:], whole[:-4]):
        file.write_bytes(spoilt)
        with memory(1e9):
            assert "are damaged" in refusal(load, model).message


def test_incomplete_weights_are_refused(model):
    """transformers would fill them with random numbers."""
    file = model / "model.safetensors"
    state = load_file(file)
    some = {name: state[name] for name in state if "layers.2.mlp" not in name}
    save_file(some, file, {"format": "pt"})
    message = refusal(load, model).message
    assert (
        "lack model.layers.2.mlp.down_proj.weight, model.layers.2.mlp.gate_proj.weight" in message
    )
    other = state | {"model.layers.1.mlp.up_proj.weight": torch.zeros(47, tiny.WIDTH)}
    save_file(other, file, {"format": "pt"})
    assert "have another shape of model.layers.1.mlp.up_proj.weight" in refusal(load, model).message
    save_file(state, file, {"format": "pt"})
    assert "lm_head.weight" not in state
    load(model)


def test_cfg_json_of_an_sae_is_checked_against_its_weights(tmp_path):
    folder = tiny.sae_folder(tmp_path / "sae")
    for change in ({"d_sae": 10**12}, {"d_in": 10**9}, {"d_sae": None}, {"d_in": "32"}):
        spoilt = Path(shutil.copytree(folder, tmp_path / "spoilt", dirs_exist_ok=True))
        edit(spoilt / "cfg.json", **change)
        with memory(1e9):
            assert (
                "the weights have W_enc [32, 96]" in refusal(load_encoder, str(spoilt), CPU).message
            )


def test_a_k_that_no_sae_has_is_refused(tmp_path):
    folder = tiny.sae_folder(tmp_path / "sae", architecture="topk")
    load_encoder(str(folder), CPU)
    for k in (tiny.FEATURES + 1, "7", -1):
        edit(folder / "cfg.json", k=k)
        assert "cannot be loaded" in refusal(load_encoder, str(folder), CPU).message


def header(shape: tuple[int, ...]) -> bytes:
    """The start of an .npy file, by hand."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def test_an_npz_is_checked_against_its_headers(tmp_path):
    file = tmp_path / "params.npz"
    write_scope(file, tiny.WIDTH, tiny.FEATURES, np.float32, threshold=1)
    load_encoder(str(file), CPU)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("more.npy", header((10**6, 10**6)))
    with memory(1e9):
        message = refusal(load_encoder, str(file), CPU).message
    assert "more.npy is not the float32 of shape (1000000, 1000000) it says" in message


def test_an_npz_that_expands_without_end_is_refused(tmp_path):
    file = tmp_path / "params.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", header((10**5, 10**3)) + bytes(4 * 10**8))
    with memory(3e8):
        assert "bytes expand to 400,000," in refusal(load_encoder, str(file), CPU).message


def test_yaml_that_expands_without_bound_is_refused(tmp_path):
    file = tmp_path / "grid.yaml"
    rows = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for one, other in zip("abcdefgh", "bcdefghi", strict=True):
        rows.append(f"{other}: &{other} [{', '.join([f'*{one}'] * 10)}]")
    file.write_text("\n".join(rows) + "\nruns: [{method: *i}]\n")
    assert "by references to itself" in refusal(read_grid, str(file), REPORTS).message
    file.write_text("runs: &a [*a]")
    assert "by references to itself" in refusal(read_grid, str(file), REPORTS).message


# -- messages --------------------------------------------------------------------------------------


def test_a_message_cannot_control_a_terminal():
    error = UserError("a\x1b[2J\n\tb\u202ec" + "\ud800", "x" * 9999)
    assert error.message == "a\ufffd[2J b\ufffdc\ufffd"
    assert len(error.hint) < 1100
