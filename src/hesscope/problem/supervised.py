"""Classification and regression problems."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from hesscope.errors import HesscopeError
from hesscope.losses import CrossEntropyLoss, Loss, SquaredErrorLoss
from hesscope.problem.problem import Problem

_LOSSES: dict[str, type[CrossEntropyLoss] | type[SquaredErrorLoss]] = {
    "cross_entropy": CrossEntropyLoss,
    "mse": SquaredErrorLoss,
}


def supervised(
    model: nn.Module,
    batches: Iterable[Any],
    loss: str | Loss = "cross_entropy",
    *,
    objective: str = "nll",
    dropout: str = "off",
    seed: int = 0,
) -> Problem:
    """A problem over (inputs, targets) batches.

    Args:
        model: maps inputs to a tensor (or to an object with `.logits`). Inputs may be a tensor, a tuple of positional
            arguments or a dictionary of keyword arguments.
        batches: any iterable of (inputs, targets), of any sizes; the risk divides by the total count once.
        loss: "cross_entropy" (R in nats, mean over examples), "mse" (mean over elements), or an object with `total`.

    Raises:
        HesscopeError: an unknown loss, no batches, active dropout.

    Example:
        >>> import torch, hesscope as hs
        >>> X, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [1.0]])
        >>> problem = hs.supervised(torch.nn.Linear(1, 1, bias=False), [(X, y)], loss="mse")
        >>> hs.block(hs.hessian(problem)).matrix      # (2/N) X^T X
        tensor([[5.]])
    """
    if isinstance(loss, str):
        if loss not in _LOSSES:
            raise HesscopeError(f"Expected loss to be one of {', '.join(_LOSSES)}, or an object, got {loss!r}.")
        return supervised(model, batches, _LOSSES[loss](), objective=objective, dropout=dropout, seed=seed)
    return Problem(model, loss, batches, objective=objective, dropout=dropout, seed=seed)
