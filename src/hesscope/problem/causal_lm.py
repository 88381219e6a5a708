"""Language-model problems from any model and any text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hesscope.data import Source, batches_of_sequences, check_batches, read, sequences_of
from hesscope.data.batching import require_context
from hesscope.data.tokens import require_sequences
from hesscope.errors import HesscopeError
from hesscope.losses import CausalLMLoss, LastTokenCrossEntropyLoss, OneHotSquaredErrorLoss, SplitLoss
from hesscope.models import context_length, is_hooked, load_model, load_tokenizer, place_model, unwrapped
from hesscope.models.loading import resolve_device, resolve_dtype
from hesscope.problem.problem import Problem

#: Tokens a sequence at most, where no length is given.
LONGEST_DEFAULT = 2048
_LOSSES: dict[str, type[SplitLoss]] = {
    "next_token": CausalLMLoss,
    "classification": LastTokenCrossEntropyLoss,
    "regression": OneHotSquaredErrorLoss,
}


def causal_lm(
    model: str | Path | nn.Module,
    data: Any,
    tokenizer: Any = None,
    length: int | None = None,
    sequences: int | None = None,
    batch_size: int = 1,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    split: str | None = None,
    data_config: str | None = None,
    text_column: str = "text",
    pack: bool = False,
    objective: str = "nll",
    dropout: str = "off",
    seed: int = 0,
    attention: str = "auto",
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    loss: str = "next_token",
    device_map: str | dict[str, Any] | None = None,
    offload_folder: str | Path | None = None,
    borders: str | Path = "device",
    vectors: str | Path = "device",
) -> Problem:
    """The next-token loss of a causal language model on frozen text.

    R(theta) = (1/N) sum over valid target tokens of -log p(token | tokens before it), in nats.

    Args:
        model: a Hub id, a local folder, or a loaded model.
        data: a Hub dataset (with `data_config` and `split`), a dataset folder or a loaded `datasets.Dataset`, whose rows
            are joined by a blank line and cut into consecutive windows of `length` tokens, as a .txt file is; a .jsonl
            or .parquet file or a list of texts, which stay separate sequences truncated to `length` (`pack=True` joins
            and cuts them too); token ids [sequences, length]; or any iterable of batches, read once. Explicit `labels`
            are obeyed; otherwise labels are the inputs, without masked positions.
        tokenizer: a tokenizer or the name of one; the model's own by default.
        length: tokens a sequence; the model's context, at most 2048, by default.
        sequences: use only so many, the first ones.
        batch_size: sequences a batch. It changes memory and speed, not the result.
        dtype: float32 by default where hesscope loads the model, the model's own otherwise. Another dtype or device than
            a given model's works on a copy.
        objective: "nll" (R) or "perplexity" (exp R).
        dropout: "off", or "frozen" for one mask a batch, drawn from `seed`.
        attention: "auto", "sdpa", "eager" or "tiled", as for `hesscope.Problem`.
        revision, cache_dir: passed on to the Hub.
        device_map: where hesscope loads the model, the places of its parts, as `from_pretrained` takes them: "auto" (what one
            device cannot hold goes to others, to the CPU and to disk), "disk", or a dictionary.
        offload_folder: a folder for weights that rest on disk.
        borders, vectors: "device", "cpu", "disk" or a folder, as for `hesscope.Problem`.
        loss: "next_token", R as above; "classification", the same for the last valid token of each sequence only, one
            example a sequence; "regression", the mean over tokens and vocabulary of the squared difference between the
            logits and the one-hot next token.

    Raises:
        HesscopeError: an unknown loss, no such model or data, text shorter than one window, sequences longer than the model's context.
    """
    criterion = loss_named(loss)
    model = unwrapped(model) if isinstance(model, nn.Module) else model
    hub: dict[str, Any] = {
        key: value for key, value in {"revision": revision, "cache_dir": cache_dir}.items() if value is not None
    }
    if isinstance(model, nn.Module) and (device_map is not None or offload_folder is not None):
        raise HesscopeError(
            "Expected no device_map= or offload_folder= with a model that is loaded: give them to from_pretrained."
        )
    dtype, device = resolve_dtype(dtype), resolve_device(device)
    name = str(model) if not isinstance(model, nn.Module) else getattr(model, "name_or_path", "") or None
    loaded = (
        place_model(model, dtype, device)
        if isinstance(model, nn.Module)
        else load_model(model, dtype, device, device_map=device_map, offload_folder=offload_folder, **hub)
    )
    context = context_length(loaded)
    require_context(length or 0, context, "each sequence")
    if length is not None and length < 2:
        raise HesscopeError(f"Expected length to be at least 2 (a token and the one it predicts), got {length}.")
    source = read(data, split=split, data_config=data_config, text_column=text_column)
    if tokenizer is None and is_hooked(loaded):
        tokenizer = getattr(loaded, "tokenizer", None)
    encode = tokenizer_of(tokenizer, name, hub) if source.kind in ("rows", "texts") else None
    window = length or min(context or LONGEST_DEFAULT, LONGEST_DEFAULT)
    if source.kind in ("rows", "texts"):
        found = sequences_of(source, encode, window, sequences, pack)
        batches = batches_of_sequences(found, batch_size)
    else:
        batches = _token_batches(source, length, sequences, batch_size)
    return Problem(
        loaded,
        criterion,
        check_batches(batches, vocabulary_of(loaded), context),
        objective=objective,
        dropout=dropout,
        seed=seed,
        attention=attention,
        borders=borders,
        vectors=vectors,
        source=describe_source(loaded, name, encode, source.name, window),
    )


def with_loss(problem: Problem, loss: str, objective: str = "nll") -> Problem:
    """The same model on the same frozen batches under another of the losses and objectives of `causal_lm`."""
    other = Problem(
        problem.model,
        loss_named(loss),
        problem.batches,
        objective=objective,
        dropout=problem.dropout,
        seed=problem.seed,
        attention=problem.attention,
        borders=problem.borders,
        vectors=problem.vectors,
        source=problem.source,
    )
    other.comm = problem.comm
    return other


def loss_named(name: str) -> SplitLoss:
    """The language-model loss of that name; raises HesscopeError for another."""
    if name not in _LOSSES:
        raise HesscopeError(f"Expected loss to be one of {', '.join(_LOSSES)}, got {name!r}.")
    return _LOSSES[name]()


def _token_batches(source: Source, length: int | None, sequences: int | None, batch_size: int) -> list[dict[str, Any]]:
    """Batches of data that came as token ids: cut to `length` and to the first `sequences` where these are given."""
    if source.kind == "batches":
        batches = source.items if sequences is None else _first_sequences(source.items, sequences)
        return batches if length is None else [_cut(batch, length) for batch in batches]
    found = require_sequences(source.items, sequences, source.name)
    return batches_of_sequences([ids[:length] for ids in found], batch_size)


def _cut(batch: dict[str, Any], length: int) -> dict[str, Any]:
    """The first `length` tokens of every sequence: of all that is shaped like input_ids."""
    shape = batch["input_ids"].shape if isinstance(batch.get("input_ids"), Tensor) else None
    return {k: v[:, :length] if isinstance(v, Tensor) and v.shape == shape else v for k, v in batch.items()}


def _first_sequences(batches: Iterable[dict[str, Any]], wanted: int) -> list[dict[str, Any]]:
    """The batches that hold the first `wanted` sequences; the last of them may be cut."""
    kept, found = [], 0
    for batch in batches:
        rows = len(batch["input_ids"])
        take = min(rows, wanted - found)
        if take > 0:
            kept.append({k: v[:take] if isinstance(v, Tensor) and len(v) == rows else v for k, v in batch.items()})
        found += max(take, 0)
    require_sequences([torch.empty(0)] * found, wanted, "the batches")
    return kept


def tokenizer_of(tokenizer: Any, model_name: str | None, hub: dict[str, Any]) -> Any:
    """The tokenizer given, by object or name, or the model's own."""
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        return tokenizer
    name = tokenizer or model_name
    if not name:
        raise HesscopeError("Expected tokenizer= with text and a model that was not loaded by name; pass a tokenizer.")
    return load_tokenizer(name, **hub)


def vocabulary_of(model: nn.Module) -> int | None:
    """How many tokens the model has embeddings for, where it says so."""
    if is_hooked(model):
        return getattr(model.cfg, "d_vocab", None)
    get: Any = getattr(model, "get_input_embeddings", None)
    embeddings = get() if get is not None else None
    return getattr(embeddings, "num_embeddings", None)


def describe_source(model: nn.Module, name: str | None, tokenizer: Any, data: str, length: int) -> dict[str, Any]:
    """What the record of a result says about where the problem came from."""
    config = getattr(model, "config", None)
    described = {
        "model_name": name,
        "revision": getattr(config, "_commit_hash", None),
        "data": data,
        "length": length,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    if tokenizer is not None:
        described["tokenizer"] = hashlib.sha256(repr(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    return described
