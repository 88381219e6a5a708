"""Several whole numbers in one argument."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hesscope as hs
from hesscope.problem.numbers import numbers


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (3, [3]),
        (-1, [11]),
        ("3", [3]),
        ("-1", [11]),
        ("0,3,11", [0, 3, 11]),
        (" 0 , 3 ", [0, 3]),
        ("11,0", [11, 0]),  # as given
        ("0-5", [0, 1, 2, 3, 4, 5]),
        ("4-4", [4]),
        (":3", [0, 1, 2]),
        ("9:", [9, 10, 11]),
        ("-2:", [10, 11]),
        ("::5", [0, 5, 10]),
        ("::-6", [11, 5]),
        ("10:99", [10, 11]),  # as a slice in Python
        ("0,5-6,-1", [0, 5, 6, 11]),
        ("all", list(range(12))),
        ([2, 0], [2, 0]),
        ((1,), [1]),
        (range(2, 8, 3), [2, 5]),
        (slice(None, 2), [0, 1]),
        (torch.tensor([4, 2]), [4, 2]),
    ],
)
def test_what_is_meant(wanted: Any, expected: list[int]) -> None:
    assert numbers(wanted, 12, "blocks", "Model") == expected


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("12", "Expected blocks of Model between 0 and 11, got 12; the nearest is 11"),
        (-13, "got -13; the nearest is 0"),
        ("8-12", "got 12; the nearest is 11"),
        ([3, 40], "got 40"),
        ("0,3-5,4", "Expected distinct blocks, but '0,3-5,4' gives 4 twice"),
        ([11, -1], "Expected distinct blocks"),
        ("5:5", "Expected at least one of the 12 blocks of Model; '5:5' selects none"),
        ([], "Expected at least one of the 12 blocks"),
        ("5-3", "Expected blocks from low to high, as in 0-5, got '5-3'"),
        ("", "Expected blocks as in '0,3,11', '0-5', ':3' or 'all', or a list of integers, got ''"),
        ("0,,1", "Expected blocks as in"),
        ("first", "Expected blocks as in .* got 'first'"),
        ("::0", "Expected blocks as in"),
        (1.0, "Expected blocks as in"),
        ([0.5], "Expected blocks as in"),
        (True, "Expected blocks as in"),
        ([0, True], "Expected blocks as in"),
        (["0"], "Expected blocks as in"),
    ],
)
def test_complaints(wanted: Any, message: str) -> None:
    with pytest.raises(hs.HesscopeError, match=message):
        numbers(wanted, 12, "blocks", "Model")
