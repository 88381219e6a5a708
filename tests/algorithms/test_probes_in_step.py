"""Probes of a density that go in step give what they give one after another, and a run goes on with another number of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hesscope as hs
from hesscope.algorithms.basis import Home
from hesscope.algorithms.density import Quadrature
from hesscope.communicator import ALONE

STEPS, PROBES = 7, 5


def matrix() -> Tensor:
    g = torch.Generator().manual_seed(0)
    A = torch.randn(12, 12, generator=g, dtype=torch.float64)
    return A + A.T


def quadrature(basis: bool) -> Quadrature:
    return Quadrature(hs.operator(matrix()), PROBES, STEPS, 0, Home() if basis else None)


def finished(run: Quadrature) -> Quadrature:
    while not run.done:
        run.step()
    return run


@pytest.mark.parametrize("basis", [True, False], ids=["basis", "three terms"])
@pytest.mark.parametrize("at_once", [2, 3, 5, 8])
def test_in_step(at_once: int, basis: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = finished(quadrature(basis))
    monkeypatch.setattr(type(ALONE), "probe_groups", at_once)
    together = quadrature(basis)
    assert len(together._under_way) == min(at_once, PROBES)
    finished(together)
    torch.testing.assert_close(together.nodes, alone.nodes, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(together.weights, alone.weights, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 7, 10])
@pytest.mark.parametrize(("before", "after"), [(3, 1), (1, 3), (2, 4)])
def test_a_run_goes_on_with_another_number_of_groups(
    before: int, after: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = finished(quadrature(True))
    monkeypatch.setattr(type(ALONE), "probe_groups", before)
    begun = quadrature(True)
    for _ in range(steps):
        begun.step()
    state = begun.state()
    monkeypatch.setattr(type(ALONE), "probe_groups", after)
    run = quadrature(True)
    run.restore(state)
    finished(run)
    torch.testing.assert_close(run.nodes, expected.nodes, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(run.weights, expected.weights, rtol=1e-8, atol=1e-12)
