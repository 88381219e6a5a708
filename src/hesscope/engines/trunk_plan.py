"""Which pieces of a model the derivatives of a selection run through."""

from __future__ import annotations

import torch

from hesscope.engines.base import parameter_values
from hesscope.engines.trunk_run import names_inside, record, require_no_detours
from hesscope.errors import HesscopeError
from hesscope.models import aliases, find_trunk
from hesscope.problem import Problem
from hesscope.space import Space


class TrunkPlan:
    """The trunk, and what of it is differentiated; found by one recorded run of the first sequence.

    Attributes:
        inside: for every block, {name inside it: name in the model} of what is selected.
        outside: the selected parameters that the stem or the head uses.
        stem: whether one of these comes before the first block.
        start: the first block that a derivative reaches; the number of blocks where none does.
    """

    def __init__(self, small: Problem, space: Space) -> None:
        trunk = find_trunk(small.model)
        if trunk is None:
            raise HesscopeError(
                "Expected a model with a list of like blocks for engine='streamed', found none; use another engine."
            )
        if small.dropout == "frozen":
            raise HesscopeError(
                "Expected dropout='off' with engine='streamed': a block that runs again would draw another mask."
            )
        self.trunk = trunk
        selected = set(space.names)
        names = names_inside(small.model, trunk)
        self.inside = [{local: name for local, name in block.items() if name in selected} for block in names]
        elsewhere = {name for alias, name in aliases(small.model).items() if not alias.startswith(f"{trunk.prefix}.")}
        self.outside = [name for name in space.names if name in elsewhere]
        leaves = {name: p.requires_grad_() for name, p in parameter_values(small, space).items()}
        with torch.enable_grad():
            _, calls = record(small, 0, trunk, leaves)
        require_no_detours(calls, trunk)
        self.stem = calls[0].hidden.requires_grad
        reached = (i for i, block in enumerate(self.inside) if block)
        self.start = 0 if self.stem else next(reached, len(trunk.blocks))
