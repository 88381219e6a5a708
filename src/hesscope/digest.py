"""Hashing tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def update_with_tensor(digest: Any, tensor: Tensor) -> None:
    """Feed dtype, shape and bytes of a tensor to a `hashlib` object."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(raw.numpy().data)
