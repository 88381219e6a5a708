"""Two exact Hessian blocks of real models, as published with arXiv 2504.04520: what is known of them comes out again."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hesscope as hs

BLOCKS = Path(__file__).resolve().parents[2] / ".." / "shared" / "assets" / "published_blocks"
OPT = "opt125m_block0_q_proj_row0.safetensors"
LLAMA = "llama32_1b_block0_v_proj_row0.safetensors"


@cache
def published(name: str) -> Tensor:
    if not (BLOCKS / name).is_file():
        pytest.skip(f"shared/assets/published_blocks/{name} is not beside this checkout")
    return hs.load(BLOCKS / name)


def test_leading_eigenvalues_of_the_opt_block() -> None:
    A = published(OPT)
    found = hs.eigs(hs.operator(A), k=2, which="LM")
    assert found.eigenvalues.tolist() == pytest.approx([-1.05e-3, 6.3e-4], abs=5e-6)
    exact = torch.linalg.eigvalsh(A.double())
    torch.testing.assert_close(found.eigenvalues, exact[exact.abs().argsort(descending=True)[:2]], rtol=1e-4, atol=0)
    assert found.converged
    assert found.products < 60


@pytest.mark.parametrize(("name", "ratio"), [(OPT, "11.5"), (LLAMA, "3.9")])
def test_off_diagonal_energy(name: str, ratio: str) -> None:
    found = hs.block(hs.operator(published(name)))
    assert f"off-diagonal over diagonal energy {ratio}" in found.summary()
    torch.testing.assert_close(found.matrix, published(name), rtol=0, atol=1e-6 * float(published(name).abs().max()))


@pytest.mark.parametrize(("name", "budget", "expected"), [(OPT, 240, 0.22), (LLAMA, 120, 0.18)])
def test_hutchinsons_relative_error(name: str, budget: int, expected: float) -> None:
    """The square root of the energy ratio over the number of probes, and every run says so of itself."""
    A = published(name)
    d = A.diagonal()
    runs = [hs.diagonal(hs.operator(A), method="hutchinson", budget=budget, seed=seed) for seed in range(20)]
    true = torch.stack([(run.flat() - d).norm() / d.norm() for run in runs]).double()
    stated = torch.tensor([run.relative_error for run in runs], dtype=torch.float64)
    energy = float((A.double().square().sum() - d.double().square().sum()) / d.double().square().sum())
    assert float(true.square().mean().sqrt()) == pytest.approx((energy / budget) ** 0.5, rel=0.05)
    assert float(true.mean()) == pytest.approx(expected, abs=0.01)
    assert float(stated.mean()) == pytest.approx(float(true.mean()), rel=0.05)


@pytest.mark.parametrize("method", ["nystrom", "auto", "deflated", "xdiag"])
@pytest.mark.parametrize(("name", "budget", "most"), [(OPT, 240, 0.06), (LLAMA, 120, 0.018)])
def test_a_quarter_of_hutchinsons_error_and_less(method: str, name: str, budget: int, most: float) -> None:
    A = published(name).double()
    d = A.diagonal()
    seeds = 20 if method == "nystrom" else 4
    runs = [hs.diagonal(hs.operator(A), method=method, budget=budget, seed=seed) for seed in range(seeds)]
    assert float(torch.stack([(run.flat() - d).norm() / d.norm() for run in runs]).mean()) < most
    assert max(run.products for run in runs) <= budget


@pytest.mark.parametrize("name", [OPT, LLAMA])
def test_trace_and_density_agree_with_the_block(name: str) -> None:
    A = published(name)
    exact = float(A.double().trace())
    trace = hs.trace(hs.operator(A), method="hutchinson", budget=90)
    assert abs(trace.estimate - exact) < 4 * trace.standard_error
    value, error = hs.density(hs.operator(A), probes=10, steps=12).trace
    assert abs(value - exact) < 4 * error
