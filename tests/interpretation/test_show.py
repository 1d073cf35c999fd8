"""fpo features show: what the store has of a feature, and its tokens in context."""

import json

import numpy as np
import pytest
import tiny
import torch
from processes import Command
from sae_lens import SAE
from stores import cache_config, contents
from transformers import AutoModelForCausalLM

from fpocli import ShowConfig, UserError, cache, show
from fpocli.interpretation.contexts import pieces
from fpocli.store.reader import Store

SITE = f"layer_{tiny.LAYERS - 1}.resid_post"
# Fires often, in some responses among the stored features and in others not.
FEATURE = 26


def test_numbers_equal_the_arrays(store_path, capsys):
    result = show(ShowConfig(store=str(store_path), feature=FEATURE, contexts=0, json=True))
    assert json.loads(capsys.readouterr().out) == result
    arrays = contents(store_path)
    index, value = (arrays[f"features/{SITE}/{name}"] for name in ("index", "value"))
    dense = np.zeros((21, 2))
    for pair, side in np.ndindex(21, 2):
        for one, number in zip(index[pair, side], value[pair, side], strict=True):
            if one == FEATURE:
                dense[pair, side] = number
    frequency = arrays[f"features/{SITE}/frequency"][:, FEATURE]
    for side, name in enumerate(("chosen", "rejected")):
        assert result["frequency"][name] == frequency[side] / 21
        assert result["stored"][name] == (dense[:, side] > 0).sum()
        assert result["values"]["mean"][name] == pytest.approx(dense[:, side].mean())
        assert sum(result["values"]["counts"][name]) == (dense[:, side] > 0).sum()
    largest = [(one["pair"], one["value"]) for one in result["largest"]]
    order = np.argsort(-dense.max(1), kind="stable")[:5]
    assert largest == [(int(pair), pytest.approx(dense[pair].max())) for pair in order]
    for one in result["largest"]:
        assert dense[one["pair"], ["chosen", "rejected"].index(one["side"])] == one["value"]
    assert result["contexts"] == [] and result["page"] is None


def test_contexts_equal_plain_transformers_and_sae_lens(material, store_path):
    settings = {"store": str(store_path), "feature": FEATURE, "device": "cpu", "json": True}
    result = show(ShowConfig(pairs=4, contexts=3, **settings))
    assert [one["pair"] for one in result["contexts"]] == [
        one["pair"] for one in result["largest"][:3]
    ]
    network = AutoModelForCausalLM.from_pretrained(
        material / "model", dtype=torch.float32, attn_implementation="eager"
    )
    sae = SAE.load_from_disk(material / "sae")
    store = Store.open(store_path)
    for found in result["contexts"]:
        pair = store.pair(found["pair"])
        response = {"chosen": pair.chosen, "rejected": pair.rejected}[found["side"]]
        ids = torch.tensor([[int(token) for token in (*pair.prompt, *response)]])
        kept = []
        layer = network.model.layers[tiny.LAYERS - 1]
        hook = layer.register_forward_hook(lambda module, inputs, out, kept=kept: kept.append(out))
        with torch.no_grad():
            network(ids)
            values = sae.encode(kept[0][0])[:, FEATURE].numpy()[len(pair.prompt) - 1 : -1]
        hook.remove()
        at = int(values.argmax())
        assert found["peak"] == pytest.approx(values[at], rel=1e-4)
        window = values[at - found["at"] :][: len(found["activations"])]
        np.testing.assert_allclose(found["activations"], window, rtol=1e-3, atol=1e-4)
        tokens = ids[0, len(pair.prompt) - 1 : -1].tolist()[at - found["at"] :]
        shown = tiny.tokenizer().decode(tokens[: len(found["tokens"])])
        assert "".join(found["tokens"]) == shown
        # The pooled value of the store is the mean of the activations.
        (largest,) = (one for one in result["largest"] if one["pair"] == found["pair"])
        assert largest["value"] == pytest.approx(values.mean(), rel=1e-4)


def test_kept_features_are_known_in_every_response(material, tmp_path):
    file = tmp_path / "keep.yaml"
    file.write_text(f"{SITE}: {{groups: {{some: [{FEATURE}]}}}}")
    few = cache(cache_config(material, tmp_path / "few.zarr", top_k="2", keep=str(file)))
    every = cache(cache_config(material, tmp_path / "all.zarr", top_k="all"))
    shown = [
        show(ShowConfig(store=str(store.path), feature=FEATURE, contexts=0, json=True))
        for store in (few, every)
    ]
    for name in ("frequency", "stored", "values", "largest", "mean"):
        assert shown[0][name] == shown[1][name]


def test_pieces_join_to_the_text_and_keep_characters_whole():
    tokenizer = tiny.tokenizer()
    text = "the cat: élan, 東京 and 🙂!"
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = pieces(tokenizer, ids)
    assert len(found) == len(ids) and "".join(found) == text
    assert "🙂" in found and not any("\ufffd" in piece for piece in found)
    # Cut inside a character, what is left of it is shown as such.
    assert len(pieces(tokenizer, ids[:-2])) == len(ids) - 2


def test_the_command_prints_a_table(store_path):
    run = Command(
        "features", "show", str(store_path), "--feature", str(FEATURE), "--contexts", "1",
        "--device", "cpu",
    )  # fmt: skip
    assert run.wait(120) == 0, run.printed()
    table = run.data()
    run.close()
    assert "fires in (share of responses)" in table and "Tokens it fires on" in table
    assert "«" in table


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feature": 96}, "has no feature 96"),
        ({"at": "layer_9.mlp_out"}, "has no features at layer_9.mlp_out"),
        ({"store": "missing.zarr"}, "does not exist"),
        ({"labels": "missing.jsonl"}, "cannot be read"),
    ],
)
def test_wrong_input(store_path, changes, message):
    settings = {"store": str(store_path), "feature": 1, "contexts": 0} | changes
    with pytest.raises(UserError, match=message):
        show(ShowConfig(**settings))
