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


def off_and_stated(problem: hs.Problem, space: hs.Space, b: int) -> tuple[float, float]:
    """The error of a difference, relative to the larger of its product and of that with the engine's own vector; as stated."""
    exact, _ = product(problem, space, b, b, "reverse-over-reverse")
    difference, error = product(problem, space, b, b, "finite-difference")
    size, z, Hz = float(space.norms(space.gaussian(b, [0]))), space.rademacher(0, ["step"]), space.zeros()
    make_engine("reverse-over-reverse").linearize(problem, b, space).add_product(z, Hz)
    largest = max(float(exact.norm()) / size, float(space.norms(Hz) / space.norms(z)))
    return float((difference - exact).norm()) / size / largest, error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "opt"])
@pytest.mark.parametrize("glob", ["*", "*.1.*bias"])
def test_products_are_as_near_as_they_say(name: str, dtype: torch.dtype, glob: str) -> None:
    problem = hs.causal_lm(tiny(name, dtype), ragged_batches())
    space = hs.select(problem, glob)
    for b in range(3):
        off, error = off_and_stated(problem, space, b)
        assert off < error < BOUND[dtype]


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_a_float64_model_that_casts_to_float32_inside_is_noticed(name: str) -> None:
    """The step for float64 would drown in the rounding of its normalisation layers."""
    problem = hs.causal_lm(tiny(name), ragged_batches())
    space = hs.select(problem)
    for b in range(3):
        off, error = off_and_stated(problem, space, b)
        assert off < error < BOUND[torch.float32]


def test_the_error_grows_with_what_is_lost_to_rounding() -> None:
    """The same weights, data and vector in two precisions."""
    errors = []
    for dtype in (torch.float64, torch.float32):
        problem = hs.causal_lm(tiny("gpt2", dtype), ragged_batches())
        errors.append(product(problem, hs.select(problem), 0, 0, "finite-difference")[1])
    assert errors[0] < 1e-4 * errors[1]


def normalised(kind: str) -> hs.Problem:
    """Layers that a normalisation makes blind to the sum of their biases, or to the length of their weights."""
    torch.manual_seed(0)
    layers: dict[str, list[nn.Module]] = {
        "layer norm": [nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)],
        "convolutions": [
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(),
            nn.Linear(16, 2),
        ],
    }  # fmt: skip
    shape = {"layer norm": (3,), "convolutions": (1, 6, 6)}[kind]
    model = nn.Sequential(*layers[kind]).double().eval()
    g = torch.Generator().manual_seed(1)
    batches = [(torch.randn(n, *shape, generator=g).double(), torch.randn(n, 2, generator=g).double()) for n in (2, 5)]
    return hs.supervised(model, batches, loss="mse")


@pytest.mark.parametrize(
    ("kind", "pattern"), [("layer norm", "0.bias"), ("layer norm", "*"), ("convolutions", "3.bias")]
)
def test_a_product_of_zero_does_not_spoil_the_error(kind: str, pattern: str) -> None:
    """The error is relative to what products can be, not to the rounding of one that vanishes."""
    problem = normalised(kind)
    space = hs.select(problem, pattern)
    exact = hs.hessian(problem, space, engine="reverse-over-reverse").to_dense()
    shift = torch.cat(
        [torch.full((c.size,), float(c.name in ("0.bias", "3.bias"))) for c in space.coordinates]
    ).double()
    if kind == "convolutions":  # groups of two channels, which are shifted together
        shift[2:] = 0
    F = hs.hessian(problem, space, engine="finite-difference")
    v = torch.stack([shift, torch.eye(space.size, dtype=torch.float64)[1]], 1)
    for k in (0, 1):
        off = float((F @ v[:, k] - exact @ v[:, k]).norm() / v[:, k].norm() / torch.linalg.matrix_norm(exact, 2))
        assert off < F.describe()["engine_error"] < BOUND[torch.float64]
    assert float((exact @ shift).norm()) < 1e-12 * float(torch.linalg.matrix_norm(exact, 2))


def test_a_shift_that_the_engine_s_own_vector_is_does_not_spoil_the_error() -> None:
    """Two biases before a softmax, along whose sum nothing changes, and a name for which both signs are the same."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Identity() for _ in range(4)], nn.Linear(3, 2)).double()
    problem = hs.supervised(model, [(torch.randn(4, 3).double(), torch.tensor([0, 1, 1, 0]))])
    space = hs.select(problem, "4.bias")
    assert abs(float(space.flatten(space.rademacher(0, ["step"])).sum())) == 2.0
    F = hs.hessian(problem, space, engine="finite-difference")
    assert float((F @ torch.ones(2).double()).norm()) < F.describe()["engine_error"] < BOUND[torch.float64]


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
