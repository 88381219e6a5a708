"""Targets sampled from the model's own predictions, each by a random number that belongs to its place in the data.

Term number k of the frozen data (valid targets counted through all batches, in their order) always gets number k of its
stream, so that padding and the cutting into batches do not change what is drawn. Legend: T rows, V classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hesscope.losses.cross_entropy import IGNORED
from hesscope.space import random

#: A chunk of rows is accumulated in float64: so many bytes at most.
_CHUNK_BYTES = 64 * 2**20


def sample_classes(logits_TV: Tensor, valid_T: Tensor, key: int, first: int) -> Tensor:
    """A class for every valid row, drawn from softmax(logits) by inverting its distribution function; -100 elsewhere.

    Valid row number i takes the uniform number at position `first + i` of the stream `key`.
    """
    positions = torch.nonzero(valid_T)[:, 0]
    numbers = first + torch.arange(len(positions), device=logits_TV.device)
    sampled_T = torch.full_like(valid_T, IGNORED, dtype=torch.int64)
    rows = max(1, _CHUNK_BYTES // (8 * logits_TV.shape[1]))
    for chunk, number in zip(torch.split(positions, rows), torch.split(numbers, rows), strict=True):
        cumulative_TV = torch.softmax(logits_TV[chunk].double(), -1).cumsum_(-1)
        # Scaled by the last sum, which rounding keeps from being one.
        thresholds_T1 = random.uniforms(key, number)[:, None] * cumulative_TV[:, -1:]
        sampled_T[chunk] = torch.searchsorted(cumulative_TV, thresholds_T1)[:, 0]
    return sampled_T


def sample_normal(means: Tensor, variance: float, key: int, first: int) -> Tensor:
    """Independent normal numbers around `means`; entry i (row-major) takes number `first + i` of the stream `key`."""
    numbers = first + torch.arange(means.numel(), device=means.device)
    noise = random.normals(key, numbers).reshape(means.shape).to(means.dtype)
    return torch.add(means, noise, alpha=math.sqrt(variance))
