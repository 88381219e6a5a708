"""Which pieces of a model the derivatives of a selection run through."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from hesscope.engines.base import ValuesOnDemand
from hesscope.engines.trunk_run import names_inside, record, require_no_detours
from hesscope.errors import HesscopeError
from hesscope.losses import HeadLoss, head_loss
from hesscope.models import aliases, elsewhere, find_trunk
from hesscope.problem import Problem
from hesscope.space import Space


class TrunkPlan:
    """The trunk, and what of it is differentiated; found by one recorded run of the first sequence.

    Attributes:
        inside: for every block, {name inside it: name in the model} of what is selected.
        outside: the selected parameters that the stem or the head uses.
        stem: whether one of these comes before the first block.
        head: the loss by chunks of tokens where the model's head allows for it, None elsewhere.
        start: the first block that a derivative reaches; the number of blocks where none does.
        apart: whether a batch has to be recorded before derivatives go up through it.
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
        self.trunk, self.apart = trunk, False
        selected = set(space.names)
        names = names_inside(small.model, trunk)
        self.inside = [{local: name for local, name in block.items() if name in selected} for block in names]
        others = {name for alias, name in aliases(small.model).items() if not alias.startswith(f"{trunk.prefix}.")}
        self.outside = [name for name in space.names if name in others]
        loss, store = head_loss(small.loss, keep=False), elsewhere(small.model)
        values = ValuesOnDemand(small, space)
        # Offloaded weights of blocks are leaves when they are brought, and each block's graph goes before the next.
        kept = [name for name in space.names if store is None or name not in store or name in others]
        leaves = {name: values[name].requires_grad_() for name in kept}
        with torch.enable_grad(), store.differentiating(space.names) if store is not None else nullcontext():
            _, calls = record(small, 0, trunk, leaves, loss, apart=store is not None)
        require_no_detours(calls, trunk)
        self.head = loss if isinstance(loss, HeadLoss) and loss.chunked else None
        self.stem = calls[0].hidden.requires_grad
        reached = (i for i, block in enumerate(self.inside) if block)
        self.start = 0 if self.stem else next(reached, len(trunk.blocks))
