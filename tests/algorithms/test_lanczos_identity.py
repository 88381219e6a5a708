"""The Lanczos run is held to its defining identity, and its quadrature to the start vector's moments."""

from __future__ import annotations

import pytest
import torch

import hesscope as hs
from hesscope.algorithms.basis import Basis
from spectra import SPECTRA, Counted, generic, symmetric

F64 = torch.float64


@pytest.mark.parametrize("name", SPECTRA)
def test_identity_and_orthogonality(name: str) -> None:
    """A Q = Q T + beta q e_m^T with q a unit vector orthogonal to Q, and Q^T Q = I."""
    A = symmetric(SPECTRA[name])
    scale = float(torch.linalg.eigvalsh(A).abs().max()) or 1.0
    for steps in {1, min(2, len(A)), min(9, len(A)), len(A)}:
        run = hs.lanczos(hs.operator(A), steps, keep_basis=True)
        Q, m = run.basis, len(run.T)
        assert Q is not None
        assert Q.shape == (len(A), m)
        assert m <= steps
        torch.testing.assert_close(Q.T @ Q, torch.eye(m, dtype=F64), rtol=0, atol=1e-14 * len(A))
        left_over = A @ Q - Q @ run.T
        torch.testing.assert_close(left_over[:, :-1].norm(), torch.zeros((), dtype=F64), rtol=0, atol=2e-14 * scale)
        last = left_over[:, -1]
        torch.testing.assert_close(float(last.norm()), run.residual_norm, rtol=0, atol=2e-14 * scale)
        torch.testing.assert_close((Q.T @ last).norm(), torch.zeros((), dtype=F64), rtol=0, atol=2e-14 * scale)
        assert torch.equal(run.T, run.T.T)
        assert torch.equal(run.T, run.T.triu(-1).tril(1))


def test_orthogonality_survives_the_convergence_of_an_outlier() -> None:
    """Without reorthogonalisation the basis turns back towards the outlier as soon as it has converged."""
    A = symmetric([1e3, *torch.linspace(-1.0, 1.0, 299).tolist()])
    Q = hs.lanczos(hs.operator(A), 150, keep_basis=True).basis
    assert Q is not None
    torch.testing.assert_close(Q.T @ Q, torch.eye(150, dtype=F64), rtol=0, atol=1e-13)


def test_orthogonality_survives_products_with_noise_in_the_direction_of_the_basis() -> None:
    """What symmetry says is zero then is not: the pass against the whole basis finds more than rounding, and is repeated."""
    A, u = symmetric(torch.linspace(-1.0, 1.0, 100).tolist()), torch.linspace(1.0, 2.0, 100, dtype=F64)
    H = hs.operator(lambda V: A @ V + 1e3 * u[:, None] * V.sum(0), 100, dtype=F64)
    Q = hs.lanczos(H, 30, keep_basis=True).basis
    assert Q is not None
    torch.testing.assert_close(Q.T @ Q, torch.eye(30, dtype=F64), rtol=0, atol=1e-13)


def test_a_basis_that_has_to_grow_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    A = hs.operator(symmetric(SPECTRA["indefinite"]))
    expected = hs.lanczos(A, 20, keep_basis=True).basis
    monkeypatch.setattr("hesscope.algorithms.basis.available_bytes", lambda device: 0)
    grown: list[int] = []
    grow = Basis._grow
    monkeypatch.setattr(Basis, "_grow", lambda self, name: (grown.append(self.m), grow(self, name))[1])
    found = hs.lanczos(A, 20, keep_basis=True).basis
    assert grown == [8, 13]
    assert expected is not None
    assert found is not None
    assert torch.equal(found, expected)


def test_float32_identity() -> None:
    A = symmetric(SPECTRA["indefinite"]).float()
    run = hs.lanczos(hs.operator(A), 20, keep_basis=True)
    Q, scale = run.basis, float(A.norm())
    assert Q is not None
    assert (Q.dtype, run.T.dtype) == (torch.float32, F64)
    Q = Q.double()
    torch.testing.assert_close(Q.T @ Q, torch.eye(20, dtype=F64), rtol=0, atol=2e-6)
    assert float((A.double() @ Q - Q @ run.T)[:, :-1].norm()) < 3e-6 * scale


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_nodes_and_weights_reproduce_moments_up_to_degree_2m_minus_1(as_dictionary: bool) -> None:
    A, m = generic(50), 5
    start = torch.randn(50, generator=torch.Generator().manual_seed(3), dtype=F64)
    run = hs.lanczos(hs.operator(A), m, start={"x": start} if as_dictionary else start)
    s = start / start.norm()
    exact = [float(s @ torch.linalg.matrix_power(A, p) @ s) for p in range(2 * m + 1)]
    found = [float((run.weights * run.nodes**p).sum()) for p in range(2 * m + 1)]
    torch.testing.assert_close(found[: 2 * m], exact[: 2 * m], rtol=0, atol=1e-12)
    assert abs(found[2 * m] - exact[2 * m]) > 1e-3  # Gauss quadrature is not exact one degree further


def test_a_full_run_has_the_matrix_spectrum() -> None:
    A = symmetric(SPECTRA["clustered"])
    run = hs.lanczos(hs.operator(A), len(A))
    torch.testing.assert_close(run.nodes, torch.linalg.eigvalsh(A), rtol=0, atol=1e-13)
    torch.testing.assert_close(float(run.weights.sum()), 1.0)


def test_the_run_ends_with_its_krylov_space() -> None:
    A = symmetric(SPECTRA["repeated"])
    counted = Counted(A)
    run = hs.lanczos(counted.operator(), 15)
    torch.testing.assert_close(run.nodes, torch.tensor([-3.0, 0.0, 2.0, 5.0], dtype=F64), rtol=0, atol=1e-13)
    assert run.products == counted.columns == 4
    assert run.residual_norm == 0.0


def test_an_eigenvector_as_start_is_one_step() -> None:
    values, V = torch.linalg.eigh(generic(20))
    run = hs.lanczos(hs.operator(generic(20)), 10, start=V[:, 4])
    torch.testing.assert_close(run.nodes, values[4:5])


def test_the_basis_is_kept_only_on_request() -> None:
    run = hs.lanczos(hs.operator(generic(20)), 5)
    assert run.basis is None
    assert run.products == 5


def test_one_seed_one_run_and_a_drawn_seed_is_recorded() -> None:
    H = hs.operator(generic(20))
    drawn = hs.lanczos(H, 5, seed=None)
    assert torch.equal(drawn.T, hs.lanczos(H, 5, seed=drawn.seed).T)
    assert not torch.equal(drawn.T, hs.lanczos(H, 5, seed=drawn.seed + 1).T)


@pytest.mark.parametrize(
    ("steps", "start", "message"),
    [
        (0, None, "steps between 1 and 6"),
        (7, None, "steps between 1 and 6"),
        (3, torch.zeros(6), "other than zero"),
        (3, torch.full((6,), float("nan")), "finite entries"),
        (3, torch.ones(5), r"shape \[6\], got \[5\]"),
        (3, {"y": torch.ones(6)}, "names in space.names"),
        (3, {"x": torch.ones(2, 3)}, r"shape \[6\]"),
    ],
)
def test_impossible_requests_are_refused(steps: int, start: object, message: str) -> None:
    with pytest.raises(hs.HesscopeError, match=message):
        hs.lanczos(hs.operator(torch.eye(6)), steps, start=start)


# ---- without a basis


@pytest.mark.parametrize("name", SPECTRA)
def test_the_three_term_form_has_the_same_moments(name: str) -> None:
    H = hs.operator(symmetric(SPECTRA[name]))
    steps = min(5, H.shape[0])
    full, short = hs.lanczos(H, steps), hs.lanczos(H, steps, reorthogonalize=False)
    scale = float(full.nodes.abs().max()) or 1.0
    for p in range(5):
        moments = [float((run.weights * (run.nodes / scale) ** p).sum()) for run in (full, short)]
        assert moments[0] == pytest.approx(moments[1], abs=1e-10)


def test_copies_of_a_converged_eigenvalue_are_joined_and_keep_its_weight() -> None:
    """An outlier converges after a few steps; 150 steps then hold it many times over."""
    A = symmetric([1e3, *torch.linspace(-1.0, 1.0, 299).tolist()])
    full, short = hs.lanczos(hs.operator(A), 150), hs.lanczos(hs.operator(A), 150, reorthogonalize=False)
    assert int((torch.linalg.eigvalsh(short.T) > 999).sum()) > 3
    assert int((short.nodes > 999).sum()) == 1
    for run in (full, short):
        torch.testing.assert_close(float(run.weights.sum()), 1.0, rtol=1e-10, atol=0)
    torch.testing.assert_close(short.weights[-1], full.weights[-1], rtol=1e-8, atol=0)
    torch.testing.assert_close(short.nodes[-1], full.nodes[-1], rtol=1e-12, atol=0)


def test_the_three_term_form_has_no_basis_to_give() -> None:
    with pytest.raises(hs.HesscopeError, match="keep_basis"):
        hs.lanczos(hs.operator(torch.eye(5)), 2, reorthogonalize=False, keep_basis=True)
