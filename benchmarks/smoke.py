"""One tiny round of every benchmark, on random models made on the spot: `make bench-smoke`.

It shows that the benchmarks run. Their figures mean nothing at this size and are thrown away.
"""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests/support"))

import tiny  # noqa: E402
from stores import write_pairs  # noqa: E402


def main() -> None:
    """Make the material and run the benchmarks, two at a time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.model_folder(folder / "model", "llama")
        # In 4 bits a CPU needs multiples of 64.
        sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
        tiny.model_folder(folder / "wide", "llama", **sizes)
        tiny.sae_folder(folder / "sae")
        write_pairs(folder / "pairs.jsonl", 100)
        pairs = ["--model", f"{folder}/model", "--data", f"{folder}/pairs.jsonl"]
        site = ["--sae", f"{folder}/sae", "--layer", "3"]
        rounds = ["--rounds", "1", "--max-length", "256"]
        count = ["--pairs", "2", "--max-length", "256"]
        results = {"FPO_BENCHMARK_RESULTS": f"{folder}/results"}
        benchmarks = {
            # The page needs these two of fpo's methods.
            "train": [*pairs, *site, *rounds, "--without", "dpo_norm", "dpo"],
            "cache": [*pairs, *site, *rounds],
            "breakdown": [*pairs, *count],
            "constraint": [*pairs, "--max-length", "256", "--layer", "3"],
            "kl": [*pairs, *site, *rounds, "--without", "again"],
            "distributions": [*pairs, *site, *rounds, "--tokens", "16", "256", "--lr", "1e-4"],
            "logit_weights": [*pairs, *site, "--pairs", "12", "--dtype", "float32"],
            "noise": [*pairs, *count, *site],
            "constraints": [*pairs, *site, "--tiny", "--work", f"{folder}/constraints"],
            "growth": ["--tiny"],
            "store": ["--pairs", "64"],
            "bucket": ["--pairs", "16", "--block", "8", "--width", "32"],
            "gpu": ["--tiny", "--pairs", "4"],
            "host_memory": ["--parameters", "1", "--ranks", "2"],
            "lora": [*pairs, "--model", f"{folder}/wide", "--max-length", "256"],
            "ranks": [*pairs, "--pairs", "64", "--with-distributions", "8", "--ranks", "1", "2"],
            "scaling": [],
        }
        with ThreadPoolExecutor(2) as two:
            done = [two.submit(run, name, words, results) for name, words in benchmarks.items()]
        failed = [error for future in done if (error := future.result())]
    if failed:
        sys.exit("\n\n".join(failed))


def run(name: str, arguments: list[str], environment: dict[str, str]) -> str:
    """Run a benchmark; what it printed if it fails, else nothing."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, HERE / f"{name}.py", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(f"{name}: {time.monotonic() - began:.0f} s, exit code {done.returncode}", flush=True)
    return f"{done.stdout}\nbenchmarks/{name}.py failed" if done.returncode else ""


if __name__ == "__main__":
    main()
