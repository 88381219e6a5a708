"""Look at a model in the middle of its training, and leave no trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and its own precision inside; training flags and all random states return after.

    Random states are those of Python, NumPy and torch, on the CPU and on the model's devices.
    """
    flags = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state that a data loader may draw from
    devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        try:
            model.eval()
            with full_precision(model):
                yield
        finally:
            for module, training in flags:
                module.training = training
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Without the autocast of mixed precision inside.

    accelerate sets a `forward` with autocast on the instance, and keeps the one from before as `_original_forward`.
    """
    wrapped = [vars(m) for m in model.modules() if {"forward", "_original_forward"} <= vars(m).keys()]
    forwards = [attributes["forward"] for attributes in wrapped]
    try:
        for attributes in wrapped:
            attributes["forward"] = attributes["_original_forward"]
        yield
    finally:
        for attributes, forward in zip(wrapped, forwards, strict=True):
            attributes["forward"] = forward
