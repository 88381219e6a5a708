"""Estimators of a diagonal on whole layers of a trained model, real text, against the exact diagonal."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hesscope as hs

ASSETS = Path(__file__).resolve().parents[3] / "shared" / "assets"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ASSETS.is_dir(), reason="the trained model and texts are not beside the repository"),
]
SEEDS, BUDGET = 8, 62
#: The least and the largest share of entries that 95% intervals hold: independent probes, and samples that share something.
COVERS = {"hutchinson": (0.93, 0.97), "deflated": (0.93, 0.97), "per-sequence": (0.93, 0.97), "nystrom": (0.90, 0.97)}
LAYERS = ["model.layers.4.self_attn.q_proj.weight", "model.layers.4.self_attn.v_proj.weight"]


@cache
def operator(name: str) -> hs.Operator:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "stories260k")
    lines = (ASSETS / "text" / "tinystories_sample.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [tokenizer(json.loads(line)["text"])["input_ids"] for line in lines[:80]]
    ids = torch.tensor([row[:64] for row in rows if len(row) >= 64][:16])
    problem = hs.causal_lm(str(ASSETS / "stories260k"), ids, batch_size=16)
    return hs.hessian(problem, hs.select(problem, name))


@cache
def exact(name: str) -> Tensor:
    return hs.diagonal(operator(name), method="exact").flat().double()


@pytest.mark.parametrize("method", list(COVERS))
@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_over_seeds_is_the_exact_diagonal_and_intervals_cover(name: str, method: str) -> None:
    """Of the mean its own error, from what the runs state, is what is left."""
    H, d, shares = operator(name), exact(name), []
    found = [hs.diagonal(H, method=method, budget=BUDGET, seed=seed) for seed in range(SEEDS)]
    gap = torch.stack([run.flat().double() for run in found]).mean(0) - d
    variances = torch.stack(
        [torch.cat([e.double().flatten() for e in run.standard_error.values()]) ** 2 for run in found]
    ).mean(0)
    ratio = float(gap.square().sum() / (variances.sum() / SEEDS))
    # Thousands of entries, but few directions: the sum of squares spreads by about a fifth.
    assert 0.6 < ratio < 1.6
    for run in found:
        low, high = (torch.cat([part.flatten() for part in end.values()]).double() for end in run.interval())
        shares.append(float(((low <= d) & (d <= high)).double().mean()))
    least, most = COVERS[method]
    assert least <= sum(shares) / len(shares) <= most


def test_on_all_ones_the_mean_is_one() -> None:
    """Balanced signs would give zero here."""
    H = hs.operator(torch.ones(64, 64, dtype=torch.float64))
    for method in ("hutchinson", "gaussian", "deflated", "nystrom", "auto"):
        found = torch.stack([hs.diagonal(H, method=method, budget=32, seed=s).flat() for s in range(40)])
        error = found.std(0).mean() / 40**0.5
        assert float((found.mean(0) - 1).abs().mean()) < 3 * float(error) + 1e-10
