"""fpo features find: planted features, the weights file, backgrounds, wrong input."""

import json
import random

import numpy as np
import pytest
import tiny
import torch
import yaml
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

from fpocli import FindConfig, UserError, find
from fpocli.data.texts import read_texts
from fpocli.features.weights import load_feature_weights
from fpocli.interpretation.activations import Peaks
from fpocli.interpretation.find import select
from fpocli.interpretation.group_file import add_group

PLANTED, FEATURES, WIDTH = 20, 96, 128
# Of the byte-level tokeniser a capital letter is one token.
LETTERS = "ABCDEFGHIJKLMNOPQRST"
SITE = "layer_0.resid_post"


def write_texts(path, count: int, letters: str, seed: int):
    rng = random.Random(seed)
    words = ["the", "cat", "and", "hat", "rat", "code", "mat", "on"]
    rows = []
    for _ in range(count):
        text = [rng.choice(words) for _ in range(30)]
        for letter in letters:
            if rng.random() < 0.7:
                text[rng.randrange(30)] += letter
        rows.append(json.dumps({"text": " ".join(text)}) + "\n")
    path.write_text("".join(rows))
    return path


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A model whose states are nearly its embeddings, an SAE of which 20 features each read one
    capital letter, and texts with and without capitals."""
    folder = tmp_path_factory.mktemp("planted")
    network = tiny.network("llama", hidden_size=WIDTH, num_hidden_layers=1)
    tokenizer = tiny.tokenizer()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "embed" in name:
                parameter.copy_(torch.randn_like(parameter))
            elif "layers" in name and parameter.ndim > 1:
                parameter.mul_(0.05)
    network.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=WIDTH, d_sae=FEATURES, apply_b_dec_to_input=False))
    places = torch.randperm(FEATURES)[:PLANTED].tolist()
    embeddings = network.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.W_dec):
            parameter.copy_(torch.randn_like(parameter) / WIDTH**0.5)
        sae.b_enc.zero_()
        sae.threshold.fill_(0.5)
        tokens = [tokenizer.encode(letter, add_special_tokens=False) for letter in LETTERS]
        directions = embeddings[torch.tensor(tokens)[:, 0]]
        # The other features do not read the letters.
        basis, _ = torch.linalg.qr(directions.T)
        sae.W_enc -= basis @ (basis.T @ sae.W_enc)
        sae.W_enc[:, places] = (directions / directions.square().sum(1, keepdim=True)).T
    sae.save_model(folder / "sae")
    write_texts(folder / "capitals.jsonl", 24, LETTERS, 1)
    write_texts(folder / "plain.jsonl", 31, "", 2)
    return folder, places


def settings(folder, **changes):
    values = {
        "model": str(folder / "model"),
        "layer": 0,
        "sae": str(folder / "sae"),
        "target": str(folder / "capitals.jsonl"),
        "against": str(folder / "plain.jsonl"),
        "dtype": "float32",
        "device": "cpu",
        "json": True,
        "out": str(folder / "features.yaml"),
    }
    return FindConfig(**(values | changes))


def test_all_planted_features_are_found_and_no_other(planted, tmp_path, capsys):
    folder, places = planted
    out = tmp_path / "found.yaml"
    result = find(settings(folder, out=str(out), top=50, contexts=3))
    assert json.loads(capsys.readouterr().out) == result
    found = [one["feature"] for one in result["features"]]
    assert set(found[:PLANTED]) == set(places), "20 of 20, and none false among the first 20"
    assert result["texts"] == 24 and result["background_texts"] == 31
    for one in result["features"][:PLANTED]:
        letter = LETTERS[places.index(one["feature"])]
        assert one["background_mean"] == 0 and one["share"] > 0.3
        for context in one["contexts"]:
            assert letter in context["tokens"][context["at"]]
            assert context["activations"][context["at"]] == context["peak"] > 0.9
    # The file is one of weights: a group of all that were found.
    weights = load_feature_weights(str(out), {SITE: FEATURES})[SITE]
    assert weights.groups["capitals"].tolist() == sorted(found)
    assert (weights.weight == 1).all() and weights.named.tolist() == sorted(found)


def test_numbers_equal_plain_transformers_and_sae_lens(planted, tmp_path):
    """Every text by itself, after the prompt of the template, in transformers' own attention."""
    from sae_lens import SAE
    from transformers import AutoModelForCausalLM

    from fpocli.data.dropped import DroppedRows
    from fpocli.data.pair_tokenizer import PairTokenizer
    from fpocli.system.model_folder import find_model

    folder, _ = planted
    result = find(settings(folder, out=str(tmp_path / "f.yaml"), contexts=0))
    network = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    sae = SAE.load_from_disk(folder / "sae")
    tokenizer = PairTokenizer(find_model(str(folder / "model")), None, 2048, 1024, DroppedRows())
    pooled, peak = [], []
    for pair in tokenizer(text.pair for text in read_texts(str(folder / "capitals.jsonl"), 256)):
        for response in (pair.chosen, pair.rejected):
            ids = torch.tensor([[*pair.prompt, *response]])
            with torch.no_grad():
                states = network.model(ids, output_hidden_states=True).hidden_states
                # Of the only layer the last of these is after the final norm, so it is hooked.
                assert len(states) == 2
                kept = []
                hook = network.model.layers[0].register_forward_hook(
                    lambda module, inputs, output, kept=kept: kept.append(output)
                )
                network.model(ids)
                hook.remove()
                at = kept[0][0, len(pair.prompt) - 1 : -1]
                values = sae.encode(at)
            pooled.append(values.mean(0).numpy())
            peak.append(values.max(0).values.numpy())
    assert len(pooled) == 24
    for one in result["features"]:
        feature = one["feature"]
        assert one["mean"] == pytest.approx(np.mean(pooled, 0)[feature], rel=1e-4)
        assert one["peak"] == pytest.approx(np.mean(peak, 0)[feature], rel=1e-4)
        assert one["share"] == pytest.approx((np.array(pooled)[:, feature] > 0).mean())


@pytest.mark.parametrize(("target", "background"), [(20, 20), (64, 8), (2, 64), (64, 2)])
def test_texts_of_one_kind_differ_in_no_more_features_than_stated(target, background):
    """The candidates are chosen on the texts that they are tested on, and features are sparse: in
    few texts a feature that fires seldom may not fire at all."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(400):
        texts = target + background
        pooled = rng.gamma(0.3, 1.0, (texts, 200)) * (rng.random((texts, 200)) < 0.2)
        peak = pooled * rng.gamma(2.0, 1.0, (texts, 200))
        sides = [Peaks(pooled[half], peak[half]) for half in (slice(target), slice(target, None))]
        found += bool(len(select(*sides, candidates=50, rate=0.05).feature))
    # 20 are expected at most, with a standard deviation of 4.4.
    assert found <= 33


def test_false_candidates_are_not_hidden_among_true_features():
    """Most features differ, with small peaks; the candidates, with large peaks, do not."""
    rng = np.random.default_rng(0)
    false = 0
    for _ in range(20):
        sides = []
        for shift in (1.0, 0.0):
            true = rng.random((64, 300)) + shift
            null = rng.random((64, 200))
            pooled = np.hstack([true, null])
            sides.append(Peaks(pooled, np.hstack([true, 100 * null])))
        false += bool((select(*sides, candidates=50, rate=0.05).feature >= 300).any())
    assert false <= 2


def test_a_store_is_a_background(planted, tmp_path, capsys):
    from fpocli import CacheConfig, cache

    folder, places = planted
    rows = [
        {"prompt": "say", "chosen": "the cat and the hat", "rejected": f"the rat on mat {i % 7}"}
        for i in range(20)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cache(
        CacheConfig(
            model=str(folder / "model"), layer=[0], sae=[str(folder / "sae")], dtype="float32",
            data=str(tmp_path / "pairs.jsonl"), device="cpu", out=str(tmp_path / "ref.zarr"),
        )
    )  # fmt: skip
    against = str(tmp_path / "ref.zarr")
    out = str(tmp_path / "f.yaml")
    result = find(settings(folder, out=out, against=against, top=50, json=False))
    assert result["background_texts"] == 40
    assert set(places) <= {one["feature"] for one in result["features"]}
    assert "against 40 of" in capsys.readouterr().out


def test_without_a_background_the_largest_come_first(planted, tmp_path, capsys):
    folder, _ = planted
    result = find(settings(folder, out=str(tmp_path / "f.yaml"), against=None, top=5))
    assert all(one["effect"] is None for one in result["features"])
    means = [one["mean"] for one in result["features"]]
    assert means == sorted(means, reverse=True) and len(means) == 5
    assert "without --against" in capsys.readouterr().err


def test_groups_are_added_to_a_file_with_its_comments(tmp_path):
    file = tmp_path / "features.yaml"
    add_group(file, SITE, "one", {5: "a « note » # with: signs\n\x07", 3: ""})
    add_group(file, SITE, "two", {7: "x" * 200})
    text = file.read_text()
    assert "# a « note » # with: signs" in text and "\x07" not in text
    groups = yaml.safe_load(text)[SITE]["groups"]
    assert groups["one"]["features"] == [5, 3] and groups["two"]["features"] == [7]
    assert max(map(len, text.splitlines())) < 100
    with pytest.raises(UserError, match="has a group two already"):
        add_group(file, SITE, "two", {1: ""})
    with pytest.raises(UserError, match="does not end with the groups"):
        add_group(file, "layer_1.mlp_out", "three", {1: ""})
    assert file.read_text() == text
    for name in ("yes", "12", "a-b"):
        add_group(file, SITE, name, {8: ""})
    names = ["one", "two", "yes", "12", "a-b"]
    assert list(load_feature_weights(str(file), {SITE: FEATURES})[SITE].groups) == names
    with pytest.raises(UserError, match="no name of a group"):
        add_group(file, SITE, "a b", {8: ""})
    file.write_text("- 1\n")
    with pytest.raises(UserError, match="not a weights file"):
        add_group(file, SITE, "two", {1: ""})


def test_texts_of_all_layouts(tmp_path):
    file = tmp_path / "texts.jsonl"
    rows = [
        {"text": "one"},
        {"text": "one"},
        {"text": "two"},
        {"prompt": "q", "response": "three"},
        {"prompt": "q", "chosen": "four", "rejected": "five"},
        {"text": "six"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_texts(str(file), 100)
    texts = sorted(
        text for one in found for text in (one.pair.chosen, one.pair.rejected)[: one.texts]
    )
    assert texts == ["five", "four", "one", "one", "six", "three", "two"]
    assert [one.pair.row for one in found] == list(range(len(found)))
    assert sum(one.texts for one in read_texts(str(file), 3)) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"words": "a"}', "line 1: no text, its fields are words"),
        ('{"text": " "}', "no text"),
        ('{"text": 3}', "no text"),
        ("[1]", "not an object"),
        ("{", "broken line"),
        ("", "holds no text"),
        ('{"text": "a"}', "holds a single text"),
    ],
)
def test_wrong_texts_are_an_error_with_their_place(planted, tmp_path, row, message):
    folder, _ = planted
    file = tmp_path / "texts.jsonl"
    file.write_text(row + "\n")
    with pytest.raises(UserError, match=message):
        find(settings(folder, target=str(file), out=str(tmp_path / "f.yaml")))
