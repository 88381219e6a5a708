"""Sums of squares and products of long vectors."""

from __future__ import annotations

import math

import pytest
import torch

import hesscope as hs
from hesscope.space import sums


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-19, 1e25, 1e37])
def test_entries_whose_squares_are_no_float32_numbers(scale: float) -> None:
    v = (torch.randn(3, 5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale).float()
    v[1] = 0
    exact = v.double() @ v.double().T
    torch.testing.assert_close(sums.squares(v) / scale**2, exact.diagonal() / scale**2, rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.products(v, v) / scale**2, exact / scale**2, rtol=1e-5, atol=1e-3)


def test_infinite_entries_stay_infinite() -> None:
    v = torch.tensor([[1.0, math.inf], [1.0, 1.0]])
    assert sums.squares(v).tolist() == [math.inf, pytest.approx(2.0)]


def test_a_tiny_matrix_has_its_eigenvalues_and_residuals() -> None:
    found = hs.eigs(hs.operator(1e-30 * torch.diag(torch.arange(1.0, 6.0))), 1, "SA")
    assert float(found.eigenvalues[0]) == pytest.approx(1e-30)
    density = hs.density(hs.operator(1e-30 * torch.diag(torch.arange(1.0, 6.0))), probes=3, steps=5)
    assert float(density.frobenius_norm[0]) == pytest.approx(1e-30 * 55**0.5)
