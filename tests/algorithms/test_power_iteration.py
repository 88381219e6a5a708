"""Power iteration: plain, with momentum, and stochastic with an unbiased Rayleigh quotient."""

from __future__ import annotations

import warnings

import pytest
import torch
from test_eigs_spectra import check_pairs

import hesscope as hs
from hesscope.algorithms.power import momentum_for
from oracles import cross_entropy_hessian, jacobian
from spectra import SPECTRA, Counted, symmetric

F64 = torch.float64


@pytest.mark.parametrize("momentum", [0.0, "auto"])
@pytest.mark.parametrize("name", [name for name in SPECTRA if name != "clustered"])
def test_pairs_equal_eigh(name: str, momentum: float | str) -> None:
    A = symmetric(SPECTRA[name])
    exact = torch.linalg.eigvalsh(A)
    k = min(3, len(A))
    found = hs.eigs(hs.operator(A), k=k, tol=1e-6, method="power", momentum=momentum, max_products=6000)
    expected = exact[exact.abs().argsort(descending=True, stable=True)[:k]]
    scale = float(exact.abs().max())
    torch.testing.assert_close(found.eigenvalues, expected, rtol=0, atol=1e-6 * scale)
    assert found.converged
    assert found.method == "power"
    check_pairs(found, A, rounding=1e-12)


@pytest.mark.parametrize("momentum", [0.0, "auto"])
def test_pairs_of_a_cluster_are_as_near_as_their_residuals_say(momentum: float | str) -> None:
    """To tell eigenvalues a thousandth apart from one another would take ten thousand products."""
    A = symmetric(SPECTRA["clustered"])
    found = hs.eigs(hs.operator(A), k=3, tol=1e-3, method="power", momentum=momentum, max_products=3000)
    assert found.converged
    check_pairs(found, A, rounding=1e-12)
    gaps = (found.eigenvalues[:, None] - torch.linalg.eigvalsh(A)).abs().amin(1)
    assert bool((gaps <= found.residuals).all())
    assert bool((found.eigenvalues > 2.99).all())


def test_momentum_converges_at_the_root_of_the_gap() -> None:
    """lambda_2 / lambda_1 = 0.98: plain needs about log(1/tol) / 0.02 products, momentum log(1/tol) / sqrt(0.04)."""
    A = symmetric([1.0, *torch.linspace(-0.98, 0.98, 99).tolist()])
    spent = {
        momentum: hs.eigs(hs.operator(A), k=1, tol=1e-6, method="power", momentum=momentum, max_products=5000).products
        for momentum in (0.0, 0.98**2 / 4, "auto")
    }
    assert spent[0.98**2 / 4] < 0.25 * spent[0.0]
    assert spent["auto"] < 0.35 * spent[0.0]


def test_the_rate_tells_the_second_eigenvalue() -> None:
    """From rates that the recurrence has in closed form, whatever the momentum so far."""
    for second in (0.3, 0.9, 0.99):
        for beta in (0.0, 0.01, 0.2 * second**2):
            grown = [(x + (x * x - 4 * beta) ** 0.5) / 2 for x in (1.0, second)]
            assert momentum_for(1.0, grown[1] / grown[0], beta) == pytest.approx(second**2 / 4)
    assert momentum_for(1.0, 0.1, 0.2) == 0.2


def test_too_few_products_say_so_and_every_pair_has_its_residual() -> None:
    A = symmetric(torch.linspace(0.5, 1.0, 50))
    counted = Counted(A)
    with pytest.warns(hs.HesscopeWarning, match="missed tol"):
        found = hs.eigs(counted.operator(), k=3, tol=1e-8, method="power", max_products=40)
    assert found.products == 40 == counted.columns
    check_pairs(found, A, rounding=1e-12)


def test_earlier_vectors_save_products() -> None:
    A = symmetric([3.0, 2.0, 1.5, *torch.linspace(-1.0, 1.0, 60).tolist()])
    earlier = hs.eigs(hs.operator(A), k=3, tol=1e-4)
    warm = hs.eigs(hs.operator(A), k=3, method="power", start=earlier)
    assert warm.products == 3


# ---- stochastic


def ragged() -> hs.Problem:
    """Classification in batches of 2 to 9 examples."""
    g = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(5, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 5, generator=g, dtype=F64))
    sizes = (2, 9, 4, 7, 3, 5, 8, 6)
    batches = [(torch.randn(m, 5, generator=g, dtype=F64), torch.randint(3, (m,), generator=g)) for m in sizes]
    return hs.supervised(model, batches)


def dense(problem: hs.Problem) -> torch.Tensor:
    inputs = torch.cat([x for x, _ in problem.batches])
    return cross_entropy_hessian(inputs, inputs @ next(problem.model.parameters()).detach().T)


def test_resampled_products_are_unbiased_and_all_batches_are_the_whole() -> None:
    H = hs.hessian(ragged())
    v = torch.randn(15, generator=torch.Generator().manual_seed(1), dtype=F64)
    whole = H @ v
    torch.testing.assert_close(H.sampled(8, 0, 0) @ v, whole)
    each = torch.stack([H.sampled(3, 0, draw) @ v for draw in range(600)])
    z = (each.mean(0) - whole) / (each.std(0) / 600**0.5)
    assert float(z.abs().max()) < 4
    assert float(each.std(0).min()) > 0
    assert torch.equal(H.sampled(3, 0, 7) @ v, each[7])


def test_cost_is_the_share_of_the_batches() -> None:
    H = hs.hessian(ragged(), graph_memory=0)
    H.sampled(1, 0, 0) @ torch.ones(15, dtype=F64)
    assert H.products == 1
    assert 0 < H.units < 0.25 * 9


@pytest.mark.slow
def test_the_stochastic_quotient_is_unbiased_with_a_true_error() -> None:
    """Over 300 seeds: the stated value against v^T H v of the vector that was found, its error against the spread."""
    problem = ragged()
    A = dense(problem)
    H = hs.hessian(problem)
    gaps, errors, covered = [], [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hs.HesscopeWarning)
        for seed in range(300):
            found = hs.eigs(H, k=1, method="power", batches=3, max_products=25, seed=seed)
            v = found.eigenvectors[:, 0]
            gaps.append(float(found.eigenvalues[0]) - float(v @ A @ v))
            errors.append(float(found.eigenvalue_standard_error[0]))
            low, high = found.interval()
            covered += float(low[0]) <= float(v @ A @ v) <= float(high[0])
    x, e = torch.tensor(gaps), torch.tensor(errors)
    assert abs(float(x.mean() / (x.std() / 300**0.5))) < 4
    assert float(e.square().mean() / x.var()) == pytest.approx(1, abs=0.3)
    assert covered >= 0.88 * 300  # five quotients a run, skewed: measured 93%


def network() -> tuple[hs.Problem, torch.Tensor]:
    """A classifier with curvature beyond its GGN, in ragged batches, and the GGN written down."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()
    batches = [
        (torch.randn(m, 3, generator=g, dtype=F64), torch.randint(3, (m,), generator=g)) for m in (2, 9, 4, 7, 3)
    ]
    z = model(torch.cat([x for x, _ in batches]))
    parameters = list(model.parameters())
    J = jacobian(z, parameters, [(i, j) for i, p in enumerate(parameters) for j in range(p.numel())])
    p = z.detach().softmax(-1)
    H_out = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return hs.supervised(model, batches), torch.einsum("bvi,bvw,bwj->ij", J, H_out, J) / len(z)


@pytest.mark.slow
def test_several_stochastic_pairs_of_a_ggn() -> None:
    """Over 30 seeds: each stated value against v^T G v, and the leading directions hold most of what there is."""
    problem, dense_ggn = network()
    G, best = hs.ggn(problem), torch.linalg.eigvalsh(dense_ggn).flip(0)[:2]
    gaps, errors, quotients = [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hs.HesscopeWarning)
        for seed in range(30):
            found = hs.eigs(G, k=2, method="power", batches=4, max_products=50, seed=seed)
            V = found.eigenvectors
            own = (V * (dense_ggn @ V)).sum(0)
            torch.testing.assert_close(V.T @ V, torch.eye(2, dtype=F64), rtol=0, atol=1e-10)
            gaps.append(found.eigenvalues - own)
            errors.append(found.eigenvalue_standard_error)
            quotients.append(own.sort(descending=True).values)
    x, e = torch.stack(gaps), torch.stack(errors)
    assert float((x.mean(0) / (x.std(0) / 30**0.5)).abs().max()) < 4
    assert 0.6 < float(e.square().mean() / x.square().mean()) < 1.6
    shares = torch.stack(quotients).mean(0) / best
    assert bool((shares > 0.85).all()), shares


def test_the_stochastic_form_finds_the_leading_direction() -> None:
    problem = ragged()
    A = dense(problem)
    exact = torch.linalg.eigvalsh(A)[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hs.HesscopeWarning)
        for momentum in (0.0, 0.002):
            found = hs.eigs(
                hs.hessian(problem), k=1, method="power", batches=6, momentum=momentum, max_products=200, tol=0.1
            )
            v = found.eigenvectors[:, 0]
            assert float(v @ A @ v) > 0.85 * float(exact)
            assert abs(float(found.eigenvalues[0] - exact)) < 0.15 * float(exact)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": 9}, "batches between 1 and 8"),
        ({"batches": 2, "momentum": "auto"}, "momentum to be a number"),
        ({"momentum": float("inf")}, "'auto' or a number"),
        ({"batches": 2, "max_products": 11, "k": 2}, "max_products of at least 12"),
        ({"max_basis": 4}, "method='power', which keeps no basis"),
        ({"basis_device": "abacus"}, "method='power', which keeps no basis"),
        ({"basis_folder": "anywhere"}, "method='power', which keeps no basis"),
        ({"basis_dtype": "float16"}, "method='power', which keeps no basis"),
    ],
)
def test_impossible_requests_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(hs.HesscopeError, match=message):
        hs.eigs(hs.hessian(ragged()), **{"k": 1, "method": "power", **arguments})
