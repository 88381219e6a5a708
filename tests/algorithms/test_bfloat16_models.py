"""Models in bfloat16: every engine and every algorithm, held to a dense float64 Hessian of the same weights."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.algorithms.grouping import grouped
from hesscope.engines import ENGINES
from oracles import causal_lm, linearized_lm, relative

pytestmark = pytest.mark.slow

#: Of a product: roundings of what a tangent meets on its way through two layers and back.
ROUNDING = 16 * torch.finfo(torch.bfloat16).eps
F64 = torch.float64

each_model = pytest.mark.parametrize("name", ["llama", "gpt2"])


@cache
def case(name: str) -> tuple[hs.Operator, Tensor, float]:
    """A Hessian over entries of all parameters, the same by the oracle, and how far its numbers may be from it."""
    model = tiny(name, torch.bfloat16)
    problem = hs.causal_lm(model, ragged_batches())
    space = hs.select(problem, random=24, seed=3)
    dense = causal_lm(model, ragged_batches(), space).hessian
    return hs.hessian(problem, space), dense, ROUNDING * float(dense.norm())


def close(found: Tensor | float, expected: Tensor | float, tol: float) -> None:
    """Finite float64 numbers, or float32 ones of as many entries as there are weights, within a tolerance."""
    found, expected = (torch.as_tensor(x, dtype=F64) for x in (found, expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=tol)


@each_model
@pytest.mark.parametrize("engine", ENGINES)
def test_products_of_every_engine(name: str, engine: str) -> None:
    """In float32; a finite difference is as near as it says, which in bfloat16 is not near."""
    base, dense, _ = case(name)
    H = hs.hessian(base.problem, base.space, engine)  # type: ignore[attr-defined]
    V = torch.randn(24, 2, generator=torch.Generator().manual_seed(2))
    found = H @ V
    stated = H.describe()["engine_error"]
    assert found.dtype == torch.float32
    assert relative(found, dense @ V.double()) < (stated or ROUNDING)
    assert (stated > 0) == (engine == "finite-difference")
    assert H.describe()["engine_choice"].startswith(f"{engine}, as asked")


@each_model
def test_products_through_the_outputs_that_are_streamed(name: str) -> None:
    base, _, _ = case(name)
    problem, space = base.problem, base.space  # type: ignore[attr-defined]
    dense = linearized_lm(problem.model, ragged_batches(), space)
    V = torch.randn(24, 2, generator=torch.Generator().manual_seed(2))
    for A, expected in (
        (hs.ggn(problem, space, "streamed"), dense.ggn()),
        (hs.empirical_fisher(problem, space, engine="streamed"), dense.empirical_fisher("token")),
    ):
        assert relative(A @ V, expected @ V.double()) < ROUNDING


@each_model
def test_block_and_diagonal(name: str) -> None:
    H, dense, _ = case(name)
    assert relative(hs.block(H).matrix, dense) < ROUNDING
    assert relative(hs.diagonal(H, "exact").flat(), dense.diagonal()) < ROUNDING
    Z = H.space.flatten(H.space.rademacher(0, range(20))).double()
    assert relative(hs.diagonal(H, "hutchinson", budget=20).flat(), (Z * (dense @ Z)).mean(1)) < ROUNDING


@each_model
def test_eigenpairs(name: str) -> None:
    H, dense, tol = case(name)
    exact = torch.linalg.eigvalsh(dense)
    for method, allowed in (("lanczos", 1e-2), ("power", 0.1)):
        found = hs.eigs(H, k=2, tol=allowed, method=method)
        assert found.converged
        close(found.eigenvalues, exact[exact.abs().argsort(descending=True)[:2]], tol)


@each_model
def test_traces(name: str) -> None:
    """Of the same vectors, on the same matrix but for its rounding."""
    H, dense, tol = case(name)
    close(hs.trace(H, "exact").estimate, float(dense.trace()), tol)
    for method in ("hutchinson", "hutch++", "xtrace"):
        found = hs.trace(H, method, budget=18)
        low, high = found.interval(0.9999)
        assert low - tol < float(dense.trace()) < high + tol
        assert found.samples.dtype == F64
    Z = H.space.flatten(H.space.rademacher(0, range(20))).double()
    close(hs.trace(H, "hutchinson", budget=20).estimate, float((Z * (dense @ Z)).sum(0).mean()), tol)


@each_model
@pytest.mark.parametrize("kind", ["ggn", "fisher", "per sequence", "empirical", "kfac"])
def test_traces_of_what_is_semidefinite(name: str, kind: str) -> None:
    """To a rounding of the products, which the record states, beside the stated error."""
    problem = case(name)[0].problem  # type: ignore[attr-defined]
    space = hs.select(problem, "*.0.mlp.*.weight")
    A = {
        "ggn": lambda: hs.ggn(problem, space),
        "fisher": lambda: hs.fisher(problem, space),
        "per sequence": lambda: hs.fisher(problem, space, per="sequence"),
        "empirical": lambda: hs.empirical_fisher(problem, space),
        "kfac": lambda: hs.kfac(problem, space),
    }[kind]()
    exact = hs.trace(A, "exact").estimate
    for method in ("auto", "xtrace", "hutch++"):
        found = hs.trace(A, method, budget=60)
        low, high = found.interval(0.999)
        slack = torch.finfo(torch.bfloat16).eps * exact
        assert low - slack < exact < high + slack
        assert found.standard_error < 0.3 * exact


@each_model
@pytest.mark.parametrize("basis", [True, False])
def test_densities(name: str, basis: bool) -> None:
    """Moments of the start vectors' own measures; the p-th is off by p roundings."""
    H, dense, tol = case(name)
    found = hs.density(H, probes=3, steps=10, basis=basis)
    Z = H.space.flatten(H.space.rademacher(0, [f"density/{p}" for p in range(3)])).double()
    scale = float(torch.linalg.eigvalsh(dense).abs().max())
    for p, moment in enumerate(found.moments, 1):
        expected = (Z * (torch.linalg.matrix_power(dense, p) @ Z)).sum(0).mean() / 24
        close(moment, expected, p * tol * scale ** (p - 1))
    assert found.nodes.dtype == found.weights.dtype == F64
    close(found.weights.sum(1), torch.ones(3), 1e-12)


@each_model
def test_a_lanczos_run(name: str) -> None:
    """T is float64, and Q^T A Q of a basis that is orthonormal to float32's rounding."""
    H, dense, tol = case(name)
    found = hs.lanczos(H, 12, keep_basis=True)
    assert found.basis is not None
    Q = found.basis.double()
    close(Q.T @ Q, torch.eye(12), 1e-5)
    close(found.T, Q.T @ dense @ Q, tol)
    assert found.T.dtype == found.nodes.dtype == F64


@each_model
@pytest.mark.filterwarnings("ignore:The extreme eigenvalues of .* groups missed tol")
def test_groups(name: str) -> None:
    """An eigenvalue below the rounding of its group's largest has no relative error to speak of."""
    H, dense, tol = case(name)
    found = hs.groups(H, probes=4, steps=4, max_products=24, tol=0.1)
    place = torch.arange(24)
    for g, part in enumerate(grouped(H.space, "block").values()):
        own = torch.cat([place[H.space.slices[n]] for n in part.names])
        exact = torch.linalg.eigvalsh(dense[own][:, own])
        close(found.extremes[g], exact[[-1, 0]], tol + float(found.residuals[g].max()))
        Z = torch.zeros(24, 4, dtype=F64)
        Z[own] = H.space.flatten(H.space.rademacher(0, [f"density/{p}" for p in range(4)])).double()[own]
        close(found.traces[g], (Z * (dense @ Z)).sum(0).mean(), 2 * tol)
