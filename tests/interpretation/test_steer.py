"""fpo features steer against plain transformers, without cache, and the sampler of fpo eval."""

import json

import pytest
import tiny
import torch
from sae_lens import SAE
from typer.testing import CliRunner

from fpocli import EvalConfig, SteerConfig, UserError, evaluate, steer
from fpocli.cli.commands import app
from fpocli.data.chat_templates import CHAT_TEMPLATES
from fpocli.data.tokenizer import encode_prompt, load_tokenizer
from fpocli.system.model_folder import find_model

QUESTIONS = ["say the cat", "code with the hat on the mat and some more", "rat"]
ADDED, ABLATED = {4: 6.0, 31: -2.5}, [1, 2, 5]
# The others never fire.
ACTIVE = [feature for feature in range(tiny.FEATURES) if feature % 3]


def config(material, **changes) -> SteerConfig:
    settings = {
        "model": str(material / "policy"),
        "layer": 2,
        "sae": str(material / "sae"),
        "add": [f"{feature}={value}" for feature, value in ADDED.items()],
        "prompt": QUESTIONS,
        "max_new_tokens": 10,
        "dtype": "float32",
        "device": "cpu",
        "json": True,
    }
    return SteerConfig(**(settings | changes))


def greedy(network, module, sae, tokenizer, question, added, ablated, most=10):
    """The likeliest tokens one by one, from the whole sequence each time: text, entropy in nats per
    token, and whether it ended."""

    def change(_, inputs, output):
        features = sae.encode(output)
        moved = output.double()
        for feature, value in added.items():
            moved = moved + value * sae.W_dec[feature].double()
        for feature in ablated:
            moved = moved - features[..., feature, None] * sae.W_dec[feature].double()
        return moved.float()

    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")}
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": question}], 1)
    ids, entropies = list(prompt), []
    hook = module.register_forward_hook(change)
    while len(entropies) < most and ids[-1] not in ends:
        with torch.no_grad():
            logits = network(torch.tensor([ids]), use_cache=False).logits[0, -1].double()
        entropies.append(torch.distributions.Categorical(logits=logits).entropy().item())
        ids.append(int(logits.argmax()))
    hook.remove()
    ended = ids[-1] in ends
    text = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    return text, pytest.approx(sum(entropies) / len(entropies), abs=1e-4), ended


@pytest.mark.parametrize(
    ("family", "site", "added", "ablated"),
    [
        *(
            (family, site, ADDED, ABLATED)
            for family in tiny.FAMILIES
            for site in ("resid_post", "mlp_out")
        ),
        ("gemma2", "resid_post", ADDED, []),
        ("gemma2", "resid_post", {}, ACTIVE),
    ],
)
def test_greedy_answers_are_those_of_plain_transformers(
    material, tmp_path, family, site, added, ablated
):
    folder = tiny.model_folder(tmp_path / "model", family)
    changes = {
        "model": str(folder),
        "site": site,
        "add": [f"{feature}={value}" for feature, value in added.items()],
        "ablate": ablated,
        "chat_template": "gemma",
    }
    result = steer(config(material, **changes))
    network = tiny.network(family)
    layer = network.model.layers[2]
    module = layer
    if site == "mlp_out":
        module = layer.mlp if family == "llama" else layer.post_feedforward_layernorm
    sae = SAE.load_from_disk(str(material / "sae")).requires_grad_(False)
    tokenizer = load_tokenizer(find_model(str(folder)))
    tokenizer.chat_template = CHAT_TEMPLATES["gemma"]
    for question, sample in zip(QUESTIONS, result["samples"], strict=True):
        for side, (more, less) in (("plain", ({}, [])), ("steered", (added, ablated))):
            found = tuple(sample[side][name] for name in ("text", "entropy", "ended"))
            assert found == greedy(network, module, sae, tokenizer, question, more, less)
    assert any(sample["plain"]["text"] != sample["steered"]["text"] for sample in result["samples"])


def test_plain_samples_are_those_of_fpo_eval(material, store_path, tmp_path):
    """Also after a steered one; a prompt's seed does not depend on what was sampled before."""
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    sampling = {"temperature": 0.8, "top_p": 0.9, "seed": 3, "max_new_tokens": 10}
    result = steer(config(material, prompt=[], prompts=str(file), **sampling))
    evaluate(
        EvalConfig(
            model=str(material / "policy"),
            cache=str(store_path),
            generate=[str(file)],
            batch_size=1,
            device="cpu",
            out=str(tmp_path / "out"),
            **(sampling | {"temperature": [0.8]}),
        )
    )
    lines = (tmp_path / "out/mine/samples.jsonl").read_text().splitlines()
    theirs = [json.loads(line)["turns"][0] for line in lines]
    names = ("text", "entropy", "ended")
    ours = [sample["plain"] for sample in result["samples"]]
    assert [[one[name] for name in names] for one in ours] == [
        [one[name] for name in names] for one in theirs
    ]
    assert [one["tokens"] for one in ours] == [len(one["ids"]) for one in theirs]
    assert all(sample["plain"] != sample["steered"] for sample in result["samples"])


def test_both_samples_of_a_prompt_have_the_same_seed(material):
    """Feature 0 never fires, so ablating it changes nothing."""
    result = steer(config(material, add=[], ablate=[0], temperature=1.0))
    assert all(sample["plain"] == sample["steered"] for sample in result["samples"])
    other = steer(config(material, add=[], ablate=[0], temperature=1.0, seed=1))
    assert result["samples"] != other["samples"]


def test_the_second_turn_follows_the_answer_of_its_own_kind(material, tmp_path):
    file = tmp_path / "turns.jsonl"
    file.write_text(json.dumps({"question_id": 1, "turns": ["say the cat", "and more"]}))
    result = steer(config(material, prompt=["rat"], prompts=str(file)))
    assert [sample["prompt"] for sample in result["samples"]] == ["rat", "say the cat", "and more"]


def command(material, *more) -> list[str]:
    return [
        *("features", "steer", "--model", str(material / "policy"), "--layer", "2"),
        *("--sae", str(material / "sae"), "--dtype", "float32", "--device", "cpu"),
        *("--add", "4=6", "--add", "31=-2.5", "--ablate", "5", "--prompt", QUESTIONS[0]),
        *("--max-new-tokens", "10", *more),
    ]


def test_the_command_prints_json_and_nothing_else_on_stdout(material, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS[1:]))
    run = CliRunner().invoke(
        app, command(material, "--prompts", str(file), "--limit", "1", "--json")
    )
    assert run.exit_code == 0, run.output
    shown = json.loads(run.stdout)
    assert shown == steer(config(material, ablate=[5], prompt=QUESTIONS[:2]))
    assert shown["site"] == "layer_2.resid_post" and shown["sae"] == str(material / "sae")
    assert shown["added"] == [{"feature": 4, "value": 6.0}, {"feature": 31, "value": -2.5}]
    assert shown["ablated"] == [5]
    assert shown["samples"][0]["steered"].keys() == {"text", "tokens", "entropy", "ended"}


def test_the_table_has_both_samples_side_by_side(material):
    run = CliRunner().invoke(app, command(material))
    assert run.exit_code == 0, run.output
    (sample,) = steer(config(material, ablate=[5], prompt=QUESTIONS[:1]))["samples"]
    words = " ".join(run.stdout.split())
    assert "feature 4 +6, feature 31 -2.5, feature 5 ablated" in words
    assert QUESTIONS[0] in words
    for side in ("plain", "steered"):
        assert f"{sample[side]['entropy']:.2f}" in words
    assert sample["plain"]["text"].split()[0] in words
    assert not sample["steered"]["text"].isprintable(), "it would control the terminal"
    assert run.stdout.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add": ["4"]}, "--add 4 is not a feature's index"),
        ({"add": ["x=3"]}, "--add x=3 is not"),
        ({"add": ["4=x"]}, "--add 4=x is not"),
        ({"add": ["4=nan"]}, "--add 4=nan is not"),
        ({"add": ["4=inf"]}, "finite number"),
        ({"add": ["4=1", "4=2"]}, "feature 4 is named twice"),
        ({"ablate": [4]}, "feature 4 is named twice"),
        ({"ablate": [7, 7]}, "feature 7 is named twice"),
        ({"add": []}, "no feature is named"),
        ({"prompt": []}, "no prompt is named"),
        ({"prompt": [" "]}, "a --prompt is empty"),
        ({"prompts": "none.jsonl"}, "the prompts none.jsonl do not exist"),
        ({"temperature": float("inf")}, "--temperature"),
        ({"add": ["96=1"]}, "the SAE has no feature 96"),
        ({"ablate": [-1]}, "the SAE has no feature -1"),
        ({"add": ["4=1e39"]}, "not finite"),
        ({"layer": tiny.LAYERS}, "out of range"),
        ({"chat_template": "none"}, "--chat-template none"),
    ],
)
def test_a_mistake_is_a_sentence_and_a_hint(material, changes, message):
    with pytest.raises(UserError, match=message) as raised:
        steer(config(material, **changes))
    assert raised.value.hint


def test_an_sae_of_another_site_or_width_is_refused(material, tmp_path):
    narrow = tiny.sae_folder(tmp_path / "narrow", width=24)
    with pytest.raises(UserError, match="width 24"):
        steer(config(material, sae=str(narrow)))
    elsewhere = tiny.sae()
    elsewhere.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    elsewhere.save_model(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="not the hook point layer_2"):
        steer(config(material, sae=str(tmp_path / "elsewhere")))
