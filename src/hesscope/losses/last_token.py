"""A language model as a classifier of sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscope.losses.causal_lm import next_tokens
from hesscope.losses.cross_entropy import IGNORED, cross_entropy_residual, summed_cross_entropy
from hesscope.losses.output_hessian import Kernel, cross_entropy_hessian_product
from hesscope.losses.sampling import sample_classes
from hesscope.losses.tokens import LogitsLoss, raised


class LastTokenCrossEntropyLoss(LogitsLoss):
    """The sum over sequences of -log softmax(logits[t])[labels[t + 1]] at the last t whose target counts, in nats.

    Each sequence is one example: its last valid token is the class, out of the vocabulary, and everything before it the
    input. N counts the sequences that have a valid target. Batches are those of `CausalLMLoss`.
    """

    def total_of_outputs(self, outputs: Tensor, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Sum and count from the logits, of which one row a sequence is read."""
        last_B, targets_B = _last_targets(batch)
        return summed_cross_entropy(raised(_read(outputs, last_B)), targets_B), self.count(batch)

    def count(self, batch: dict[str, Any]) -> int:
        """The number of sequences with a valid target, without running the model."""
        return int((next_tokens(batch["labels"]) != IGNORED).any(1).sum())

    def residual(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        """p - e_target at every sequence's last valid position, [B, T, vocabulary]; zero elsewhere."""
        last_B, targets_B = _last_targets(batch)
        return _placed(cross_entropy_residual(raised(_read(outputs, last_B)), targets_B), last_B, outputs)

    def output_hessian_product(
        self, outputs: Tensor, batch: dict[str, Any], u: Tensor, kernel: str | Kernel = "auto"
    ) -> Tensor:
        """(diag p - p p^T) u at every sequence's last valid position, [B, T, vocabulary]; zero elsewhere."""
        last_B, targets_B = _last_targets(batch)
        rows = raised(_read(outputs, last_B)), targets_B, raised(_read(u, last_B))
        return _placed(cross_entropy_hessian_product(*rows, kernel), last_B, outputs)

    def term_axes(self, outputs: Tensor) -> tuple[int, ...]:
        """The vocabulary: a term is a sequence, at its last valid position."""
        return (outputs.dim() - 1,)

    def sample(self, outputs: Tensor, batch: dict[str, Any], key: int, first: int) -> dict[str, Any]:
        """The batch with a token drawn from the model's distribution as the class of every sequence that has one."""
        last_B, targets_B = _last_targets(batch)
        drawn_B = sample_classes(_read(outputs, last_B), targets_B != IGNORED, key, first)
        # A label stands one position after the logits that predict it; that of a sequence without any stays.
        labels, place_B1 = batch["labels"], (last_B + 1).clamp(max=outputs.shape[1] - 1)[:, None]
        new_B1 = torch.where(drawn_B != IGNORED, drawn_B, labels.gather(1, place_B1)[:, 0])[:, None]
        return {**batch, "labels": labels.scatter(1, place_B1, new_B1)}


def _last_targets(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Each sequence's last position with a valid target, and that target; 0 and -100 where it has none, [B] both."""
    targets_BT = next_tokens(batch["labels"])
    places_T = torch.arange(targets_BT.shape[1], device=targets_BT.device)
    last_B = torch.where(targets_BT != IGNORED, places_T, 0).amax(1)
    return last_B, targets_BT.gather(1, last_B[:, None])[:, 0]


def _read(x_BTV: Tensor, last_B: Tensor) -> Tensor:
    """The row of every sequence's last position, [B, V]."""
    return x_BTV.gather(1, last_B[:, None, None].expand(-1, 1, x_BTV.shape[-1]))[:, 0]


def _placed(rows_BV: Tensor, last_B: Tensor, outputs: Tensor) -> Tensor:
    """Rows in the place of every sequence's last position, zero elsewhere, [B, T, V]."""
    result = rows_BV.new_zeros(outputs.shape)
    return result.scatter_(1, last_B[:, None, None].expand(-1, 1, outputs.shape[-1]), rows_BV[:, None])
