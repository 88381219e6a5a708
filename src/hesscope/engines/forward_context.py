"""Forward mode without torch's noise, and its refusals in words."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hesscope.errors import HesscopeError


class NotInForwardMode(HesscopeError):
    """An operation of the model has no forward derivative."""


@contextmanager
def quietly() -> Iterator[None]:
    """Torch compiles its forward decompositions in a way that it calls deprecated, when they are first used."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        yield


@contextmanager
def refusals_in_words() -> Iterator[None]:
    """Torch refuses in many words what has no forward derivative or no rule for a batch of tangents."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, HesscopeError):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotInForwardMode(f"an operation of the model does not run in forward mode ({reason[:160]})") from error
