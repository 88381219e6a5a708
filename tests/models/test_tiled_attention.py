"""Tiled attention against SDPA's mathematical form, written out where that has no soft caps and sinks, in float64.

Tiles are made so small that every case has several, some whole, some masked and some that nothing is seen of.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import masking_utils as masks

from hesscope.models.attention import scores
from hesscope.models.attention.functions import Second, tiled_attention
from hesscope.models.attention.scores import Shape
from hesscope.models.attention.visibility import NotTiled, Visible, causal, everything, of_transformers, visible_by
from operations import numbers
from oracles import relative

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

EXACT = 1e-12
B, T = 2, 7
#: The first sequence is padded on the left, so that under causal masks its first positions see nothing.
KEPT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]).bool()
PADDING_LEFT = torch.tensor([3, 0])

Function = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "tile_sides", lambda q: (2, 3))


def described(**more: Any) -> Visible:
    return of_transformers(B, T, T, **more)


VISIBLE: dict[str, Callable[[], Visible]] = {
    "causal": lambda: causal(T, T, "cpu"),
    "everything": lambda: everything(T, T, "cpu"),
    "padded": lambda: described(attention_mask=KEPT, mask_function=masks.bidirectional_mask_function),
    "padded, causal": lambda: described(attention_mask=KEPT),
    "window": lambda: described(attention_mask=KEPT, mask_function=masks.sliding_window_causal_mask_function(3)),
    "window both ways": lambda: described(mask_function=masks.sliding_window_bidirectional_mask_function(2)),
    "chunks": lambda: described(attention_mask=KEPT, mask_function=masks.chunked_causal_mask_function(3, PADDING_LEFT)),
}


def dense_mask(visible: Visible) -> Tensor:
    """[B or 1, 1, Q, K]."""
    return visible.mask(slice(0, visible.first.shape[1]), slice(0, visible.keys))[:, :, 0]


def written_out(visible: Visible, scale: float, cap: float | None) -> Function:
    """Attention with a dense matrix of scores; a position that sees nothing gets zeros."""
    seen = dense_mask(visible)
    blind = ~seen.any(-1, keepdim=True)

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        x = q @ k.mT * scale
        x = x if cap is None else cap * torch.tanh(x / cap)
        x = x.masked_fill(~(seen | blind), -math.inf)
        if sinks is not None:
            x = torch.cat([x, sinks[None, :, None, None].expand(*x.shape[:3], 1)], -1)
        return x.softmax(-1)[..., : k.shape[2]].masked_fill(blind, 0.0) @ v

    return run


def tiled(visible: Visible, scale: float, cap: float | None) -> Function:
    return lambda q, k, v, sinks=None: tiled_attention(q, k, v, Shape(visible, scale, cap), sinks)


def arguments(sinks: bool = False, seed: int = 0, queries: int = T, keys: int = T) -> tuple[Tensor, ...]:
    """Four query heads on two key heads; values of another size than keys."""
    shapes = [(B, 4, queries, 3), (B, 2, keys, 3), (B, 2, keys, 5), *([(4,)] if sinks else [])]
    return tuple(numbers(*shape, seed=seed + i) for i, shape in enumerate(shapes))


def scalar(f: Function) -> Function:
    def s(*x: Tensor) -> Tensor:
        out = f(*x)
        return (out.sin() * numbers(*out.shape, seed=20)).sum()

    return s


def reverse_over_reverse(f: Function, x: tuple[Tensor, ...], u: tuple[Tensor, ...]) -> Tensor:
    x = tuple(part.detach().requires_grad_() for part in x)
    g = torch.autograd.grad(f(*x), x, create_graph=True)
    return flat(torch.autograd.grad(g, x, u))


def forward_over_reverse(f: Function, x: tuple[Tensor, ...], u: tuple[Tensor, ...]) -> Tensor:
    return flat(jvp(grad(f, tuple(range(len(x)))), x, u)[1])


def reverse_over_forward(f: Function, x: tuple[Tensor, ...], u: tuple[Tensor, ...]) -> Tensor:
    return flat(grad(lambda *y: jvp(f, y, u)[1], tuple(range(len(x))))(*x))


def flat(parts: Any) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("name", VISIBLE)
def test_values_and_second_derivatives(name: str, cap: float | None, sinks: bool) -> None:
    visible = VISIBLE[name]()
    ours, theirs = tiled(visible, 0.7, cap), written_out(visible, 0.7, cap)
    x, u = arguments(sinks), arguments(sinks, seed=10)
    assert relative(ours(*x), theirs(*x)) < EXACT
    expected = reverse_over_reverse(scalar(theirs), x, u)
    for arrangement in (reverse_over_reverse, forward_over_reverse, reverse_over_forward):
        assert relative(arrangement(scalar(ours), x, u), expected) < EXACT


@pytest.mark.parametrize("arrangement", [forward_over_reverse, reverse_over_forward])
def test_a_batch_of_tangents(arrangement: Callable[..., Tensor]) -> None:
    visible = VISIBLE["window"]()
    x = arguments(sinks=True)
    U = tuple(torch.stack(parts) for parts in zip(arguments(True, 10), arguments(True, 30), strict=True))
    found = vmap(lambda *u: arrangement(scalar(tiled(visible, 0.7, 2.0)), x, u), randomness="same")(*U)
    for k, row in enumerate(found):
        u = tuple(part[k] for part in U)
        assert relative(row, reverse_over_reverse(scalar(written_out(visible, 0.7, 2.0)), x, u)) < EXACT


@pytest.mark.parametrize("moving", [m for m in itertools.product([False, True], repeat=4) if any(m)])
def test_tangents_of_some_inputs_only(moving: tuple[bool, ...]) -> None:
    """What does not move has no tangent, and what is not differentiated no derivative."""
    visible, x, u = VISIBLE["padded, causal"](), arguments(True), arguments(True, 10)
    some = [i for i in range(4) if moving[i]]

    def only(f: Function) -> Function:
        def run(*y: Tensor) -> Tensor:
            at = dict(zip(some, y, strict=True))
            return scalar(f)(*(at.get(i, x[i]) for i in range(4)))

        return run

    ours, theirs = only(tiled(visible, 0.7, 2.0)), only(written_out(visible, 0.7, 2.0))
    part, along = tuple(x[i] for i in some), tuple(u[i] for i in some)
    expected = reverse_over_reverse(theirs, part, along)
    for arrangement in (reverse_over_reverse, forward_over_reverse, reverse_over_forward):
        # Along values alone the output is linear, and the scalar's own curvature is all there is.
        assert relative(arrangement(ours, part, along), expected) < EXACT


@pytest.mark.parametrize("name", ["padded, causal", "window both ways"])
def test_numerical_derivatives(name: str) -> None:
    x = tuple(part.requires_grad_() for part in arguments(sinks=True))
    f = tiled(VISIBLE[name](), 0.7, 2.0)
    fast = {"fast_mode": True}
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, **fast)
    assert torch.autograd.gradgradcheck(f, x, **fast)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 7), (5, 7), (7, 4)])
def test_lengths(queries: int, keys: int) -> None:
    """Length one, odd lengths, and queries that attend to something of another length, as a decoder does."""
    visible = everything(queries, keys, "cpu")
    x, u = arguments(queries=queries, keys=keys), arguments(seed=10, queries=queries, keys=keys)
    ours, theirs = tiled(visible, 0.7, None), written_out(visible, 0.7, None)
    assert relative(ours(*x), theirs(*x)) < EXACT
    expected = reverse_over_reverse(scalar(theirs), x, u)
    assert relative(reverse_over_reverse(scalar(ours), x, u), expected) < EXACT


def test_rows_that_see_nothing_are_those_of_sdpa() -> None:
    visible, (q, k, v), u = VISIBLE["padded, causal"](), arguments(), arguments(seed=10)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, dense_mask(visible), scale=0.7, enable_gqa=True)

    found = tiled(visible, 0.7, None)(q, k, v)
    assert relative(found, sdpa(q, k, v)) < EXACT
    assert not found[0, :, :3].any()
    assert found[0, :, 3:].all()
    f = scalar(tiled(visible, 0.7, None))
    assert relative(reverse_over_reverse(f, (q, k, v), u), reverse_over_reverse(scalar(sdpa), (q, k, v), u)) < EXACT


@pytest.mark.parametrize(
    ("dtype", "scale", "roundings"), [(torch.float32, 0.7, 10), (torch.bfloat16, 3.0, 2), (torch.float16, 3.0, 2)]
)
def test_other_dtypes(dtype: torch.dtype, scale: float, roundings: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only inputs and outputs are rounded to half: statistics and sums are float32, over many tiles. float32 sums in itself."""
    monkeypatch.setattr(scores, "tile_sides", lambda q: (64, 8))
    length = 256
    visible = causal(length, length, "cpu")
    x, u = (tuple(part.to(dtype) for part in arguments(seed=seed, queries=length, keys=length)) for seed in (0, 10))
    exact_x, exact_u = (tuple(part.double() for part in parts) for parts in (x, u))
    f = tiled(visible, scale, None)
    found, expected = f(*x), f(*exact_x)
    assert found.dtype == dtype
    assert relative(found, expected) < roundings * torch.finfo(dtype).eps
    second = reverse_over_reverse(weighted(f), x, u)
    assert second.dtype == dtype
    assert relative(second, reverse_over_reverse(weighted(f), exact_x, exact_u)) < roundings * torch.finfo(dtype).eps


def weighted(f: Function) -> Function:
    """Linear in the output, with weights of half precision, so that nothing but attention rounds."""

    def s(*x: Tensor) -> Tensor:
        out = f(*x)
        return (out * numbers(*out.shape, seed=20).bfloat16().to(out.dtype)).double().sum()

    return s


def test_scores_far_beyond_what_exp_can_take() -> None:
    visible, (q, k, v) = causal(T, T, "cpu"), arguments()
    found = tiled(visible, 1e4, None)(q, k, v)
    assert relative(found, written_out(visible, 1e4, None)(q, k, v)) < EXACT


def test_third_derivatives_are_refused() -> None:
    x = tuple(part.requires_grad_() for part in arguments())
    f = scalar(tiled(causal(T, T, "cpu"), 0.7, None))
    g = torch.autograd.grad(f(*x), x, create_graph=True)
    h = torch.autograd.grad(g, x, arguments(seed=10), create_graph=True)
    with pytest.raises(RuntimeError, match=f"{Second.__name__}|backward"):
        torch.autograd.grad(flat(h).sum(), x)


def test_only_tensors_linear_in_the_length_are_kept_and_made() -> None:
    """Neither the graph of the gradient nor the passes through it hold a tensor of length x length."""
    length, largest = 48, 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                largest = max(largest, x.numel() if isinstance(x, Tensor) else 0)
            return out

    x = tuple(part.requires_grad_() for part in arguments(queries=length, keys=length))
    with Watch():
        visible = causal(length, length, "cpu")
        g = torch.autograd.grad(tiled(visible, 0.7, None)(*x).sum(), x, create_graph=True)
        torch.autograd.grad(g, x, arguments(seed=10, queries=length, keys=length))
    assert largest == B * 4 * length * 5


# ---- what is seen


@pytest.mark.parametrize("name", VISIBLE)
def test_intervals_are_the_masks_of_transformers(name: str) -> None:
    visible = VISIBLE[name]()
    functions = {
        "window": masks.sliding_window_causal_mask_function(3),
        "window both ways": masks.sliding_window_bidirectional_mask_function(2),
        "chunks": masks.chunked_causal_mask_function(3, PADDING_LEFT),
        "everything": masks.bidirectional_mask_function,
        "padded": masks.bidirectional_mask_function,
    }
    theirs = masks.sdpa_mask(
        B, T, T,
        mask_function=functions.get(name, masks.causal_mask_function),
        attention_mask=None if visible.kept is None else KEPT,
        allow_is_causal_skip=False,
    )  # fmt: skip
    assert torch.equal(dense_mask(visible).expand(B, 1, T, T), theirs)


@pytest.mark.parametrize("name", VISIBLE)
@pytest.mark.parametrize("sides", [(2, 3), (3, 2), (4, 4), (8, 8)])
def test_tiles_cover_what_is_seen_once(name: str, sides: tuple[int, int]) -> None:
    visible = VISIBLE[name]()
    covered = torch.zeros(dense_mask(visible).shape, dtype=torch.long)
    for row in visible.rows(*sides):
        for keys in row.keys:
            seen = visible.mask(row.at, keys.at)[:, :, 0]
            assert seen.any()
            assert keys.mixed == (not seen.all())
            covered[:, :, row.at, keys.at] += seen
    assert torch.equal(covered, dense_mask(visible).long())


def test_tiles_of_nothing_but_padding_are_left_out() -> None:
    kept = torch.tensor([[True, True, False, False, False, True, False]] * B)
    visible = described(attention_mask=kept, mask_function=masks.bidirectional_mask_function)
    assert [keys.at for row in visible.rows(4, 2) for keys in row.keys] == [slice(0, 2), slice(4, 6)] * 2


def test_later_queries_of_a_longer_text() -> None:
    visible = of_transformers(1, 2, 5, q_offset=3, attention_mask=torch.tensor([[True, False, True, True]]))
    assert dense_mask(visible)[0, 0].tolist() == [[True, False, True, True, False]] * 2


def test_gaps_are_refused() -> None:
    def every_other(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q - k) % 2 == 0

    with pytest.raises(NotTiled, match="gaps"):
        visible_by(every_other, 1, range(5), range(5), None, "cpu")
    with pytest.raises(NotTiled, match="of its own"):
        of_transformers(1, 5, 5, use_vmap=True)
