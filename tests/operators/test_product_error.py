"""The measured error of products, held to the same error found otherwise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.operators.product_error import TOKENS, stated_errors
from oracles import causal_lm_products, keeping_double, relative


def one_short(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> hs.Problem:
    """A problem of one sequence that is short enough to be measured on as a whole."""
    return hs.causal_lm(tiny(name, dtype), ragged_batches()[2:], **more)


def true_error(H: Any) -> float:
    """The same figure from a float64 double backward by hand, casts left out."""
    v = {name: part[0] for name, part in H.space.rademacher(0, ["product-error/1"]).items()}
    with keeping_double(H.problem.model):
        (exact,) = causal_lm_products(H.problem.model, H.problem.batches, [v])
    return relative(flat(H @ v), flat(exact))


def flat(v: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten().double() for part in v.values()])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("engine", ["auto", "streamed", "finite-difference"])
def test_float32_is_measured_against_float64(name: str, engine: str) -> None:
    H = hs.hessian(one_short(name), engine=engine)
    found = H.product_error()
    assert (found.of, found.against, found.on) == ("float32", "float64", "one sequence of 3 tokens")
    assert found.relative == pytest.approx(true_error(H), rel=1e-3)
    assert 1e-8 < found.relative < (1e-2 if engine == "finite-difference" else 1e-4)


def test_an_error_of_a_percent_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    H: Any = hs.hessian(one_short("gpt2"))
    make = H.of_small
    monkeypatch.setattr(H, "of_small", lambda small: _wrong(make(small)))
    assert H.product_error().relative == pytest.approx(1e-2, rel=1e-2)


def _wrong(run: Any) -> Any:
    matmat = run._matmat
    run._matmat = lambda V: {name: 1.01 * part for name, part in matmat(V).items()}
    return run


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "qwen3"])
def test_bfloat16_weights_are_held_to_the_same_weights_in_float32(name: str) -> None:
    H: Any = hs.hessian(one_short(name, torch.bfloat16))
    found = H.product_error()
    assert (found.of, found.against) == ("bfloat16", "float32")
    assert found.relative == pytest.approx(true_error(H), rel=1e-2)
    assert 1e-3 < found.relative < 0.5


def test_bfloat16_products_are_held_to_those_in_float32() -> None:
    H: Any = hs.hessian(one_short("llama"), precision="bfloat16")
    found = H.product_error()
    assert (found.of, found.against) == ("bfloat16", "float32")
    assert found.relative == pytest.approx(true_error(H), rel=1e-2)


def test_a_reference_is_not_in_the_precision_that_a_context_asks_for() -> None:
    with hs.precision("bfloat16"):
        found = hs.hessian(one_short("llama")).product_error()
    assert found.relative is not None
    assert found.relative > 1e-4


def test_a_float64_model_that_casts_is_held_to_itself_without_the_casts() -> None:
    H: Any = hs.hessian(one_short("llama", torch.float64))
    found = H.product_error()
    assert "casts" in found.against
    assert found.relative == pytest.approx(true_error(H), rel=1e-3)
    assert 1e-9 < found.relative < 1e-5


def test_a_float64_model_that_does_not_cast_is_held_to_its_symmetry() -> None:
    found = hs.hessian(one_short("gpt2", torch.float64)).product_error()
    assert "symmetry" in found.against
    assert found.relative is not None
    assert found.relative < 1e-12
    assert found.products == 3


@pytest.mark.parametrize(("engine", "limit"), [("streamed", 1e-13), ("finite-difference", 1e-3)])
def test_another_engine_is_held_to_double_backward_in_float64(engine: str, limit: float) -> None:
    H: Any = hs.hessian(one_short("gpt2", torch.float64), engine=engine)
    found = H.product_error()
    assert found.against == "double backward"
    assert found.relative == pytest.approx(true_error(H), rel=1e-3, abs=1e-14)
    assert found.relative < limit


def test_a_failure_costs_the_figure_and_not_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    H: Any = hs.hessian(one_short("gpt2"))

    def fails(*_: Any) -> Any:
        raise RuntimeError("no kernel for float64")

    monkeypatch.setattr(H, "reference", fails)
    with stated_errors():
        result = hs.trace(H, budget=2)
    assert result.product_error_line() == "product error not measured: no kernel for float64"


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("engine", ["auto", "streamed"])
def test_a_fisher_matrix_keeps_its_labels(per: str, engine: str) -> None:
    problem = hs.causal_lm(tiny("llama", torch.float32), ragged_batches())
    for A in (hs.fisher(problem, samples=3, per=per, engine=engine), hs.empirical_fisher(problem, per=per)):
        found = A.product_error().relative
        assert found is not None
        assert 1e-8 < found < 1e-4  # one other label would make tenths


def test_the_perplexitys_is_that_of_the_mean_losss_matrix() -> None:
    H, P = (hs.ggn(one_short("gpt2", objective=objective)) for objective in ("nll", "perplexity"))
    assert P.product_error() == H.product_error()


def test_cost_is_counted_and_small() -> None:
    ids = torch.arange(3, 3 + 16).repeat(40, 1)
    problem = hs.causal_lm(tiny("gpt2", torch.float32), ids, batch_size=8)
    H = hs.hessian(problem)
    found = H.product_error()
    assert (H.products, H.units) == (0, 0.0)
    assert found.products == 2
    assert found.units == pytest.approx(2 * 9 / 40)
    assert TOKENS == 32


def test_a_long_sequence_is_cut() -> None:
    model = tiny("gpt2", torch.float32, n_positions=64)
    found = hs.hessian(hs.causal_lm(model, torch.full((2, 60), 5))).product_error()
    assert found.on == "one sequence of 32 tokens"


def zero(weight: float) -> hs.Problem:
    """Linear in its weights for a squared error of zeros: H = 2 x^2, zero where x is."""
    return hs.supervised(nn.Linear(1, 1, bias=False), [(torch.full((1, 1), weight), torch.zeros(1, 1))], loss="mse")


@pytest.mark.parametrize("x", [0.0, 0.3])
def test_one_coordinate_and_a_zero_hessian(x: float) -> None:
    found = hs.hessian(zero(x)).product_error()
    assert found.relative is not None
    assert found.relative < 1e-6
    assert found.on == "one batch of 1 terms"
    assert str(found).startswith("product error ")


def test_what_cannot_be_measured_says_why() -> None:
    problem = one_short("gpt2")
    with hs.memory_limit("1kB"):
        H = hs.hessian(problem)
        H._has_room = True  # type: ignore[attr-defined]
        found = H.product_error()
    assert found.relative is None
    assert "a copy of the weights in float64 takes" in str(found)
    frozen = hs.causal_lm(tiny("gpt2", torch.float32), ragged_batches(), dropout="frozen")
    assert "a frozen dropout mask" in str(hs.hessian(frozen).product_error())
    with pytest.raises(hs.HesscopeError, match="ask its parts"):
        (2.0 * hs.hessian(problem)).product_error()


def test_weights_that_rest_elsewhere_are_measured_where_no_copy_is_needed() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = accelerate.cpu_offload(
        tiny("llama", torch.float32, tie_word_embeddings=False), execution_device=torch.device("cpu")
    )
    problem = hs.causal_lm(model, ragged_batches())
    assert "weights that rest elsewhere have no copy in float64" in str(hs.hessian(problem).product_error())
    found = hs.hessian(problem, precision="bfloat16").product_error().relative
    assert found is not None
    assert 1e-4 < found < 0.1


def test_results_say_it_once_it_is_known() -> None:
    problem = one_short("gpt2")
    H = hs.hessian(problem)
    assert "product_error" not in hs.trace(H, budget=2).provenance
    found = H.product_error()
    result = hs.trace(H, budget=2)
    assert result.provenance["product_error"] == found.describe()
    assert result.product_error_line() == str(found)
    with torch.no_grad():
        next(problem.model.parameters()).mul_(1.5)
    assert "product_error" not in hs.trace(H, budget=2).provenance


def test_inside_a_context_every_result_says_it() -> None:
    H = hs.hessian(one_short("gpt2"))
    with stated_errors():
        first = hs.trace(H, budget=2).provenance["product_error"]
        assert math.isfinite(first["relative"])
        assert "product_error" not in hs.trace(hs.operator(torch.eye(3)), budget=2).provenance


def test_the_model_comes_back_as_it_was() -> None:
    problem = one_short("llama")
    before = {name: p.clone() for name, p in problem.model.named_parameters()}
    fingerprint = problem.fingerprint
    hs.hessian(problem).product_error()
    assert problem.fingerprint == fingerprint
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in problem.model.named_parameters())
