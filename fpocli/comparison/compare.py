"""fpo compare: caches, trains and evaluates a grid of runs, and writes the paper's tables."""

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from fpocli.comparison.grid import Grid, Step, read_grid
from fpocli.comparison.tables import REPORTS, collect, write_reports
from fpocli.config import CompareConfig
from fpocli.store.reader import Store
from fpocli.system.console import console
from fpocli.system.errors import UserError
from fpocli.system.files import replace_text
from fpocli.system.signals import on_end


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
    grid = read_grid(config.config_file, REPORTS)
    steps = [*grid.stores, *(step for run in grid.runs for step in (run.train, run.evaluate))]
    if config.plan:
        for step in steps:
            print(f"{'done' if _done(grid, step) else 'to do'}  {step.name}")
        return []
    if missing := [file for step in steps for file in step.files if not file.is_file()]:
        raise UserError(f"{missing[0]}, which {config.config_file} names, is not there", "mend it")
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
    """Whether its result is there, made of what it would be made of now."""
    mark = _mark(grid, step)
    return step.result.is_file() and mark.is_file() and mark.read_text() == _inputs(step)


def _inputs(step: Step) -> str:
    """sha256 of all that a step's result is made of: settings, files, and the step before."""
    digest = hashlib.sha256(json.dumps(step.settings, sort_keys=True).encode())
    for file in step.files:
        digest.update(file.read_bytes() if file.is_file() else b"")
    if step.after:
        digest.update(_inputs(step.after).encode())
        return digest.hexdigest()
    # All that follows rests on the store, which may have been made anew by hand.
    store = Path(step.settings.get("cache") or step.settings["out"])
    if (store / "zarr.json").is_file():
        digest.update(Store.open(store).meta["fingerprint"].encode())
    return digest.hexdigest()


def _run(grid: Grid, step: Step) -> None:
    mark = _mark(grid, step)
    mark.parent.mkdir(exist_ok=True)
    mark.unlink(missing_ok=True)
    file = mark.with_suffix(".yaml")
    replace_text(file, yaml.safe_dump(step.settings, sort_keys=False))
    # What fpo eval measures has no flag.
    model = [step.settings["model"]] if step.words[-1] == "eval" else []
    # The commands' own tables would mix with ours on stdout.
    words = [*step.words, *model, "--config", str(file)]

    def stop() -> None:
        child.terminate()
        child.wait()

    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as child, on_end(stop):
        child.wait()
    if child.returncode:
        raise UserError(
            f"{step.name} stopped with exit code {child.returncode}, as told above",
            "mend it and give the same command again; what is done is not done anew",
        )
    replace_text(mark, _inputs(step))


def _mark(grid: Grid, step: Step) -> Path:
    return grid.out / "configs" / f"{step.name}.done"
