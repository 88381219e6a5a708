"""How much memory is left."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch
from torch import Tensor

from hesscope.errors import HesscopeError

_UNITS = {
    "": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_STANDS_FOR: ContextVar[str] = ContextVar("stands for", default="meta")
_PEAK_ALONE: ContextVar[bool] = ContextVar("peak alone", default=False)
_LIMIT: ContextVar[int | None] = ContextVar("limit", default=None)
#: A limit that nothing exceeds.
UNLIMITED = 2**62


@contextmanager
def memory_limit(limit: int | str | None) -> Iterator[None]:
    """Inside, computations reckon with so much memory for the process (on a GPU: for its tensors), the model included.

    It decides which graphs are kept, what is refused for want of memory, and what engine="auto" takes. None lifts every
    limit: nothing is refused.

    Args:
        limit: bytes, or text such as "8GB" or "16GiB".

    Raises:
        HesscopeError: what is no size.

    Example:
        >>> import hesscope as hs
        >>> with hs.memory_limit("4GB"):
        ...     pass
    """
    token = _LIMIT.set(UNLIMITED if limit is None else parse_bytes(limit))
    try:
        yield
    finally:
        _LIMIT.reset(token)


def parse_bytes(size: int | str) -> int:
    """A number of bytes from itself or from text such as "8GB"; raises HesscopeError for what is no size."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(size).lower())
    if isinstance(size, str) and found and found[2] in _UNITS and float(found[1]) > 0:
        return int(float(found[1]) * _UNITS[found[2]])
    raise HesscopeError(f"Expected an amount of memory, such as 8GB or 512MiB, got {size!r}.")


def available_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on a device, within the limit that `memory_limit` sets."""
    limit = _LIMIT.get()
    if limit is not None and limit != UNLIMITED:
        return max(0, limit - _used_bytes(device))
    if device.type == "cuda":
        return _free_on_gpu(device)
    import psutil

    return int(psutil.virtual_memory().available)


def least_available(devices: Collection[torch.device]) -> int:
    """Memory that can still be allocated on whichever of some devices has least: what is divided among them anyhow fits."""
    return min(map(available_bytes, devices))


def available_together(devices: Collection[torch.device]) -> int:
    """Memory that can still be allocated on some devices in all; whatever is not a GPU of CUDA has that of the machine."""
    return sum(map(available_bytes, {d if d.type == "cuda" else torch.device("cpu") for d in devices}))


@contextmanager
def shapes_for(device: torch.device, peak_alone: bool = False) -> Iterator[None]:
    """Inside, tensors without data stand for some on this device; with `peak_alone` only the most memory at a time is asked."""
    tokens = _STANDS_FOR.set(device.type), _PEAK_ALONE.set(peak_alone)
    try:
        yield
    finally:
        _STANDS_FOR.reset(tokens[0])
        _PEAK_ALONE.reset(tokens[1])


def peak_alone(device: torch.device) -> bool:
    """Whether of steps that take their memory one after another, on this device, one may stand for all."""
    return device.type == "meta" and _PEAK_ALONE.get()


def kind_of(device: torch.device) -> str:
    """The type of a device, or of the one that it stands for: chunks have the sizes that they will have there."""
    return _STANDS_FOR.get() if device.type == "meta" else device.type


def _free_on_gpu(device: torch.device) -> int:
    """What the driver has left, and what torch's allocator holds without a tensor in it."""
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + max(0, idle)


def is_limited() -> bool:
    """Whether a limit was set for the process."""
    return _LIMIT.get() not in (None, UNLIMITED)


def is_unlimited() -> bool:
    """Whether nothing is to be refused."""
    return _LIMIT.get() == UNLIMITED


def _used_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


def storage_key(tensor: Tensor) -> int:
    """Which storage a tensor has, as long as that lives; also told for tensors without data."""
    return int(getattr(tensor, "_local_tensor", tensor).untyped_storage()._cdata)


def free_disk_bytes(folder: Path) -> int:
    """What is free where a folder is, or will be."""
    import shutil

    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
