"""How one batch's columns of a Hessian are found: through weights or positions, and how many at once. A matter of counting."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hesscope.engines.base import parameter_values
from hesscope.engines.linear_uses import Box, Use, WatchUses, as_linear
from hesscope.losses import CausalLMLoss
from hesscope.losses.cross_entropy import IGNORED
from hesscope.models import device_of, named_parameters, values_of
from hesscope.problem import Problem
from hesscope.space import Coordinates, Space

#: So many tokens keep a device busy in one pass; smaller batches are repeated.
_BUSY_TOKENS = {"cpu": 256, "cuda": 8192}
#: What layers receive of one sequence may differ by so much, of its norm, with another beside it; by some roundings at least.
_LEAK = 1e-4
#: Passes of one task through positions, whose responses are read out together.
_PASSES = 8


@dataclass(frozen=True)
class Task:
    """Some columns of one parameter: its selected coordinates `places`, or one unit of its box at positions `places`."""

    name: str
    places: range
    unit: int | None = None

    @property
    def products(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class Part:
    """One parameter's columns: `units` times places 0..length-1, in tasks of at most `chunk`; one unit through weights."""

    name: str
    length: int
    chunk: int
    units: int = 1
    by_position: bool = False

    @property
    def tasks(self) -> int:
        return self.units * -(-self.length // self.chunk)

    @property
    def products(self) -> int:
        return self.units * self.length

    def task(self, number: int) -> Task:
        unit, chunk = divmod(number, self.tasks // self.units)
        start = chunk * self.chunk
        places = range(start, min(start + self.chunk, self.length))
        return Task(self.name, places, unit if self.by_position else None)


@dataclass(frozen=True)
class BatchPlan:
    """One batch's work, a part a parameter. `order` says which layer is called when; empty where none goes through positions.

    Tasks are counted and made when their turn comes: there may be one a column and batch.
    """

    parts: list[Part]
    order: dict[str, int]
    copies: int
    sequences: int

    @cached_property
    def through_positions(self) -> dict[str, Part]:
        return {part.name: part for part in self.parts if part.by_position}

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(part.tasks for part in self.parts))

    @property
    def tasks(self) -> int:
        return self._ends[-1]

    @cached_property
    def products(self) -> int:
        return sum(part.products for part in self.parts)

    def task(self, number: int) -> Task:
        """One of `tasks`."""
        at = bisect_right(self._ends, number)
        return self.parts[at].task(number - (self._ends[at - 1] if at else 0))


def watch_uses(problem: Problem, b: int, space: Space) -> dict[str, list[Use] | None]:
    """How batch b's forward pass uses the selected parameters."""
    parameters = named_parameters(problem.model)
    weights = {name: values_of(problem.model, name, parameters[name]) for name in space.names}
    # Nothing requires a gradient, so that nothing is kept; what an autograd function does inside is told by where it is off.
    with torch.enable_grad(), WatchUses(weights) as watch:
        problem.total(b, weights)
    uses: dict[str, list[Use] | None] = watch.uses
    return uses


def watch_every_use(problem: Problem, space: Space) -> list[dict[str, list[Use] | None]]:
    """The same of every batch; a rank looks at its own."""
    own: dict[int, dict[str, list[Use] | None]] = {}
    with problem.comm.summed():
        own.update((b, watch_uses(problem, b, space)) for b in problem.mine)
    found = {b: uses for of_rank in problem.comm.gathered(own) for b, uses in of_rank.items()}
    return [found[b] for b in range(len(problem.batches))]


def box_of(problem: Problem, c: Coordinates, unit_axis: int, weight: Tensor) -> Box:
    """A linear layer's box, where the layer computes."""
    return Box(c, unit_axis, device_of(problem.model, c.name, weight))


def boxes_of(problem: Problem, space: Space, uses: list[dict[str, list[Use] | None]]) -> dict[str, Box]:
    """Boxes of the weights that are used in no batch by anything but linear layers, all the same way round."""
    found, named = {}, named_parameters(problem.model)
    for c in space.coordinates:
        calls = [batch[c.name] for batch in uses]
        axes = {use.unit_axis for batch in calls for use in batch or ()}
        if None not in calls and len(axes) == 1 and len(c.parameter_shape) == 2:
            found[c.name] = box_of(problem, c, axes.pop(), named[c.name])
    return found


def taken_apart(
    problem: Problem, space: Space, takes: Callable[[str, Box], bool] = lambda name, box: True
) -> list[tuple[dict[str, Box], int]]:
    """For every batch: the weights whose linear layers see each position of it once, and its number of sequences.

    Where sequences may touch one another, the batch is one of them: what draws make of that is unbiased, too, with more spread.
    """
    uses = watch_every_use(problem, space)
    boxes = {name: box for name, box in boxes_of(problem, space, uses).items() if takes(name, box)}
    found = []
    for b, used in enumerate(uses):
        tokens = sequences_and_length(problem, b)
        fits = {
            name: box
            for name, box in boxes.items()
            if len(used[name] or ()) == 1 and (tokens is None or receives_every_position(box, used[name], tokens))
        }
        found.append((fits, tokens[0] if tokens else 1))
    return found


def sequences_are_apart(problem: Problem, space: Space, boxes: Mapping[str, Box]) -> bool:
    """Whether layers receive sequences along the first axis of their input, and each is what it is whatever else is in its batch.

    They need not be: a model may turn its axes round, or look at a whole batch. Told by two forward passes of the same shapes:
    one sequence twice, and that beside one of other tokens. Layers receive the same of it, and so is its loss.
    """
    at = next((at for b in range(len(problem.batches)) if (at := _counted(problem, b)) is not None), None)
    if at is None or not boxes:
        return True
    leaks = torch.zeros(1, dtype=torch.float64)
    with problem.comm.summed({"leaks": leaks}):
        if at[0] in problem.mine:
            leaks += not _are_apart(problem, *at, space, boxes)
    return float(leaks) == 0.0


def _counted(problem: Problem, b: int) -> tuple[int, int] | None:
    """The batch, and its first sequence that has a loss; None for a batch that is not one of sequences."""
    if not sequences_and_length(problem, b):
        return None
    rows = (problem.batches[b]["labels"][:, 1:] != IGNORED).any(1).nonzero()
    return (b, int(rows[0, 0])) if len(rows) else None


def _are_apart(problem: Problem, b: int, s: int, space: Space, boxes: Mapping[str, Box]) -> bool:
    batch: Any = problem.batches[b]
    twice = {key: torch.cat([x[s : s + 1], x[s : s + 1]]) for key, x in batch.items()}
    beside = {key: x.clone() for key, x in twice.items()}
    beside["input_ids"][1] = beside["input_ids"][1] == 0  # another token everywhere
    for one in (twice, beside):
        one["labels"][1] = IGNORED
    both = problem.related(batches=[twice, beside])
    (alone, before), (together, after) = (_first_received(both, i, space, boxes) for i in range(2))
    limit = min(max(_LEAK, 20 * space.rounding), 0.2)
    pairs = [pair for name in boxes for pair in zip(before[name], after[name], strict=False)]
    return abs(alone - together) <= limit * abs(alone) and all(
        x.shape == y.shape and float((x - y).norm()) <= limit * float(x.norm()) for x, y in pairs
    )


def _first_received(
    problem: Problem, b: int, space: Space, boxes: Mapping[str, Box]
) -> tuple[float, dict[str, list[Tensor]]]:
    """The loss of a batch of two, and what layers receive of the first of them."""
    values = parameter_values(problem, space)
    size = problem.batches[b]["input_ids"].numel()
    expected = {id(values[name]): (name, size * box.in_features) for name, box in boxes.items()}
    with torch.no_grad(), _FirstOf(2, expected) as seen:
        total, _ = problem.total(b, values)
    return float(total), seen.found


class _FirstOf(TorchFunctionMode):
    """Keeps the first of so many parts of what linear layers of some weights receive: all positions, or several of each.

    What is a list of positions of another length, such as those of an expert, has no order to look at.
    """

    def __init__(self, parts: int, expected: dict[int, tuple[str, int]]) -> None:
        super().__init__()
        self._parts, self._expected = parts, expected
        self.found: dict[str, list[Tensor]] = {name: [] for name, _ in expected.values()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        linear = as_linear(func, args, kwargs)
        name, size = self._expected.get(id(linear[1]), ("", 0)) if linear is not None else ("", 0)
        if linear is not None and name and (linear[0].numel() == size or linear[0].dim() > 2):
            x = linear[0].detach()
            self.found[name].append(
                x.reshape(self._parts, -1)[0].double() if x.numel() % self._parts == 0 else x.double()
            )
        return func(*args, **(kwargs or {}))


def plan_batch(
    problem: Problem,
    b: int,
    space: Space,
    boxes: dict[str, Box],
    uses: dict[str, list[Use] | None],
    route: str,
    apart: bool,
    most_copies: Callable[[int], int],
) -> BatchPlan:
    """Count the products of either route and take the fewer; `most_copies(wanted)` says how many fit in memory.

    Through positions, and with copies of the batch: only where every selected parameter has a box, and where sequences are
    apart; through positions only where each is used once, too.
    """
    tokens = sequences_and_length(problem, b) if apart else None
    every = len(boxes) == len(space.coordinates)
    once = every and all(len(uses[name] or ()) <= 1 for name in boxes)
    short = [
        c.name
        for c in space.coordinates
        if once
        and tokens
        and receives_every_position(boxes[c.name], uses[c.name], tokens)
        and _shorter(c, boxes[c.name], tokens, route)
    ]
    S, T = tokens or (1, 0)
    copies = most_copies(_wanted_copies(problem, S * T, space.size)) if every and tokens else 1
    through = frozenset(short) if route != "weights" else frozenset()
    parts = [
        Part(c.name, T, _PASSES * copies, boxes[c.name].shape[0], by_position=True)
        if c.name in through
        else Part(c.name, c.size, copies)
        for c in space.coordinates
    ]
    order = {name: (uses[name] or [Use(0, 0, 0)])[0].order for name in boxes} if through else {}
    return BatchPlan(parts, order, copies, S if through else 1)


def _shorter(c: Coordinates, box: Box, tokens: tuple[int, int], route: str) -> bool:
    return route == "positions" or box.shape[0] * tokens[1] < c.size


def receives_every_position(box: Box, uses: list[Use] | None, tokens: tuple[int, int]) -> bool:
    """Whether the layer receives every position of every sequence, once."""
    return bool(uses) and uses is not None and uses[0].elements == tokens[0] * tokens[1] * box.in_features


def sequences_and_length(problem: Problem, b: int) -> tuple[int, int] | None:
    """Sequences and padded length of a language model's batch whose loss is a sum over its sequences; otherwise None."""
    batch: Any = problem.batches[b]
    if not isinstance(problem.loss, CausalLMLoss) or problem.dropout != "off" or "input_ids" not in batch:
        return None
    ids = batch["input_ids"]
    along = all(isinstance(x, Tensor) and x.dim() >= 2 and len(x) == len(ids) for x in batch.values())
    return (int(ids.shape[0]), int(ids.shape[1])) if along else None


def _wanted_copies(problem: Problem, tokens: int, n: int) -> int:
    return max(1, min(_BUSY_TOKENS.get(problem.device.type, 256) // max(tokens, 1), n))
