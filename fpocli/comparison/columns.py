"""The columns of the paper's tables."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fpocli.comparison.records import Record
from fpocli.data.pairs import SIDES

# Of the answers that the tables describe; the default of fpo eval.
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Column:
    """A measured column.

    Args:
        title: its heading, with the unit.
        value: of a run's record; None where it was not measured.
        digits: after the point.
        per_pair: its name among the values of pairs, by which runs are compared; or None.
        error: the standard error of a run's value, where it has one of its own.
        share: whether it is a share of pairs.
        note: below the table, about columns of this kind; {baseline} stands for its name.
    """

    title: str
    value: Callable[[Record], float | None]
    digits: int
    per_pair: str | None = None
    error: Callable[[Record], float | None] | None = None
    share: bool = False
    note: str = ""

    def known(self, rows: list[Record]) -> list[float]:
        """Its values for the runs in which it was measured."""
        return [value for row in rows if (value := self.value(row)) is not None]


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: above it.
        keys: settings that tell its rows apart.
        columns: what is measured.
        groups: whether the distances of named groups of features follow.
    """

    title: str
    keys: tuple[str, ...]
    columns: tuple[Column, ...]
    groups: bool = False

    def known_columns(self, rows: list[Record]) -> list[Column]:
        """The columns that were measured in some run."""
        columns = [*self.columns, *(_group_columns(rows) if self.groups else ())]
        return [column for column in columns if column.known(rows)]


def _path(*names: str) -> Callable[[Record], float | None]:
    """A nested value of a record."""

    def value(row: Record) -> float | None:
        found: Any = row
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return found

    return value


def _percent(name: str) -> Callable[[Record], float]:
    """A share of fpo eval in percent."""
    return lambda row: 100 * row["eval"][name]["share"]


def _entropy(row: Record) -> float | None:
    """At temperature 0.7, the same in every table, or None if that was not sampled. Of several sets
    of prompts the first one's, so that it is one quantity."""
    for sampled in row["eval"].get("generation") or ():
        if sampled["temperature"] == TEMPERATURE:
            return sampled["entropy"]
    return None


def _distance(side: str) -> Callable[[Record], float | None]:
    """The mean over sites."""

    def value(row: Record) -> float | None:
        sites = row["eval"].get("distance")
        return statistics.mean(site[side] for site in sites.values()) if sites else None

    return value


def _group_columns(rows: list[Record]) -> list[Column]:
    """D of each named group of features, for both responses."""
    names = dict.fromkeys(name for row in rows for name in row["eval"].get("groups", {}))
    return [
        Column(
            f"D of {name}, {side}",
            _path("eval", "groups", name, side),
            5,
            per_pair=f"group.{name}_{side}",
        )
        for name in names
        for side in SIDES
    ]


def _judged(title: str, judge: str, name: str, digits: int = 1, *, whole: float | None) -> Column:
    """A judge's number about the baseline and a run, with its standard error.

    Args:
        title: the column's heading.
        judge, name: of the verdict.
        digits: after the point.
        whole: None for the baseline against the run (Table 2); for the run against the baseline
            (Tables 6 and 7) what both numbers sum to.
    """

    def verdict(row: Record) -> tuple[float, float | None] | None:
        for verdict in row["verdicts"]:
            wanted = verdict["judge"] == judge and verdict["temperature"] in (TEMPERATURE, None)
            if wanted and verdict.get(name):
                return verdict[name]
        return None

    def value(row: Record) -> float | None:
        found = verdict(row)
        return found and (found[0] if whole is None else whole - found[0])

    def error(row: Record) -> float | None:
        found = verdict(row)
        return found and found[1]

    sides = "{baseline} against the run of that line"
    if whole is not None:
        sides = "the run of that line against {baseline}"
    note = f"WR and Δ score are those of {sides}, ± their standard error over questions."
    return Column(title, value, digits, error=error, note=note)


def _alpaca_eval(whole: float | None) -> tuple[Column, ...]:
    return (
        _judged("AlpacaEval WR-L (%)", "alpaca_eval", "length_controlled", whole=whole),
        _judged("AlpacaEval WR (%)", "alpaca_eval", "win_rate", whole=whole),
    )


D_MARGIN = Column("D margin", _distance("margin"), 5, per_pair="distance_margin")
_D_REJECTED = Column("D rejected", _distance("rejected"), 5, per_pair="distance_rejected")
MEAN_MEMORY = Column("Mean memory (GB)", _path("memory_gb"), 2)
_PEAK = Column("Peak (GB)", _path("peak_memory_gb"), 2)
# The paper's definition, and the one by rewards that most tools log.
_ACCURACY = (
    Column("Accuracy (%)", _percent("accuracy"), 1, per_pair="accuracy", share=True),
    Column(
        "Reward acc. (%)", _percent("reward_accuracy"), 1, per_pair="reward_accuracy", share=True
    ),
)
_ENTROPY = Column(f"Entropy at T = {TEMPERATURE} (nats)", _entropy, 3)
_BENCHMARKS = (
    *_alpaca_eval(None),
    _judged("Arena-Hard WR (%)", "arena_hard", "win_rate", whole=None),
    _judged("MT-Bench WR (%)", "mt_bench", "win_rate", whole=None),
    _judged("MT-Bench Δ score", "mt_bench", "grade", 2, whole=None),
)
# The paper's Tables 6 and 7 have 50.0 for TDPO-2: win rates of each line against it.
_AGAINST_BASELINE = _alpaca_eval(100.0)
_PAPER = (*_ACCURACY, _ENTROPY)
_ALL = (
    *_ACCURACY,
    Column(
        "Reward acc. per token (%)",
        _percent("reward_accuracy_per_token"),
        1,
        per_pair="reward_accuracy_per_token",
        share=True,
    ),
    _ENTROPY,
    Column(
        "Reward margin (nats/token)",
        _path("eval", "reward_margin_per_token", "mean"),
        4,
        per_pair="reward_margin_per_token",
    ),
    Column("KL chosen (nats)", _path("eval", "kl", "chosen"), 3, per_pair="kl_chosen"),
    Column("KL rejected (nats)", _path("eval", "kl", "rejected"), 3, per_pair="kl_rejected"),
    Column("KL margin", _path("eval", "kl", "margin"), 3, per_pair="kl_margin"),
    Column("D chosen", _distance("chosen"), 5, per_pair="distance_chosen"),
    _D_REJECTED,
    D_MARGIN,
    Column("Time (s)", _path("seconds"), 0),
    MEAN_MEMORY,
    _PEAK,
    *_BENCHMARKS,
)
_SITES = ("at", "layer", "site")
TABLES = {
    "all": Table("All runs", ("method", *_SITES, "alpha", "stop_gradient"), _ALL, groups=True),
    "table2": Table("The paper's Table 2", ("method",), (*_BENCHMARKS, *_PAPER)),
    "table3": Table("The paper's Table 3", (*_SITES, "alpha", "stop_gradient"), _PAPER),
    "table4": Table(
        "Held and freed features (the paper's Table 4)",
        ("feature_weights",),
        (*_ACCURACY, _D_REJECTED),
        groups=True,
    ),
    "table6": Table("The paper's Table 6", ("method",), (*_PAPER, *_AGAINST_BASELINE)),
    "table7": Table("The paper's Table 7", _SITES, (*_PAPER, *_AGAINST_BASELINE)),
}
