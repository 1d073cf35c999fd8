"""Charts of block characters."""

import pytest

from fpocli.system.sparkline import block, sparkline


def test_a_block_fills_its_share():
    assert "".join(block(share / 8) for share in range(9)) == " ▁▂▃▄▅▆▇█"
    assert block(-1) + block(2) == " █"


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        (range(8), 8, "▁▂▃▄▅▆▇█"),
        ([-7.0, 0.0, 3.5, 7.0], 40, "▁▄▆█"),
        ([100, 0, 1], 2, "▁█"),
        ([1e-12, 2e-12], 5, "▁█"),
        ([3, 3, 3], 5, "▄▄▄"),
        ([3], 5, "▄"),
        ([1, 2], 0, ""),
        ([], 5, ""),
    ],
)
def test_the_last_values_between_their_smallest_and_largest(values, width, expected):
    assert sparkline(values, width) == expected
