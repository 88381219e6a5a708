"""A language model as a classifier of sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hesscope.losses.causal_lm import CausalLMLoss, next_tokens
from hesscope.losses.cross_entropy import IGNORED, summed_cross_entropy


class LastTokenCrossEntropyLoss:
    """The sum over sequences of -log softmax(logits[t])[labels[t + 1]] at the last t whose target counts, in nats.

    Each sequence is one example: its last valid token is the class, out of the vocabulary, and everything before it the
    input. N counts the sequences that have a valid target. Batches are those of `CausalLMLoss`.
    """

    #: In the logits.
    convex = True

    def __init__(self) -> None:
        self._model_of = CausalLMLoss()

    def outputs(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The logits, [B, T, vocabulary]."""
        return self._model_of.outputs(model, batch)

    def total_of_outputs(self, outputs: Tensor, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Sum and count from the logits, of which one row a sequence is read."""
        targets_BT = next_tokens(batch["labels"])
        last_B1 = _last_valid(targets_BT)[:, None]
        logits_BV = outputs.gather(1, last_B1[..., None].expand(-1, 1, outputs.shape[-1]))[:, 0]
        logits_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
        return summed_cross_entropy(logits_BV, targets_BT.gather(1, last_B1)[:, 0]), self.count(batch)

    def total(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Sum and count of one batch."""
        return self.total_of_outputs(self.outputs(model, batch), batch)

    def count(self, batch: dict[str, Any]) -> int:
        """The number of sequences with a valid target, without running the model."""
        return int((next_tokens(batch["labels"]) != IGNORED).any(1).sum())


def _last_valid(targets_BT: Tensor) -> Tensor:
    """For each sequence the last position with a valid target; 0, whose target is ignored, where there is none."""
    places_T = torch.arange(targets_BT.shape[1], device=targets_BT.device)
    return torch.where(targets_BT != IGNORED, places_T, 0).amax(1)
