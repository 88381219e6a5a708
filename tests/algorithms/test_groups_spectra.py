"""Groups of block-diagonal matrices whose blocks have prescribed spectra."""

from __future__ import annotations

import pytest
import torch
from test_groups import Dense
from torch import Tensor, nn

import hesscope as hs
from spectra import SPECTRA, symmetric

F64 = torch.float64
PAIRS = list(zip(SPECTRA, [*list(SPECTRA)[3:], *list(SPECTRA)[:3]], strict=True))


def over_parameters(A: Tensor, *sizes: int) -> hs.Operator:
    """A matrix over a parameter of each size."""
    model = nn.ParameterDict({str(i): nn.Parameter(torch.zeros(n, dtype=F64)) for i, n in enumerate(sizes)})
    return Dense(A, hs.select(model))


@pytest.mark.slow
@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_two_spectra_side_by_side(names: tuple[str, str]) -> None:
    """Extremes to rounding, nothing between the blocks, and estimates within four of their errors."""
    blocks = [symmetric(SPECTRA[name], seed) for seed, name in enumerate(names)]
    H = over_parameters(torch.block_diag(*blocks), *map(len, blocks))
    found = hs.groups(H, str, probes=30, steps=6, tol=1e-8)
    assert found.names == ["0", "1"]
    assert all(found.converged)
    assert found.squares[0, 1] == found.squares[1, 0] == 0
    low, high = found.interval(0.9999)
    for g, A in enumerate(blocks):
        values, scale = torch.linalg.eigvalsh(A), float(A.norm())
        torch.testing.assert_close(found.extremes[g], values[[-1, 0]], rtol=0, atol=1e-12 * scale)
        assert low[g] - 1e-10 * scale <= A.trace() <= high[g] + 1e-10 * scale
        square = A.square().sum()
        assert (found.squares[g, g] - square).abs() <= 4 * found.squares_standard_error[g, g] + 1e-10 * square
        density = found.density(str(g))
        exact = torch.stack([values.pow(p).mean() for p in range(1, 5)])
        gap = (density.moments - exact).abs()
        assert bool((gap <= 4 * density.moments_standard_error + 1e-10 * exact.abs() + 1e-12 * scale).all())
