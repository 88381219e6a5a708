"""Quadrature without a basis, where rounding brings copies of nodes back: held to dense float64 matrices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import hesscope as hs
from hesscope.algorithms import three_term
from spectra import symmetric

F64 = torch.float64
Function = Callable[[Tensor], Tensor]


def line(low: float, high: float, count: int) -> list[float]:
    return torch.linspace(low, high, count, dtype=F64).tolist()


SPECTRA = {
    "one huge outlier": [1000.0, *line(-0.5, 0.5, 299)],
    "outliers at both ends": [1000.0, 10.0, -5.0, *line(-0.5, 0.5, 297)],
    "four outliers": [100.0, 80.0, 60.0, -40.0, *line(-1.0, 1.0, 296)],
    "clusters": [*line(100.0, 100.01, 9), *line(10.0, 10.01, 12), *line(-20.0, -19.99, 9), *line(0.0, 1.0, 200)],
    "repeated, and zero": [100.0] * 3 + [10.0] * 5 + [1.0] * 20 + [0.0] * 272,
    "low rank": [1000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0] + [0.0] * 293,
    "decaying": torch.logspace(-1, 3, 300, dtype=F64).tolist(),
}


def in_float32(values: list[float]) -> tuple[hs.Operator, Tensor]:
    A = symmetric(values).float()
    return hs.operator(A), A.double()


def in_bfloat16(values: list[float]) -> tuple[hs.Operator, Tensor]:
    """A product as of a model in bfloat16: parameters and outcome are rounded, the vectors are not."""
    A = symmetric(values).bfloat16()
    return hs.operator(lambda X: (A.float() @ X).bfloat16().float(), size=len(A), dtype=torch.bfloat16), A.double()


def of_probes(A: Tensor, H: hs.Operator, probes: int) -> Callable[[Function], float]:
    """The mean of z^T f(A) z over the density's own sign vectors, from the eigenvalues of the dense matrix."""
    values, V = torch.linalg.eigh(A)
    Z = torch.cat([H.space.flatten(H.space.rademacher(0, [f"density/{p}"])).reshape(-1, 1) for p in range(probes)], 1)
    shares = (V.T @ Z.double()).square().mean(1)
    return lambda f: float((shares * f(values)).sum())


def numbers(mean: Callable[[Function], float], n: int) -> dict[str, float]:
    """What a density derives from its nodes."""
    total, square = mean(torch.abs), mean(torch.square)
    entropy = -mean(lambda t: torch.special.xlogy(t.abs(), t.abs())) / total + torch.tensor(total).log()
    return {
        "trace": mean(lambda t: t),
        "Frobenius norm": square**0.5,
        "log-determinant": mean(lambda t: (t.abs() + 1).log()),
        "participation": total**2 / square,
        "entropy": float(entropy.exp()),
        **{f"moment {p}": mean(lambda t, p=p: t**p) / n for p in (3, 4)},  # type: ignore[misc]
    }


def read(found: hs.results.Density) -> dict[str, float]:
    return {
        "trace": found.trace[0],
        "Frobenius norm": found.frobenius_norm[0],
        "log-determinant": found.log_determinant(1.0)[0],
        "participation": found.effective_rank()[0],
        "entropy": found.effective_rank("entropy")[0],
        **{f"moment {p}": float(found.moments[p - 1]) for p in (3, 4)},
    }


@pytest.mark.parametrize("name", SPECTRA)
def test_float32_densities_are_those_of_the_matrix(name: str) -> None:
    H, A = in_float32(SPECTRA[name])
    found = hs.density(H, probes=2, steps=45, basis=False)
    assert read(found) == pytest.approx(numbers(of_probes(A, H, 2), len(A)), rel=5e-3)
    whole = read(hs.density(H, probes=2, steps=45))
    assert {key: read(found)[key] for key in whole if key[0] in "tFm"} == pytest.approx(
        {key: whole[key] for key in whole if key[0] in "tFm"}, rel=1e-5
    )


@pytest.mark.parametrize("name", SPECTRA)
def test_bfloat16_densities_are_as_good_as_with_a_basis(name: str) -> None:
    """Rounded products blur what is smaller than a rounding of the largest eigenvalue; what weighs is right."""
    H, A = in_bfloat16(SPECTRA[name])
    found, exact = read(hs.density(H, probes=2, steps=45, basis=False)), numbers(of_probes(A, H, 2), len(A))
    whole = read(hs.density(H, probes=2, steps=45))
    for key, value in exact.items():
        rounding = 0.01 * abs(value)
        assert abs(found[key] - value) <= rounding + 2 * abs(whole[key] - value), key


OUTLIERS: dict[str, tuple[list[float], list[float], float]] = {
    "one huge outlier": ([1000.0], [], 0.5),
    "outliers at both ends": ([1000.0, 10.0], [-5.0], 0.5),
    "four outliers": ([100.0, 80.0, 60.0], [-40.0], 1.0),
}


@pytest.mark.parametrize("steps", [30, 45])
@pytest.mark.parametrize("name", OUTLIERS)
def test_outliers_are_counted_once_and_stand_apart_from_the_bulk(name: str, steps: int) -> None:
    """Whatever else stands out is an end of the bulk, on which the probes happen to agree."""
    above, below, edge = OUTLIERS[name]
    found = hs.density(in_float32(SPECTRA[name])[0], probes=4, steps=steps, basis=False)
    values = [o.value for side in found.outliers() for o in side]
    assert sorted(v for v in values if abs(v) > 1.02 * edge) == pytest.approx(sorted(above + below), abs=1e-3)
    low, high, _ = found.bulk()
    # Rounding of the outliers perturbs what is a hundredth of them, and less.
    assert 0.95 * edge < -low < 1.02 * edge
    assert 0.95 * edge < high < 1.02 * edge


@pytest.mark.parametrize("name", ["one huge outlier", "four outliers"])
def test_bfloat16_outliers_are_counted_once(name: str) -> None:
    """The eigenvalues -5 and 10 beside 1000 would be of the size of its rounding."""
    above, below, edge = OUTLIERS[name]
    found = hs.density(in_bfloat16(SPECTRA[name])[0], probes=4, steps=45, basis=False)
    values = [o.value for side in found.outliers() for o in side]
    rounding = 2**-7 * above[0]
    assert sorted(v for v in values if abs(v) > edge + rounding) == pytest.approx(sorted(above + below), abs=rounding)
    low, high, _ = found.bulk()
    assert -edge - rounding <= low < 0 < high <= edge + rounding


@pytest.mark.parametrize("steps", [20, 100])
@pytest.mark.parametrize("name", SPECTRA)
def test_joining_copies_leaves_every_sum_over_nodes(name: str, steps: int) -> None:
    H, _ = in_float32(SPECTRA[name])
    run = hs.lanczos(H, steps, reorthogonalize=False)
    nodes, S = torch.linalg.eigh(run.T)
    weights, scale = S[0] ** 2, float(nodes.abs().max())
    assert float(run.weights.sum()) == pytest.approx(1.0, abs=1e-12)
    assert len(run.nodes) < steps or steps == 20
    for f, unit in ((lambda t: t, scale), (torch.square, scale**2), (torch.abs, scale), (lambda t: (t.abs() + 1e-2).log(), 1.0)):  # fmt: skip
        assert float((run.weights * f(run.nodes)).sum()) == pytest.approx(float((weights * f(nodes)).sum()), abs=1e-5 * unit)  # fmt: skip


def test_nodes_that_are_near_but_distinct_are_not_copies_of_one() -> None:
    """Three hundred eigenvalues within a hundredth of the largest; each node lies near the next."""
    run = hs.lanczos(in_float32(line(0.99, 1.0, 300))[0], 60, reorthogonalize=False)
    assert len(run.nodes) > 45
    assert float(run.nodes.max() - run.nodes.min()) > 0.0099


def test_copies_do_not_chain_and_zero_is_not_joined_with_what_is_near() -> None:
    nodes = torch.tensor([-0.004, 0.0, 0.005, 1.0, 1.008, 1.016, 1.03, 1.4], dtype=F64)
    weights = torch.tensor([0.1, 0.2, 0.1, 0.1, 0.3, 0.1, 0.1 - 1e-9, 1e-9], dtype=F64)
    found, load = three_term.joined(nodes, weights, 0.01)
    torch.testing.assert_close(found, torch.tensor([-0.004, 0.0, 0.005, 1.008, 1.03], dtype=F64), rtol=1e-8, atol=0)
    torch.testing.assert_close(load, torch.tensor([0.1, 0.2, 0.1, 0.5, 0.1], dtype=F64), rtol=1e-8, atol=0)
