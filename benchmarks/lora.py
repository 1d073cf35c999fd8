"""Memory of the host, and bytes of a checkpoint: all weights trained, an adapter, one in 4 bits.

    .venv/bin/python benchmarks/lora.py

`fpo train` takes two steps of four pairs on one CPU, in bfloat16, each way in a process of its own:
with dpo_norm, and with tdpo2, whose KL is to the reference in memory. `memory_gb` and
`peak_memory_gb` of metrics.jsonl are those of the process, so about a gigabyte of it is libraries.
What a step takes for activations and logits is the same in all ways.
"""

import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from common import machine, make_store, measure_parser, table, write_page
from safetensors import safe_open

RANK = ["--lora-rank", "16"]
WAYS = {
    "all weights": [],
    "LoRA of rank 16": RANK,
    "the same, frozen layers in 4 bits": [*RANK, "--load-in-4bit"],
}


def main() -> None:
    """Run every way with both methods, and write the page."""
    arguments = measure_parser(__doc__).parse_args()
    # No site is asked for below.
    arguments.features = arguments.sae = arguments.layer = None
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            measure(arguments, Path(folder), way, method)
            for method in ("dpo_norm", "tdpo2")
            for way in WAYS
        ]
    report(arguments, rows)


def measure(arguments: Namespace, folder: Path, way: str, method: str) -> dict[str, Any]:
    """Train for two steps; what metrics.jsonl and the checkpoint say."""
    in_4_bits = "--load-in-4bit" in WAYS[way]
    store, out = folder / f"ref-{in_4_bits}.zarr", folder / f"{method}-{way.replace(' ', '-')}"
    if not store.exists():
        changes = {"layer": [], "sae": [], "load_in_4bit": in_4_bits, "device": "cpu"}
        make_store(arguments, str(folder), 8, out=str(store), **changes)
    words = ["--cache", str(store), "--out", str(out), "--method", method, "--device", "cpu"]
    words += ["--batch-size", "4", "--warmup", "0", "--save-every", "1", *WAYS[way]]
    done = subprocess.run(
        [sys.executable, "-m", "fpocli", "train", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    last = [line for line in map(json.loads, lines) if line["split"] == "train"][-1]
    files = list(out.glob("checkpoints/*/*.safetensors"))
    found = {"way": way, "method": method, "checkpoint": sum(f.stat().st_size for f in files) / 1e6}
    found |= {"trained": trained(files), "held": last["memory_gb"], "most": last["peak_memory_gb"]}
    print(found, file=sys.stderr)
    return found


def trained(files: list[Path]) -> int:
    """Number of parameters in a checkpoint."""
    count = 0
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if not name.endswith((".exp_avg", ".exp_avg_sq")):
                    count += opened.get_tensor(name).numel()
    return count


def report(arguments: Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the page."""
    heads = ("method", "trained", "parameters", "held, GB", "most, GB", "checkpoint, MB")
    cells = [
        (
            row["method"], row["way"], f"{row['trained']:,}", f"{row['held']:.2f}",
            f"{row['most']:.2f}", f"{row['checkpoint']:,.1f}",
        )
        for row in rows
    ]  # fmt: skip
    write_page(
        "lora",
        f"""# Memory with an adapter

{Path(arguments.model).name}, bfloat16, activation checkpointing, ZeRO-2 on one process of a CPU,
sequences of 2,048 tokens. "held" is the memory of the process at the end of the second step, "most"
its peak, loading included. tdpo2 has the reference in memory: a second model where all weights are
trained, the adapter switched off with LoRA. Memory of a GPU was not measured.

{machine()}
Command: `python benchmarks/lora.py`.

{table(heads, cells)}
""",
    )


if __name__ == "__main__":
    main()
