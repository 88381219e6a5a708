"""Negative log-likelihood of an encoder-decoder's targets."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hesscope.losses.tokens import TokenLoss


class Seq2SeqLMLoss(TokenLoss):
    """The sum over valid targets of -log softmax(logits[t])[labels[t]], in nats.

    A batch is a dictionary of `input_ids` [B, S], `labels` [B, T], `decoder_input_ids` [B, T] (the labels one position
    later, as the model itself shifts them) and whatever else the model's forward takes. Labels of -100 do not count.
    """

    def targets(self, batch: dict[str, Any]) -> Tensor:
        """The labels."""
        labels: Tensor = batch["labels"]
        return labels

    def with_targets(self, batch: dict[str, Any], targets: Tensor) -> dict[str, Any]:
        """The batch with these labels; the decoder's inputs stay."""
        return {**batch, "labels": targets}
