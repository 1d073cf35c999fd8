"""Alpha under --hold, as dual ascent should move it, and the warning about chosen responses."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpocli.training.chosen_fall import ChosenFall
from fpocli.training.hold import HeldAlpha


def line(change: float, margin: float) -> dict[str, float]:
    return {"average_logp_chosen_change": change, "margin": margin}


@given(st.floats(1e-3, 1e3), st.floats(1e-6, 1e6), st.lists(st.floats(0, 5), max_size=40))
def test_alpha_has_no_unit(alpha, unit, multiples):
    """In other units of the divergence the same run has the same alpha times value."""
    one, other = HeldAlpha(alpha, 1.0), HeldAlpha(alpha / unit, unit)
    for multiple in multiples:
        one.update({"held": multiple})
        other.update({"held": multiple * unit})
        assert other.alpha * unit == pytest.approx(one.alpha, rel=1e-6, abs=1e-9)


def test_alpha_rises_above_the_value_falls_below_it_and_stays_at_it():
    held = HeldAlpha(0.5, 2.0)
    before = held.alpha
    held.update({"held": 2.0})
    assert held.alpha == pytest.approx(before)
    held.update({"held": 2.5})
    assert held.alpha > before
    for _ in range(200):
        held.update({"held": 0.0})
    assert held.alpha == 0
    # No debt is left from the time at 0.
    held.update({"held": 4.0})
    assert held.alpha > 0


def test_without_a_value_alpha_is_constant():
    held = HeldAlpha(0.5, None)
    held.update({"loss": 1.0})
    assert held.alpha == 0.5


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_divergence_that_yields_to_alpha_is_held(scale):
    """X = scale * growth / (1 + alpha scale), slowly reached: it ends at the value."""
    value, x = 0.25 * scale, 0.0
    held = HeldAlpha(0.5 / scale, value)
    seen = []
    for _ in range(600):
        x += 0.1 * (scale / (1 + held.alpha * scale) - x)
        held.update({"held": x})
        seen.append(x)
    assert math.isclose(sum(seen[-100:]) / 100, value, rel_tol=0.02)


def test_the_fall_of_chosen_responses_is_warned_of_once(capsys):
    fall = ChosenFall(from_reference=True)
    for step in range(40):
        fall.watch(line(-0.03 * step, 0.01 * step))
    told = capsys.readouterr().err
    assert told.count("chosen responses are less likely") == 1 and "--sft-weight" in told


@pytest.mark.parametrize(
    ("from_reference", "lines"),
    [
        (True, [line(-0.4, 0.01 * step) for step in range(40)]),
        (True, [line(-0.9, -0.01 * step) for step in range(40)]),
        (False, [line(-2.0, 0.01 * step) for step in range(40)]),
        (True, [line(-0.9, 0.1 * step) for step in range(9)]),
    ],
    ids=["small", "margin falls", "other starting weights", "few steps"],
)
def test_no_warning(capsys, from_reference, lines):
    fall = ChosenFall(from_reference=from_reference)
    for one in lines:
        fall.watch(one)
    assert "less likely" not in capsys.readouterr().err
