"""Problems that the tests of Kronecker factors share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import hesscope as hs
from architectures import ragged_batches, tiny


def language_model(name: str, *patterns: Any, batches: Any = None) -> tuple[hs.Problem, hs.Space]:
    problem = hs.causal_lm(tiny(name), ragged_batches() if batches is None else batches)
    return problem, hs.select(problem, *patterns)


def network() -> hs.Problem:
    """A classifier of ragged batches with an example that does not count; a position is an example."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    g = torch.Generator().manual_seed(2)
    batches = [
        (torch.randn(n, 3, generator=g, dtype=torch.float64), torch.randint(3, (n,), generator=g)) for n in (1, 6, 4)
    ]
    batches[1][1][2] = -100
    return hs.supervised(model, batches)
