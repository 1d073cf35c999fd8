"""fpo compare: caches, trains and evaluates a grid of runs, and writes the paper's tables."""

import json
import subprocess
from typing import Any

import yaml

from fpocli.config import CompareConfig
from fpocli.console import console
from fpocli.engine import replace_text
from fpocli.errors import UserError
from fpocli.grid import Grid, Step, read_grid
from fpocli.tables import REPORTS, collect, write_reports


def compare(config: CompareConfig) -> list[dict[str, Any]]:
    """Run what is not done yet of a grid, and write its reports.

    Every command is a process of its own, so that its memory is its own; each goes on by itself
    where it was stopped.

    Args:
        config: the settings.

    Returns:
        one record for each run, as results.json holds them.

    Raises:
        UserError: the file is wrong, or a command of the grid stopped.
    """
    grid = read_grid(config.config_file, tuple(REPORTS))
    steps = [*grid.stores, *(step for run in grid.runs for step in (run.train, run.evaluate))]
    if config.plan:
        for step in steps:
            print(f"{'done' if _done(grid, step) else 'to do'}  {step.name}")
        return []
    grid.out.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, 1):
        if not _done(grid, step):
            console.print(f"\n[{number} of {len(steps)}] {step.name}")
            _run(grid, step)
    rows = collect(grid.runs)
    replace_text(grid.out / "results.json", json.dumps(rows, indent=1))
    write_reports(grid, rows)
    console.print(f"tables and figures are in {grid.out}")
    return rows


def _done(grid: Grid, step: Step) -> bool:
    """Whether the result is there, made with these very settings and marked as whole."""
    file = _file(grid, step)
    same = file.is_file() and yaml.safe_load(file.read_text()) == step.settings
    return same and step.result.is_file() and file.with_suffix(".done").is_file()


def _run(grid: Grid, step: Step) -> None:
    file = _file(grid, step)
    file.parent.mkdir(exist_ok=True)
    done = file.with_suffix(".done")
    done.unlink(missing_ok=True)
    replace_text(file, yaml.safe_dump(step.settings, sort_keys=False))
    words = [*step.words, "--config", str(file)]
    if step.words[-1] == "eval":
        words.insert(len(step.words), step.settings["model"])
    # The commands' own tables would mix with ours on stdout.
    finished = subprocess.run(words, stdout=subprocess.DEVNULL)
    if finished.returncode:
        raise UserError(
            f"{step.name} stopped with exit code {finished.returncode}, as told above",
            "mend it and give the same command again; what is done is not done anew",
        )
    done.touch()


def _file(grid: Grid, step: Step) -> Any:
    return grid.out / "configs" / f"{step.name}.yaml"
