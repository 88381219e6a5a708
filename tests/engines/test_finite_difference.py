"""Finite differences agree with reverse over reverse to within the error that they report."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import hesscope as hs
from architectures import ragged_batches, tiny
from custom_functions import once_problem
from hesscope.engines import make_engine
from hesscope.errors import UnusedParameters
from oracles import relative

#: What four rounded gradients can give: rounding / step, balanced against step^2, with a margin of ten.
BOUND = {torch.float64: 1e-8, torch.float32: 1e-2}


def product(problem: hs.Problem, space: hs.Space, b: int, seed: int, engine: str) -> tuple[Tensor, float]:
    linearization = make_engine(engine).linearize(problem, b, space)
    result = space.zeros()
    linearization.add_product(space.gaussian(seed, [0]), result)
    return space.flatten(result), getattr(linearization, "error", 0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "opt"])
@pytest.mark.parametrize("glob", ["*", "*.1.*bias"])
def test_products_are_as_near_as_they_say(name: str, dtype: torch.dtype, glob: str) -> None:
    problem = hs.causal_lm(tiny(name, dtype), ragged_batches())
    space = hs.select(problem, glob)
    for b in range(3):
        exact, _ = product(problem, space, b, b, "reverse-over-reverse")
        difference, error = product(problem, space, b, b, "finite-difference")
        assert relative(difference, exact) < error < BOUND[dtype]


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_a_float64_model_that_casts_to_float32_inside_is_noticed(name: str) -> None:
    """The step for float64 would drown in the rounding of its normalisation layers."""
    problem = hs.causal_lm(tiny(name), ragged_batches())
    space = hs.select(problem)
    for b in range(3):
        exact, _ = product(problem, space, b, b, "reverse-over-reverse")
        difference, error = product(problem, space, b, b, "finite-difference")
        assert relative(difference, exact) < error < BOUND[torch.float32]


def test_the_error_grows_with_what_is_lost_to_rounding() -> None:
    """The same weights, data and vector in two precisions."""
    errors = []
    for dtype in (torch.float64, torch.float32):
        problem = hs.causal_lm(tiny("gpt2", dtype), ragged_batches())
        errors.append(product(problem, hs.select(problem), 0, 0, "finite-difference")[1])
    assert errors[0] < 1e-4 * errors[1]


def test_vectors_of_any_length_are_answered_alike() -> None:
    """The step is divided by the vector's norm."""
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    F = hs.hessian(problem, engine="finite-difference")
    v = F.space.flatten(F.space.gaussian(0, [0]))[:, 0]
    reference = F @ v
    for factor in (1e-9, 1e9):
        assert relative(F @ (factor * v), factor * reference) < BOUND[torch.float64]
    assert not (F @ torch.zeros_like(v)).any()


def test_the_whole_operator_divides_once() -> None:
    model = tiny("gpt2")
    problem = hs.causal_lm(model, ragged_batches())
    space = hs.select(problem, "transformer.ln_f.*", {"transformer.wte.weight": [3, 90, 41]})
    identity = torch.eye(space.size, dtype=torch.float64)
    exact, difference = (hs.hessian(problem, space, engine=e) for e in ("reverse-over-reverse", "finite-difference"))
    assert relative(difference @ identity, exact @ identity) < BOUND[torch.float64]
    assert difference.describe()["engine"] == "finite-difference"
    assert difference.units == pytest.approx(12 * space.size)


def test_a_loss_without_second_derivatives_by_autograd() -> None:
    """What finite differences are for."""
    problem, expected = once_problem()
    product = hs.hessian(problem, engine="finite-difference") @ torch.ones(1, dtype=torch.float64)
    assert float(product) == pytest.approx(expected, rel=1e-8)


class _Spare(nn.Module):
    """A linear layer and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.spare, self.layer = nn.Parameter(torch.ones(2).double()), nn.Linear(3, 1, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.layer(x))


def test_an_unused_parameter_has_zero_rows_and_a_warning() -> None:
    batches = [(torch.randn(n, 3, generator=torch.Generator().manual_seed(n)).double(), torch.zeros(n, 1).double()) for n in (1, 3)]  # fmt: skip
    H = hs.hessian(hs.supervised(_Spare(), batches, loss="mse"), engine="finite-difference")
    with pytest.warns(UnusedParameters, match="does not depend on spare:"):
        assert not (H @ torch.zeros(5).double()).any()  # whatever the vector
    X = torch.cat([x for x, _ in batches])
    expected = torch.block_diag(torch.zeros(2, 2).double(), 2 / 4 * X.T @ X)
    assert relative(H.to_dense(), expected) < BOUND[torch.float64]


@pytest.mark.filterwarnings("ignore::hesscope.HesscopeWarning")
def test_autograd_does_not_answer_where_it_has_no_second_derivative() -> None:
    problem, _ = once_problem()
    with pytest.raises(hs.HesscopeError, match="cannot be differentiated again; use engine='finite-difference'"):
        hs.hessian(problem) @ torch.ones(1, dtype=torch.float64)


def test_an_unknown_engine() -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    with pytest.raises(
        hs.HesscopeError,
        match="Expected engine to be auto, reverse-over-reverse, forward-over-reverse, reverse-over-forward, streamed or "
        "finite-difference, got 'x'",
    ):
        hs.hessian(problem, engine="x")


def test_the_trace_of_a_language_model_in_single_precision() -> None:
    """0.9 million weights: a step that did not fit theta and v would miss the trace by far more than this."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=64))
    assert 0.85e6 < sum(p.numel() for p in model.parameters()) < 0.95e6
    tokens = torch.randint(0, 1024, (2, 64), generator=torch.Generator().manual_seed(0))
    problem = hs.causal_lm(model, tokens, batch_size=2)
    exact, difference = (
        hs.trace(hs.hessian(problem, engine=engine), method="hutchinson", budget=4)
        for engine in ("reverse-over-reverse", "finite-difference")
    )
    assert difference.estimate == pytest.approx(exact.estimate, rel=0.02)
    assert difference.estimate != exact.estimate
