"""How matrices are multiplied for a while, and that torch is as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.arithmetic import linear_passes, multiplying, resolve_precision, unrounded
from hesscope.losses.chunked_head import ChunkedHead, HeadForm
from hesscope.models.attention import first, second
from hesscope.models.attention.scores import Inputs, Shape, Tangents
from hesscope.models.attention.visibility import causal
from oracles import relative

PLACES: list[Any] = [
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,
]
CPU = torch.device("cpu")


def settings() -> list[str]:
    return [place.fp32_precision for place in PLACES]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before, older = settings(), torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(older)
    for place, value in zip(PLACES, before, strict=True):
        place.fp32_precision = value


def test_torch_is_left_alone_by_import_and_by_default() -> None:
    before = settings()
    with multiplying(None):
        assert settings() == before


@pytest.mark.parametrize("process", ["highest", "high", "medium"])
@pytest.mark.parametrize("name", ["tf32", "float32"])
def test_a_setting_lasts_as_long_as_a_product(name: str, process: str) -> None:
    torch.set_float32_matmul_precision(process)
    before = settings()
    seen: list[object] = []

    def product() -> None:
        with multiplying(name):
            # The older interface may be asked at any time, by torch too.
            seen.extend([*settings(), torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        product()
    assert seen == ([*4 * ["tf32"], True, "high"] if name == "tf32" else [*4 * ["ieee"], False, "highest"])
    assert settings() == before
    assert torch.get_float32_matmul_precision() == process


def test_settings_made_through_torchs_newer_interface_come_back_too() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # which the older one now refuses to report
    before = settings()
    with multiplying("float32"):
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert settings() == before


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().double()


@pytest.mark.parametrize("kind", ["mm", "bmm", "mm into", "bmm into", "addmm", "addmm_", "baddbmm", "linear"])
def test_factors_of_a_linear_pass_are_rounded_and_its_sums_are_not_lost(kind: str) -> None:
    x, y, z = numbers(2, 5, 64), numbers(2, 64, 6, seed=1), numbers(2, 5, 6, seed=2)
    run = {
        "mm": lambda: x[0] @ y[0],
        "bmm": lambda: x @ y,
        "mm into": lambda: torch.mm(x[0], y[0], out=torch.empty_like(z[0])),
        "bmm into": lambda: torch.bmm(x, y, out=torch.empty_like(z)),
        "addmm": lambda: torch.addmm(z[0], x[0], y[0], beta=2.0, alpha=0.5),
        "addmm_": lambda: z[0].clone().addmm_(x[0], y[0]),
        "baddbmm": lambda: torch.baddbmm(z, x, y),
        "linear": lambda: torch.nn.functional.linear(x, y[0].T, z[0, 0]),
    }[kind]
    exact = {
        "mm": rounded(x[0]) @ rounded(y[0]),
        "bmm": rounded(x) @ rounded(y),
        "mm into": rounded(x[0]) @ rounded(y[0]),
        "bmm into": rounded(x) @ rounded(y),
        "addmm": 2.0 * z[0].double() + 0.5 * rounded(x[0]) @ rounded(y[0]),
        "addmm_": z[0].double() + rounded(x[0]) @ rounded(y[0]),
        "baddbmm": z.double() + rounded(x) @ rounded(y),
        "linear": rounded(x) @ rounded(y[0]) + z[0, 0].double(),
    }[kind]
    plain = run()
    with multiplying("bfloat16"), linear_passes():
        found = run()
        with unrounded():
            assert torch.equal(run(), plain)
    assert found.dtype == torch.float32
    assert relative(found, exact) < 2.0**-8  # the product itself is rounded once
    assert relative(plain, exact) > 2.0**-11  # a product of what was not rounded is another
    assert torch.equal(run(), plain)


def test_other_dtypes_are_left_as_they_are() -> None:
    x, y = numbers(5, 7).double(), numbers(7, 3).double()
    with multiplying("bfloat16"), linear_passes():
        assert torch.equal(x @ y, torch.mm(x, y))
        assert (x.bfloat16() @ y.bfloat16()).dtype == torch.bfloat16
    assert relative(x @ y, rounded(x) @ rounded(y)) > 1e-4


def test_logits_that_are_computed_anew_are_not_rounded() -> None:
    h, W = numbers(6, 16), numbers(11, 16, seed=1)
    head = ChunkedHead(h, W, None, torch.arange(6), HeadForm())
    plain = head.projected(slice(0, 6))
    with multiplying("bfloat16"), linear_passes():
        assert torch.equal(head.projected(slice(0, 6)), plain)
        assert not torch.equal(head.tangent(slice(0, 6), h, None, None), plain)


def test_attention_scores_that_are_computed_anew_are_not_rounded() -> None:
    q, k, v, w = (
        numbers(1, 2, 1, 9, 8),
        numbers(1, 2, 9, 8, seed=1),
        numbers(1, 2, 9, 8, seed=2),
        numbers(1, 2, 1, 9, 8, seed=3),
    )
    x, shape = Inputs(q, k, v, None), Shape(causal(9, 9, CPU), 0.3)
    dot = Tangents(w, v, k, None)
    o, L = first.output(x, shape)

    def everything() -> list[Tensor]:
        twice = second.second(x, o, L, w, dot, w, shape)
        return [
            *first.output(x, shape),
            *first.reverse(x, o, L, w, shape)[:3],
            first.forward(x, o, L, dot, shape),
            twice.q,
        ]

    plain = everything()
    with multiplying("bfloat16"), linear_passes():
        assert all(map(torch.equal, everything(), plain))


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        ("half", {torch.float32}, "Expected precision to be float32, tf32 or bfloat16, got 'half'"),
        ("tf32", {torch.float32}, "Expected a CUDA device for precision='tf32'"),
        ("tf32", {torch.float64}, "Expected weights in float32 for precision='tf32', got float64"),
        ("bfloat16", {torch.bfloat16}, "Expected weights in float32 for precision='bfloat16', got bfloat16"),
        ("float32", {torch.float16}, "Expected weights in float32 for precision='float32', got float16"),
    ],
)
def test_what_would_mean_nothing_is_refused(name: str, weights: set[torch.dtype], words: str) -> None:
    with pytest.raises(hs.HesscopeError, match=words):
        resolve_precision(name, weights, CPU)


def test_a_context_is_the_default_of_operators_made_in_it() -> None:
    problem = hs.causal_lm(tiny("gpt2", torch.float32), ragged_batches())
    with hs.precision("bfloat16"):
        inside, other = hs.hessian(problem), hs.ggn(problem, precision="float32")
    assert [A.describe()["precision"] for A in (inside, other, hs.hessian(problem))] == ["bfloat16", "float32", None]
    with pytest.raises(hs.HesscopeError, match="Expected precision to be"), hs.precision("fast"):
        pass
