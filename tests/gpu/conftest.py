"""Tests of a CUDA device; `HESSCOPE_TEST_DEVICE=cpu` runs them on the CPU, which tests the tests."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device under test."""
    asked = os.environ.get("HESSCOPE_TEST_DEVICE", "cuda")
    if asked.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    return torch.device(asked)


@pytest.fixture(scope="session")
def kernels(device: torch.device) -> None:
    """Triton, on the device or by its interpreter."""
    pytest.importorskip("triton", reason="triton is not installed; pip install 'hesscope[triton]'")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("triton runs on a CPU by its interpreter only (TRITON_INTERPRET=1)")
