"""The stated error of a diagonal is the sampling's; with the measured error of products it tells the whole."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import hesscope as hs
from architectures import ragged_batches, tiny
from oracles import linearized_lm, relative

#: A diagonal's error may be so many times that of the one product that was measured.
MARGIN = 3.0


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sampling_and_products_together_are_the_error_in_bfloat16(name: str) -> None:
    """Of a matrix of low rank nothing is left to sample: three tokens, whose GGN has hardly more directions than products."""
    model, batches = tiny(name, torch.bfloat16), [{"input_ids": ragged_batches()[0]["input_ids"][:1, :3]}]
    problem = hs.causal_lm(model, batches)
    space = hs.select(problem, "*.1.*mlp*weight")
    expected = linearized_lm(copy.deepcopy(model).double(), batches, space).ggn().diagonal()
    measured = hs.ggn(problem, space).product_error()  # type: ignore[attr-defined]
    rounding = float(measured.relative)
    for method in ("exact", "deflated", "xdiag", "nystrom"):
        found = hs.diagonal(hs.ggn(problem, space), method=method, budget=None if method == "exact" else 120)
        assert relative(found.flat(), expected) < MARGIN * math.hypot(found.relative_error, rounding), method
        if method in ("exact", "deflated", "xdiag"):
            assert found.relative_error < 1e-3 * rounding
