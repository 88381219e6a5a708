"""What a model's configuration says about its attention."""

from __future__ import annotations

from typing import Any

from torch import nn

# Implementations that have second derivatives: SDPA in its mathematical form, and the written-out one.
_TWICE_DIFFERENTIABLE = ("sdpa", "eager")


def root_config(model: nn.Module) -> Any:
    """The first configuration with an attention implementation that a module of the model reads, or None."""
    found: list[Any] = [m.config for m in model.modules() if hasattr(m, "config")]
    return next((c for c in found if getattr(c, "_attn_implementation", None) is not None), None)


def replacement(model: nn.Module, attention: str) -> str:
    """SDPA for a fused kernel where the model has it; a model that has not (soft caps) gets the written-out form."""
    if attention in _TWICE_DIFFERENTIABLE:
        return attention
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"


def attention_note(model: nn.Module) -> str:
    """Which attention a borrowed model runs where nothing is asked for, in words, for the record of a result."""
    config = root_config(model)
    used = None if config is None else config._attn_implementation
    if used is None:
        return "the model's own"
    target = replacement(model, used)
    named = "sdpa (mathematical form)" if target == "sdpa" else str(target)
    return named if target == used else f"{named}, in place of {used}, which has no second derivative"
