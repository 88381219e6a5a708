"""A language model as a regression onto the next token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscope.losses.causal_lm import next_tokens
from hesscope.losses.cross_entropy import IGNORED
from hesscope.losses.sampling import sample_normal
from hesscope.losses.supervised import VARIANCE
from hesscope.losses.tokens import LogitsLoss, raised


class OneHotSquaredErrorLoss(LogitsLoss):
    """The sum over valid targets t and vocabulary entries v of (logits[t, v] - 1[v = labels[t + 1]])^2.

    The square loss as it is used for classification: logits are regressed onto the one-hot next token. N counts
    elements, valid targets times the width of the logits, so that the risk is their mean, as for `torch.nn.MSELoss`.
    Batches are those of `CausalLMLoss`. The count is known only with the model's outputs.

    As a negative log-likelihood it belongs to independent normal targets of variance 1/2 around the logits. Drawn ones are
    a batch's `targets`, [B, T, vocabulary], where its labels say which positions count.
    """

    unread = ("labels", "targets")

    def total_of_outputs(self, outputs: Tensor, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Sum and count from the logits; |z - e_y|^2 = |z|^2 - 2 z_y + 1 needs no one-hot tensor of their size."""
        y_N, valid_N = _labels(batch)
        z_CV = raised(outputs.flatten(0, 1)[valid_N])
        if "targets" in batch:
            return (z_CV - batch["targets"].flatten(0, 1)[valid_N]).square().sum(), z_CV.numel()
        y_C = y_N[valid_N]
        total = z_CV.square().sum() - 2 * z_CV.gather(1, y_C[:, None]).sum() + len(y_C)
        return total, z_CV.numel()

    def residual(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        """2 (logits - target) at every valid position, [B, T, vocabulary]; zero elsewhere."""
        y_N, valid_N = _labels(batch)
        r_NV = 2.0 * raised(outputs).flatten(0, 1)
        if "targets" in batch:
            r_NV -= 2.0 * batch["targets"].flatten(0, 1)
        else:
            r_NV.scatter_add_(1, y_N.clamp(min=0)[:, None], r_NV.new_full((len(y_N), 1), -2.0))
        return r_NV.masked_fill_(~valid_N[:, None], 0.0).reshape(outputs.shape)

    def output_hessian_product(self, outputs: Tensor, batch: dict[str, Any], u: Tensor) -> Tensor:
        """2 u at every valid position, [B, T, vocabulary]; zero elsewhere."""
        _, valid_N = _labels(batch)
        return (2.0 * raised(u)).masked_fill_(~valid_N.reshape(*u.shape[:2], 1), 0.0)

    def term_axes(self, outputs: Tensor) -> tuple[int, ...]:
        """None: a term is an element."""
        return ()

    def sample(self, outputs: Tensor, batch: dict[str, Any], key: int, first: int) -> dict[str, Any]:
        """The batch with targets drawn from the normal distributions around the logits of every valid position."""
        _, valid_N = _labels(batch)
        z_NV = raised(outputs).flatten(0, 1)
        drawn_NV = torch.zeros_like(z_NV)
        drawn_NV[valid_N] = sample_normal(z_NV[valid_N], VARIANCE, key, first)
        return {**batch, "targets": drawn_NV.reshape(outputs.shape)}


def _labels(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The token after every position of all sequences, and whether it counts, [N] both."""
    y_N = next_tokens(batch["labels"]).flatten()
    return y_N, y_N != IGNORED
