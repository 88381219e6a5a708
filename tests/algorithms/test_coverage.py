"""Intervals cover as often as they say, on a spectrum without a dominant direction: densities, groups, stopping at a target."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from scipy.stats import t
from test_groups_spectra import over_parameters
from torch import Tensor

import hesscope as hs
from hesscope.algorithms.cross_norms import CrossNorms
from hesscope.algorithms.grouping import grouped
from hesscope.results import Density
from spectra import generic, symmetric

pytestmark = pytest.mark.slow

F64 = torch.float64
SEEDS = 400
PROBES = 5
BANDWIDTH = 0.5


def covered(found: Tensor, errors: Tensor, exact: Tensor, degrees: int) -> Tensor:
    """Shares over the first axis, the runs, of 95% intervals by Student's t that hold the exact value."""
    return ((found - exact).abs() <= float(t.ppf(0.975, degrees)) * errors).double().mean(0)


@cache
def matrix() -> Tensor:
    return generic(40, seed=4) + 0.5 * torch.eye(40, dtype=F64)


@cache
def densities() -> list[Density]:
    H = hs.operator(matrix())
    return [hs.density(H, probes=PROBES, steps=7, bandwidth=BANDWIDTH, seed=seed) for seed in range(SEEDS)]


def test_moments_and_trace_of_a_density() -> None:
    values = torch.linalg.eigvalsh(matrix())
    moments, errors = (torch.stack(x) for x in zip(*((r.moments, r.moments_standard_error) for r in densities()), strict=True))  # fmt: skip
    shares = covered(moments, errors, torch.stack([values.pow(p).mean() for p in range(1, 5)]), PROBES - 1)
    assert 0.93 <= float(shares.min()) <= float(shares.max()) <= 0.97, shares
    traces = torch.tensor([run.trace for run in densities()], dtype=F64)
    assert 0.93 <= float(covered(traces[:, 0], traces[:, 1], matrix().trace(), PROBES - 1)) <= 0.97


def test_the_interval_of_a_smoothed_density() -> None:
    """Seven steps integrate a Gaussian of this width exactly enough; points are taken where the density is."""
    values = torch.linalg.eigvalsh(matrix())
    inside = []
    for run in densities():
        low, high = run.interval()
        z = (run.grid[:, None] - values) / BANDWIDTH
        exact = torch.exp(-0.5 * z * z).mean(1) / (BANDWIDTH * (2 * torch.pi) ** 0.5)
        there = exact > 0.3 * exact.max()
        inside.append(((low <= exact) & (exact <= high))[there].double().mean())
    assert 0.93 <= float(torch.stack(inside).mean()) <= 0.97, torch.stack(inside).mean()


def test_traces_and_norms_of_groups() -> None:
    """Two groups that are tied to one another; intervals are those of a whole run."""
    A, cut = generic(60, seed=4) + 0.5 * torch.eye(60, dtype=F64), [slice(0, 25), slice(25, 60)]
    H = over_parameters(A, 25, 35)
    parts, runs = list(grouped(H.space, str).values()), []
    for seed in range(1000):
        run = CrossNorms(H, parts, 8, seed)
        while not run.done:
            run.step()
        runs.append((run.means.clone(), run.errors.clone()))
    found, errors = (torch.stack(x) for x in zip(*runs, strict=True))
    exact = torch.stack([torch.stack([A[h, h].trace(), *(A[g, h].square().sum() for g in cut)]) for h in cut])
    shares = covered(found, errors, exact, 7)
    assert 0.93 <= float(shares.min()) <= float(shares.max()) <= 0.97, shares
    whole = hs.groups(H, str, probes=8, steps=1, max_products=2, tol=1e9)
    half = float(t.ppf(0.975, 7)) * errors[0][:, 0]
    torch.testing.assert_close(whole.interval(), (found[0][:, 0] - half, found[0][:, 0] + half))


# ---- stopping at a target error


#: A matrix, and the shares of the trace's intervals that hold; those of the diagonal are the first's in both.
STOPPED = {
    "generic": (generic(50, seed=4) + 0.5 * torch.eye(50, dtype=F64), (0.93, 0.97)),
    "one dominant direction": (symmetric([10.0, *torch.linspace(0.0, 1.0, 49).tolist()], seed=4), (0.88, 0.94)),
}


@pytest.mark.parametrize("name", STOPPED)
def test_after_stopping_intervals_hold_what_the_documentation_says(name: str) -> None:
    A, (least, most) = STOPPED[name]
    H, d = hs.operator(A), A.diagonal()
    of_trace, of_diagonal = [], []
    for seed in range(400):
        low, high = hs.trace(H, method="hutchinson", target_error=0.08, seed=seed).interval()
        of_trace.append(low <= float(A.trace()) <= high)
    for seed in range(60):
        ends = hs.diagonal(H, method="hutchinson", target_error=0.25, seed=seed).interval()
        of_diagonal.append((ends[0]["x"] <= d) & (d <= ends[1]["x"]))
    assert least <= sum(of_trace) / 400 <= most
    assert 0.93 <= float(torch.stack(of_diagonal).double().mean()) <= 0.97
