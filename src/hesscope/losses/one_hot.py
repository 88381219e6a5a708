"""A language model as a regression onto the next token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hesscope.losses.causal_lm import CausalLMLoss, next_tokens
from hesscope.losses.cross_entropy import IGNORED


class OneHotSquaredErrorLoss:
    """The sum over valid targets t and vocabulary entries v of (logits[t, v] - 1[v = labels[t + 1]])^2.

    The square loss as it is used for classification: logits are regressed onto the one-hot next token. N counts
    elements, valid targets times the width of the logits, so that the risk is their mean, as for `torch.nn.MSELoss`.
    Batches are those of `CausalLMLoss`. The count is known only with the model's outputs.
    """

    #: In the logits.
    convex = True

    def __init__(self) -> None:
        self._model_of = CausalLMLoss()

    def outputs(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The logits, [B, T, vocabulary]."""
        return self._model_of.outputs(model, batch)

    def total_of_outputs(self, outputs: Tensor, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Sum and count from the logits; |z - e_y|^2 = |z|^2 - 2 z_y + 1 needs no one-hot tensor of their size."""
        targets_T = next_tokens(batch["labels"]).flatten()
        valid_T = targets_T != IGNORED
        z_NV, y_N = outputs.flatten(0, 1)[valid_T], targets_T[valid_T]
        z_NV = z_NV if z_NV.dtype == torch.float64 else z_NV.float()
        total = z_NV.square().sum() - 2 * z_NV.gather(1, y_N[:, None]).sum() + len(y_N)
        return total, z_NV.numel()

    def total(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Sum and count of one batch."""
        return self.total_of_outputs(self.outputs(model, batch), batch)
