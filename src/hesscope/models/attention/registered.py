"""Tiled attention as transformers calls it: an attention function and a mask function, under one name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from hesscope.models.attention.functions import tiled_attention
from hesscope.models.attention.scores import Shape
from hesscope.models.attention.visibility import NotTiled, Visible, causal, everything, of_transformers

#: The name under which models find it.
NAME = "hesscope_tiled"

#: What some models hand to an attention function and tiles do not know, in words.
_FOREIGN = {
    "position_bias": "adds a bias to every pair of positions, which is itself length x length",
    "alibi": "adds a bias to every pair of positions, which is itself length x length",
    "indices": "lets every position choose its keys",
    "block_indices": "lets every position choose its keys",
    "sinks": "has attention sinks of a kind of its own",
    "head_mask": "masks heads",
    "cache": "keeps keys and values in pages",
}

_CALLS: ContextVar[list[str] | None] = ContextVar("tiled_calls", default=None)


def register() -> None:
    """Tell transformers the name; other models are not touched by it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, of_transformers)


@contextmanager
def counting() -> Iterator[list[str]]:
    """A list that grows by the class name of every module that calls tiled attention inside."""
    calls: list[str] = []
    token = _CALLS.set(calls)
    try:
        yield calls
    finally:
        _CALLS.reset(token)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Visible | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What a model calls: [B, heads, Q, D] to [B, Q, heads, E].

    Raises:
        NotTiled: dropout, a mask that holds every pair of positions, or something else that tiles do not know.
    """
    if (calls := _CALLS.get()) is not None:
        calls.append(type(module).__name__)
    if dropout:
        raise NotTiled("the model drops attention weights")
    found = next((name for name in _FOREIGN if others.get(name) is not None), None)
    if found is not None:
        raise NotTiled(f"the model {_FOREIGN[found]}")
    shape = Shape(
        _visible(module, query, key, attention_mask, is_causal),
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        None if softcap is None else float(softcap),
    )
    out = tiled_attention(query, key, value, shape, s_aux)
    return out.transpose(1, 2).contiguous(), None


def _visible(
    module: nn.Module, query: Tensor, key: Tensor, mask: Visible | Tensor | None, is_causal: bool | None
) -> Visible:
    """What is seen; without a mask that depends on whether the layer is causal, as for SDPA."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        layer = getattr(module, "is_causal", True) if is_causal is None else is_causal
        make = causal if layer and queries > 1 else everything
        return make(queries, keys, query.device)
    if not isinstance(mask, Visible):
        raise NotTiled("the model, or the batch, comes with a mask of every pair of positions")
    if mask.keys != keys or mask.first.shape[1] != queries:
        raise NotTiled(
            f"the model has a mask for {mask.first.shape[1]} queries and {mask.keys} keys where there are {queries} and {keys}"
        )
    return mask
