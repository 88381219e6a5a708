"""The GGN of a small model is that of another library, where `pip install 'hesscope[peers]'` was possible."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hesscope as hs
from oracles import relative

curvlinops = pytest.importorskip(
    "curvlinops", reason="curvlinops-for-pytorch is not installed; pip install 'hesscope[peers]'"
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # theirs, and torch's own in what they call
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_batches_of_unequal_sizes(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    X = [torch.randn(n, 4, generator=g, dtype=torch.float64) for n in (2, 5, 1)]
    if kind == "classification":
        targets = [torch.randint(0, 3, (len(x),), generator=g) for x in X]
        loss, theirs = "cross_entropy", nn.CrossEntropyLoss()
    else:
        targets = [torch.randn(len(x), 3, generator=g, dtype=torch.float64) for x in X]
        loss, theirs = "mse", nn.MSELoss()
    batches = list(zip(X, targets, strict=True))
    ours = hs.ggn(hs.supervised(model, batches, loss=loss)).to_dense()
    operator = curvlinops.GGNLinearOperator(model, theirs, list(model.parameters()), batches)
    assert relative(operator @ torch.eye(len(ours), dtype=torch.float64), ours) < 1e-10
