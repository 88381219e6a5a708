"""A token loss that never has logits for more than a chunk of tokens: it takes the output projection in."""

from __future__ import annotations

from typing import Any, TypeGuard

from torch import Tensor, nn

from hesscope.losses.causal_lm import CausalLMLoss
from hesscope.losses.chunked_head import HeadForm
from hesscope.losses.cross_entropy import IGNORED
from hesscope.losses.head_functions import projected_cross_entropy
from hesscope.losses.protocol import Loss
from hesscope.losses.seq2seq_lm import Seq2SeqLMLoss
from hesscope.losses.standing_logits import Projection, StandingLogits, WatchProjection, output_weight
from hesscope.losses.tokens import TokenLoss

#: A loss that builds on one of these may do something else besides.
_PLAIN = (CausalLMLoss, Seq2SeqLMLoss)


class HeadLoss:
    """The same function as a `TokenLoss`, and the same as the model's own where that does something else to its logits.

    Args:
        base: the loss.
        rows: tokens a chunk; by default so many that a chunk's tensors stay small.
        keep: keep the projection's output between products, which saves one of seven products of matrices; by default where
            it is small.
    """

    def __init__(self, base: TokenLoss, rows: int | None = None, keep: bool | None = None) -> None:
        self._base, self._rows, self._keep = base, rows, keep
        #: What the last call did, in words, and whether it was in chunks.
        self.form, self.chunked = "", False

    def count(self, batch: dict[str, Any]) -> int:
        """The number of valid targets, without running the model."""
        return self._base.count(batch)

    def total(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Sum and count of one batch."""
        projection, logits, reason = projection_of(self._base, model, batch)
        self.chunked = projection is not None
        if projection is None:
            self.form = f"whole logits: {reason}"
            return self._base.total_of_outputs(logits, batch)
        h_Td, y_T = counted(projection.hidden, self._base.targets(batch))
        form = HeadForm(projection.map, self._rows, self._keep)
        self.form = in_words(projection, form, len(y_T))
        return projected_cross_entropy(h_Td, projection.weight, projection.bias, y_T, form), len(y_T)


def has_plain_head(loss: object) -> TypeGuard[TokenLoss]:
    """Whether a loss is the sum of its tokens' cross-entropies and nothing else."""
    return type(loss) in _PLAIN


def head_loss(loss: Loss, keep: bool | None = None) -> Loss:
    """The loss with its head in chunks if it is one that can have it; else the loss itself."""
    return HeadLoss(loss, keep=keep) if has_plain_head(loss) else loss


def head_note(loss: Loss | None) -> str:
    """What the last call of a loss did about the head; empty where it is no `HeadLoss`."""
    return loss.form if isinstance(loss, HeadLoss) else ""


def projection_of(loss: TokenLoss, model: nn.Module, batch: dict[str, Any]) -> tuple[Projection | None, Tensor, str]:
    """Run the model; what its logits are projected from, or the logits and why there is no such thing."""
    weight = output_weight(model)
    if weight is None:
        return None, loss.outputs(model, batch), "the model names no linear layer as its last"
    with WatchProjection(weight) as watch:
        logits = loss.outputs(model, batch)
    if not isinstance(logits, StandingLogits):
        called = "does more to them than scale, cap or shift each" if watch.calls else "does not call its last layer"
        return None, logits, f"the model {called}"
    projection = logits.projection
    if logits.formed is not None or not projection.untouched:
        return (
            None,
            logits.form() if projection.untouched else loss.outputs(model, batch),
            "the model changes them in place",
        )
    if projection.hidden.shape[:-1] != loss.targets(batch).shape:
        return None, logits.form(), "they are not one row for each token"
    return projection, logits, ""


def counted(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and targets of the tokens that count, [T, d] and [T], where the hidden states are."""
    h_Nd, y_N = hidden.flatten(0, -2), targets.flatten().to(hidden.device)
    valid_T = (y_N != IGNORED).nonzero()[:, 0]
    if len(valid_T) == len(y_N):
        return h_Nd, y_N
    return h_Nd.index_select(0, valid_T), y_N[valid_T]


def in_words(projection: Projection, form: HeadForm, tokens: int) -> str:
    """What the head does, for the record of a result."""
    steps = f" ({projection.map})" if projection.map.steps else ""
    kept = ", kept between products" if form.keeps(tokens, projection.weight) else ""
    return f"logits{steps} in chunks of at most {form.most(projection.weight)} tokens{kept}"
