"""Borrow the caller's model for a computation and hand it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hesscope.models.attention.registered import NAME, register
from hesscope.models.configs import replacement
from hesscope.models.elsewhere import devices_of, elsewhere
from hesscope.models.padding import whole_embeddings


@contextmanager
def borrowed(model: nn.Module, dropout_seed: int | None = None, attention: str | None = None) -> Iterator[None]:
    """Run the model twice-differentiably inside; attention, experts, flags and random state return after.

    With a `dropout_seed` dropout is on (normalisation layers stay in evaluation mode) and draws from that seed. `attention` is
    the implementation to run; None exchanges only what has no second derivative.
    """
    if attention == NAME:
        register()
    store, devices = elsewhere(model), devices_of(model)
    with ExitStack() as stack:
        if store is not None:
            stack.enter_context(store.hooks_bring_what_is_missing())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # An autocast around the caller's code would change the function, unseen by any fingerprint.
        for device_type in {device.type for device in devices} - {"meta"}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(whole_embeddings(model))
        stack.enter_context(_implementations(model, attention))
        stack.enter_context(_without_checkpointing(model))
        if dropout_seed is not None:
            stack.enter_context(_training_flags(model))
            stack.enter_context(
                torch.random.fork_rng(devices=sorted((d for d in devices if d.type == "cuda"), key=str))
            )
            torch.manual_seed(dropout_seed)
        yield


@contextmanager
def _implementations(model: nn.Module, wanted: str | None) -> Iterator[None]:
    """Exchange fused attention and grouped experts, in this model's configurations only."""
    saved: list[tuple[Any, str, Any]] = []
    try:
        for config in _configs(model):
            attention = getattr(config, "_attn_implementation_internal", None)
            if attention is not None:
                saved.append((config, "_attn_implementation_internal", attention))
                config._attn_implementation_internal = wanted or replacement(model, attention)
            if getattr(config, "_experts_implementation_internal", None) is not None:
                saved.append((config, "_experts_implementation_internal", config._experts_implementation_internal))
                config._experts_implementation_internal = "eager"
        yield
    finally:
        for config, name, value in reversed(saved):
            setattr(config, name, value)


def _configs(model: nn.Module) -> list[Any]:
    """Every configuration that a module of the model reads, once."""
    return list({id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values())


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Checkpointed layers would run again during a backward pass, when the model is no longer borrowed."""
    checkpointed: list[Any] = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    try:
        for m in checkpointed:
            m.gradient_checkpointing = False
        yield
    finally:
        for m in checkpointed:
            m.gradient_checkpointing = True


@contextmanager
def _training_flags(model: nn.Module) -> Iterator[None]:
    flags = [(m, m.training) for m in model.modules()]
    try:
        for m, _ in flags:
            m.training = not isinstance(m, nn.modules.batchnorm._NormBase)
        yield
    finally:
        for m, training in flags:
            m.training = training
