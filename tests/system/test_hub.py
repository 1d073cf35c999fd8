"""Hub names with the real loading code, offline: a hub cache made here replaces the hub."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial

import datasets
import numpy as np
import pytest
import tiny
import torch
from hub_cache import COMMIT, snapshot, write_scope, write_scope_2
from processes import Command, results, use_hub
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from transformers import AutoModelForCausalLM

from fpocli import CacheConfig, Store, cache
from fpocli.data.sources import open_source, sources_of
from fpocli.model.attention import BY_SEQUENCE

SCOPE = "layer_25/width_16k/average_l0_116"
PAIRS = [
    {"prompt": "why is the sky blue?", "chosen": "it scatters light", "rejected": "no idea"},
    {"prompt": "1 + 1", "chosen": "2", "rejected": "3, I think"},
    {"prompt": "name a cat", "chosen": "the cat Tom", "rejected": "the rat and the hat"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A hub cache with a small Gemma-2 under its real name, its Gemma Scope SAE, and pairs."""
    folder = tmp_path_factory.mktemp("offline")
    tiny.model_folder(
        snapshot(folder / "hub", "google/gemma-2-2b"),
        hidden_size=2304,
        num_hidden_layers=26,
        intermediate_size=8,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    scope = snapshot(folder / "hub", "google/gemma-scope-2b-pt-res") / SCOPE
    scope.mkdir(parents=True)
    write_scope(scope / "params.npz", 2304, 16384, np.float16, threshold=8)
    tiny.model_folder(folder / "model")
    write_scope(folder / "params.npz", tiny.WIDTH, tiny.FEATURES, np.float32, threshold=1.5)
    tiny.sae_folder(folder / "sae")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return folder


def fpo(folder, command, hub="hub"):
    """Run a command offline, in `folder`, with the hub's cache there."""
    with contextlib.chdir(folder):
        process = Command(*command.split(), prepare=partial(use_hub, folder / hub))
    (done,) = results(process)
    return done


def scope_sae(npz):
    """sae-lens's SAE of a Gemma Scope file."""
    with np.load(npz) as arrays:
        state = {name: torch.tensor(array).float() for name, array in arrays.items()}
    width, features = state["W_enc"].shape
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=width, d_sae=features, apply_b_dec_to_input=False))
    sae.load_state_dict(state)
    return sae


@torch.no_grad()
def check_features(store, model, npz, layer):
    """The stored features of every response are the largest of those that transformers and
    sae-lens give for it alone."""
    network = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    sae = scope_sae(npz)
    seen = []
    network.model.layers[layer].register_forward_hook(lambda *call: seen.append(call[-1]))
    tokens = store.tokens(0)
    stored = store.reference(0, tokens).features[f"layer_{layer}.resid_post"]
    for pair in range(len(tokens)):
        prompt, *responses = (
            torch.from_numpy(run.astype(np.int64)) for run in runs(tokens.pair(pair))
        )
        for side, response in enumerate(responses):
            network(torch.cat([prompt, response])[None])
            states = seen.pop()[0, len(prompt) - 1 : -1]
            expected = sae.encode(states).mean(0).numpy()
            index, value = stored.index[pair, side], stored.value[pair, side]
            used = value > 0
            count = stored.nonzero[pair, side]
            assert used.sum() == min(count, len(value))
            # A state that stands on a threshold may fall on either side of it.
            assert count == pytest.approx((expected > 0).sum(), abs=3)
            assert is_close(value[used], expected[index[used]])
            assert is_close(value, np.sort(expected)[::-1][: len(value)])


def is_close(given, expected):
    return np.isclose(given, expected, rtol=1e-4, atol=1e-5).mean() > 0.98


@pytest.mark.slow
def test_gemma_by_its_short_name(folder):
    words = "cache --model gemma-2-2b --layer 25 --data pairs.jsonl --dtype float32 --device cpu"
    # As a user starts it, with the place of the cache in the environment.
    places = {"HF_HOME": str(folder / "home"), "HF_HUB_CACHE": str(folder / "hub")}
    done = subprocess.run(
        [sys.executable, "-m", "fpocli", *words.split()],
        cwd=folder,
        env=os.environ | places,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    store = Store.open(folder / "ref.zarr")
    model, about = store.meta["model"], store.sites["layer_25.resid_post"]
    assert (model["source"], model["revision"]) == ("google/gemma-2-2b", COMMIT)
    assert (model["architecture"], model["attention"]) == ("Gemma2ForCausalLM", BY_SEQUENCE)
    assert store.meta["tokenizer"]["source"] == "google/gemma-2-2b"
    assert store.meta["tokenizer"]["chat_template"]["name"] == "halos"
    release = "gemma-scope-2b-pt-res-canonical"
    assert about["sae"]["source"] == f"{release}/layer_25/width_16k/canonical"
    assert about["sae"]["architecture"] == "jumprelu"
    assert (about["d_sae"], about["k"], store.pairs) == (16384, 256, len(PAIRS))
    hub = folder / "hub"
    check_features(
        store,
        hub / "models--google--gemma-2-2b" / "snapshots" / COMMIT,
        hub / "models--google--gemma-scope-2b-pt-res" / "snapshots" / COMMIT / SCOPE / "params.npz",
        layer=25,
    )


def test_local_gemma_scope_file(folder):
    store = cache(
        CacheConfig(
            model=str(folder / "model"),
            layer=[2],
            sae=[str(folder / "params.npz")],
            data=str(folder / "pairs.jsonl"),
            top_k="all",
            dtype="float32",
            device="cpu",
            out=str(folder / "local.zarr"),
        )
    )
    assert store.sites["layer_2.resid_post"]["k"] == tiny.FEATURES
    assert store.meta["model"]["revision"] is None
    check_features(store, folder / "model", folder / "params.npz", layer=2)


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ("--model gemma-2-2b --sae sae --data pairs.jsonl", "the model google/gemma-2-2b"),
        (
            "--model model --sae gemma-scope-2b-pt-res-canonical/layer_2/width_16k/canonical "
            "--data pairs.jsonl",
            "the SAE gemma-scope-2b-pt-res-canonical/layer_2/width_16k/canonical",
        ),
        ("--model model --sae sae", "the data set HuggingFaceH4/ultrafeedback_binarized"),
    ],
)
def test_what_is_missing_offline_is_reported(folder, names, what):
    done = fpo(folder, f"cache --layer 2 --device cpu --out none.zarr {names}", hub="empty")
    assert done.returncode == 2, done.stderr
    told = done.stderr[done.stderr.index("error: ") :]
    assert told.startswith(f"error: {what} is not on this machine and the hub cannot be reached")
    assert "\nhint: check the network and HF_ENDPOINT" in told
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_defaults_are_the_papers(monkeypatch):
    config = CacheConfig(model="gemma-2-2b", layer=[25])
    assert (config.data, config.out) == (["HuggingFaceH4/ultrafeedback_binarized"], "ref.zarr")
    assert (config.split, config.limit, config.sae) == ([], None, [])
    asked = []

    def load_dataset(name, config_name, split, revision):
        asked.append((name, config_name, split, revision))
        return datasets.Dataset.from_list(PAIRS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (source,) = sources_of(config)
    assert asked == [("HuggingFaceH4/ultrafeedback_binarized", None, "train_prefs", None)]
    assert source.identity["split"] == "train_prefs"
    assert [row for _, row in source.rows()] == PAIRS
    open_source("owner/other", None, None)
    assert asked[1:] == [("owner/other", None, "train", None)]


def test_a_fine_tuned_folder_gets_the_sae_of_its_base_model(folder):
    """By its shape: the folder's name says nothing."""
    tuned = folder / "tuned"
    base = folder / "hub/models--google--gemma-2-2b/snapshots" / COMMIT
    shutil.copytree(base, tuned, dirs_exist_ok=True)
    done = fpo(
        folder,
        "cache --model tuned --layer 25 --data pairs.jsonl --dtype float32 --device cpu "
        "--out tuned.zarr",
    )
    assert done.returncode == 0, done.stderr
    source = "gemma-scope-2b-pt-res-canonical/layer_25/width_16k/canonical"
    assert f"SAE {source}, trained on google/gemma-2-2b, the base model whose shape" in done.stderr
    assert Store.open(folder / "tuned.zarr").sites["layer_25.resid_post"]["sae"]["source"] == source
    done = fpo(folder, "saes tuned --layer 25")
    assert done.returncode == 0, done.stderr
    assert "these were trained on google/gemma-2-2b, whose shape tuned has" in done.stderr
    marked = [line for line in done.stdout.splitlines() if line.rstrip().endswith("default")]
    assert [line.split()[:4] for line in marked] == [
        ["layer_25.mlp_out", "16k", "126", source.replace("res", "mlp")],
        ["layer_25.resid_post", "16k", "116", source],
    ]


def test_gemma_3_with_gemma_scope_2(folder):
    """Its release on the hub, and the same folder by its path."""
    tiny.model_folder(
        snapshot(folder / "hub", "google/gemma-3-270m"),
        "gemma3",
        hidden_size=640,
        num_hidden_layers=18,
    )
    scope = snapshot(folder / "hub", "google/gemma-scope-2-270m-pt")
    place = scope / "resid_post_all/layer_3_width_16k_l0_big"
    write_scope_2(place, 640, 16384, "model.layers.3.output", threshold=3)
    words = "cache --model gemma-3-270m --layer 3 --data pairs.jsonl --dtype float32 --device cpu"
    done = fpo(folder, f"{words} --out gemma3.zarr")
    assert done.returncode == 0, done.stderr
    named, path = Store.open(folder / "gemma3.zarr"), str(place)
    source = "gemma-scope-2-270m-pt-res-all/layer_3_width_16k_l0_big"
    assert named.sites["layer_3.resid_post"]["sae"]["source"] == source
    done = fpo(folder, f"{words} --out path.zarr --sae {path}")
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(
        named.read_array("features/layer_3.resid_post/value"),
        Store.open(folder / "path.zarr").read_array("features/layer_3.resid_post/value"),
    )
    done = fpo(folder, f"{words.replace('--layer 3', '--layer 4')} --out p4.zarr --sae {path}")
    assert done.returncode == 2
    assert "was trained at model.layers.3" in done.stderr and "use --layer 3" in done.stderr


def runs(pair):
    return pair.prompt, pair.chosen, pair.rejected
