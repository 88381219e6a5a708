"""The unit-major order of a weight, against torch's own reshaping."""

from __future__ import annotations

import pytest
import torch

from hesscope.space import units


@pytest.mark.parametrize(
    ("shape", "unit_axis", "count", "view"),
    [
        ((3, 4), 0, 3, lambda w: w),
        ((3, 4), 1, 4, lambda w: w.T),
        ((5,), 0, 5, lambda w: w[:, None]),
        ((), 0, 1, lambda w: w.reshape(1, 1)),
        ((2, 3, 4), 1, 6, lambda w: w.reshape(6, 4)),  # experts, [out, in]
        ((2, 3, 4), 2, 8, lambda w: w.transpose(1, 2).reshape(8, 3)),  # experts, [in, out]
        ((6, 1, 4), 0, 6, lambda w: w.reshape(6, 4)),  # a convolution
        ((2, 3, 2, 2), 0, 2, lambda w: w.reshape(2, 12)),
    ],
)
def test_positions_in_the_unit_major_view(shape: tuple[int, ...], unit_axis: int, count: int, view: object) -> None:
    stored = torch.arange(torch.Size(shape).numel()).reshape(shape)
    expected = view(stored)  # type: ignore[operator]
    assert units.count(shape, unit_axis) == count == len(expected)
    positions = torch.arange(stored.numel()).reshape(expected.shape)
    assert units.flat_indices(shape, unit_axis, positions).tolist() == expected.tolist()
    assert units.flat_indices(shape, unit_axis, positions.flip(0)).tolist() == expected.flip(0).tolist()
