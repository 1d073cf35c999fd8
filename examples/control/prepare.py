"""What control.yaml needs, in demo/control: an SAE, the features of French and of JSON, pairs.

SmolLM2-135M-Instruct is that of examples/demo.py; examples/train_sae.py makes its SAE, which is
trained on French, JSON and plain texts and some of the pairs, so that it has features for them.
`fpo features find` names these features. From its file three others are made, which differ in the
weights of the two groups:

    free.yaml          weight 0: both may change
    hold-french.yaml   French held, JSON free
    hold-json.yaml     JSON held, French free
"""

import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml

import fpocli

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import demo  # noqa: E402
import train_sae  # noqa: E402

WORK = Path("demo/control")
LAYER, SAE_PAIRS = 19, 32
KINDS = ("french", "json")
# Of a held group. D of a few features is small beside the rewards, so a weight of 1 hardly acts.
HELD = 50.0


def main() -> None:
    """Make what does not exist yet."""
    torch.manual_seed(0)
    WORK.mkdir(parents=True, exist_ok=True)
    if not demo.MODEL.is_dir():
        demo.convert_model()
    pairs = [list(_rows(f"{kind}_pairs.jsonl")) for kind in KINDS]
    # One of each in turn, so that every part of the file has both.
    mixed = list(chain.from_iterable(zip(*pairs, strict=True)))
    _write(WORK / "pairs.jsonl", mixed)
    if not (WORK / "sae").is_dir():
        texts = [
            {"prompt": "Please write a short text.", "chosen": row["text"]}
            for kind in (*KINDS, "neutral")
            for row in _rows(f"texts/{kind}.jsonl")
        ]
        answers = [
            {"prompt": row["prompt"], "chosen": row[side]}
            for row in mixed[:SAE_PAIRS]
            for side in ("chosen", "rejected")
        ]
        activations = train_sae.collect_activations(demo.MODEL, LAYER, answers + texts)
        train_sae.train_sae(activations, demo.MODEL, LAYER, WORK / "sae")
    found = WORK / "found.yaml"
    if not found.exists():
        for kind in KINDS:
            fpocli.find(
                fpocli.FindConfig(
                    model=str(demo.MODEL),
                    layer=LAYER,
                    sae=str(WORK / "sae"),
                    target=str(HERE / f"texts/{kind}.jsonl"),
                    against=str(HERE / "texts/neutral.jsonl"),
                    out=str(found),
                    # Many CPUs are slow in bfloat16.
                    dtype="float32",
                )
            )
    for name, held in (("free", ()), ("hold-french", ("french",)), ("hold-json", ("json",))):
        weights = yaml.safe_load(found.read_text(encoding="utf-8"))
        for site in weights.values():
            for kind, group in site["groups"].items():
                group["weight"] = HELD if kind in held else 0.0
        (WORK / f"{name}.yaml").write_text(yaml.safe_dump(weights), encoding="utf-8")


def _rows(name: str) -> Any:
    return map(json.loads, (HERE / name).read_text(encoding="utf-8").splitlines())


def _write(file: Path, rows: list[Any]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
