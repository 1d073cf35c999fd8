"""What the docs say is true: the tests that they name exist, and their commands work.

A block of commands is run here as it is printed, on a tiny model that has the name of the demo's,
unless a comment before it says what it needs and the tests lack, such as `needs: a GPU, the hub`.
Such a block is only parsed. `make` targets are those of `make check`, or marked.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
from functools import partial
from itertools import chain
from pathlib import Path

import pytest
import tiny
import torch
import typer
import yaml
from doc_commands import PAGES, ROOT, Block, blocks, parse
from forked_launch import forked_launch
from processes import Command, results
from stores import write_pairs

from fpocli.cli.commands import app

TESTS = Path(__file__).parents[1]
BLOCKS = [block for page in PAGES for block in blocks(page)]
RUNNABLE = [
    block
    for block in BLOCKS
    if (block.is_commands or block.is_python) and not (block.needs or block.run_by)
]
MAKE = re.findall(r"^([\w-]+):((?: [\w./-]+)*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
LACKING = {
    "8 GPUs",
    "a GPU",
    "a bucket",
    "a cluster",
    "a network",
    "an hour",
    "Docker",
    "four GPUs",
    "GPUs",
    "half an hour",
    "Kubernetes",
    "minutes",
    "other programs",
    "Slurm",
    "your store",
    "the hub",
    "the key of a judge",
    "your model and SAE",
}
# Features that pages name.
NAMED = [664, 1877]
# Where the demo has its SAEs, and of which layer they are.
SAES = {"demo/sae": 24, "demo/sae-19": 19, "demo/control/sae": 19}


@pytest.mark.parametrize("page", ["reliability.md", "security.md"])
def test_every_promise_names_tests_that_exist(page):
    text = (TESTS.parent / "docs" / page).read_text()
    files = {file.name: file.read_text() for file in TESTS.rglob("test_*.py")}
    named = set(re.findall(r"\btest_\w+(?!\w|\.py)", text.replace(".py", ".py ")))
    named = {name for name in named if f"{name}.py" not in files}
    assert len(named) > 20
    for name in named:
        assert any(f"def {name}(" in source for source in files.values()), name
    assert set(re.findall(r"\btest_\w+\.py", text)) <= files.keys()


def test_marks_say_what_is_lacking_or_who_runs_it():
    assert len(RUNNABLE) > 10
    for block in BLOCKS:
        assert not block.needs or {*block.needs.split(", ")} <= LACKING, block
        assert not block.run_by or block.page.removeprefix("docs/") in (
            (ROOT / block.run_by).read_text()
        ), block


def lines() -> list[tuple[str, str]]:
    """Every line of the docs that calls fpo, also one that is shown with its output."""
    found = []
    for block in BLOCKS:
        code = re.sub(r"\\?\n +(?=-)", " ", block.text)
        for line in re.findall(r"^(?:\$ )?((?:.* -m )?fpo(?:cli)? .*)$", code, re.MULTILINE):
            words = shlex.split(line, comments=True)
            words = words[next(i for i, word in enumerate(words) if word.startswith("fpo")) + 1 :]
            if block.is_commands or words[0] in names():
                found.append((f"{block.page}:{block.line}", shlex.join(words)))
    return found


def names() -> set[str]:
    return {*typer.main.get_command(app).commands}


@pytest.mark.parametrize("place, line", lines())
def test_the_command_line_takes_every_command(place, line):
    """It is parsed, not run."""
    parse(shlex.split(line))


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A folder with what `make demo` makes, and the examples with fewer and shorter texts."""
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(ROOT / "examples", folder / "examples")
    for file in folder.glob("examples/**/*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()[:40]]
        file.write_text("".join(json.dumps(cut(row)) + "\n" for row in rows))
    model = folder / "demo/SmolLM2-135M-Instruct"
    sizes = {"num_hidden_layers": 26, "max_position_embeddings": 4096, "vocab_size": 4000}
    tiny.network("llama", **sizes).save_pretrained(model)
    # Of whole words, so that the examples are short.
    texts = (ROOT / "examples/preferences.jsonl").read_text().splitlines()
    tiny.tokenizer().train_new_from_iterator(texts, 4000).save_pretrained(model)
    for name, layer in SAES.items():
        sae = tiny.sae("topk", features=2048)
        with torch.no_grad():
            sae.b_enc[NAMED] += 10
        sae.cfg.metadata.hook_name = f"model.layers.{layer}"
        sae.save_model(folder / name)
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (model / "chat_template.jinja").write_text(template)
    write_pairs(folder / "pairs.jsonl", 24)
    return folder


def cut(row: dict) -> dict:
    """A row whose texts have 60 characters at most."""
    return {name: value[:60] if isinstance(value, str) else value for name, value in row.items()}


@pytest.fixture(scope="module")
def finished(demo, tmp_path_factory) -> Path:
    """The same, with a store and evaluated runs."""
    folder = tmp_path_factory.mktemp("finished") / "folder"
    shutil.copytree(demo, folder, symlinks=True)
    model = "--model demo/SmolLM2-135M-Instruct --layer 24 --sae demo/sae"
    for line in (
        f"cache {model} --data pairs.jsonl --device cpu",
        "train --cache ref.zarr --eval-fraction 0.25 --batch-size 8 --device cpu",
        "eval run --cache ref.zarr --device cpu",
    ):
        fpo(line.split(), folder)
    for name in ("fpo", "dpo", "dpo_norm"):
        shutil.copytree(folder / "run", folder / "runs" / name)
    return folder


def fpo(words: list[str], folder: Path, **settings) -> None:
    """Run a command in a folder, in a process that is forked."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        (done,) = results(Command(*words, **settings))
    finally:
        os.chdir(here)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", sorted({block.page for block in RUNNABLE}))
def test_commands_work_as_printed(page, request, tmp_path, monkeypatch):
    needed = [block for block in RUNNABLE if block.page == page]
    start = "demo" if "tutorials/" in page else "finished"
    folder = tmp_path / "folder"
    if any(not line.startswith("make ") for block in needed for line in block.commands):
        shutil.copytree(request.getfixturevalue(start), folder, symlinks=True)
        monkeypatch.chdir(folder)
    for block in needed:
        if block.is_python:
            Path("program.py").write_text(block.text)
            fpo([], folder, main=partial(runpy.run_path, "program.py", run_name="__main__"))
        else:
            for line in block.commands:
                run(block, line)


def run(block: Block, line: str) -> None:
    """One command of a block, in this folder."""
    words = shlex.split(line, comments=True) if "<<" not in line else []
    match words:
        case ["make", *targets]:
            assert {*targets} <= checked("check") | checked("browser-check") | {"check"}, block
        case ["fpo", "compare", name]:
            # The same grid, smaller, and with processes that start fast.
            grid = yaml.safe_load(Path(name).read_text())
            grid["cache"]["limit"], grid["train"]["batch_size"] = 8, 2
            for entry in grid["runs"]:
                entry.pop("seed", None)
            with forked_launch() as launch:
                Path(name).write_text(yaml.safe_dump(grid | {"launch": launch}))
                fpo(words[1:], Path.cwd())
        case ["fpo", *rest]:
            # As a shell expands them.
            expanded = [
                sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in rest
            ]
            fpo([*chain.from_iterable(expanded)], Path.cwd())
        case ["python", script, *rest]:
            fpo(rest, Path.cwd(), main=partial(runpy.run_path, script, run_name="__main__"))
        case _:
            subprocess.run(["bash", "-euo", "pipefail", "-c", line], check=True)


def checked(target: str) -> set[str]:
    """What make does for a target."""
    (needed,) = (words.split() for name, words in MAKE if name == target)
    return {*needed}
