"""Alpha under --hold, as dual ascent should move it, and the warning about chosen responses."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import command, finish, read, run

from fpocli.training.chosen_fall import ChosenFall
from fpocli.training.hold import HeldAlpha
from fpocli.training.losses import Terms, preference_loss


def line(change: float, margin: float) -> dict[str, float]:
    return {"average_logp_chosen_change": change, "margin": margin}


def measured(held: float, chosen: float = 0.0) -> dict[str, float]:
    return {"held": held, "held_chosen": chosen}


@given(st.floats(1e-3, 1e3), st.floats(1e-6, 1e6), st.lists(st.floats(0, 5), max_size=40))
def test_alpha_has_no_unit(alpha, unit, multiples):
    """In other units of the divergence the same run has the same alpha times value."""
    one, other = HeldAlpha(alpha, 1.0, 0.1), HeldAlpha(alpha / unit, unit, 0.1)
    for multiple in multiples:
        one.update(measured(multiple))
        other.update(measured(multiple * unit))
        assert other.alpha * unit == pytest.approx(one.alpha, rel=1e-6, abs=1e-9)


def test_alpha_rises_above_the_value_falls_below_it_and_stays_at_it():
    held = HeldAlpha(0.5, 2.0, 0.1)
    before = held.alpha
    held.update(measured(2.0))
    assert held.alpha == pytest.approx(before)
    held.update(measured(2.5))
    assert held.alpha > before
    for _ in range(200):
        held.update(measured(0.0))
    assert held.alpha == 0
    # No debt is left from the time at 0.
    held.update(measured(4.0))
    assert held.alpha > 0


@pytest.mark.parametrize(("held", "chosen"), [(1e6, 0.0), (0.5, 0.0), (0.5, 7.0)])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_alpha_is_limited(beta, held, chosen):
    """However long the value is not reached, what alpha makes of a divergence in u is at most 10,
    and alpha is soon back."""
    one = HeldAlpha(0.5, 0.02, beta)
    for _ in range(10_000):
        one.update(measured(held, chosen))
    assert one.alpha * beta * max(held, chosen) == pytest.approx(10)
    for _ in range(60):
        one.update(measured(0.01))
    assert one.alpha * beta * 0.02 < 1


def test_without_a_value_alpha_is_constant(capsys):
    held = HeldAlpha(0.5, None, 0.1)
    held.update({"loss": 1.0})
    held.warn_if_missed()
    assert held.alpha == 0.5 and capsys.readouterr().err == ""


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_divergence_that_yields_to_alpha_is_held(scale):
    """X = scale * growth / (1 + alpha scale), slowly reached: it ends at the value."""
    value, x = 0.25 * scale, 0.0
    held = HeldAlpha(0.5 / scale, value, 0.1)
    seen = []
    for _ in range(600):
        x += 0.1 * (scale / (1 + held.alpha * scale) - x)
        held.update(measured(x))
        seen.append(x)
    assert math.isclose(sum(seen[-100:]) / 100, value, rel_tol=0.02)


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("value", [0.01, 0.1, 0.5])
def test_the_loss_holds_a_divergence_that_the_reward_drives_up(value, beta, capsys):
    """Gradient descent on the loss itself, of two responses whose divergence is the square of what
    their log-probability has changed by; the chosen one, which nothing holds, gets away."""
    changes = torch.tensor([[1e-3, 1e-3]], dtype=torch.float64, requires_grad=True)
    held = HeldAlpha(0.5, value, beta)
    optimiser = torch.optim.Adam([changes], lr=0.003 * value**0.5)
    seen = []
    for _ in range(1000):
        none = torch.zeros(1, 2, dtype=torch.float64)
        terms = Terms(
            logp=changes * torch.tensor([1.0, -1.0]),
            count=none + 1, ref_logp=none, distance=changes.square(), kl=none,
        )  # fmt: skip
        found = preference_loss(
            terms, reward="dpo", constraint="features", alpha=held.alpha, beta=beta, gamma=0,
            stop_gradient=True,
        )  # fmt: skip
        optimiser.zero_grad()
        found.loss.sum().backward()
        optimiser.step()
        chosen, rejected = terms.distance[0].tolist()
        held.update(measured(rejected, chosen))
        seen.append(rejected)
    assert np.mean(seen[-200:]) == pytest.approx(value, rel=0.1)
    held.warn_if_missed()
    assert capsys.readouterr().err == ""


def test_a_value_that_is_not_reached_is_told(capsys):
    held = HeldAlpha(0.5, 0.02, 0.1)
    for _ in range(120):
        held.update(measured(0.5))
    held.warn_if_missed()
    told = capsys.readouterr().err
    assert "--hold 0.02 was not reached: over the last 50 steps the value is 0.5" in told


def test_a_short_run_is_judged_by_its_second_half(capsys):
    """X is 0 at the start. A run that was resumed is judged by all of its steps."""
    resumed = HeldAlpha(0.5, 1.0, 0.1)
    for step in range(19):
        resumed.watch(measured(0.12 * step))
    resumed.update(measured(0.12 * 19))
    resumed.warn_if_missed()
    assert "over the last 10 steps the value is 1.74" in capsys.readouterr().err
    near = HeldAlpha(0.5, 1.0, 0.1)
    for step in range(40):
        near.update(measured(9.0 if step < 20 else 1.2))
    near.warn_if_missed()
    assert capsys.readouterr().err == ""


def test_the_fall_of_chosen_responses_is_warned_of_once(capsys):
    fall = ChosenFall(100, from_reference=True)
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
    fall = ChosenFall(100, from_reference=from_reference)
    for one in lines:
        fall.watch(one)
    assert "less likely" not in capsys.readouterr().err


def test_training_warns(material, store_path, tmp_path):
    """DPO makes chosen responses less likely that SFT had made likely."""
    run(material, tmp_path / "sft", "--no-bf16", method="sft", lr=5e-3, epochs=12)
    words = command(
        material, tmp_path / "run", "--no-bf16", method="dpo", lr=3e-3, epochs=6,
        model=tmp_path / "sft/final",
    )  # fmt: skip
    done = finish(words)
    assert done.returncode == 0, done.stderr[-2000:]
    changes = [line["average_logp_chosen_change"] for line in read(tmp_path / "run")]
    assert min(changes) < changes[0] - 1
    assert done.stderr.count("the chosen responses are less likely") == 1
