"""Memory figures of a GPU are those of torch's allocator."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import hesscope as hs
from hesscope.memory import available_bytes, available_together, least_available

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 100 bytes, 10 of them free, 40 reserved by torch, 25 in tensors."""
    figures = {"mem_get_info": (10, 100), "memory_reserved": 40, "memory_allocated": 25}
    for name, value in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)


@pytest.mark.usefixtures("gpu")
def test_what_torch_holds_without_a_tensor_in_it_is_free() -> None:
    assert available_bytes(GPU) == 10 + (40 - 25)


@pytest.mark.usefixtures("gpu")
def test_a_limit_is_one_on_tensors() -> None:
    with hs.memory_limit(60):
        assert available_bytes(GPU) == 60 - 25
    with hs.memory_limit(20):
        assert available_bytes(GPU) == 0
    with hs.memory_limit(None):
        assert available_bytes(GPU) == 25


def test_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs with 10 and 30 bytes free, and the machine's memory, which is counted once."""
    monkeypatch.setattr("hesscope.memory._free_on_gpu", lambda device: (10, 30)[device.index])
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=50))
    gpus = torch.device("cuda", 0), torch.device("cuda", 1)
    assert least_available(gpus) == 10
    assert available_together(gpus) == 40
    assert available_together((*gpus, torch.device("cpu"), torch.device("meta"))) == 90
