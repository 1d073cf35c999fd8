"""fpo compare: cache, train and evaluate a grid of runs, and write the paper's tables."""

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
from fpocli.system.signals import run_if_stopped


def compare(config: CompareConfig) -> list[dict[str, Any]]:
    """Run the commands of a grid that are not done yet, and write its reports.

    Every command runs in a process of its own, with its own memory, and resumes where it stopped.

    Args:
        config: the settings.

    Returns:
        one record for each run, as in results.json.

    Raises:
        UserError: the file is invalid, a file it names is missing, or a command failed.
    """
    grid = read_grid(config.config_file, REPORTS)
    steps = [*grid.stores, *(step for run in grid.runs for step in (run.train, run.evaluate))]
    if config.plan:
        for step in steps:
            print(f"{'done' if _done(grid, step) else 'to do'}  {step.name}")
        _require_files(config.config_file, steps)
        return []
    _require_files(config.config_file, steps)
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


def _require_files(config_file: str, steps: list[Step]) -> None:
    """Refuse a grid that names files which do not exist, before anything runs.

    Raises:
        UserError: it names the file.
    """
    for step in steps:
        for name, file in step.files.items():
            if not file.is_file():
                hint = f"put it there, or remove `{name}` from {config_file}"
                if file.name == "alpaca_eval.json":
                    hint = (
                        "download alpaca_eval.json from the hub's data set tatsu-lab/alpaca_eval, "
                        f"or remove `{name}` from {config_file}, and with it the entropy column"
                    )
                raise UserError(f"{file}, which {config_file} names, does not exist", hint)


def _done(grid: Grid, step: Step) -> bool:
    """Whether a step's result exists and was made from its current inputs."""
    mark = _mark(grid, step)
    return step.result.is_file() and mark.is_file() and mark.read_text() == _inputs(step)


def _inputs(step: Step) -> str:
    """sha256 of everything a step's result depends on: settings, files, and the step before."""
    digest = hashlib.sha256(json.dumps(step.settings, sort_keys=True).encode())
    for file in step.files.values():
        digest.update(file.read_bytes() if file.is_file() else b"")
    if step.after:
        digest.update(_inputs(step.after).encode())
        return digest.hexdigest()
    # All later steps depend on the store, which the user may have made again.
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
    # The model of fpo eval is an argument, not a flag.
    model = [step.settings["model"]] if step.words[-1] == "eval" else []
    # The commands' own tables would mix with those of fpo compare on stdout.
    words = [*step.words, *model, "--config", str(file)]

    def stop() -> None:
        child.terminate()
        child.wait()

    with subprocess.Popen(words, stdout=subprocess.DEVNULL) as child, run_if_stopped(stop):
        child.wait()
    if child.returncode:
        raise UserError(
            f"{step.name} failed with exit code {child.returncode}; its error is above",
            "correct it and run the same command again; finished steps are not repeated",
        )
    replace_text(mark, _inputs(step))


def _mark(grid: Grid, step: Step) -> Path:
    return grid.out / "configs" / f"{step.name}.done"
