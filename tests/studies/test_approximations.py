"""Approximations held to an exact block: each measure by hand, what exists for which selection, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.studies.approximations import compare
from oracles import relative

F64 = torch.float64
CORNER = "*.{}.mlp.*_proj.weight[0:2, 0:2]"


def problem() -> hs.Problem:
    return hs.causal_lm(tiny("llama"), ragged_batches())


def two_blocks(of: hs.Problem) -> hs.Space:
    return hs.select(of, CORNER.format(0), CORNER.format(1))


def classifier() -> hs.Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    g = torch.Generator().manual_seed(2)
    return hs.supervised(
        model, [(torch.randn(n, 3, generator=g, dtype=F64), torch.randint(3, (n,), generator=g)) for n in (2, 7)]
    )


def test_measures() -> None:
    A = torch.tensor([[3.0, 1.0], [1.0, -2.0]], dtype=F64)
    M = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=F64)
    found = compare(A, M)
    c = (3 * 2 - 2 * 1) / 5
    assert found["kept"] == pytest.approx((9 + 4) / 15)
    assert found["errors"] == pytest.approx(math.sqrt((1 + 1 + 1 + 9) / 15))
    assert found["scales"] == pytest.approx(c)
    assert found["scaled_errors"] == pytest.approx(float((c * M - A).norm() / A.norm()))
    assert found["cosines"] == pytest.approx(4 / math.sqrt(15 * 5))
    assert found["scaled_errors"] == pytest.approx(math.sqrt(1 - found["cosines"] ** 2))
    assert found["diagonal_errors"] == pytest.approx(math.sqrt(10 / 13))


@pytest.mark.parametrize("A", [torch.zeros(3, 3), torch.eye(3)])
def test_nothing_to_approximate_and_nothing_to_do_it_with(A: Tensor) -> None:
    found = compare(A, torch.zeros(3, 3))
    missing = 1.0 if A.any() else 0.0
    assert (found["errors"], found["scaled_errors"], found["diagonal_errors"]) == (missing,) * 3
    assert (found["scales"], found["cosines"]) == (0.0, 0.0)


def test_parts_of_the_block_itself() -> None:
    of = problem()
    H = hs.hessian(of, two_blocks(of))
    block = hs.block(H)
    A, n = block.matrix, len(block.labels)
    found = hs.approximations(H, kinds=["diagonal", "rows", "layers", "blocks"], exact=block)
    assert found.products == block.products
    sizes = {"diagonal": 1, "rows": 2, "layers": 4, "blocks": 12}
    for name, size in sizes.items():
        part = torch.block_diag(*(A[i : i + size, i : i + size] for i in range(0, n, size)))
        assert torch.equal(found.matrix(name), part)
        of_part = found.row(name)
        assert of_part["errors"] == pytest.approx(relative(part, A))
        assert of_part["kept"] == pytest.approx(1 - relative(part, A) ** 2)
        assert (of_part["scales"], of_part["diagonal_errors"]) == (pytest.approx(1.0), 0.0)
        assert of_part["numbers"] == n * size
        assert (of_part["forward_passes"], of_part["own_seconds"]) == (block.units, block.seconds)
    shares = hs.structure(block).shares
    assert [found.row(name)["kept"] for name in sizes] == pytest.approx(shares.cumsum(0)[:4].tolist())


def test_operators_beside_the_block() -> None:
    of = problem()
    space = two_blocks(of)
    H = hs.hessian(of, space)
    found = hs.approximations(H, kinds=["ggn", "fisher", "kfac", "ekfac"], samples=2, seed=5, per="sequence")
    A = hs.block(H).matrix
    expected = {
        "ggn": hs.ggn(of, space),
        "fisher": hs.fisher(of, space, samples=2, seed=5, per="sequence"),
        "kfac": hs.kfac(of, space, samples=2, seed=5),
        "ekfac": hs.kfac(of, space, corrected=True, samples=2, seed=5, per="sequence"),
    }
    for name, M in expected.items():
        assert relative(found.matrix(name), M.to_dense()) < 1e-6
        assert found.row(name)["errors"] == pytest.approx(relative(M.to_dense(), A), rel=1e-6)
    assert found.row("ggn")["numbers"] == space.size**2
    corner = 2 * 2 + 2 * 2
    assert found.row("kfac")["numbers"] == 6 * corner
    assert found.row("kfac")["forward_passes"] == pytest.approx(1 + 2 * 2)
    assert found.row("ekfac")["forward_passes"] == pytest.approx(2 * (1 + 2 * 2))
    assert found.units == pytest.approx(found.exact_units + float(found.forward_passes.sum()))


def test_a_fisher_matrix_of_one_term_is_its_own_kfac() -> None:
    of = hs.supervised(nn.Linear(3, 4, bias=False).double(), [(torch.ones(1, 3, dtype=F64), torch.tensor([2]))])
    found = hs.approximations(hs.fisher(of), kinds=["kfac", "ekfac"])
    assert float(found.errors.max()) < 1e-12
    assert found.cosines.tolist() == pytest.approx([1.0, 1.0])


def test_the_corrected_form_is_never_worse() -> None:
    of = classifier()
    for seed in range(3):
        found = hs.approximations(hs.fisher(of, seed=seed), kinds=["kfac", "ekfac"], seed=seed)
        kfac, ekfac = found.errors.tolist()
        assert ekfac < kfac


def test_by_default_what_exists() -> None:
    of = problem()
    found = hs.approximations(hs.hessian(of, two_blocks(of)))
    assert found.names == ["diagonal", "rows", "layers", "blocks", "ggn", "kfac", "ekfac"]
    assert found.skipped == {}
    one = hs.approximations(hs.ggn(of, hs.select(of, "*.0.mlp.up_proj.weight[0, :3]")))
    assert one.names == ["diagonal", "kfac", "ekfac"]
    assert {"rows", "layers", "blocks", "Gauss-Newton"} == set(one.skipped)
    norms = hs.approximations(hs.hessian(of, hs.select(of, "*norm.weight[0:2]")))
    assert "ggn" in norms.names
    assert "select the linear layers' weights alone" in norms.skipped["K-FAC"]
    assert "K-FAC left out: Expected weights of linear layers" in norms.summary()
    matrix = hs.approximations(hs.operator(torch.eye(2)))
    assert matrix.names == ["diagonal"]
    assert "K-FAC" in matrix.skipped


def test_others_by_name() -> None:
    A = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    H = hs.operator(A)
    found = hs.approximations(H, kinds=[], others={"twice": 2.0 * H})
    assert found.row("twice")["errors"] == pytest.approx(1.0)
    assert found.row("twice")["scales"] == pytest.approx(0.5)
    assert found.row("twice")["scaled_errors"] == pytest.approx(0.0, abs=1e-12)
    assert found.titles == ["twice"]
    with pytest.raises(hs.HesscopeError, match="'small' to be an operator on the same selection"):
        hs.approximations(H, others={"small": hs.operator(torch.eye(3))})


def single() -> hs.Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False))
    return hs.supervised(model, [(torch.ones(2, 3), torch.tensor([0, 2]))])


#: {what differs: (the operator, another on the same weights)}
OTHERS: dict[str, Callable[[hs.Problem], tuple[hs.Operator, hs.Operator]]] = {
    "operator ggn": lambda of: (hs.hessian(of), hs.ggn(of)),
    "seed 5": lambda of: (hs.fisher(of), hs.fisher(of, seed=5)),
    "per sequence": lambda of: (hs.fisher(of), hs.fisher(of, per="sequence")),
    "samples 2": lambda of: (hs.kfac(of), hs.kfac(of, samples=2)),
    "factor 2.0": lambda of: (hs.hessian(of), 2.0 * hs.hessian(of)),
    "rank-one": lambda of: (hs.hessian(of), hs.hessian(of).updated(torch.ones(24))),
    "precision bfloat16": lambda of: (hs.hessian(of), hs.hessian(of, precision="bfloat16")),
}


@pytest.mark.parametrize("what", OTHERS)
def test_the_block_of_another_operator_is_no_truth(what: str, tmp_path: Path) -> None:
    H, other = OTHERS[what](single())
    hs.block(other).save(tmp_path)
    for block in (hs.block(other), hs.load(tmp_path)):
        with pytest.raises(hs.HesscopeError, match="exact block of this operator") as error:
            hs.approximations(H, kinds=["diagonal"], exact=block)
        assert what in str(error.value)


def test_another_matrix_is_no_truth() -> None:
    H, other = hs.operator(torch.eye(2)), hs.operator(torch.diag(torch.tensor([1.0, 2.0])))
    with pytest.raises(hs.HesscopeError, match="exact block of this operator"):
        hs.approximations(H, kinds=["diagonal"], exact=hs.block(other))


def test_a_block_may_come_by_any_way_that_gives_the_same_matrix() -> None:
    of = classifier()
    part = hs.select(of, {"0.weight": [0, 3, 5]})
    H = hs.hessian(of, part)
    ways = [
        H,
        hs.hessian(of, part, engine="finite-difference"),
        hs.hessian(of, part, microbatch=1),
        hs.hessian(of).restricted_to(part),
    ]
    for way in ways:
        found = hs.approximations(H, kinds=["diagonal"], exact=hs.block(way))
        assert found.exact.equal(hs.block(way).matrix)


def test_refusals() -> None:
    of = problem()
    H = hs.hessian(of, two_blocks(of))
    with pytest.raises(hs.HesscopeError, match="got 'shampoo'"):
        hs.approximations(H, kinds=["shampoo"])
    with pytest.raises(hs.HesscopeError, match="at least one approximation"):
        hs.approximations(H, kinds=[])
    with pytest.raises(hs.HesscopeError, match="an operator of a problem"):
        hs.approximations(hs.operator(torch.eye(2)), kinds=["kfac"])
    with pytest.raises(hs.HesscopeError, match="use the same selection"):
        hs.approximations(H, exact=hs.block(hs.operator(torch.eye(2))))
    other = hs.causal_lm(tiny("llama", seed=1), ragged_batches())
    with pytest.raises(hs.HesscopeError, match="is of another: fingerprint"):
        hs.approximations(H, exact=hs.block(hs.hessian(other, two_blocks(other))))


def test_the_summary_is_a_table(tmp_path: Path) -> None:
    of = classifier()
    found = hs.approximations(hs.hessian(of))
    lines = found.summary().splitlines()
    assert lines[0].startswith("approximations of an exact block 24 x 24; ")
    assert [line.split()[0] for line in lines[2 : 3 + len(found.names)]] == ["exact", *found.titles]
    assert len({len(line) for line in lines[1 : 3 + len(found.names)]}) == 1
    assert hs.load(found.save(tmp_path / "run")).summary() == found.summary()
