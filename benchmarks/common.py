"""What the benchmarks share: arguments, a store, contestants in separate processes, pages."""

import argparse
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

BATCH = 4  # pairs of an optimiser step, here and in the peers' trainers
# benchmarks/smoke.py writes to another folder.
RESULTS = Path(os.environ.get("FPO_BENCHMARK_RESULTS", Path(__file__).parent / "results"))
_PACKAGES = ("torch", "transformers", "deepspeed", "sae-lens", "zarr", "trl")


class Contestant:
    """A process that does one round of work when it is asked to.

    Only one of several contestants works at a time, so all see the same machine load, and each has
    its own peak of memory.

    Args:
        words: arguments of the benchmark that make it `serve`.
    """

    def __init__(self, words: list[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, sys.argv[0], *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self.answer()

    def round(self, number: int) -> dict[str, Any]:
        """One round of work; its measurements."""
        assert self._process.stdin
        print(number, file=self._process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next line it writes."""
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"a contestant stopped with exit code {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def take_turns(names: list[str], words: list[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Measurements of every contestant over a warm-up and `rounds`, in alternating order.

    Args:
        names: of the contestants, as the benchmark's --contestant takes them.
        words: their other arguments.
        rounds: how many are counted, after the warm-up.
    """
    figures: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with ExitStack() as stack:
        contestants = {}
        for name in names:
            contestants[name] = Contestant([*words, f"--contestant={name}"])
            stack.callback(contestants[name].close)
        for number in range(rounds + 1):
            for name in names if number % 2 else reversed(names):
                figures[name].append(contestants[name].round(number))
    return figures


def take_stdout() -> Any:
    """The contestant's pipe to its parent. From now on, what libraries print goes to stderr."""
    line = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return line


def serve(line: Any, work: Callable[[int], dict[str, Any]]) -> None:
    """Act as a contestant: one round of work for every line on stdin."""
    print("{}", file=line, flush=True)
    for number in sys.stdin:
        print(json.dumps(work(int(number))), file=line, flush=True)


def middle(values: Iterable[float], form: str = ".2f") -> str:
    """Median, minimum and maximum as text."""
    values = list(values)
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells as a Markdown table."""
    head, *lines = ("| " + " | ".join(cells) + " |" for cells in (heads, *rows))
    return "\n".join([head, re.sub(r"[^|]+", "---", head), *lines])


def by_turns(
    names: Iterable[str], rows: list[Any], work: Callable[[str, Any], None]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Do the same work in several ways, alternating for every packed sequence, in this process.

    Args:
        names: of the ways.
        rows: packed sequences; the first one also warms up.
        work: processes one of them, in the way it is given.

    Returns:
        seconds of each sequence, and the most GB the process held during it, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks: dict[str, list[float]] = {name: [] for name in seconds}
    for number, row in enumerate([rows[0], *rows]):
        for name in seconds if number % 2 else reversed(seconds):
            gc.collect()
            forget_peak()
            began = time.perf_counter()
            work(name, row)
            if number:
                seconds[name].append(time.perf_counter() - began)
                peaks[name].append(memory("VmHWM") / 1e3)
    return seconds, peaks


def forget_peak() -> None:
    """Reset the peak of this process's memory that Linux keeps."""
    Path("/proc/self/clear_refs").write_text("5")


def memory(field: str) -> float:
    """MB of this process: VmRSS now, VmHWM at most since the peak was reset."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024 / 1e6


def machine() -> str:
    """The processor or GPU and the versions, as a line of text."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        names = [line.split(":")[1].strip() for line in info.splitlines() if "model name" in line]
        device = f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, no GPU"
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return f"Machine: {device}. Python {platform.python_version()}, {versions}."


def write_page(name: str, text: str) -> None:
    """Write a result as a dated Markdown page in place of the last one, and print it."""
    RESULTS.mkdir(exist_ok=True)
    for old in RESULTS.glob(f"????-??-??-{name}.md"):
        old.unlink()
    (RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{name}.md").write_text(text)
    print(text)


def model_width(folder: str) -> int:
    """d of a model in a local folder."""
    return json.loads((Path(folder) / "config.json").read_text())["hidden_size"]


def random_sae(folder: str, width: int, features: int) -> str:
    """An SAE of random weights with about 60 active features a position: enough for costs."""
    import torch
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    torch.manual_seed(0)
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=width, d_sae=features))
    with torch.no_grad():
        sae.W_enc.copy_(torch.nn.functional.normalize(torch.randn(width, features), dim=0))
        states = torch.randn(256, width)
        active = min(60, features // 2) / features
        sae.threshold.fill_(torch.quantile((states @ sae.W_enc)[:, :2048], 1 - active).item())
    sae.save_model(folder)
    return folder


def measure_parser(description: str) -> argparse.ArgumentParser:
    """Arguments of all benchmarks on a real model and real pairs."""
    parser = argparse.ArgumentParser(description=description.split("\n")[0])
    parser.add_argument("--model", default="demo/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="examples/preferences.jsonl")
    parser.add_argument("--max-length", type=int, default=512)
    return parser


def turns_parser(description: str, page: str, rounds: int) -> argparse.ArgumentParser:
    """Those and what a benchmark of contestants needs, its contestants included."""
    parser = measure_parser(description)
    parser.add_argument("--sae", default="demo/sae")
    parser.add_argument("--features", type=int, help="a random SAE of so many, not --sae")
    parser.add_argument("--layer", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds that count")
    parser.add_argument("--without", nargs="*", default=[], help="contestants to leave out")
    parser.add_argument("--page", default=page, help="name of the result's page")
    parser.add_argument("--store", help=argparse.SUPPRESS)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    return parser


def make_store(arguments: argparse.Namespace, folder: str, pairs: int, **changes: Any) -> Any:
    """fpo's store of the first pairs, with one site unless `changes` say otherwise.

    Args:
        arguments: model, data, layer, sae and max_length; with `features` a random SAE of so many.
        folder: where the store, and the SAE, are made.
        pairs: rows of the data that are read.
        changes: other settings of CacheConfig.
    """
    from fpocli import CacheConfig, cache

    sae = arguments.sae
    if arguments.features:
        sae = random_sae(f"{folder}/sae", model_width(arguments.model), arguments.features)
    settings: dict[str, Any] = {
        "model": arguments.model,
        "layer": [arguments.layer],
        "sae": [sae],
        "data": arguments.data,
        "limit": pairs,
        "max_length": arguments.max_length,
        "max_prompt_length": arguments.max_length - 1,
        "out": f"{folder}/ref.zarr",
    }
    return cache(CacheConfig(**settings | changes))


def real_rows(arguments: argparse.Namespace) -> tuple[int, list[Any]]:
    """Packed sequences of the first pairs, for a CPU; and how many tokens they have."""
    import torch

    from fpocli.data.dropped import DroppedRows
    from fpocli.data.layouts import read_pairs
    from fpocli.data.pair_tokenizer import PairTokenizer
    from fpocli.data.sources import open_source
    from fpocli.model.packing import default_packed_length, pack, plan_packing
    from fpocli.system.model_folder import find_model

    folder, most = find_model(arguments.model), arguments.max_length
    source = open_source(arguments.data, None, arguments.pairs)
    tokenize = PairTokenizer(folder, None, most, most - 1, DroppedRows())
    pairs = list(tokenize(read_pairs(source, tokenize.dropped)))
    lengths = [len(pair) for pair in pairs]
    rows = plan_packing(lengths, default_packed_length(torch.device("cpu")))
    return sum(lengths), [pack([pairs[i] for i in row]) for row in rows]


def load_encoders(store: Any, device: Any) -> dict[str, Any]:
    """The SAE of each site of a store."""
    from fpocli.features.pretrained import load_encoder

    return {
        name: load_encoder(about["sae"]["source"], device) for name, about in store.sites.items()
    }
