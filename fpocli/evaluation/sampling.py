"""Sampling answers from a policy, and how diverse they are.

The entropy of a response is the mean over its tokens of the Shannon entropy of the policy's
next-token distribution, in nats and at temperature 1 whatever the temperature of the sampling
(docs/evaluation.md).

Shapes: b prompts of a batch, T steps, V vocabulary.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpocli.config import EvalConfig
from fpocli.data.tokenizer import encode_prompt
from fpocli.evaluation.judge_answers import write_answers
from fpocli.evaluation.prompts import Prompt
from fpocli.evaluation.samples import Samples
from fpocli.model.network import load_network
from fpocli.store.reader import Store
from fpocli.system.console import progress
from fpocli.system.model_folder import ModelFolder


def generate(
    config: EvalConfig,
    answers: list[Samples],
    folder: ModelFolder,
    tokenizer: Any,
    store: Store,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Answer the prompts at every temperature, resuming from the answers that exist.

    Args:
        config: of the sampling.
        answers: to each set of prompts, those that exist already.
        folder: the policy.
        tokenizer: with the store's template.
        store: its template begins a prompt and ends a turn.
        device: where the policy runs.

    Returns:
        by set of prompts and temperature: number of responses, mean tokens, share that ended,
        entropy, distinct-n.
    """
    todo = [(samples, *batch) for samples in answers for batch in samples.missing()]
    if todo:
        network = load_network(folder, getattr(torch, store.meta["model"]["dtype"])).to(device)
        special = store.meta["tokenizer"]["special_tokens"]
        sampler = Sampler(
            network,
            tokenizer,
            bos=special["bos"],
            end_of_turn=special["end_of_turn"],
            top_p=config.top_p,
            seed=config.seed,
        )
        batches = [
            samples.asked.prompts[first : first + config.batch_size] for samples, _, first in todo
        ]
        with progress("Sampling answers", sum(map(len, batches))) as bar:
            for (samples, temperature, first), batch in zip(todo, batches, strict=True):
                most = samples.asked.max_new_tokens
                samples.add(temperature, first, sampler.answer(batch, temperature, first, most))
                bar.advance(len(batch))
    results = []
    for samples in answers:
        samples.finish()
        for temperature in samples.asked.temperatures:
            prompts = samples.asked.prompts
            rows = [samples.done[temperature][number] for number in range(len(prompts))]
            name = _name(config.model) + ("" if temperature is None else f"-t{temperature:g}")
            if samples.ranks.rank == 0:
                write_answers(prompts, rows, name, samples.file.parent)
            about = {"prompts": samples.asked.name, "temperature": temperature}
            results.append(about | diversity(rows))
    return results


def _name(model: str) -> str:
    """A model's name in the judges' files: the name of its folder or hub repository."""
    return Path(model).resolve().name if Path(model).exists() else model.replace("/", "-")


class Sampler:
    """A policy that answers prompts, with transformers' generate.

    Args:
        network: transformers' model, on its device.
        tokenizer: with a chat template.
        bos: the id that starts every prompt, or None.
        end_of_turn: the ids that end a turn in the template.
        top_p: of nucleus sampling; 1 keeps all tokens.
        seed: of the sampling.
    """

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        *,
        bos: int | None,
        end_of_turn: list[int],
        top_p: float,
        seed: int,
    ) -> None:
        from transformers import GenerationConfig

        self.tokenizer, self.bos = tokenizer, bos
        self.top_p, self.seed = top_p, seed
        # The end of a turn may be several tokens.
        self.ends = [end_of_turn]
        if tokenizer.eos_token_id is not None and [tokenizer.eos_token_id] not in self.ends:
            self.ends.append([tokenizer.eos_token_id])
        # Packed sequences are for scoring; generation uses transformers' own attention.
        self.network = network.eval()
        # Ignore penalties and filters in the model's own generation configuration.
        self.network.generation_config = GenerationConfig()

    def answer(
        self, prompts: list[Prompt], temperature: float | None, first: int, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Answers to a batch of prompts, turn by turn.

        Args:
            prompts: b of them.
            temperature: 0 takes the likeliest token; None stands for that of each prompt's
                category.
            first: the number of the first prompt, which seeds the batch.
            max_new_tokens: the most tokens of an answer.

        Returns:
            per prompt `turns`: text, ids, entropy in nats per token, and whether it ended.
        """
        seed = hashlib.sha256(f"{self.seed} {temperature} {first}".encode()).digest()
        torch.manual_seed(int.from_bytes(seed[:4], "little"))
        talks: list[list[dict[str, str]]] = [[] for _ in prompts]
        answers: list[dict[str, Any]] = [{"turns": []} for _ in prompts]
        for turn in range(max(len(prompt.turns) for prompt in prompts)):
            speaking = [i for i, prompt in enumerate(prompts) if turn < len(prompt.turns)]
            for i in speaking:
                talks[i].append({"role": "user", "content": prompts[i].turns[turn]})
            warmth = {i: prompts[i].temperature(temperature) for i in speaking}
            for value in dict.fromkeys(warmth.values()):
                group = [i for i in speaking if warmth[i] == value]
                replies = self._sample([talks[i] for i in group], value, max_new_tokens)
                for i, reply in zip(group, replies, strict=True):
                    answers[i]["turns"].append(reply)
                    talks[i].append({"role": "assistant", "content": reply["text"]})
        return answers

    def _sample(
        self, talks: list[list[dict[str, str]]], temperature: float, max_new_tokens: int
    ) -> list[dict]:
        prompts = [encode_prompt(self.tokenizer, talk, self.bos) for talk in talks]
        width = max(len(ids) for ids in prompts)
        device = self.network.device
        single = [end[0] for end in self.ends if len(end) == 1]
        padding = single[0] if single else 0
        ids = torch.tensor([[padding] * (width - len(p)) + p for p in prompts], device=device)
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            sampling = {
                "do_sample": True, "temperature": temperature, "top_p": self.top_p, "top_k": 0,
            }  # fmt: skip
        if several := [self.tokenizer.decode(end) for end in self.ends if len(end) > 1]:
            sampling |= {"stop_strings": several, "tokenizer": self.tokenizer}
        with torch.inference_mode(), _entropies(self.network) as entropies:
            tokens = self.network.generate(
                ids,
                attention_mask=seen,
                max_new_tokens=max_new_tokens,
                eos_token_id=single or None,
                pad_token_id=padding,
                **sampling,
            )[:, width:]
        return [
            self._reply(row, entropy)
            for row, entropy in zip(
                tokens.tolist(), torch.stack(entropies, 1).tolist(), strict=True
            )
        ]

    def _reply(self, tokens: list[int], entropy: list[float]) -> dict[str, Any]:
        """The answer up to the end of its turn, which counts for the entropy but not the text."""
        found = [
            (start, start + len(end))
            for end in self.ends
            for start in range(len(tokens) - len(end) + 1)
            if tokens[start : start + len(end)] == end
        ]
        stop, count = min(found, default=(len(tokens), len(tokens)))
        ids = tokens[:stop]
        return {
            "text": self.tokenizer.decode(ids, skip_special_tokens=True),
            "ids": ids,
            "entropy": sum(entropy[:count]) / count,
            "ended": bool(found),
        }


@contextmanager
def _entropies(network: Any) -> Iterator[list[Tensor]]:
    """Collect the entropy of every next-token distribution, nats [b] per step, from the model's
    logits before the temperature."""
    found: list[Tensor] = []

    def note(module: Any, inputs: Any, output: Any) -> None:
        logs = output.logits[:, -1].float().log_softmax(-1)
        found.append(-(logs.exp() * logs).sum(-1))

    hook = network.register_forward_hook(note)
    try:
        yield found
    finally:
        hook.remove()


def diversity(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Entropy and distinct-n of the answers at one temperature.

    Args:
        rows: per prompt `turns` as `Sampler.answer` gives them.
    """
    turns = [turn for row in rows for turn in row["turns"]]
    return {
        "responses": len(turns),
        "tokens": sum(len(turn["ids"]) for turn in turns) / len(turns),
        "ended": sum(turn["ended"] for turn in turns) / len(turns),
        "entropy": sum(turn["entropy"] for turn in turns) / len(turns),
        **{f"distinct_{n}": _distinct([turn["ids"] for turn in turns], n) for n in (1, 2, 3)},
    }


def _distinct(runs: list[list[int]], n: int) -> float | None:
    """Distinct n-grams of tokens as a share of all n-grams (Li et al. 2016)."""
    grams = [tuple(ids[i : i + n]) for ids in runs for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None
