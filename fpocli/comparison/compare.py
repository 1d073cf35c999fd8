"""fpo compare: cache, train and evaluate a grid of runs, and write the paper's tables."""

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from fpocli.comparison.estimate import estimate_costs
from fpocli.comparison.grid import Grid, read_grid
from fpocli.comparison.judge_script import write_judge_scripts
from fpocli.comparison.records import collect
from fpocli.comparison.steps import Step
from fpocli.comparison.tables import REPORTS, write_reports
from fpocli.config import JUDGES, CompareConfig
from fpocli.evaluation.prompts import find_prompts
from fpocli.store.place import place_of
from fpocli.system.console import say
from fpocli.system.errors import UserError
from fpocli.system.files import remove_folder, replace_text
from fpocli.system.output import output
from fpocli.system.signals import run_if_stopped

# Endings of local files.
_LOCAL = (".json", ".jsonl", ".parquet", ".csv", ".gz", ".zst", ".npz")


def compare(config: CompareConfig) -> list[dict[str, Any]]:
    """Run the commands of a grid that are not done yet, and write its reports.

    Every command runs in a process of its own, with its own memory, and resumes where it stopped.

    Args:
        config: the settings.

    Returns:
        one record for each run, as in results.json; with --plan for each command.

    Raises:
        UserError: the file is invalid, a file it names is missing, a judge's questions cannot be
            downloaded, or a command failed.
    """
    grid = read_grid(config.config_file, REPORTS)
    _require_files(grid)
    if config.plan:
        return _print_plan(grid)
    todo = [step for step in grid.steps if not _done(grid, step)]
    # Not after hours of training.
    for judge in _judges(todo):
        find_prompts(judge)
    grid.out.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(grid.steps, 1):
        # Again, as the steps before may have changed what it reads.
        if not _done(grid, step):
            say(f"\n[{number} of {len(grid.steps)}] {step.name}")
            _run(grid, step)
    rows = collect(grid)
    replace_text(grid.out / "results.json", json.dumps(rows, indent=1))
    for script in write_judge_scripts(grid):
        say(f"{script} has the answers judged; then run this command again")
    write_reports(grid, rows)
    say(f"tables and figures are in {grid.out}")
    return rows


def _require_files(grid: Grid) -> None:
    """Refuse a grid that names files which do not exist, before anything runs.

    Raises:
        UserError: it names the file.
    """
    for step in grid.steps:
        for name, file in step.files.items():
            if not file.is_file():
                raise UserError(
                    f"{file}, which {grid.file.path} names, does not exist",
                    f"put it there, or remove `{name}` from {grid.file.path}",
                )
        named = [step.settings.get(name) for name in ("model", "data", "reference")]
        for name in [*named, *(step.settings.get("sae") or [])]:
            path = Path(str(name))
            # Other names may be those of the hub or of sae-lens.
            local = str(name).startswith(("/", "./", "../")) or path.suffix in _LOCAL
            is_result = any(path in other.result.parents for other in grid.steps)
            if name and local and not is_result and not path.exists():
                raise UserError(
                    f"{name}, which {grid.file.path} names, does not exist", "correct the path"
                )


def _print_plan(grid: Grid) -> list[dict[str, Any]]:
    """Print every command, whether it is done, and what it is expected to take."""
    plan = []
    for step, cost in estimate_costs(grid):
        state = "done" if _done(grid, step) else "to do"
        print(f"{state:6} {cost.hours_text():>9} {cost.size_text():>9}  {step.name}")
        plan.append({"name": step.name, "state": state, "hours": cost.hours, "bytes": cost.bytes})
    for judge in _judges(grid.steps):
        print(f"{_where(judge)}  the questions of {judge}")
    return plan


def _judges(steps: list[Step]) -> list[str]:
    """The judges whose questions the steps ask, by name."""
    named = {name for step in steps for name in step.settings.get("generate", [])}
    return sorted(named & JUDGES.keys())


def _where(judge: str) -> str:
    try:
        find_prompts(judge, download=False)
    except UserError:
        return "to be downloaded"
    return "on this machine"


def _done(grid: Grid, step: Step) -> bool:
    """Whether a step's result exists and was made from its current inputs."""
    mark = _mark(grid, step)
    return step.made and mark.is_file() and mark.read_text() == step.inputs()


def _run(grid: Grid, step: Step) -> None:
    mark = _mark(grid, step)
    begun = mark.with_suffix(".begun")
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    settings, inputs = step.settings, step.inputs(finished=False)
    # What was begun with the same inputs is resumed, anything else made again.
    if begun.is_file() and begun.read_text() != inputs:
        say("made again, as its settings or what it reads have changed")
        if step.kind == "cache":
            # Before it is noted as begun: a command that is interrupted finds no other store.
            place_of(settings["out"]).clear()
        elif step.kind == "sft":
            for checkpoint in step.result.parent.glob("checkpoint-*"):
                remove_folder(checkpoint)
        else:
            settings = settings | {"overwrite": True}
    replace_text(begun, inputs)
    file = mark.with_suffix(".yaml")
    replace_text(file, yaml.safe_dump(settings, sort_keys=False))
    # The model of fpo eval is an argument, not a flag.
    model = [settings["model"]] if step.kind == "eval" else []
    # The commands' own tables would mix with those of fpo compare on stdout.
    words = [*step.words, *model, "--config", str(file)]
    if step.kind != "sft":
        words += output.flags()

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
    if step.kind == "sft" and not list(step.result.parent.glob("*.safetensors")):
        raise UserError(
            f"{step.name} has left no weights in {step.result.parent}",
            "under ZeRO-3 its DeepSpeed file needs stage3_gather_16bit_weights_on_model_save: true",
        )
    replace_text(mark, step.inputs())


def _mark(grid: Grid, step: Step) -> Path:
    if step.kind == "sft":
        # Grids may share it.
        return step.result.parent / "fpo-compare.done"
    return grid.out / "configs" / f"{step.name}.done"
