"""A broken operator is refused before a long run, a good one is not, and a product that is not finite never passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hesscope as hs
from hesscope.algorithms.probing import probe, tolerated
from spectra import Counted, generic, noisy, symmetric

Product = Callable[[Tensor], Tensor]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32", "bfloat16"])


def function(product: Product, size: int, dtype: torch.dtype = torch.float64) -> hs.Operator:
    return hs.operator(product, size=size, dtype=dtype)


def vector_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def random_numbers(A: Tensor, level: float) -> Product:
    g = torch.Generator().manual_seed(0)
    return lambda X: A @ X * (1 + level * torch.randn(X.shape, generator=g, dtype=X.dtype))


@every_dtype
@pytest.mark.parametrize("n", [120, 3000])
def test_products_that_change_are_refused(dtype: torch.dtype, n: int) -> None:
    A = torch.diag(torch.linspace(-1, 2, n, dtype=vector_dtype(dtype)))
    with pytest.raises(hs.HesscopeError, match="draws random numbers or changes state"):
        probe(function(random_numbers(A, 0.3), n, dtype))


@every_dtype
@pytest.mark.parametrize("n", [120, 3000])
def test_a_map_without_symmetry_is_refused_at_any_size(dtype: torch.dtype, n: int) -> None:
    """Relative to |u| |Hv| its asymmetry would be sqrt(2 / n) and pass for rounding in a large enough space."""
    B = torch.randn(n, n, generator=torch.Generator().manual_seed(1), dtype=vector_dtype(dtype))
    with pytest.raises(hs.HesscopeError, match="second derivative is wrong"):
        probe(function(lambda X: B @ X, n, dtype))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float64", "float32"])
def test_an_error_of_two_percent_in_some_rows_is_refused(dtype: torch.dtype) -> None:
    """By most pairs of vectors: <u, Hv> - <v, Hu> is a normal number of deviation 0.01 |Hv| and may come out small."""
    A = generic(400).to(dtype)
    A[:80] *= 1.02

    def refused(seed: int) -> bool:
        try:
            probe(function(lambda X: A @ X, 400, dtype), seed)
        except hs.HesscopeError as error:
            return "second derivative is wrong" in str(error)
        return False

    assert sum(map(refused, range(20))) >= 15


@every_dtype
def test_good_operators_pass(dtype: torch.dtype) -> None:
    A = generic(500).to(vector_dtype(dtype))
    found = probe(function(lambda X: A @ X, 500, dtype))
    assert found["repeatability"] == 0.0
    assert found["symmetry"] < 100 * torch.finfo(vector_dtype(dtype)).eps


def test_rounding_inside_the_products_passes() -> None:
    A = generic(500)
    probe(function(noisy(Counted(A), bits=20), 500))  # float64 parameters, float32 inside
    probe(function(lambda X: (A.bfloat16() @ X.bfloat16()).float(), 500, torch.bfloat16))


def test_a_float64_model_that_casts_to_float32_passes() -> None:
    """Every RMSNorm of the Llama family does."""
    torch.manual_seed(0)

    class Casting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = torch.nn.Linear(12, 16), torch.nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.inner(x).float()
            return self.outer(torch.tanh(h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).double())

    x, y = torch.randn(9, 12, dtype=torch.float64), torch.arange(9) % 5
    problem = hs.supervised(Casting().double(), [(x[:2], y[:2]), (x[2:], y[2:])])
    for engine in ("auto", "finite-difference"):
        found = hs.trace(hs.hessian(problem, engine=engine), method="hutchinson", budget=100)
        assert found.provenance["probe"]["symmetry"] > 1e-12  # which the rounding of float64 would not allow


@every_dtype
def test_limits_stay_below_what_any_broken_operator_shows(dtype: torch.dtype) -> None:
    H = function(lambda X: X, 10, dtype)
    assert 1000 * torch.finfo(torch.float32).eps <= tolerated(H) <= 0.2


def test_a_zero_operator_passes() -> None:
    assert probe(function(torch.zeros_like, 10)) == {"symmetry": 0.0, "repeatability": 0.0}


# ---- when it is asked


RUNS: dict[str, Callable[[hs.Operator], Any]] = {
    "block": hs.block,
    "diagonal": lambda H: hs.diagonal(H, method="hutchinson", budget=100),
    "trace": lambda H: hs.trace(H, method="hutchinson", budget=100),
    "eigs": lambda H: hs.eigs(H, k=1),
    "density": lambda H: hs.density(H, probes=10, steps=10),
    "lanczos": lambda H: hs.lanczos(H, 100),
}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS.keys())


@every_run
def test_every_long_run_asks_first(run: Callable[[hs.Operator], Any]) -> None:
    counted = Counted(torch.randn(120, 120, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    with pytest.raises(hs.HesscopeError, match="second derivative is wrong"):
        run(counted.operator())
    assert counted.columns == 3


def test_a_short_run_does_not() -> None:
    counted = Counted(symmetric(range(1, 31)))
    assert hs.trace(counted.operator(), method="hutchinson", budget=20).provenance["probe"] is None
    assert counted.columns == 20


SHORT_RUNS: dict[str, Callable[[hs.Operator], Any]] = {
    "block": hs.block,
    "diagonal": lambda H: hs.diagonal(H, method="hutchinson", budget=5),
    "exact diagonal": lambda H: hs.diagonal(H, method="exact"),
    "trace": lambda H: hs.trace(H, method="hutchinson", budget=5),
    "exact trace": lambda H: hs.trace(H, method="exact"),
    "eigs": lambda H: hs.eigs(H, k=1),
    "density": lambda H: hs.density(H, probes=2, steps=3),
    "lanczos": lambda H: hs.lanczos(H, 3),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [10, 120])
@pytest.mark.parametrize("run", SHORT_RUNS.values(), ids=SHORT_RUNS.keys())
def test_products_that_are_not_finite_are_refused(run: Callable[[hs.Operator], Any], size: int, value: float) -> None:
    def product(X: Tensor) -> Tensor:
        Y = X.clone()
        Y[-1] = value
        return Y

    with pytest.raises(hs.HesscopeError, match="not finite in x"):
        run(function(product, size))
