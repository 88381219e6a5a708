"""Next-token negative log-likelihood."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hesscope.losses.cross_entropy import IGNORED, summed_cross_entropy


class CausalLMLoss:
    """The sum over valid targets of -log softmax(logits[t])[labels[t + 1]], in nats.

    A batch is a dictionary of `input_ids` [B, T], `labels` [B, T] and whatever else the model's forward takes. Labels
    of -100 do not count. Half-precision logits are raised to float32 first.
    """

    def outputs(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The logits, [B, T, vocabulary]."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        output = model(**inputs, use_cache=False) if hasattr(model, "config") else model(**inputs)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    def total_of_outputs(self, outputs: Tensor, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Sum and count from the logits. The labels are shifted, not the logits, which would copy the larger tensor."""
        logits = outputs if outputs.dtype == torch.float64 else outputs.float()
        targets = next_tokens(batch["labels"])
        return summed_cross_entropy(logits.flatten(0, 1), targets.flatten()), self.count(batch)

    def total(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Sum and count of one batch."""
        return self.total_of_outputs(self.outputs(model, batch), batch)

    def count(self, batch: dict[str, Any]) -> int:
        """The number of valid targets, without running the model."""
        return valid_targets(batch["labels"])


def next_tokens(labels: Tensor) -> Tensor:
    """The target of every position, [B, T]: the label after it; -100, which does not count, at the last one."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def valid_targets(labels: Tensor) -> int:
    """How many labels count: those other than -100 that have a token before them."""
    return int((labels[:, 1:] != IGNORED).sum())
