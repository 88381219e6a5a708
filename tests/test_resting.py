"""Tensors that rest come back as they were, and leave nothing behind."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.resting import Rest
from oracles import relative


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("place", ["device", "cpu", "disk", "folder"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_what_is_laid_down_comes_back(place: str, dtype: torch.dtype, temporary: Path) -> None:
    own = temporary / "own"
    own.mkdir()
    rest = Rest(own if place == "folder" else place)
    x = torch.randn(3, 4, dtype=dtype)
    resting = rest.put(x.T)
    assert torch.equal(resting.bring(), x.T)
    on_disk = place in ("disk", "folder")
    assert bool(list(temporary.rglob("*.safetensors"))) is on_disk
    assert (resting.kept == []) is on_disk
    del resting
    assert not list(temporary.rglob("*.safetensors"))
    del rest
    gc.collect()
    assert not list(temporary.rglob("hesscope-*"))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_products_are_the_same_and_files_go(name: str, temporary: Path) -> None:
    usual, on_disk = (hs.causal_lm(tiny(name), ragged_batches(), borders=place) for place in ("device", "disk"))
    for make in (hs.hessian, hs.ggn):
        A, B = (make(problem, engine="streamed") for problem in (usual, on_disk))
        V = A.space.gaussian(0, [0, 1])
        assert relative(A.space.flatten(A.matmat(V)), B.space.flatten(B.matmat(V))) == 0.0
        del B
    gc.collect()
    assert not list(temporary.rglob("hesscope-*"))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_vectors_rest_on_disk(name: str, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers; sums of products, the Lanczos vectors and the basis are files, and go with the run."""
    made: list[int] = []
    whole = torch.from_file

    def watched(path: str, **how: Any) -> torch.Tensor:
        made.append(Path(path).stat().st_size)
        return whole(path, **how)  # type: ignore[no-any-return]

    usual, on_disk = (hs.causal_lm(tiny(name), ragged_batches(), vectors=place) for place in ("device", "disk"))
    A, B = hs.hessian(usual, engine="streamed"), hs.hessian(on_disk)
    v = A.space.gaussian(0, [0])
    expected = A.space.flatten(A.matmat(v))
    monkeypatch.setattr(torch, "from_file", watched)
    assert relative(B.space.flatten(B.matmat(v)), expected) == 0.0
    assert made[-1] == 8 * B.space.size  # one file for the sum
    assert B.describe()["engine_choice"] == "streamed: the problem's vectors rest elsewhere"
    before = len(made)
    ours, theirs = hs.lanczos(B, 3, basis_folder=temporary), hs.lanczos(A, 3)
    assert torch.equal(ours.T, theirs.T)
    assert len(made) - before == 3 * len(B.space.coordinates) + 3  # start, unit start, basis; and a sum a step
    part = hs.select(on_disk, {A.space.names[0]: [0, 2, 5]})
    torch.testing.assert_close(
        hs.block(hs.hessian(on_disk, part)).matrix,
        hs.block(hs.hessian(usual, hs.select(usual, {A.space.names[0]: [0, 2, 5]}))).matrix,
    )
    del B, ours
    gc.collect()
    assert not list(temporary.rglob(".hesscope-*"))


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(
        hs.HesscopeError, match="Expected borders to be device, cpu, disk or a folder that exists, got 'gpu'"
    ):
        hs.causal_lm(tiny("gpt2"), ragged_batches(), borders="gpu")
    with pytest.raises(hs.HesscopeError, match="Expected vectors to be device, cpu, disk or a folder that exists"):
        hs.causal_lm(tiny("gpt2"), ragged_batches(), vectors="nowhere")
