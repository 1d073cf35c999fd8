"""Conditions mean what Python means by them, and are never run as code."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpocli.system.conditions import Condition
from fpocli.system.errors import UserError

NAMES = ("margin", "tokens")
NUMBERS = st.sampled_from(["0", "-1", "2.5", "1e3", "margin", "tokens", "(margin + 2 * tokens)"])
COMPARISONS = st.lists(NUMBERS, min_size=2, max_size=3).flatmap(
    lambda terms: st.sampled_from(["<", "<=", ">", ">=", "==", "!="]).map(
        lambda sign: f" {sign} ".join(terms)
    )
)
CONDITIONS = st.recursive(
    COMPARISONS,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(
            lambda part: f"({part[0]}) {part[1]} {part[2]}"
        ),
        inner.map(lambda part: f"not ({part})"),
    ),
    max_leaves=5,
)


@given(CONDITIONS, st.lists(st.tuples(st.floats(), st.integers(0, 9)), min_size=1, max_size=6))
def test_it_holds_where_python_says_so(text, rows):
    columns = dict(zip(NAMES, np.array(rows, float).T, strict=True))
    expected = [
        bool(eval(text, {}, {"margin": margin, "tokens": float(tokens)})) for margin, tokens in rows
    ]
    assert Condition(text, NAMES, "--where")(columns).tolist() == expected


WRONG = {
    "margin": "where a comparison is needed",
    "margin + 1": "where a comparison is needed",
    "margin > x": "unknown name x",
    "margin > '1'": "where a number or a name is needed",
    "margin > True": "where a number or a name is needed",
    "margin > 1j": "where a number or a name is needed",
    "margin is 1": "a comparison that is not one of",
    "margin in (1, 2)": "a comparison that is not one of",
    "margin > 2 ** 9": "where a number or a name is needed",
    "__import__('os').system('true') > 0": "where a number or a name is needed",
    "margin.real > 0": "where a number or a name is needed",
    "(lambda: 1)() > 0": "where a number or a name is needed",
    "margin > 1; tokens": "cannot be parsed",
    "margin >": "cannot be parsed",
    "": "cannot be parsed",
    "margin > \0": "cannot be parsed",
    "margin > 1" + "0" * 400: "too large",
    "(" * 500 + "margin > 1" + ")" * 500: "cannot be parsed",
    "not " * 5000 + "margin > 1": "cannot be parsed",
    "-" * 5000 + "margin > 1": "cannot be parsed",
    " and ".join(["margin"]): "where a comparison is needed",
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_anything_else_is_refused(text):
    with pytest.raises(UserError) as caught:
        Condition(text, NAMES, "--where")
    assert WRONG[text] in caught.value.message and "margin, tokens" in caught.value.hint


def test_a_long_condition_is_no_deep_one():
    text = " or ".join(f"tokens == {number}" for number in range(2000))
    columns = {"margin": np.zeros(3), "tokens": np.array([5, 1999, 2000])}
    assert Condition(text, NAMES, "--where")(columns).tolist() == [True, True, False]


def test_division_by_zero_is_no_error():
    columns = {"margin": np.array([0.0, 1.0]), "tokens": np.array([0, 0])}
    assert Condition("margin / tokens > 1", NAMES, "--where")(columns).tolist() == [False, True]
