"""Problems of encoder-decoders: a target text given a source text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hesscope.data.batching import require_vocabulary
from hesscope.data.pairs import batches_of_pairs, read_pairs
from hesscope.data.tokens import require_sequences
from hesscope.errors import HesscopeError
from hesscope.losses import Seq2SeqLMLoss
from hesscope.losses.cross_entropy import IGNORED
from hesscope.models import load_model, place_model, unwrapped
from hesscope.models.loading import resolve_device, resolve_dtype
from hesscope.problem.causal_lm import describe_source, tokenizer_of, vocabulary_of
from hesscope.problem.problem import Problem

_LONGEST_DEFAULT = 512


def seq2seq_lm(
    model: str | Path | nn.Module,
    data: Any,
    tokenizer: Any = None,
    length: int | None = None,
    sequences: int | None = None,
    batch_size: int = 1,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    source_column: str = "source",
    target_column: str = "target",
    objective: str = "nll",
    dropout: str = "off",
    seed: int = 0,
    attention: str = "auto",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Problem:
    """The loss of an encoder-decoder (T5, BART) on frozen pairs of texts.

    R(theta) = (1/N) sum over valid target tokens of -log p(token | source, target tokens before it), in nats.

    Args:
        model: a Hub id, a local folder, or a loaded model.
        data: (source, target) pairs of texts, a .jsonl file or rows with these two columns, or batches, read once:
            `input_ids` [B, S], `attention_mask` [B, S] and `labels` [B, T], the targets themselves, which the model
            shifts to its decoder's inputs (`decoder_input_ids`, if given, are obeyed). Labels of -100 do not count.
        tokenizer: a tokenizer or the name of one; the model's own by default.
        length: tokens a text; 512 by default. Batches are taken as they are.
        sequences: use only so many pairs (or batches), the first ones.
        batch_size: pairs a batch. It changes memory and speed, not the result.
        source_column, target_column: names of the two texts in a file or in rows.
        dtype, device, objective, dropout, seed, attention, revision, cache_dir: as for `hesscope.causal_lm`.

    Raises:
        HesscopeError: no such model or data, a model that does not shift labels, token ids outside its vocabulary.
    """
    hub: dict[str, Any] = {
        key: value for key, value in {"revision": revision, "cache_dir": cache_dir}.items() if value is not None
    }
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    dtype, device = resolve_dtype(dtype), resolve_device(device)
    name = str(model) if not isinstance(model, nn.Module) else getattr(model, "name_or_path", "") or None
    loaded = (
        place_model(model, dtype, device)
        if isinstance(model, nn.Module)
        else load_model(model, dtype, device, encoder_decoder=True, **hub)
    )
    rows, came_from = read_pairs(data, source_column, target_column)
    rows = require_sequences(rows, sequences, came_from)
    encode, window = None, length or _LONGEST_DEFAULT
    if isinstance(rows[0], dict):
        batches: list[dict[str, Any]] = rows
    else:
        encode = tokenizer_of(tokenizer, name, hub)
        batches = batches_of_pairs(rows, encode, window, batch_size)
    return Problem(
        loaded,
        Seq2SeqLMLoss(),
        [_with_decoder_inputs(b, batch, loaded) for b, batch in enumerate(batches)],
        objective=objective,
        dropout=dropout,
        seed=seed,
        attention=attention,
        source=describe_source(loaded, name, encode, came_from, window),
    )


def _with_decoder_inputs(b: int, batch: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The batch with what the decoder reads: the labels, shifted by the model itself, which knows its start token."""
    for key in ("input_ids", "labels"):
        ids = batch.get(key)
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise HesscopeError(f"Expected {key} of batch {b} to be whole numbers [sequences, length].")
    vocabulary, labels = vocabulary_of(model), batch["labels"]
    require_vocabulary(b, "input_ids", batch["input_ids"], vocabulary)
    require_vocabulary(b, "labels", labels[labels != IGNORED], vocabulary)
    if "decoder_input_ids" in batch:
        return batch
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        raise HesscopeError(
            f"Expected an encoder-decoder that shifts its labels, but {type(model).__name__} has no "
            "prepare_decoder_input_ids_from_labels; give every batch its decoder_input_ids (hs.causal_lm is for decoders)."
        )
    return {**batch, "decoder_input_ids": shift(labels=labels)}
