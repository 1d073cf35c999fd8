"""What the benchmarks share: contestants in processes of their own, pages of results."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "deepspeed", "sae-lens", "zarr", "trl")


class Contestant:
    """A process that does one round of work whenever it is told to.

    Only one of several contestants works at a time, so they share the machine's weather, and each
    has its own peak of memory.

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
        """Let it work; its figures."""
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


def take_stdout() -> Any:
    """A contestant's line to its parent. Whatever libraries print goes to stderr from now on."""
    line = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return line


def serve(line: Any, work: Callable[[int], dict[str, Any]]) -> None:
    """Be a contestant: a round of work for every number on stdin."""
    print("{}", file=line, flush=True)
    for number in sys.stdin:
        print(json.dumps(work(int(number))), file=line, flush=True)


def middle(values: Iterable[float], form: str = ".2f") -> str:
    """Median, least and largest as text."""
    values = list(values)
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


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
    """Write a result as a dated Markdown page, and print it."""
    path = RESULTS / f"{datetime.now(UTC):%Y-%m-%d}-{name}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    print(text)


def model_width(folder: str) -> int:
    """d of a model in a local folder."""
    return json.loads((Path(folder) / "config.json").read_text())["hidden_size"]


def random_sae(folder: str, width: int, features: int) -> str:
    """A SAE of random weights with about 60 active features a position: enough for costs."""
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
