"""Counts what the runs of the control experiment answer: formats, languages, refusals, sentiment.

    python examples/control/count.py compare/runs/*/eval/prompts/samples.jsonl
    python examples/control/count.py run/eval/prompts/samples.jsonl --json

Reads the samples that `fpo eval --generate examples/control/prompts.jsonl` writes, and the file
question.jsonl beside them. Each property has a share of answers by kind of prompt, with a standard
error over prompts. Runs whose names differ in `_seed-N` only are taken together. The others are
compared with the first, prompt by prompt. README.md says how each property is recognised. Needs
`pip install ".[control]"`.

Shapes: S seeds, P prompts, C properties.
"""

import argparse
import json
import re
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from py3langid.langid import MODEL_FILE, LanguageIdentifier
from rich.console import Console
from rich.table import Table
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from fpocli.comparison.statistics import compare_shares
from fpocli.system.errors import UserError

LANGUAGES = ("en", "fr", "de", "it")
PROPERTIES = (
    "json", "json in a fence", "list", "capitals", "quotes", *LANGUAGES, "unknown language",
    "refusal", "positive", "negative",
)  # fmt: skip
# Fewer letters, or a lower probability, and the language is unknown.
_FEWEST_LETTERS, _LEAST_PROBABILITY = 20, 0.9
_OPENING = 120
_SENTIMENT = 0.05
_FENCE = re.compile(r"^```[^\n`]*\n(.*?)^```\s*$", re.DOTALL | re.MULTILINE)
_ITEM = re.compile(r"^\s*(?:[-*+•]|\d{1,3}[.)])\s+\S", re.MULTILINE)


# -- one answer ------------------------------------------------------------------------------------


def properties(text: str) -> dict[str, bool]:
    """Which properties an answer has."""
    spoken = language(text)
    # The lexicon is English; "die" is a very negative word in it.
    score = sentiment(text) if spoken not in ("fr", "de", "it") else 0.0
    found = {
        "json": is_json(text),
        "json in a fence": any(is_json(part) for part in _FENCE.findall(text)),
        "list": len(_ITEM.findall(text)) >= 2,
        "capitals": text.isupper(),
        "quotes": in_quotes(text),
        **{name: spoken == name for name in LANGUAGES},
        "unknown language": spoken == "unknown",
        "refusal": refuses(text),
        "positive": score > _SENTIMENT,
        "negative": score < -_SENTIMENT,
    }
    return {name: found[name] for name in PROPERTIES}


def is_json(text: str) -> bool:
    """Whether the whole text is a JSON object or array, by the letter of RFC 8259."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    # Brackets nested too deeply raise RecursionError.
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict | list)


def _refuse_constant(name: str) -> None:
    """Python would read NaN and Infinity, which are not JSON."""
    raise ValueError(name)


def in_quotes(text: str) -> bool:
    """Whether the answer as a whole stands in double quotation marks."""
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def language(text: str) -> str:
    """One of `LANGUAGES`, or "unknown" for a text that is too short or too mixed to tell."""
    if sum(letter.isalpha() for letter in text) < _FEWEST_LETTERS:
        return "unknown"
    name, probability = _identifier().classify(text)
    return name if probability >= _LEAST_PROBABILITY else "unknown"


def refuses(text: str) -> bool:
    """Whether the answer opens with a phrase of refusal_words.txt."""
    opening = text.strip().replace("’", "'").lower()[:_OPENING]
    return any(phrase in opening for phrase in _refusal_words())


def sentiment(text: str) -> float:
    """VADER's compound score, from -1 to 1."""
    return _analyser().polarity_scores(text)["compound"]


@cache
def _identifier() -> LanguageIdentifier:
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    identifier.set_languages(list(LANGUAGES))
    return identifier


@cache
def _analyser() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


@cache
def _refusal_words() -> tuple[str, ...]:
    lines = Path(__file__).with_name("refusal_words.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if line and not line.startswith("#"))


# -- the answers of a run --------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """What a run answered, or several that differ in the seed.

    Args:
        run: its name.
        questions: P records of question.jsonl.
        temperatures: of the answers.
        shares: [S, P, C], of the answers to a prompt those with a property. There is one answer
            per turn and temperature.
    """

    run: str
    questions: list[dict[str, Any]]
    temperatures: set[float | None]
    shares: np.ndarray

    def kinds(self) -> dict[str, np.ndarray]:
        """Which prompts are of a kind, [P] of bool, and "all" where there are several kinds."""
        found = np.array([question.get("kind", "all") for question in self.questions])
        kinds = {str(kind): found == kind for kind in dict.fromkeys(found)}
        return kinds if len(kinds) == 1 else kinds | {"all": np.full(len(found), True)}


def read(file: Path) -> Answered:
    """The answers of samples.jsonl.

    Raises:
        UserError: a file is missing, or prompts are not answered yet.
    """
    beside = file.with_name("question.jsonl")
    for needed in (file, beside):
        if not needed.is_file():
            raise UserError(f"{needed} does not exist", "run fpo eval --generate first")
    questions, rows = _rows(beside), _rows(file)
    temperatures = {row["temperature"] for row in rows}
    expected = len(questions) * max(1, len(temperatures))
    if len(rows) < expected:
        raise UserError(
            f"{file} has {len(rows)} of {expected} answers",
            "the same fpo eval command goes on where it stopped",
        )
    found: dict[int, list[list[bool]]] = defaultdict(list)
    for row in rows:
        found[row["prompt"]] += [list(properties(turn["text"]).values()) for turn in row["turns"]]
    shares = np.array([np.mean(found[number], 0) for number in range(len(questions))])
    return Answered(_name(file), questions, temperatures, shares[None])


def pool_seeds(runs: list[Answered]) -> list[Answered]:
    """Runs whose names differ in `_seed-N` only, as one each.

    Raises:
        UserError: two runs share a name, or did not answer the same prompts in the same way.
    """
    first, *others = runs
    for other in others:
        if (other.questions, other.temperatures) != (first.questions, first.temperatures):
            raise UserError(
                f"{other.run} and {first.run} answered different prompts, or at different "
                "temperatures",
                "sample both with the same prompts and settings",
            )
    names = [run.run for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"two of the runs have the same name: {', '.join(names)}", "rename one")
    pooled: dict[str, list[np.ndarray]] = defaultdict(list)
    for run in runs:
        pooled[re.sub(r"_seed-\d+$", "", run.run)].append(run.shares)
    if len({len(shares) for shares in pooled.values()} - {1}) > 1:
        raise UserError("the runs have different numbers of seeds", "name the same seeds of each")
    return [replace(first, run=name, shares=np.concatenate(s)) for name, s in pooled.items()]


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def _name(file: Path) -> str:
    """RUN for RUN/eval/prompts/samples.jsonl, OUT for OUT/prompts/samples.jsonl."""
    folder = file.resolve().parents[1]
    return folder.parent.name if folder.name == "eval" else folder.name


# -- shares and differences ------------------------------------------------------------------------


def summarise(runs: list[Answered]) -> dict[str, Any]:
    """Shares of every run, and differences from the first.

    Returns:
        by kind of prompt, property and run: share and standard error, for all runs but the first
        also the difference.

    Raises:
        UserError: as `pool_seeds`.
    """
    runs = pool_seeds(runs)
    first, names = runs[0], [run.run for run in runs]
    kinds = first.kinds()
    return {
        "baseline": first.run,
        "runs": names,
        "prompts": {kind: int(of_kind.sum()) for kind, of_kind in kinds.items()},
        "shares": {
            kind: {
                name: {run.run: _compared(run, first, of_kind, c) for run in runs}
                for c, name in enumerate(PROPERTIES)
            }
            for kind, of_kind in kinds.items()
        },
    }


def _compared(run: Answered, first: Answered, of_kind: np.ndarray, c: int) -> dict[str, Any]:
    """The share of property c, and its difference from the first run."""
    values, others = run.shares[:, of_kind, c], first.shares[:, of_kind, c]
    by_prompt = values.mean(0)
    count = len(by_prompt)
    error = float(by_prompt.std(ddof=1) / np.sqrt(count)) if count > 1 else None
    share = {"share": float(values.mean()), "standard_error": error}
    if run is first:
        return share
    # A run without seeds, such as the model before training, is the same for all of them.
    found = compare_shares(*np.broadcast_arrays(values, others))
    return share | {"difference": asdict(found) | {"beyond_noise": found.beyond_noise}}


def show(summary: dict[str, Any], out: Console) -> None:
    """Print a table for each kind of prompt: a property in a row, a run in a column."""
    for kind, properties in summary["shares"].items():
        table = Table("", *summary["runs"], box=None, header_style="")
        for name, runs in properties.items():
            table.add_row(name, *(_cell(runs[run]) for run in summary["runs"]))
        out.print(f"{summary['prompts'][kind]} prompts: {kind}")
        out.print(table)
        out.print()
    out.print(
        "Share of answers ± standard error over prompts; in brackets the difference from "
        f"{summary['baseline']} with its 95 % interval, * beyond noise (never with fewer than 20 "
        "prompts)."
    )


def _cell(found: dict[str, Any]) -> str:
    error = found["standard_error"]
    text = f"{found['share']:.2f}" + ("" if error is None else f" ± {error:.2f}")
    if gap := found.get("difference"):
        star = "*" if gap["beyond_noise"] else ""
        text += f" ({gap['mean']:+.2f}, {gap['low']:+.2f} to {gap['high']:+.2f}){star}"
    return text


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description="Count what runs of the experiment answer.")
    parser.add_argument("samples", nargs="+", type=Path, help="samples.jsonl of each run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args()
    try:
        summary = summarise([read(file) for file in chosen.samples])
    except UserError as error:
        parser.exit(2, f"{error.message}\n{error.hint}\n")
    if chosen.json:
        print(json.dumps(summary, indent=1))
    else:
        # Wide enough for every run, whatever the terminal.
        width = 20 + 60 * len(summary["runs"])
        show(summary, Console(highlight=False, markup=False, width=width))


if __name__ == "__main__":
    main()
