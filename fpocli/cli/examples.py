"""What --help shows at its end: a command or two that one would type."""

_LINES = {
    "cache": [
        "fpo cache --model gemma-2-2b-it --layer 25",
        "fpo cache --model gemma-2-2b-it --data pairs.jsonl --dry-run",
    ],
    "train": [
        "fpo train --cache ref.zarr --eval-fraction 0.02",
        "fpo train --cache ref.zarr --method dpo+features --alpha 0.1 --gpus 4",
    ],
    "eval": [
        "fpo eval run --cache ref.zarr",
        "fpo eval run --cache ref.zarr --generate alpaca_eval",
    ],
    "compare": ["fpo compare grid.yaml --plan", "fpo compare grid.yaml"],
    "inspect": ["fpo inspect ref.zarr", "fpo inspect ref.zarr --verify"],
    "saes": ["fpo saes gemma-2-2b-it --layer 25"],
    "doctor": ["fpo doctor", "fpo doctor --bucket s3://BUCKET/NAME"],
    "report": ["fpo report run other-run --html runs.html"],
    "export": ["fpo export run", "fpo export run --push-to-hub OWNER/NAME --private"],
    "contrast": ["fpo features contrast ref.zarr --top 20"],
    "find": [
        "fpo features find --model gemma-2-2b-it --layer 25 --target french.jsonl \\",
        "  --against english.jsonl --out french.yaml",
    ],
    "show": ["fpo features show ref.zarr --feature 466"],
    "diff": ["fpo features diff run"],
    "steer": [
        "fpo features steer --model gemma-2-2b-it --layer 25 --add 1041=80 \\",
        '  --prompt "How do plants grow?"',
    ],
}


def examples(name: str) -> str:
    """Of a command: text for the end of its --help, which is not to be wrapped."""
    lines = _LINES[name]
    heading = "Example:" if len(lines) == 1 or lines[0].endswith("\\") else "Examples:"
    # After \b the lines stay as they are.
    return "\n".join(["\b", heading, *(f"  {line}" for line in lines)])
