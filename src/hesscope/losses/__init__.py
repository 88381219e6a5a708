"""Losses: what is summed over a batch, and how many terms that sum has."""

from hesscope.losses.causal_lm import CausalLMLoss, valid_targets
from hesscope.losses.last_token import LastTokenCrossEntropyLoss
from hesscope.losses.mean import MeanLoss
from hesscope.losses.one_hot import OneHotSquaredErrorLoss
from hesscope.losses.projected import ProjectedCausalLMLoss
from hesscope.losses.protocol import Loss, SplitLoss
from hesscope.losses.supervised import CrossEntropyLoss, SquaredErrorLoss

__all__ = [
    "CausalLMLoss",
    "CrossEntropyLoss",
    "LastTokenCrossEntropyLoss",
    "Loss",
    "MeanLoss",
    "OneHotSquaredErrorLoss",
    "ProjectedCausalLMLoss",
    "SplitLoss",
    "SquaredErrorLoss",
    "valid_targets",
]
