"""A model run piece by piece: what comes before its trunk (the stem), one block at a time, what comes after (the head).

Nothing here knows an architecture. A recording run notes how the model calls every block; a block is then replayed from
its recorded arguments, the stem is the model up to the call of its first block, and the head the model whose blocks hand on
a given tensor. That is the model only if every block's input is the block before's output and nothing else passes around
them, which the recording checks as far as it can be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from hesscope.errors import HesscopeError
from hesscope.losses import Loss
from hesscope.models import Trunk, aliases, is_sharded, without_weights
from hesscope.problem import Problem

Values = dict[str, Tensor]


_IN_PLACE = (
    "Expected the blocks of {trunk!r} to leave the hidden states that they are given as they are, but something {where} "
    "changes them in place; use another engine."
)


class NotATrunk(HesscopeError):
    """The model does not run as a stem, a chain of blocks and a head."""


@dataclass(frozen=True)
class Call:
    """How the model called a block: all arguments but the hidden states, where these stood, and what it returned."""

    keyword: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    hidden: Tensor
    result: Any
    version: int = 0

    @property
    def output(self) -> Tensor:
        """The hidden states that the block returned."""
        first: Tensor = self.result if isinstance(self.result, Tensor) else self.result[0]
        return first

    def arguments(self, h: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the block was called with, on other hidden states."""
        return ((h, *self.args), self.kwargs) if self.keyword is None else (self.args, self.kwargs | {self.keyword: h})

    def with_output(self, h: Tensor) -> Any:
        """The block's result with other hidden states."""
        return h if isinstance(self.result, Tensor) else type(self.result)((h, *self.result[1:]))

    def lean(self) -> Call:
        """Without the hidden states, and with what remains detached."""
        cut = self.with_output(torch.empty(0))
        args, kwargs, result = tree_map(
            lambda x: x.detach() if isinstance(x, Tensor) else x, (self.args, self.kwargs, cut)
        )
        return Call(self.keyword, args, kwargs, torch.empty(0), result)


class Block:
    """A block in the middle of a run of its model, as a function of parameters and hidden states; its hooks have run."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], call: Call) -> None:
        self._called, self._call = _Called(module, forward), call

    def result(self, values: Values, h: Tensor) -> Any:
        """What the block returns; `values` by the names inside it, what is missing is constant."""
        state = {f"block.{name}": p for name, p in values.items()}
        return functional_call(self._called, state, *self._call.arguments(h))

    def values(self, names: Iterable[str]) -> Values:
        """Those of its parameters that are there, as they are in this run."""
        own = dict(self._called.block.named_parameters())
        return {name: own[name].detach() for name in names if not (own[name].is_meta or is_sharded(own[name]))}

    def plain(self) -> Any:
        """What it returns to the model."""
        return self.result({}, self._call.hidden)

    @property
    def hidden(self) -> Tensor:
        return self._call.hidden


#: Takes the number of a block and the block, and returns what the model is given in its place.
Through = Callable[[int, Block], Any]


class _Called(nn.Module):
    """Calls a function that uses a module, so that `functional_call` replaces the module's parameters and no hook runs."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.block = block
        self._forward = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


class Pieces:
    """One batch's stem, blocks and head as functions of parameters and hidden states."""

    def __init__(self, problem: Problem, b: int, trunk: Trunk) -> None:
        self._problem, self._b, self._trunk = problem, b, trunk
        #: What is kept of the calls.
        self.calls: list[Call] = []

    def note(self, calls: Sequence[Call]) -> None:
        """The recorded calls; the stem can do without."""
        self.calls = [call.lean() for call in calls]

    def stem(self, values: Values) -> Tensor:
        """The input of the first block."""

        def stop(*args: Any, **kwargs: Any) -> Any:
            raise _Reached(_hidden(args, kwargs)[1])

        with _standing_in(self._trunk.blocks[:1], [without_weights(stop)]):
            try:
                self._problem.total(self._b, values)
            except _Reached as reached:
                return reached.hidden
        raise NotATrunk("Expected the model to call its first block, but it did not.")

    def block(self, i: int, values: Values, h: Tensor) -> Tensor:
        """The output of block i; `values` by the names inside the block, what is missing is constant."""
        call, module = self.calls[i], self._trunk.blocks[i]
        state = {name: p.detach() for name, p in module.named_parameters()} | values
        with self._problem.running(self._b):
            result = functional_call(module, state, *call.arguments(h))
        output: Tensor = result if isinstance(result, Tensor) else result[0]
        return output

    def head(self, values: Values, h: Tensor, loss: Loss | None = None) -> Tensor:
        """The batch's summed loss from the output of the last block; `loss` stands in for the problem's own."""
        with self.passing_on(h):
            return self._problem.total(self._b, values, loss=loss)[0].reshape(())

    @contextmanager
    def passing_on(self, h: Tensor) -> Iterator[None]:
        def give(call: Call) -> Callable[..., Any]:
            return without_weights(lambda *args, **kwargs: call.with_output(h))

        with _standing_in(self._trunk.blocks, [give(call) for call in self.calls]):
            yield


def record(
    problem: Problem,
    b: int,
    trunk: Trunk,
    values: Values | None = None,
    loss: Loss | None = None,
    apart: bool = False,
    through: Through | None = None,
) -> tuple[Tensor, list[Call]]:
    """Run batch b and note every block's call; returns the summed loss as well. `loss` stands in for the problem's own.

    With `apart` no block's output remembers how it came about, so that a block's graph goes with the block. `through` runs the
    blocks.

    Raises:
        NotATrunk: a block that is not called exactly once and in order, or whose input is not the block before's output.
    """
    calls: list[tuple[int, Call]] = []

    def noting(i: int, block: nn.Module) -> Callable[..., Any]:
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            keyword, hidden = _hidden(args, kwargs)
            if calls and calls[-1][1].output is hidden and hidden._version != calls[-1][1].version:
                raise NotATrunk(_IN_PLACE.format(where=f"between blocks {i - 1} and {i}", trunk=trunk.prefix))
            version = hidden._version
            others = {name: x for name, x in kwargs.items() if name != keyword}
            call = Call(keyword, args if keyword else args[1:], others, hidden, None)
            result = forward(*args, **kwargs) if through is None else through(i, Block(block, forward, call))
            if hidden._version != version:
                raise NotATrunk(_IN_PLACE.format(where=f"inside block {i}", trunk=trunk.prefix))
            if apart:
                result = _cut_off(result)
            call = replace(call, result=result)
            calls.append((i, replace(call, version=_output(call, i, trunk)._version)))
            return result

        return run

    with _standing_in(trunk.blocks, [noting(i, block) for i, block in enumerate(trunk.blocks)]):
        total, _ = problem.total(b, values, loss=loss)
    order = [i for i, _ in calls]
    if order != list(range(len(trunk.blocks))):
        raise NotATrunk(
            f"Expected the model to call the {len(trunk.blocks)} blocks of {trunk.prefix!r} once each and in order, it "
            f"called {order if len(order) <= 20 else f'{order[:20]} and more'}."
        )
    found = [call for _, call in calls]
    for i, (before, after) in enumerate(pairwise(found)):
        if before.output is not after.hidden:
            raise NotATrunk(
                f"Expected the input of block {i + 1} of {trunk.prefix!r} to be the output of block {i}, but the model puts "
                "something between them."
            )
    return total, found


def _cut_off(result: Any) -> Any:
    """A block's result whose hidden states are detached."""
    if isinstance(result, Tensor):
        return result.detach()
    whole = type(result) in (tuple, list) and result and isinstance(result[0], Tensor)
    return type(result)((result[0].detach(), *result[1:])) if whole else result


def _output(call: Call, i: int, trunk: Trunk) -> Tensor:
    """A call's output, known to be hidden states that another tensor can stand in for."""
    if isinstance(call.result, Tensor) or (type(call.result) in (tuple, list) and isinstance(call.result[0], Tensor)):
        return call.output
    raise NotATrunk(
        f"Expected block {i} of {trunk.prefix!r} to return its hidden states, alone or first in a tuple, got "
        f"{type(call.result).__name__}."
    )


def require_no_detours(calls: Sequence[Call], trunk: Trunk) -> None:
    """Raise NotATrunk where an argument beside the hidden states depends on a parameter that is differentiated."""
    for i, call in enumerate(calls):
        for name, value in [*enumerate(call.args), *call.kwargs.items()]:
            if any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(value)):
                raise NotATrunk(
                    f"Expected the hidden states to be all that ties the blocks of {trunk.prefix!r} to parameters, but "
                    f"argument {name!r} of block {i} depends on a selected parameter, too."
                )


def names_inside(model: nn.Module, trunk: Trunk) -> list[dict[str, str]]:
    """For every block, {name inside it: the parameter's first name in the model}.

    A parameter tied inside a block stands once in it, under its first name there; one that blocks share stands in each.
    """
    first = aliases(model)
    return [
        {name: first[f"{trunk.prefix}.{i}.{name}"] for name, _ in block.named_parameters()}
        for i, block in enumerate(trunk.blocks)
    ]


class _Reached(Exception):
    """Carries the input of the first block out of the model."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | None, Tensor]:
    """The hidden states among a block's arguments, and the keyword they came by."""
    if args and isinstance(args[0], Tensor):
        return None, args[0]
    hidden = kwargs.get("hidden_states")
    if not args and isinstance(hidden, Tensor):
        return "hidden_states", hidden
    raise NotATrunk("Expected a block's first argument, or hidden_states=, to be its input.")


@contextmanager
def _standing_in(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Let other functions run in place of the modules' forward."""
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own
