"""Which of two responses scores higher, where rounding must not decide."""

from typing import Any, NamedTuple

# Eight times the rounding of float32, relative to the numbers whose difference is looked at.
_ROUNDING = 1e-6


class Wins(NamedTuple):
    """Comparisons of P pairs.

    Args:
        value: [P], 1 where chosen is higher, 0 where rejected is, 0.5 for a tie. The mean is the
            accuracy.
        tie: bool [P].
    """

    value: Any
    tie: Any


def wins(chosen: Any, rejected: Any, magnitude: Any) -> Wins:
    """Compare the scores of P pairs. A difference within float32 rounding is a tie.

    Before training every implicit reward is S - S_ref = 0 up to rounding, and counting the pairs
    whose rounding happens to favour the chosen response would give any accuracy.

    Args:
        chosen, rejected: [P] scores, arrays or tensors.
        magnitude: [P] sum of the absolute values of the numbers that both scores are made of.
    """
    gap = chosen - rejected
    tie = abs(gap) <= _ROUNDING * magnitude
    return Wins(1.0 * ((gap > 0) & ~tie) + 0.5 * tie, tie)
