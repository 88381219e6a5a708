"""Texts to sequences of tokens: consecutive windows of joined text, or one truncated sequence a text."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor

from hesscope.data.reading import Source
from hesscope.errors import HesscopeError

_SEPARATOR = "\n\n"
# No tokenizer in use averages more characters a token over running text.
_CHARACTERS_PER_TOKEN = 16


def sequences_of(
    source: Source, tokenizer: Any, length: int, sequences: int | None = None, pack: bool = False
) -> list[Tensor]:
    """Tokenise rows or texts into at most `sequences` sequences of at most `length` tokens.

    Raises HesscopeError where joined text is shorter than one window, or yields fewer sequences than asked for.
    """
    if source.kind == "rows" or pack:
        found = _windows(source, tokenizer, length, sequences)
    else:
        encoded = (_encode(tokenizer, t, truncate_to=length) for t in source.items if t)
        found = list(islice((ids for ids in encoded if len(ids) > 1), None if sequences is None else max(sequences, 1)))
        if not found:
            raise HesscopeError(f"Expected texts of at least two tokens in {source.name}; there is none.")
    return require_sequences(found, sequences, source.name)


def require_sequences(found: list[Any], wanted: int | None, name: str) -> list[Any]:
    """The first `wanted` sequences; raises HesscopeError where there are fewer."""
    if wanted is None:
        return found
    if wanted < 1:
        raise HesscopeError(f"Expected sequences to be at least 1, got {wanted}.")
    if len(found) < wanted:
        raise HesscopeError(
            f"Expected {wanted} sequences, but {name} holds only {len(found)}; lower sequences, shorten length or bring "
            "more text."
        )
    return found[:wanted]


def _windows(source: Source, tokenizer: Any, length: int, sequences: int | None) -> list[Tensor]:
    tokens = _joined_tokens(source.items, tokenizer, None if sequences is None else sequences * length)
    if len(tokens) < length:
        raise HesscopeError(
            f"Expected {source.name} to hold at least one window of {length} tokens, but it has {len(tokens)}; "
            "bring more text or pass a smaller length."
        )
    count = len(tokens) // length
    return list(tokens[: count * length].reshape(count, length))


def _joined_tokens(rows: list[str], tokenizer: Any, needed: int | None) -> Tensor:
    """Tokens of the joined rows; only a generous beginning is tokenised where that surely suffices."""
    text = _SEPARATOR.join(rows)
    if needed is not None and len(text) > needed * _CHARACTERS_PER_TOKEN:
        tokens = _encode(tokenizer, text[: needed * _CHARACTERS_PER_TOKEN])
        # The cut may split a word; every token but the last few is what the whole text gives.
        if len(tokens) > needed + _CHARACTERS_PER_TOKEN:
            return tokens[:needed]
    return _encode(tokenizer, text)


def _encode(tokenizer: Any, text: str, truncate_to: int | None = None) -> Tensor:
    """Token ids with the tokenizer's own special tokens; long joined text is meant to exceed the model's context."""
    ids = tokenizer(text, truncation=truncate_to is not None, max_length=truncate_to, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
