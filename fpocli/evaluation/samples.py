"""NAME/samples.jsonl: the sampled answers, saved batch by batch so that sampling can be resumed.

Every rank but the first writes to a file of its own, such as samples.1.jsonl. Rank 0 merges them
at the start, so that any number of ranks may resume, and at the end.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from fpocli.config import EvalConfig
from fpocli.evaluation.prompts import PromptSet
from fpocli.store.reader import Store
from fpocli.system.errors import UserError, differences
from fpocli.system.files import replace_text
from fpocli.system.ranks import Ranks

# Settings that decide an answer.
_IDENTITY = ("top_p", "batch_size", "seed")


class Samples:
    """The answers to a set of prompts: one line per prompt and temperature, complete batches only.

    Args:
        config: how they are sampled.
        asked: the prompts.
        weights: hash of the policy's.
        store: whose template is used.
        out: of the evaluation; the file is in the folder of the prompts' name.
        ranks: the processes that sample.

    Raises:
        UserError: there are samples of other settings.
    """

    def __init__(
        self,
        config: EvalConfig,
        asked: PromptSet,
        weights: str,
        store: Store,
        out: Path,
        ranks: Ranks,
    ) -> None:
        self.config, self.asked, self.ranks = config, asked, ranks
        self.file = out / asked.name / "samples.jsonl"
        name = f"samples.{ranks.rank}.jsonl" if ranks.rank else self.file.name
        self._own = self.file.with_name(name)
        ranks.on_first(lambda: self._open(weights, store))
        self.done: dict[float | None, dict[int, dict[str, Any]]] = {
            temperature: {} for temperature in asked.temperatures
        }
        self._read()

    def _open(self, weights: str, store: Store) -> None:
        """Resume what was sampled with these settings, or start over."""
        config, about = self.config, self.file.with_name("samples.json")
        self.file.parent.mkdir(exist_ok=True)
        text = json.dumps([prompt.row for prompt in self.asked.prompts], sort_keys=True)
        identity = {name: getattr(config, name) for name in _IDENTITY} | {
            "temperature": list(self.asked.temperatures),
            "max_new_tokens": self.asked.max_new_tokens,
            "prompts": hashlib.sha256(text.encode()).hexdigest(),
            "weights": weights,
            "dtype": store.meta["model"]["dtype"],
            "template": store.meta["tokenizer"]["chat_template"]["hash"],
            "special_tokens": store.meta["tokenizer"]["special_tokens"],
        }
        if about.is_file() and self.file.is_file() and not config.overwrite:
            try:
                there = json.loads(about.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{about} is damaged: {error}", "use --overwrite") from error
            if other := differences(there, identity):
                raise UserError(
                    f"{self.file} was sampled with other settings: {other}",
                    "choose another --out, or --overwrite",
                )
        else:
            for file in (*self._parts(), *self.file.parent.glob("model_answer/*")):
                file.unlink()
            replace_text(self.file, "")
            replace_text(about, json.dumps(identity, indent=1))
            # The judges' tools want the questions that were answered.
            rows = (json.dumps(prompt.row, ensure_ascii=False) for prompt in self.asked.prompts)
            replace_text(self.file.with_name("question.jsonl"), "".join(f"{row}\n" for row in rows))
        self._merge()

    def missing(self) -> list[tuple[float | None, int]]:
        """Temperature and first prompt of this rank's share of the batches that are missing."""
        batches = [
            (temperature, first)
            for temperature in self.asked.temperatures
            for first in range(0, len(self.asked.prompts), self.config.batch_size)
            if first not in self.done[temperature]
        ]
        return batches[self.ranks.rank :: self.ranks.world]

    def add(self, temperature: float | None, first: int, rows: list[dict[str, Any]]) -> None:
        """Append the answers of a batch."""
        lines = [
            json.dumps({"prompt": number, "temperature": temperature, **row}) + "\n"
            for number, row in enumerate(rows, first)
        ]
        with self._own.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def finish(self) -> None:
        """Read the answers of all ranks, after the last one has added its own."""
        self.ranks.gather(None)
        self.ranks.on_first(self._merge)
        self._read()

    def _parts(self) -> list[Path]:
        """The files of the other ranks."""
        return sorted(self.file.parent.glob("samples.*.jsonl"))

    def _merge(self) -> None:
        """Bring complete batches into one file, and discard those that a crash interrupted."""
        kept: dict[tuple[float | None, int], dict[int, str]] = {}
        for file in (self.file, *self._parts()):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                first = row["prompt"] - row["prompt"] % self.config.batch_size
                kept.setdefault((row["temperature"], first), {})[row["prompt"]] = line
        whole = [
            line
            for (_, first), lines in kept.items()
            if len(lines) == min(self.config.batch_size, len(self.asked.prompts) - first)
            for line in lines.values()
        ]
        replace_text(self.file, "".join(line + "\n" for line in whole))
        for file in self._parts():
            file.unlink()

    def _read(self) -> None:
        for line in self.file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            self.done[row["temperature"]][row.pop("prompt")] = row
