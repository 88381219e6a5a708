"""A problem of a configuration alone: a model without weights, and batches without text."""

from __future__ import annotations

import torch
from torch import nn

from hesscope.errors import HesscopeError
from hesscope.models import context_length, mark_as_shadow
from hesscope.problem import Problem
from hesscope.problem.causal_lm import LONGEST_DEFAULT, loss_named


def skeleton_problem(
    model: nn.Module,
    length: int | None = None,
    batch_size: int = 1,
    sequences: int | None = None,
    loss: str = "next_token",
    objective: str = "nll",
) -> Problem:
    """`sequences` sequences of `length` tokens for a model on the meta device, every token the same.

    Raises:
        HesscopeError: a length that the model does not take, or numbers below 1.
    """
    context = context_length(model)
    length = min(context or LONGEST_DEFAULT, LONGEST_DEFAULT) if length is None else length
    if length < 2 or (context is not None and length > context):
        raise HesscopeError(f"Expected length to be from 2 to the model's context, {context or 'any'}, got {length}.")
    if batch_size < 1 or (sequences is not None and sequences < 1):
        raise HesscopeError(f"Expected numbers of sequences to be 1 or more, got {min(batch_size, sequences or 1)}.")
    total = batch_size if sequences is None else sequences
    rows = [min(batch_size, total - start) for start in range(0, total, batch_size)]
    one = torch.zeros(1, length, dtype=torch.long)
    batches = [{"input_ids": one.repeat(r, 1), "labels": one.repeat(r, 1)} for r in rows]
    return Problem(
        mark_as_shadow(model), loss_named(loss), batches, objective=objective, source={"data": "none", "length": length}
    )
