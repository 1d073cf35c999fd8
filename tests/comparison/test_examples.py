"""The configurations of examples/ mean what they should."""

from pathlib import Path

import pytest

from fpocli.comparison.grid import read_grid
from fpocli.comparison.tables import REPORTS

PAPER = Path(__file__).parents[2] / "examples/paper"


@pytest.mark.parametrize(
    ("name", "stores", "runs"),
    [
        ("table2", 1, 5),
        ("figure3", 1, 5),
        ("table3", 8, 15),
        ("table6", 1, 4),
        ("table7", 5, 5),
        ("smollm2", 1, 24),
        ("smollm2-short", 1, 8),
    ],
)
def test_grids_of_the_paper(name, stores, runs):
    grid = read_grid(str(PAPER / f"{name}.yaml"), REPORTS)
    assert len(grid.stores) == stores
    assert len(grid.runs) == runs
    if not name.startswith("smollm2"):
        assert all(run.settings["lr"] == 5e-7 for run in grid.runs)
        assert all(run.train.words[0] == "torchrun" for run in grid.runs)


def test_the_papers_choice_is_a_row_of_table_3():
    grid = read_grid(str(PAPER / "table3.yaml"), REPORTS)
    keys = ("layer", "site", "alpha", "stop_gradient")
    rows = [tuple(str(run.settings[key]) for key in keys) for run in grid.runs]
    assert len(set(rows)) == 15
    assert ("[25]", "['resid_post']", "0.5", "True") in rows
