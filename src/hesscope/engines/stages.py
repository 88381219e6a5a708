"""One stage of a streamed product: the derivatives of a piece of the model, whose graph lives only here.

A stage is y = f(theta, h). With lambda the loss's derivative in y, and a prime for derivatives along a vector,

    g = d <lambda, f> / d (theta, h)                                     g_h is the derivative in the stage's input
    phi = <g_theta, v> + <g_h, h'> + <lambda', f>
    (H v)_theta = d phi / d theta,     lambda'_in = d phi / d h

phi is never formed: its parts are the seeds of one reverse pass through the graphs of g and f.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp
from torch.utils._pytree import tree_leaves

from hesscope.arithmetic import linear_passes
from hesscope.engines.forward_context import NotInForwardMode, quietly, refusals_in_words
from hesscope.engines.forward_rules import REVERSE_OVER_FORWARD, Replacing
from hesscope.engines.reverse_over_reverse import missing_derivatives_in_words, require_second_derivative
from hesscope.engines.second_derivatives import WRITTEN_OUT
from hesscope.engines.valueless import VALUELESS

Values = dict[str, Tensor]
#: A piece of the model: parameters and its input to its output. The stem has no input.
Piece = Callable[[Values, Tensor | None], Tensor]


@dataclass(frozen=True)
class Above:
    """The loss's derivative in a stage's output, and the derivatives of that along every vector; None is zero."""

    cotangent: Tensor | None
    tangents: Sequence[Tensor | None]


def tangent(piece: Piece, values: Values, h: Tensor | None, v: Values, dh: Tensor | None) -> Tensor | None:
    """The derivative of a piece's output along v and dh; None is zero.

    In forward mode; what has none (a custom function) goes through two reverse passes.
    """
    if not values and dh is None:
        return None
    try:
        return _forward(piece, values, h, v, dh)[1]
    except NotInForwardMode:
        return _twice_reverse(piece, values, h, v, dh)


def carried(
    result: Callable[[Values, Tensor], Any],
    values: Values,
    h: Tensor,
    along: Sequence[Values],
    tangents: Sequence[Tensor | None],
) -> tuple[Any, list[Tensor | None]]:
    """What a block returns at h (hidden states, alone or first in a tuple), and the derivative of these along every v and h'.

    Raises NotInForwardMode for a block that returns other tensors, too.
    """
    if not values and all(dh is None for dh in tangents):
        return result(values, h), [None] * len(tangents)
    returned: list[Any] = []

    def piece(values: Values, h: Tensor | None) -> Tensor:
        assert h is not None
        whole = result(values, h)
        if not isinstance(whole, Tensor) and type(whole) not in (tuple, list):
            raise NotInForwardMode(f"a block returns a {type(whole).__name__}")
        returned[:] = [whole]
        y: Tensor = whole if isinstance(whole, Tensor) else whole[0]
        return y

    y: Tensor | None = None
    found: list[Tensor | None] = []
    for v, dh in zip(along, tangents, strict=True):
        y, dy = _forward(piece, values, h, v, dh) if values or dh is not None else (y, None)
        found.append(dy)
    whole = returned[0]
    if isinstance(whole, Tensor):
        return y, found
    if any(isinstance(x, Tensor) for x in tree_leaves(whole[1:])):
        raise NotInForwardMode("a block returns more than its hidden states")
    return type(whole)((y, *whole[1:])), found


def _forward(piece: Piece, values: Values, h: Tensor | None, v: Values, dh: Tensor | None) -> tuple[Tensor, Tensor]:
    """The value and its derivative."""

    # An argument that does not move stays out of it, for torch takes no derivative along nothing.
    def run(*at: Any) -> Tensor:
        parts = iter(at)
        theta = next(parts) if values else {}
        return piece(theta, h if dh is None else next(parts))

    moving = [values] if values else []
    along = [v] if values else []
    if dh is not None:
        moving, along = [*moving, h], [*along, dh]  # type: ignore[list-item]
    with torch.no_grad(), Replacing(REVERSE_OVER_FORWARD), quietly(), refusals_in_words():
        value, derivative, *_ = jvp(run, tuple(moving), tuple(along))
        return value, derivative


def _twice_reverse(piece: Piece, values: Values, h: Tensor | None, v: Values, dh: Tensor | None) -> Tensor | None:
    """J v as the derivative in u of <J^T u, v>, which is linear in u."""
    graph = Graph(piece, values, h, wants_below=dh is not None)
    if graph.constant:
        return None
    with torch.enable_grad():
        u = torch.zeros_like(graph.y, requires_grad=True)
        parts, below = graph.transposed(u, last=False, differentiable=True)
        seeds = [(part, v[name]) for name, part in parts.items()] + [(below, dh)]
        live = [(x, s.to(x.dtype)) for x, s in seeds if x is not None and s is not None and x.requires_grad]
        with missing_derivatives_in_words():
            return torch.autograd.grad([x for x, _ in live], u, [s for _, s in live], materialize_grads=True)[0]


class Graph:
    """A piece's graph in its parameters and, where a stage lies below, in its input.

    With `valueless`, for `second_order` only, first derivatives in the weights of linear layers have no values.
    """

    def __init__(
        self, piece: Piece, values: Values, h: Tensor | None, wants_below: bool, valueless: bool = False
    ) -> None:
        self._names = list(values)
        leaves = {name: p.detach().requires_grad_() for name, p in values.items()}
        h_leaf = None if h is None else h.detach().requires_grad_(wants_below)
        self._wants_below = wants_below and h_leaf is not None
        self._inputs = [*leaves.values(), *([h_leaf] if self._wants_below and h_leaf is not None else [])]
        with torch.enable_grad(), Replacing(VALUELESS if valueless else WRITTEN_OUT):
            self.y = piece(leaves, h_leaf)

    @property
    def constant(self) -> bool:
        """Whether nothing that is differentiated reaches the output."""
        return not self.y.requires_grad or not self._inputs

    def transposed(self, u: Tensor | None, last: bool, differentiable: bool = False) -> tuple[Values, Tensor | None]:
        """J^T u: {name: part}, and the part that goes to the stage below."""
        if self.constant:
            return {}, None
        with nullcontext() if differentiable else linear_passes():
            found = torch.autograd.grad(
                self.y, self._inputs, u, retain_graph=not last, create_graph=differentiable, allow_unused=True
            )
        return self._split(found)

    def second_order(
        self, above: Above | None, vectors: Sequence[Values], tangents: Sequence[Tensor | None]
    ) -> tuple[list[Values], Above | None, set[str]]:
        """For every vector {name: part of H v}; what the stage below needs; the parameters that are used.

        Without `above` the output is the loss itself.
        """
        cotangent = None if above is None else above.cotangent
        if self.constant or (above is not None and cotangent is None):
            return [{} for _ in vectors], None, set()
        with torch.enable_grad():
            g = torch.autograd.grad(self.y, self._inputs, cotangent, create_graph=True, allow_unused=True)
        require_second_derivative(g)
        first, g_h = self._split(g)
        parts: list[Values] = []
        below: list[Tensor | None] = []
        for k, (v, dh) in enumerate(zip(vectors, tangents, strict=True)):
            seeds = [(part, v[name]) for name, part in first.items()] + [(g_h, dh)]
            seeds += [(self.y, above.tangents[k])] if above is not None else []
            found, through = self._seeded(seeds, last=k == len(vectors) - 1)
            parts.append(found)
            below.append(through)
        under = Above(None if g_h is None else g_h.detach(), below) if self._wants_below else None
        return parts, under, set(first)

    def _seeded(self, seeds: Sequence[tuple[Tensor | None, Tensor | None]], last: bool) -> tuple[Values, Tensor | None]:
        """The derivative of the sum of <x, seed> in every input."""
        curved = [(x, s.to(x.dtype)) for x, s in seeds if x is not None and s is not None and x.requires_grad]
        if not curved:
            return {}, None
        with missing_derivatives_in_words(), linear_passes():
            found = torch.autograd.grad(
                [x for x, _ in curved], self._inputs, [s for _, s in curved], retain_graph=not last, allow_unused=True
            )
        return self._split(found)

    def _split(self, found: Sequence[Tensor | None]) -> tuple[Values, Tensor | None]:
        parts = {name: part for name, part in zip(self._names, found, strict=False) if part is not None}
        return parts, found[-1] if self._wants_below else None
