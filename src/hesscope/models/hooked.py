"""Models that are called as those of TransformerLens are: tokens first, `return_type="logits"`, a tensor comes back."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn


def is_hooked(model: nn.Module) -> bool:
    """Whether a model has TransformerLens's `cfg` and the signature `forward(input, return_type=...)`."""
    return hasattr(model, "cfg") and "return_type" in inspect.signature(model.forward).parameters


def hooked_logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The logits [B, T, vocabulary] of a batch; nothing is put before its tokens."""
    more = {"attention_mask": batch["attention_mask"]} if "attention_mask" in batch else {}
    logits: Tensor = model(batch["input_ids"], return_type="logits", **more)
    return logits
