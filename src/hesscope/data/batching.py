"""Sequences to padded batches, and the checks that batches of tokens have to pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hesscope.errors import HesscopeError
from hesscope.losses.cross_entropy import IGNORED


def batches_of_sequences(sequences: list[Tensor], batch_size: int) -> list[dict[str, Tensor]]:
    """Consecutive groups of `batch_size` sequences, padded on the right where their lengths differ."""
    if batch_size < 1:
        raise HesscopeError(f"Expected batch_size to be at least 1, got {batch_size}.")
    groups = [sequences[i : i + batch_size] for i in range(0, len(sequences), batch_size)]
    return [_pad(group) for group in groups]


def _pad(group: list[Tensor]) -> dict[str, Tensor]:
    longest = max(len(ids) for ids in group)
    input_ids = torch.stack([F.pad(ids, (0, longest - len(ids))) for ids in group])
    mask = torch.stack([F.pad(torch.ones_like(ids), (0, longest - len(ids))) for ids in group])
    return with_labels(
        {"input_ids": input_ids} if bool(mask.all()) else {"input_ids": input_ids, "attention_mask": mask}
    )


def with_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """Add labels where there are none: the inputs, except at masked positions and right after one.

    The first token after left padding has nothing before it to be predicted from, as in the sequence without padding.
    """
    if batch.get("labels") is not None:
        return batch
    labels = batch["input_ids"].clone()
    mask = batch.get("attention_mask")
    if mask is not None:
        visible = mask.bool()
        labels[~visible] = IGNORED
        labels[:, 1:][~visible[:, :-1]] = IGNORED
    return {**batch, "labels": labels}


def check_batches(batches: list[dict[str, Any]], vocabulary: int | None, context: int | None) -> list[dict[str, Any]]:
    """Batches with labels; raises HesscopeError, naming the batch, for shapes, token ids or lengths that do not fit."""
    return [_check(b, batch, vocabulary, context) for b, batch in enumerate(batches)]


def _check(b: int, batch: dict[str, Any], vocabulary: int | None, context: int | None) -> dict[str, Any]:
    ids = batch.get("input_ids")
    if ids is None:
        raise HesscopeError(f"Expected batch {b} to have input_ids, found {', '.join(map(str, batch))}.")
    batch = {key: torch.as_tensor(v) if isinstance(v, list) else v for key, v in batch.items() if v is not None}
    ids = batch["input_ids"]
    if ids.dim() != 2 or ids.is_floating_point():
        raise HesscopeError(
            f"Expected input_ids of batch {b} to be whole numbers [sequences, length], got {list(ids.shape)}."
        )
    for key in ("labels", "attention_mask"):
        if key in batch and (key == "labels" or batch[key].dim() == 2) and batch[key].shape != ids.shape:
            raise HesscopeError(
                f"Expected {key} of batch {b} to have the shape of input_ids, {list(ids.shape)}, got "
                f"{list(batch[key].shape)}."
            )
    require_context(ids.shape[1], context, f"batch {b}")
    batch = with_labels(batch)
    require_vocabulary(b, "input_ids", ids, vocabulary)
    require_vocabulary(b, "labels", batch["labels"][batch["labels"] != IGNORED], vocabulary)
    return batch


def require_context(length: int, context: int | None, what: str) -> None:
    """Raise HesscopeError where a length exceeds the model's context."""
    if context is not None and length > context:
        raise HesscopeError(
            f"Expected {what} to have at most {context} tokens, the model's context, got {length}; pass length={context} "
            "or less."
        )


def require_vocabulary(b: int, key: str, ids: Tensor, vocabulary: int | None) -> None:
    """Raise HesscopeError for token ids that the model has no embedding for."""
    if vocabulary is None or ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise HesscopeError(
            f"Expected {key} of batch {b} between 0 and {vocabulary - 1}, the model's vocabulary, got {low}..{high}; "
            "is the tokenizer the model's own?"
        )
