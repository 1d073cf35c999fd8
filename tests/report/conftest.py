"""Pages about an ordinary store, and about a store and runs with hostile names and texts."""

import json
from pathlib import Path

import pytest
from pages import HOSTILE, NAME, evaluated, hostile_material
from runs import run

import fpocli
from fpocli import InspectConfig, ReportConfig


@pytest.fixture(scope="session")
def hostile(tmp_path_factory) -> Path:
    """A store, a run and two evaluations, whose names and texts try to break a page."""
    folder = hostile_material(tmp_path_factory.mktemp("hostile"))
    store = folder / "ref.zarr"
    named = folder / "runs" / NAME
    named.parent.mkdir()
    run(folder, named, "--no-bf16", eval_every=2)
    evaluated(store, folder / NAME, folder / "reference", HOSTILE)
    evaluated(store, named, named / "eval", HOSTILE)
    return folder


@pytest.fixture(scope="session")
def pages(hostile, store_path, tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """By name the file of a page, and what its command printed with --json."""
    out = tmp_path_factory.mktemp("pages")
    runs = [str(hostile / "runs" / NAME), str(hostile / "reference")]
    made = {
        "store": (fpocli.inspect, InspectConfig, {"store": str(store_path)}),
        "feature": (fpocli.inspect, InspectConfig, {"store": str(store_path), "feature": 4}),
        "hostile": (fpocli.inspect, InspectConfig, {"store": str(hostile / "ref.zarr")}),
        "hostile-feature": (
            fpocli.inspect,
            InspectConfig,
            {"store": str(hostile / "ref.zarr"), "feature": 4},
        ),
        "runs": (fpocli.report_runs, ReportConfig, {"runs": runs}),
    }
    found = {}
    for name, (function, config, settings) in made.items():
        file = out / f"{name}.html"
        shown = function(config(html=str(file), json=True, **settings))
        found[name] = file, json.loads(json.dumps(shown))
    return found
