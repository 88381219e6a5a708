"""Losses: what is summed over a batch, and how many terms that sum has."""

from hesscope.losses.causal_lm import CausalLMLoss
from hesscope.losses.derivatives import output_hessian_product, residual
from hesscope.losses.last_token import LastTokenCrossEntropyLoss
from hesscope.losses.mean import MeanLoss
from hesscope.losses.one_hot import OneHotSquaredErrorLoss
from hesscope.losses.positions import PositionsLoss, position_chunks
from hesscope.losses.projected import ProjectedCausalLMLoss, output_weight
from hesscope.losses.protocol import HasTerms, Loss, SamplingLoss, SplitLoss
from hesscope.losses.seq2seq_lm import Seq2SeqLMLoss
from hesscope.losses.supervised import CrossEntropyLoss, SquaredErrorLoss

__all__ = [
    "CausalLMLoss",
    "CrossEntropyLoss",
    "HasTerms",
    "LastTokenCrossEntropyLoss",
    "Loss",
    "MeanLoss",
    "OneHotSquaredErrorLoss",
    "PositionsLoss",
    "ProjectedCausalLMLoss",
    "SamplingLoss",
    "Seq2SeqLMLoss",
    "SplitLoss",
    "SquaredErrorLoss",
    "output_hessian_product",
    "output_weight",
    "position_chunks",
    "residual",
]
