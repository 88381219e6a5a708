"""Next-token negative log-likelihood."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from hesscope.losses.cross_entropy import IGNORED
from hesscope.losses.tokens import TokenLoss


class CausalLMLoss(TokenLoss):
    """The sum over valid targets of -log softmax(logits[t])[labels[t + 1]], in nats.

    A batch is a dictionary of `input_ids` [B, T], `labels` [B, T] and whatever else the model's forward takes. Labels
    of -100 do not count. Half-precision logits are raised to float32 first.
    """

    def targets(self, batch: dict[str, Any]) -> Tensor:
        """The label one position on. The labels are shifted, not the logits, which would copy the larger tensor."""
        return next_tokens(batch["labels"])

    def with_targets(self, batch: dict[str, Any], targets: Tensor) -> dict[str, Any]:
        """The batch with labels that have these targets."""
        return {**batch, "labels": F.pad(targets[:, :-1], (1, 0), value=IGNORED)}


def next_tokens(labels: Tensor) -> Tensor:
    """The target of every position, [B, T]: the label after it; -100, which does not count, at the last one."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def valid_targets(labels: Tensor) -> int:
    """How many labels count: those other than -100 that have a token before them."""
    return int((labels[:, 1:] != IGNORED).sum())
