"""Losses: what is summed over a batch, and how many terms that sum has."""

from hesscope.losses.causal_lm import CausalLMLoss
from hesscope.losses.chunked_head import ChunkedHead, HeadForm
from hesscope.losses.derivatives import output_hessian_product, residual, takes_kernel
from hesscope.losses.fingerprint import KnownLoss, loss_fingerprint
from hesscope.losses.head import HeadLoss, counted, has_plain_head, head_loss, head_note, in_words, projection_of
from hesscope.losses.head_functions import projected_cross_entropy
from hesscope.losses.head_matrix import TokenMatrix, through_projection
from hesscope.losses.last_token import LastTokenCrossEntropyLoss
from hesscope.losses.mean import as_loss
from hesscope.losses.one_hot import OneHotSquaredErrorLoss
from hesscope.losses.positions import PositionsLoss, position_chunks
from hesscope.losses.projected import ProjectedCausalLMLoss
from hesscope.losses.protocol import HasTerms, Loss, SamplingLoss, SplitLoss
from hesscope.losses.seq2seq_lm import Seq2SeqLMLoss
from hesscope.losses.standing_logits import Projection, output_weight
from hesscope.losses.supervised import CrossEntropyLoss, SquaredErrorLoss

__all__ = [
    "CausalLMLoss",
    "ChunkedHead",
    "CrossEntropyLoss",
    "HasTerms",
    "HeadForm",
    "HeadLoss",
    "KnownLoss",
    "LastTokenCrossEntropyLoss",
    "Loss",
    "OneHotSquaredErrorLoss",
    "PositionsLoss",
    "ProjectedCausalLMLoss",
    "Projection",
    "SamplingLoss",
    "Seq2SeqLMLoss",
    "SplitLoss",
    "SquaredErrorLoss",
    "TokenMatrix",
    "as_loss",
    "counted",
    "has_plain_head",
    "head_loss",
    "head_note",
    "in_words",
    "loss_fingerprint",
    "output_hessian_product",
    "output_weight",
    "position_chunks",
    "projected_cross_entropy",
    "projection_of",
    "residual",
    "takes_kernel",
    "through_projection",
]
