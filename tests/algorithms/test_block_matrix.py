"""The exact block is the matrix, says how symmetric it was, and is refused where it would not fit."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

import hesscope as hs
from hesscope.operators import chunks as chunks_module
from spectra import SPECTRA, Counted, generic, symmetric


@pytest.mark.parametrize("name", SPECTRA)
def test_a_block_is_the_matrix(name: str) -> None:
    A = symmetric(SPECTRA[name])
    counted = Counted(A)
    found = hs.block(counted.operator())
    torch.testing.assert_close(found.matrix, A, rtol=0, atol=1e-15 * float(A.abs().max()))
    assert found.asymmetry <= 1e-15
    assert found.products == counted.columns == len(A)
    assert found.labels == [f"x[{i}]" for i in range(len(A))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_has_the_operators_dtype(dtype: torch.dtype) -> None:
    A = generic(20).to(dtype)
    assert torch.equal(hs.block(hs.operator(A)).matrix, A)
    assert hs.block(hs.operator(A)).matrix.dtype == dtype


def test_asymmetry_is_reported_and_removed() -> None:
    A = generic(30)
    E = 1e-4 * torch.randn(30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    B = A + E
    found = hs.block(hs.operator(lambda X: B @ X, size=30, dtype=torch.float64))
    assert found.asymmetry == pytest.approx(float((B - B.T).abs().max() / B.abs().max()), rel=1e-12)
    assert found.asymmetry > 1e-5
    torch.testing.assert_close(found.matrix, 0.5 * (B + B.T))
    assert found.error() == {"asymmetry": found.asymmetry}


def test_chunks_do_not_change_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    A = generic(30)
    for largest, calls in ((1, 30), (7, 5), (100, 1)):
        monkeypatch.setattr(chunks_module, "_LARGEST_CHUNK", largest)
        counted = Counted(A)
        torch.testing.assert_close(hs.block(counted.operator()).matrix, A, rtol=0, atol=1e-15)
        assert counted.calls == calls


def test_a_block_of_several_parameters_is_labelled_in_the_selections_order() -> None:
    model = torch.nn.Linear(3, 2).double()
    X = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 1.0]], dtype=torch.float64)
    batches = [(X[:1], torch.zeros(1, 2, dtype=torch.float64)), (X[1:], torch.zeros(1, 2, dtype=torch.float64))]
    problem = hs.supervised(model, batches, loss="mse")
    space = hs.select(problem, {"weight": [5, 1], "bias": [0]})
    found = hs.block(hs.hessian(problem, space))
    assert found.labels == ["weight[1, 2]", "weight[0, 1]", "bias[0]"]
    # R = (1/4) sum over sequences and outputs of (w_o . x + b_o)^2, so H[(o, i), (o, j)] = (1/2) sum x_i x_j.
    expected = torch.tensor([[0.625, 0.0, 0.0], [0.0, 2.5, 0.5], [0.0, 0.5, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(found.matrix, expected)


def test_a_block_beyond_memory_is_refused_with_the_largest_size_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(torch.eye(50, dtype=torch.float64))
    monkeypatch.setattr("hesscope.operators.free.available_bytes", lambda _: 3 * 40 * 40 * 8)
    with pytest.raises(hs.HesscopeError, match=r"50 x 50 needs .* GiB.* select at most 40 coordinates"):
        hs.block(counted.operator())
    assert counted.calls == 0
    monkeypatch.setattr("hesscope.operators.free.available_bytes", lambda _: 3 * 50 * 50 * 8)
    hs.block(counted.operator())


def test_a_probe_before_a_long_run_is_not_counted() -> None:
    result = hs.block(hs.operator(torch.eye(120)))
    assert result.products == 120
    assert result.provenance["probe"]["products"] == 3


def test_a_block_beyond_the_disk_is_refused_where_it_would_keep_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    A = hs.operator(torch.eye(50, dtype=torch.float64))
    module = importlib.import_module("hesscope.algorithms.block")
    monkeypatch.setattr(module, "free_disk_bytes", lambda _: 3 * 40 * 40 * 8)
    with pytest.raises(hs.HesscopeError, match=r"fits in the disk.* 50 x 50 needs .* select at most 40 coordinates"):
        hs.block(A, checkpoint=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    hs.block(A)
