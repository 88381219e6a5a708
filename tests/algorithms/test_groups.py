"""Groups of parameters, held to a dense Hessian in float64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
import oracles
from architectures import ragged_batches, tiny
from hesscope.algorithms import checkpoint, driver
from hesscope.algorithms.cross_norms import CrossNorms
from hesscope.algorithms.grouping import grouped
from hesscope.communicator import Alone
from hesscope.operators.product_error import stated_errors

LLAMA_BLOCK = {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
LLAMA_BLOCK |= {"input_layernorm", "post_attention_layernorm"}
GPT2_BLOCK = {"ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"}
#: {architecture: layers of a block, what is outside the blocks; the tied output projection goes by the embedding's name}
NAMED = {
    "llama": (LLAMA_BLOCK, ["model.embed_tokens", "model.norm"]),
    "gpt2": (GPT2_BLOCK, ["transformer.wte", "transformer.wpe", "transformer.ln_f"]),
}


@pytest.mark.parametrize("name", NAMED)
def test_every_parameter_is_in_one_group_that_is_named_after_its_place(name: str) -> None:
    layers, outside = NAMED[name]
    model = tiny(name)
    space = hs.select(model)
    found = {by: grouped(space, by) for by in ("block", "layer", "kind")}
    assert set(found["block"]) == {"block 0", "block 1", *outside}
    assert set(found["layer"]) == {f"{b}.{layer}" for b in (0, 1) for layer in layers} | set(outside)
    assert set(found["kind"]) == layers | set(outside)
    for groups in found.values():
        names = [c.name for part in groups.values() for c in part.coordinates]
        assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    own = grouped(space, lambda n: "weights" if n.endswith("weight") else "biases")
    assert sum(part.size for part in own.values()) == space.size


def test_a_weight_and_its_bias_are_one_layer() -> None:
    found = grouped(hs.select(tiny("gpt2")), "layer")
    assert [c.name for c in found["1.mlp.c_fc"].coordinates] == [f"transformer.h.1.mlp.c_fc.{x}" for x in ("weight", "bias")]  # fmt: skip


def test_a_name_inside_and_outside_the_blocks_is_two_groups() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
    model.register_parameter("0", nn.Parameter(torch.ones(2)))
    assert set(grouped(hs.select(model), "kind")) == {"0", "0 (outside blocks)"}


# ---- against a dense Hessian


def language_model(name: str, count: int = 90) -> tuple[hs.Operator, Tensor, list[Tensor]]:
    """A Hessian over entries of all parameters, the same by the oracle, and the places of each block's."""
    model = tiny(name)
    problem = hs.causal_lm(model, ragged_batches())
    space = hs.select(problem, random=count, seed=3)
    dense = oracles.causal_lm(model, ragged_batches(), space).hessian
    place = torch.arange(count)
    parts = grouped(space, "block").values()
    return hs.hessian(problem, space), dense, [torch.cat([place[space.slices[n]] for n in s.names]) for s in parts]


#: Llama's RMSNorm casts to float32.
TOLERANCE = {"llama": 1e-6, "gpt2": 1e-10}


@pytest.mark.parametrize("name", NAMED)
def test_every_number_of_every_group_is_that_of_the_dense_hessian(name: str) -> None:
    H, dense, places = language_model(name)
    found = hs.groups(H, probes=3, steps=40, max_products=100, tol=1e-6)
    tol = TOLERANCE[name] * float(dense.norm())
    assert found.sizes == [len(p) for p in places]
    assert all(found.converged)
    for g, own in enumerate(places):
        values = torch.linalg.eigvalsh(dense[own][:, own])
        assert found.largest[g] == pytest.approx(float(values[-1]), abs=tol)
        assert found.smallest[g] == pytest.approx(float(values[0]), abs=tol)
        assert float(found.residuals[g].max()) <= 1e-6 * float(found.extremes[g].abs().max()) + tol
        parts = [H.space.rademacher(0, [f"density/{p}"]) for p in range(3)]
        Z = torch.cat([H.space.flatten(z) for z in parts], 1)
        z = torch.zeros_like(Z).index_copy(0, own, Z[own])
        Az = dense @ z
        assert found.traces[g] == pytest.approx(float((z * Az).sum(0).mean()), abs=10 * tol)
        squares = torch.stack([Az[other].square().sum(0) for other in places])
        torch.testing.assert_close(found.squares[:, g], squares.mean(1), rtol=1e-4, atol=tol**2)
        error = squares.std(1) / 3**0.5
        torch.testing.assert_close(found.squares_standard_error[:, g], error, rtol=1e-3, atol=10 * tol**2)


def test_the_density_of_a_group_speaks_of_the_same_vectors() -> None:
    H, _, places = language_model("gpt2")
    found = hs.groups(H, probes=3, steps=12, max_products=2, tol=10.0)
    for g, name in enumerate(found.names):
        density = found.density(name)
        assert density.size == len(places[g])
        assert density.trace == pytest.approx((float(found.traces[g]), float(found.trace_standard_errors[g])), abs=1e-9)
        if density.size > 1:  # (1/n) |A z|^2 is the second moment
            assert density.size * float(density.moments[1]) == pytest.approx(float(found.squares[g, g]), rel=1e-6)
        of_group = H.restricted_to(grouped(H.space, "block")[name])
        alone = hs.density(of_group, probes=3, steps=12)
        torch.testing.assert_close(density.moments, alone.moments, rtol=1e-6, atol=1e-12)


def perceptron(objective: str = "nll") -> tuple[hs.Problem, Callable[[str], str]]:
    """Three layers, grouped by the first part of the name; ragged batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batches = [(torch.randn(b, 3, dtype=torch.float64), torch.arange(b) % 2) for b in (2, 7)]
    problem = hs.supervised(model, batches)
    return problem.related(objective=objective), lambda name: name.partition(".")[0]


def test_estimates_have_no_bias_and_honest_errors() -> None:
    """Over 300 seeds every trace and squared norm has the right mean, and its stated variance that of the estimates."""
    problem, by = perceptron()
    A, space = hs.block(hs.hessian(problem)).matrix, hs.select(problem)
    parts = grouped(space, by)
    place = torch.arange(space.size)
    own = [torch.cat([place[space.slices[n]] for n in part.names]) for part in parts.values()]
    squares = torch.stack([torch.stack([A[q][:, p].square().sum() for q in own]) for p in own])
    expected = torch.cat([torch.stack([A[p][:, p].trace() for p in own])[:, None], squares], 1)
    estimates, variances = [], []
    for seed in range(300):
        run = CrossNorms(Dense(A, space), list(parts.values()), 8, seed)
        while not run.done:
            run.step()
        estimates.append(run.means.clone())
        variances.append(run.errors**2)
    found = torch.stack(estimates)
    assert float(((found.mean(0) - expected) / (found.std(0) / 300**0.5)).abs().max()) < 4
    ratios = torch.stack(variances).mean(0) / found.var(0)
    assert 0.7 < float(ratios.min()) <= float(ratios.max()) < 1.4


class Dense(hs.Operator):
    """A matrix over a space with names."""

    def __init__(self, matrix: Tensor, space: hs.Space) -> None:
        super().__init__(space)
        self._matrix = matrix

    def _matmat(self, V: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.space.unflatten(self._matrix @ self.space.flatten(V))

    @property
    def units(self) -> float:
        return 0.0

    def describe(self) -> dict[str, Any]:
        return {"operator": "matrix"}

    def origin(self) -> None:
        return None


def test_norms_join_both_sides() -> None:
    problem, by = perceptron()
    found = hs.groups(hs.hessian(problem), by, probes=4, steps=2, max_products=2, tol=10.0)
    S, e = found.squares, found.squares_standard_error
    torch.testing.assert_close(found.norms**2, (S + S.T) / 2)
    assert torch.equal(found.norms, found.norms.T)
    expected = (e[0, 1] ** 2 + e[1, 0] ** 2).sqrt() / 2 / (2 * found.norms[0, 1])
    assert float(found.norms_standard_error[0, 1]) == pytest.approx(float(expected))
    assert float(found.norms_standard_error[1, 1]) == pytest.approx(float(e[1, 1] / (2 * found.norms[1, 1])))
    low, high = found.interval()
    assert bool(((low < found.traces) & (found.traces < high)).all())


# ---- cost, and operators on a part


def test_the_cost_is_what_was_promised_and_nothing_more_is_differentiated_than_a_group_needs() -> None:
    problem, by = perceptron()
    whole = hs.hessian(problem)
    found = hs.groups(whole, by, probes=3, steps=4, max_products=5, tol=10.0)
    assert whole.products == 3 * 3
    searched = found.products - 3 * 3 - 3 * 3 * 4
    assert 3 * 2 <= searched <= 3 * 5
    # A kept graph: 9 passes for the first product and 6 for every further one; a graph for the whole and each group.
    assert found.units == pytest.approx(6 * found.products + 3 * 4)
    assert found.provenance["operator"] == whole.describe() | {k: found.provenance["operator"][k] for k in ("graphs_kept", "graph_bytes")}  # fmt: skip


def operators() -> dict[str, Callable[[hs.Problem], hs.Operator]]:
    return {
        "hessian": hs.hessian,
        "forward": lambda p: hs.hessian(p, engine="forward-over-reverse"),
        "microbatches": lambda p: hs.hessian(p, microbatch=2),
        "ggn": hs.ggn,
        "fisher": lambda p: hs.fisher(p, samples=2, seed=4),
        "empirical": hs.empirical_fisher,
        "difference": lambda p: hs.hessian(p) - 0.5 * hs.ggn(p),
        "shifted": lambda p: hs.hessian(p).shifted(0.3),
    }


@pytest.mark.parametrize("name", operators())
def test_an_operator_on_a_part_is_the_restriction_and_counts_for_itself(name: str) -> None:
    problem, _ = perceptron()
    A = operators()[name](problem)
    part = hs.select(problem, {"0.weight": [3, 1, 8], "2.bias": None})
    expected = A.restricted_to(part).to_dense()
    products, units = A.products, A.units
    own = A.narrowed(part)
    assert own is not None
    torch.testing.assert_close(own.to_dense(), expected, rtol=1e-9, atol=1e-12)
    assert (A.products, A.units) == (products, units)
    assert own.units > 0
    assert own.positive_semidefinite == A.positive_semidefinite


def test_a_perplexity_on_a_part() -> None:
    problem, _ = perceptron("perplexity")
    A, part = hs.hessian(problem), hs.select(problem, "2.*")
    own = A.narrowed(part)
    assert own is not None
    torch.testing.assert_close(own.to_dense(), A.restricted_to(part).to_dense(), rtol=1e-9, atol=1e-12)


def test_an_operator_without_one_for_a_part_is_restricted_and_counted_once() -> None:
    problem, by = perceptron()
    space = hs.select(problem)
    A = Dense(hs.block(hs.hessian(problem)).matrix, space) + hs.hessian(problem)
    assert A.narrowed(hs.select(problem, "0.*")) is None
    found = hs.groups(A, by, probes=2, steps=3, max_products=4, tol=10.0)
    assert found.products == A.products
    assert found.units == A.units
    twice = hs.groups(2.0 * hs.hessian(problem), by, probes=2, steps=3, max_products=4, tol=10.0)
    torch.testing.assert_close(found.squares, twice.squares, rtol=1e-8, atol=1e-14)
    torch.testing.assert_close(found.extremes, twice.extremes, rtol=1e-8, atol=1e-12)


def test_norms_of_long_parameters_in_single_precision() -> None:
    """One float32 norm over three million products is wrong in the fifth digit."""
    d = torch.randn(3 * 2**20 + 5, 1, generator=torch.Generator().manual_seed(0)).abs()
    H = hs.operator(lambda X: d * X, size=len(d), dtype=torch.float32)
    norms = CrossNorms(H, [H.space], 2, 0)
    while not norms.done:
        norms.step()
    assert float(norms.means[0, 1]) == pytest.approx(float(d.double().square().sum()), rel=1e-6)


# ---- what the operator says of itself


class _Second(Alone):
    """The second of two ranks: files are the first's, which has found none."""

    rank, ranks = 1, 2

    def on(self, rank: int, find: Callable[[], Any]) -> Any:
        return None if find.__module__ in (driver.__name__, checkpoint.__name__) else find()

    def describe(self) -> dict[str, Any]:
        return {"layout": "data parallel", "ranks": 2}


def test_the_files_of_several_ranks_are_the_first_ones_business(tmp_path: Path) -> None:
    class Shared(Dense):
        comm = _Second()

    H = Shared(torch.eye(3).double(), hs.operator(torch.eye(3).double()).space)
    found = hs.groups(H, probes=2, steps=1, max_products=2, checkpoint=tmp_path / "run")
    assert found.provenance["processes"] == {"layout": "data parallel", "ranks": 2}
    assert list(tmp_path.iterdir()) == []


def test_an_operator_is_probed_to_its_own_tolerance() -> None:
    """Products in bfloat16 are not as symmetric as those in float32."""

    class Rounded(Dense):
        tolerance = 0.1

    A = torch.eye(60).double()
    A[0, 1] = 0.05
    space = hs.operator(torch.eye(60).double()).space
    found = hs.groups(Rounded(A, space), probes=2, steps=60, max_products=60, tol=1.0)
    assert 1e-3 < found.provenance["probe"]["symmetry"] < 0.1
    with pytest.raises(hs.HesscopeError, match="some operation's second derivative is wrong"):
        hs.groups(Dense(A, space), probes=2, steps=60, max_products=60, tol=1.0)


def test_the_products_error_is_stated() -> None:
    problem = hs.causal_lm(tiny("gpt2", torch.float32), ragged_batches()[2:])
    with stated_errors():
        found = hs.groups(hs.hessian(problem, hs.select(problem, "*ln_f*")), probes=2, steps=1, max_products=2, tol=1e9)
    error = found.provenance["product_error"]
    assert (error["of"], error["against"]) == ("float32", "float64")
    assert 1e-9 < error["relative"] < 1e-4


# ---- extreme cases


def test_single_coordinates_and_a_zero_matrix() -> None:
    problem = hs.supervised(nn.Linear(1, 1), [(torch.ones(2, 1), torch.zeros(2, 1))], loss="mse")
    found = hs.groups(hs.hessian(problem), by=lambda name: name, probes=2)
    torch.testing.assert_close(found.norms, torch.full((2, 2), 2.0).double())
    assert found.norms_standard_error.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    torch.testing.assert_close(found.extremes, torch.full((2, 2), 2.0).double())
    zero = hs.groups(0.0 * hs.hessian(problem), by=lambda name: name, probes=2)
    assert zero.norms.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert all(zero.converged)
    assert "1 +-" not in zero.summary()


def test_a_matrix_without_a_model_is_one_group() -> None:
    found = hs.groups(hs.operator(torch.diag(torch.arange(1.0, 6.0).double())))
    assert found.names == ["x"]
    assert float(found.traces) == pytest.approx(15.0)
    assert found.extremes.tolist() == [[pytest.approx(5.0), pytest.approx(1.0)]]


def test_what_misses_the_tolerance_is_said_and_marked() -> None:
    problem, by = perceptron()
    with pytest.warns(hs.HesscopeWarning, match="3 of 3 groups missed tol"):
        found = hs.groups(hs.hessian(problem), by, probes=2, steps=2, max_products=2, tol=1e-12)
    assert found.converged == [False] * 3
    assert found.summary().count("*") == 3 * 2 + 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"by": "head"}, "block, layer, kind"),
        ({"probes": 1}, "at least 2 probes"),
        ({"steps": 0}, "at least 1 step"),
        ({"max_products": 1}, "max_products"),
        ({"tol": 0.0}, "tol"),
    ],
)
def test_refusals(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(hs.HesscopeError, match=said):
        hs.groups(hs.operator(torch.eye(3)), **wrong)


def test_the_density_of_no_group_is_refused() -> None:
    with pytest.raises(hs.HesscopeError, match="name of a group"):
        hs.groups(hs.operator(torch.eye(3))).density("block 0")


def test_other_members_of_groups_of_one_size_are_another_run(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(2, 2, bias=False) for _ in range(4))).double()
    problem = hs.supervised(model, [(torch.ones(1, 2).double(), torch.zeros(1, 2).double())], loss="mse")
    H, kept = hs.hessian(problem), checkpoint.Checkpoint(tmp_path / "kept", every=0.0, keep_finished=True)
    how: dict[str, Any] = {"probes": 2, "steps": 2, "max_products": 20, "checkpoint": kept}
    hs.groups(H, by=lambda name: "first" if name[0] in "01" else "second", **how)
    with pytest.raises(hs.HesscopeError, match="of another run: members"):
        hs.groups(H, by=lambda name: "first" if name[0] in "02" else "second", **how)
