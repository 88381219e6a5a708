"""On a trained model and real text, what different algorithms say of one Hessian agrees within their stated errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hesscope as hs

ASSETS = Path(__file__).resolve().parents[3] / "shared" / "assets"
pytestmark = pytest.mark.skipif(not ASSETS.is_dir(), reason="the trained model and texts are not beside the repository")


@pytest.fixture(scope="module")
def problem() -> hs.Problem:
    texts = ASSETS / "text" / "tinystories_sample.jsonl"
    return hs.causal_lm(ASSETS / "stories260k", texts, length=64, sequences=8, batch_size=8)


@pytest.mark.slow
def test_eigs_trace_and_density_of_all_parameters(problem: hs.Problem) -> None:
    H = hs.hessian(problem)
    ends = hs.eigs(H, k=4, which="BE")
    trace = hs.trace(H, budget=40)
    density = hs.density(H, probes=4, steps=30)
    assert ends.converged
    from_density, spread = density.trace
    assert abs(trace.estimate - from_density) < 4 * (trace.standard_error**2 + spread**2) ** 0.5
    used = density.nodes[density.weights > 0]
    assert float(used.max()) == pytest.approx(float(ends.eigenvalues.max()), rel=1e-3)
    assert float(used.min()) == pytest.approx(float(ends.eigenvalues.min()), rel=1e-2)
    # (1/n) tr H^2 bounds every squared eigenvalue, and holds those that were found.
    second = density.size * float(density.moments[1])
    assert float((ends.eigenvalues**2).sum()) < second + 4 * density.size * float(density.moments_standard_error[1])


def test_estimates_against_the_exact_block(problem: hs.Problem) -> None:
    space = hs.select(problem, "model.layers.2.mlp.down_proj.weight[0]")
    H = hs.hessian(problem, space)
    matrix = hs.block(H).matrix.double()
    values = torch.linalg.eigvalsh(matrix)
    trace = hs.trace(H, method="hutchinson", budget=60)
    assert abs(trace.estimate - float(matrix.trace())) < 4 * trace.standard_error
    diagonal = hs.diagonal(H, method="exact").flat().double()
    assert torch.allclose(diagonal, matrix.diagonal(), rtol=1e-5, atol=1e-6 * float(matrix.abs().max()))
    found = hs.eigs(H, k=3, which="LA").eigenvalues
    assert torch.allclose(found, values.flip(0)[:3], rtol=1e-4)
    density = hs.density(H, probes=4, steps=30)
    error = density.moments_standard_error
    exact = torch.stack([(values**p).mean() for p in range(1, 5)])
    assert bool(((density.moments - exact).abs() < 5 * error + 1e-9).all())
