"""Hashing tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscope.tensor_file import raw_bytes


def update_with_tensor(digest: Any, tensor: Tensor) -> None:
    """Feed dtype, shape and bytes of a tensor to a `hashlib` object."""
    update_with_outline(digest, tensor.dtype, tensor.shape)
    update_with_bytes(digest, tensor)


def update_with_outline(digest: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Feed the dtype and the shape alone, before the bytes of its pieces."""
    digest.update(f"{dtype} {tuple(shape)}".encode())


def update_with_bytes(digest: Any, tensor: Tensor) -> None:
    """Feed the bytes alone."""
    digest.update(raw_bytes(tensor))
