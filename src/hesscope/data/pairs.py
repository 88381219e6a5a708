"""Pairs of a source and a target text, and the batches that an encoder-decoder takes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hesscope.errors import HesscopeError
from hesscope.losses.cross_entropy import IGNORED

Pair = tuple[str, str]


def read_pairs(data: Any, source_column: str, target_column: str) -> tuple[list[Pair] | list[dict[str, Any]], str]:
    """(source, target) texts, or batches as they are, with a name for the record.

    Takes a .jsonl file with the two columns, a `datasets.Dataset` with them, pairs, or batches with `labels`. Raises
    HesscopeError for anything else.
    """
    if isinstance(data, (str, Path)):
        return _read_json_lines(Path(data), source_column, target_column), Path(data).name
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise HesscopeError(
            f"Expected data to be a .jsonl file, (source, target) pairs or batches, got {type(data).__name__}; wrap a "
            "single batch in a list."
        )
    rows = list(data)
    if not rows:
        raise HesscopeError("Expected at least one pair or batch, got none; an iterator that was read before is empty.")
    if isinstance(rows[0], Mapping) and "labels" in rows[0]:
        return [dict(row) for row in rows], "batches"
    return [_pair(i, row, source_column, target_column) for i, row in enumerate(rows)], "pairs"


def _read_json_lines(path: Path, source_column: str, target_column: str) -> list[Pair]:
    if path.suffix != ".jsonl" or not path.is_file():
        raise HesscopeError(f"Expected a .jsonl file of {source_column!r} and {target_column!r} at {str(path)!r}.")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise HesscopeError(f"Expected line {number} of {path.name} to be a JSON object: {error}.") from error
            pairs.append(_pair(number, row, source_column, target_column))
    if not pairs:
        raise HesscopeError(f"Expected at least one pair in {path.name}; it is empty.")
    return pairs


def _pair(number: int, row: Any, source_column: str, target_column: str) -> Pair:
    if isinstance(row, Mapping):
        row = (row.get(source_column), row.get(target_column))
    if isinstance(row, (tuple, list)) and len(row) == 2 and all(isinstance(text, str) for text in row):
        return row[0], row[1]
    raise HesscopeError(
        f"Expected pair {number} to be two texts, or an object with the texts {source_column!r} and {target_column!r} "
        "(source_column= and target_column= name others); it is neither."
    )


def batches_of_pairs(pairs: list[Pair], tokenizer: Any, length: int, batch_size: int) -> list[dict[str, Tensor]]:
    """Consecutive groups of pairs, truncated to `length` tokens a side; sources padded under a mask, labels with -100."""
    if batch_size < 1:
        raise HesscopeError(f"Expected batch_size to be at least 1, got {batch_size}.")
    return [_batch(pairs[i : i + batch_size], tokenizer, length) for i in range(0, len(pairs), batch_size)]


def _batch(pairs: list[Pair], tokenizer: Any, length: int) -> dict[str, Tensor]:
    def encode(**text: str) -> Tensor:
        ids = tokenizer(**text, truncation=True, max_length=length)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    sources = [encode(text=source) for source, _ in pairs]
    labels = [encode(text_target=target) for _, target in pairs]
    return {
        "input_ids": pad_sequence(sources, batch_first=True, padding_value=tokenizer.pad_token_id or 0),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in sources], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
