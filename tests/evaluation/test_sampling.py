"""Sampling: entropy against plain transformers, seeds, resuming."""

import json
import shutil

import numpy as np
import pytest
import tiny
import torch
from stores import cache_config

from fpocli import EvalConfig, cache, evaluate
from fpocli.data.tokenizer import encode_prompt
from fpocli.evaluation.prompts import Prompt
from fpocli.evaluation.sampling import Sampler, diversity
from fpocli.model.network import load_network
from fpocli.scoring.loading import tokenizer_of
from fpocli.store.reader import Store
from fpocli.system.errors import UserError
from fpocli.system.model_folder import find_model

QUESTIONS = ["say the cat", "code with the hat on the mat and some more", "rat"]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in QUESTIONS))
    return file


def config(material, prompts, out, **changes) -> EvalConfig:
    settings = {
        "model": str(material / "policy"),
        "cache": str(material / "ref.zarr"),
        "generate": [str(prompts)],
        "max_new_tokens": 10,
        "batch_size": 2,
        "device": "cpu",
        "out": str(out),
    }
    return EvalConfig(**(settings | changes))


def sampler(folder, store) -> Sampler:
    model = find_model(str(folder))
    special = store.meta["tokenizer"]["special_tokens"]
    network = load_network(model, torch.float32)
    return Sampler(network, tokenizer_of(store, model), **special, top_p=1.0, seed=0)


def questions(*texts):
    return [Prompt((text,), {}) for text in texts]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_entropy_is_that_of_the_policys_distribution(material, tmp_path, family, temperature):
    """Each answer is scored by plain transformers by itself: no padding, no cache, no
    temperature."""
    folder = tiny.model_folder(tmp_path / "model", family)
    store = cache(cache_config(material, tmp_path / "ref.zarr", model=str(folder)))
    mouth = sampler(folder, store)
    network = tiny.network(family)
    for text, answer in zip(
        QUESTIONS, mouth.answer(questions(*QUESTIONS), temperature, 0, 10), strict=True
    ):
        (turn,) = answer["turns"]
        prompt = encode_prompt(mouth.tokenizer, [{"role": "user", "content": text}], mouth.bos)
        ids = torch.tensor([prompt + turn["ids"]])
        with torch.no_grad():
            logits = network(ids, use_cache=False).logits[0, len(prompt) - 1 :].double()
        # The end of the turn was predicted too, where there is one.
        logits = logits if turn["ended"] else logits[:-1]
        entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
        assert turn["entropy"] == pytest.approx(entropy, abs=1e-4)
        if temperature == 0:
            chosen = logits.argmax(-1).tolist()[: len(turn["ids"])]
            assert turn["ids"] == chosen


def test_tokens_are_drawn_from_the_policys_distribution(material, store_path):
    """The first token of 600 answers, against the softmax at the temperature."""
    store, temperature = Store.open(store_path), 0.5
    mouth = sampler(material / "policy", store)
    drawn = np.zeros(tiny.VOCABULARY)
    for answer in mouth.answer(questions(*["say the cat"] * 600), temperature, 0, 1):
        (turn,) = answer["turns"]
        if turn["ids"]:
            drawn[turn["ids"][0]] += 1
    prompt = encode_prompt(mouth.tokenizer, [{"role": "user", "content": "say the cat"}], mouth.bos)
    with torch.no_grad():
        logits = tiny.network("gemma2", 1)(torch.tensor([prompt])).logits[0, -1]
    expected = 600 * (logits / temperature).softmax(-1).numpy()
    likely = expected > 8
    assert likely.sum() > 10
    # Poisson: 5 standard deviations.
    assert (abs(drawn - expected)[likely] < 5 * np.sqrt(expected[likely])).all()


def test_same_seed_same_answers_and_another_seed_others(material, store_path, tmp_path, prompts):
    files = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        evaluate(config(material, prompts, tmp_path / name, seed=seed, temperature=[0.7, 1.0]))
        files.append((tmp_path / name / "prompts/samples.jsonl").read_text())
    assert files[0] == files[1] != files[2]
    rows = [json.loads(line) for line in files[0].splitlines()]
    assert [(row["temperature"], row["prompt"]) for row in rows] == [
        (temperature, number) for temperature in (0.7, 1.0) for number in range(3)
    ]


def test_interrupted_sampling_resumes_to_the_same_answers(material, store_path, tmp_path, prompts):
    settings = config(material, prompts, tmp_path / "out", temperature=[0.7, 1.0])
    whole = evaluate(settings)
    file = tmp_path / "out/prompts/samples.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    # A batch of two of which one line was written, and a line cut by a kill.
    file.write_text("".join(lines[:4]) + lines[4][:20])
    again = evaluate(settings)
    assert file.read_text() == "".join(lines)
    assert again == whole


def test_samples_of_other_settings_are_kept(material, store_path, tmp_path, prompts):
    evaluate(config(material, prompts, tmp_path / "out"))
    with pytest.raises(UserError, match="seed is 0 there, 5 here"):
        evaluate(config(material, prompts, tmp_path / "out", seed=5))
    evaluate(config(material, prompts, tmp_path / "out", seed=5, overwrite=True))


def test_an_end_of_turn_of_several_tokens_ends_an_answer_as_a_whole(material, tmp_path):
    """The tokeniser does not know chatml's <|im_end|>; a lone < is an ordinary character."""
    store = cache(cache_config(material, tmp_path / "ref.zarr", chat_template="chatml"))
    mouth = sampler(material / "policy", store)
    assert len(mouth.ends[0]) > 1 and len(mouth.ends) == 2
    ids = mouth.tokenizer("if x < y: code<|im_end|> and", add_special_tokens=False).input_ids
    reply = mouth._reply(ids, [1.0] * len(ids))
    assert reply["text"] == "if x < y: code" and reply["ended"]
    assert all(answer["turns"] for answer in mouth.answer(questions(*QUESTIONS), 0.7, 0, 10))


def test_a_models_own_generation_settings_are_ignored(material, store_path, tmp_path):
    folder = shutil.copytree(material / "policy", tmp_path / "policy")
    about = {"repetition_penalty": 1.8, "do_sample": True, "temperature": 0.1}
    (folder / "generation_config.json").write_text(json.dumps(about))
    store = Store.open(store_path)
    one, other = (
        sampler(path, store).answer(questions(*QUESTIONS), 0, 0, 10)
        for path in (material / "policy", folder)
    )
    assert one == other


def test_samples_of_another_template_are_not_reused(material, store_path, tmp_path, prompts):
    evaluate(config(material, prompts, tmp_path / "out"))
    store = cache(cache_config(material, tmp_path / "chatml.zarr", chat_template="chatml"))
    with pytest.raises(UserError, match="template is"):
        evaluate(config(material, prompts, tmp_path / "out", cache=str(store.path)))
    (tmp_path / "out/prompts/samples.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        evaluate(config(material, prompts, tmp_path / "out"))


def test_an_answer_ends_with_its_turn(material, store_path):
    mouth = sampler(material / "policy", Store.open(store_path))
    (end,) = mouth.ends[0]
    reply = mouth._reply([40, 41, end, 7, 7], [1.0, 2.0, 3.0, 50.0, 50.0])
    assert reply["ids"] == [40, 41] and reply["ended"] and reply["entropy"] == 2
    mouth.ends.append([41, 42])
    reply = mouth._reply([41, 40, 41, 42, end], [1.0, 2.0, 3.0, 2.0, 50.0])
    assert reply["ids"] == [41, 40] and reply["ended"] and reply["entropy"] == 2
    reply = mouth._reply([40, 41], [1.0, 2.0])
    assert reply["ids"] == [40, 41] and not reply["ended"] and reply["entropy"] == 1.5


def test_the_second_turn_sees_the_first_answer(material, store_path):
    mouth = sampler(material / "policy", Store.open(store_path))
    talk = [Prompt(("say the cat", "and more"), {}), Prompt(("rat",), {})]
    first, second = mouth.answer(talk, 0, 0, 10)
    assert len(first["turns"]) == 2 and len(second["turns"]) == 1
    history = [
        {"role": "user", "content": "say the cat"},
        {"role": "assistant", "content": first["turns"][0]["text"]},
        {"role": "user", "content": "and more"},
    ]
    (alone,) = mouth._sample([history], 0, 10)
    assert alone["ids"] == first["turns"][1]["ids"]


def test_distinct_n_by_hand():
    def turn(*ids):
        return {"turns": [{"ids": list(ids), "entropy": 1.0, "ended": True}]}

    found = diversity([turn(1, 2, 1, 2), turn(1, 2)])
    assert found["distinct_1"] == 2 / 6
    assert found["distinct_2"] == 2 / 4
    assert found["distinct_3"] == 2 / 2
    assert found["tokens"] == 3
    assert diversity([turn(1)])["distinct_2"] is None


def test_a_prompt_is_encoded_as_the_store_encodes_it(material, store_path):
    store = Store.open(store_path)
    mouth = sampler(material / "policy", store)
    rows = [json.loads(line) for line in (material / "pairs.jsonl").read_text().splitlines()]
    tokens = store.tokens(0)
    for number in range(len(tokens)):
        pair = tokens.pair(number)
        talk = [{"role": "user", "content": rows[pair.row]["prompt"]}]
        assert encode_prompt(mouth.tokenizer, talk, mouth.bos) == list(pair.prompt)
