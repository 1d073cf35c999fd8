"""samples.jsonl: the sampled answers, saved batch by batch so that sampling can be resumed."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fpocli.config import EvalConfig
from fpocli.evaluation.prompts import read_prompts
from fpocli.store.reader import Store
from fpocli.system.errors import UserError, differences
from fpocli.system.files import replace_text
from fpocli.system.model_folder import ModelFolder

# Settings that decide an answer.
_IDENTITY = ("temperature", "top_p", "max_new_tokens", "batch_size", "seed")


class Samples:
    """The file samples.jsonl: one line per prompt and temperature, complete batches only.

    Args:
        config: which prompts and how.
        folder: the policy.
        store: whose template is used.
        out: where the file is.

    Raises:
        UserError: the prompts cannot be read, or `out` holds samples of other settings.
    """

    def __init__(self, config: EvalConfig, folder: ModelFolder, store: Store, out: Path) -> None:
        self.config, self.prompts = config, read_prompts(str(config.generate))
        self.file = out / "samples.jsonl"
        about = out / "samples.json"
        text = json.dumps([prompt.row for prompt in self.prompts], sort_keys=True)
        identity = {name: getattr(config, name) for name in _IDENTITY} | {
            "prompts": hashlib.sha256(text.encode()).hexdigest(),
            "weights": folder.weights_hash(),
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
            replace_text(self.file, "")
            replace_text(about, json.dumps(identity, indent=1))
        self.done: dict[float, dict[int, dict[str, Any]]] = {t: {} for t in config.temperature}
        self._read()

    def missing(self) -> Iterator[tuple[float, int]]:
        """Temperature and first prompt of every batch that is missing."""
        for temperature in self.config.temperature:
            for first in range(0, len(self.prompts), self.config.batch_size):
                if first not in self.done[temperature]:
                    yield temperature, first

    def add(self, temperature: float, first: int, rows: list[dict[str, Any]]) -> None:
        """Append the answers of a batch."""
        lines = []
        for number, row in enumerate(rows, first):
            self.done[temperature][number] = row
            lines.append(json.dumps({"prompt": number, "temperature": temperature, **row}) + "\n")
        with self.file.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def _read(self) -> None:
        """Read complete batches, and discard those that a crash interrupted."""
        kept: dict[tuple[float, int], list[str]] = {}
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            first = row["prompt"] - row["prompt"] % self.config.batch_size
            kept.setdefault((row["temperature"], first), []).append(line)
        whole = []
        for (temperature, first), lines in kept.items():
            if len(lines) == min(self.config.batch_size, len(self.prompts) - first):
                whole += lines
                for line in lines:
                    row = json.loads(line)
                    self.done[temperature][row.pop("prompt")] = row
        replace_text(self.file, "".join(line + "\n" for line in whole))
