"""What follows the tensor z up to which a graph of the model is built, for a matrix through the model's outputs.

z is the outputs themselves, or, where the matrix treats tokens one by one and the model's logits come from its output projection,
the hidden states of the tokens that count: then logits never stand for more than a chunk of tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from hesscope.losses import (
    ChunkedHead,
    HeadForm,
    Projection,
    TokenMatrix,
    counted,
    has_plain_head,
    in_words,
    projected_cross_entropy,
    projection_of,
    residual,
    through_projection,
)
from hesscope.problem import Problem

#: (problem, batch, outputs) to the function u -> M u, both shaped like the outputs.
Middle = Callable[[Problem, int, Tensor], Callable[[Tensor], Tensor]]
Values = dict[str, Tensor]


@runtime_checkable
class ByToken(Protocol):
    """A `Middle` that can have tokens' cross-entropies in chunks: it treats tokens one by one if they are `apart`."""

    apart: bool

    def by_token(self, problem: Problem, b: int, head: ChunkedHead) -> TokenMatrix:
        """M for chunks of the tokens that count."""
        ...


@runtime_checkable
class OfProblem(Protocol):
    """A `Middle` that belongs to a problem, such as labels drawn for its batches."""

    def of(self, problem: Problem) -> Middle:
        """The same of another problem."""
        ...


def rebound(middle: Middle, problem: Problem) -> Middle:
    """The matrix for another problem."""
    return middle.of(problem) if isinstance(middle, OfProblem) else middle


JOINED = "whole logits: the matrix joins tokens"


class Tail(ABC):
    """From z to the summed loss, at one point."""

    #: The summed loss.
    total: float
    #: Bytes held for later products, beyond z and the parameters.
    bytes: int = 0
    #: How the head is taken, in words.
    note: str
    #: Of the selected parameters, by name, those that stand in the tail itself.
    names: tuple[str, ...] = ()

    @abstractmethod
    def product(self, u: Tensor | None, v: Values) -> tuple[Tensor, Values]:
        """T^T M T (u, v) for T the derivative of the outputs in z and in the tail's parameters; no u is zero."""

    @abstractmethod
    def gradient(self) -> tuple[Tensor, Values]:
        """The derivative of the summed loss in z and in the tail's parameters."""


class WholeOutputs(Tail):
    """z is the outputs."""

    def __init__(self, problem: Problem, b: int, z: Tensor, middle: Middle, note: str) -> None:
        self._problem, self._b, self._z, self.note = problem, b, z, note
        self.total = float(problem.total_of_outputs(b, z))
        self._multiply = middle(problem, b, z)

    def product(self, u: Tensor | None, v: Values) -> tuple[Tensor, Values]:
        return self._multiply(torch.zeros_like(self._z) if u is None else u), {}

    def gradient(self) -> tuple[Tensor, Values]:
        return residual(self._problem.require_split_loss(), self._z, self._problem.on_device(self._b)), {}


class ProjectedOutputs(Tail):
    """z is the input of the output projection, a row for every token that counts."""

    def __init__(
        self, problem: Problem, b: int, head: ChunkedHead, matrix: TokenMatrix, names: list[str | None], note: str
    ) -> None:
        self._head, self._matrix, self._places, self.note = head, matrix, names, note
        self.names = tuple(name for name in names if name is not None)
        self.bytes = head.keep()
        form = head.form
        self.total = float(problem.checked(b, projected_cross_entropy(head.h_Td, head.W_Vd, head.b_V, head.y_T, form)))

    def product(self, u: Tensor | None, v: Values) -> tuple[Tensor, Values]:
        along = [u, *(None if name is None else v[name] for name in self._places)]
        wanted = (True, *(name is not None for name in self._places))
        return self._split(through_projection(self._head, along, self._matrix, wanted))

    def gradient(self) -> tuple[Tensor, Values]:
        inputs = (self._head.h_Td, self._head.W_Vd, self._head.b_V)
        wanted = (True, *(name is not None for name in self._places))
        leaves = [None if x is None else x.detach().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)]
        asked = [x for x in leaves if x is not None and x.requires_grad]
        with torch.enable_grad():
            total = projected_cross_entropy(leaves[0], leaves[1], leaves[2], self._head.y_T, self._head.form)  # type: ignore[arg-type]
        found = iter(torch.autograd.grad(total, asked))
        return self._split([next(found) if x is not None and x.requires_grad else None for x in leaves])

    def _split(self, parts: list[Tensor | None]) -> tuple[Tensor, Values]:
        below, *own = parts
        assert below is not None
        return below, {n: x for n, x in zip(self._places, own, strict=True) if n is not None and x is not None}


def split_outputs(
    problem: Problem,
    b: int,
    middle: Middle,
    values: Values,
    outputs: Callable[[], Tensor],
    run: Callable[[Callable[[nn.Module, Any], Any]], Any],
    keep: bool | None = None,
) -> tuple[Tensor, Callable[[Tensor], Tail]]:
    """z, and the tail as a function of z's value. `outputs()` and `run(function)` run the model on batch b with `values`.

    `keep` says whether the output projection's output is kept between products, as for `HeadForm`.
    """
    loss = problem.require_split_loss()
    if not isinstance(middle, ByToken) or not has_plain_head(loss) or not middle.apart:
        note = JOINED if isinstance(middle, ByToken) and not middle.apart else ""
        return outputs(), lambda at: WholeOutputs(problem, b, at, middle, note)
    projection, logits, reason = run(lambda model, batch: projection_of(loss, model, batch))
    if projection is not None:
        names = _names(projection, values)
        if names is not None:
            h_Td, y_T = counted(projection.hidden, loss.targets(problem.on_device(b)))
            return h_Td, lambda at: _projected(problem, b, middle, projection, at, y_T, names, keep)
        logits, reason = projection.form(), "its last layer's weight is made of others"
    return logits, lambda at: WholeOutputs(problem, b, at, middle, f"whole logits: {reason}")


def _projected(
    problem: Problem,
    b: int,
    middle: ByToken,
    projection: Projection,
    h_Td: Tensor,
    y_T: Tensor,
    names: list[str | None],
    keep: bool | None,
) -> Tail:
    bias, form = None if projection.bias is None else projection.bias.detach(), HeadForm(projection.map, keep=keep)
    note = in_words(projection, form, len(y_T))
    head = ChunkedHead(h_Td, projection.weight.detach(), bias, y_T, form)
    return ProjectedOutputs(problem, b, head, middle.by_token(problem, b, head), names, note)


def _names(projection: Projection, values: Values) -> list[str | None] | None:
    """The selected parameters that weight and bias are; None where one is made of selected parameters."""
    found: list[str | None] = []
    for x in (projection.weight, projection.bias):
        name = next((name for name, value in values.items() if value is x), None)
        if x is not None and x.requires_grad and name is None:
            return None
        found.append(name)
    return found
