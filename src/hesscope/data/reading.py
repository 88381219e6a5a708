"""Where the data comes from, and in which of four forms it arrives: joined text, separate texts, sequences, batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hesscope.errors import HesscopeError

_FILES = {".txt", ".jsonl", ".parquet"}


@dataclass(frozen=True)
class Source:
    """Data as it was read. `kind` is "rows" (to be joined), "texts" (separate), "sequences" or "batches"."""

    kind: str
    items: list[Any]
    name: str


def read(data: Any, *, split: str | None = None, data_config: str | None = None, text_column: str = "text") -> Source:
    """Read any form of data that `hesscope.causal_lm` accepts.

    Raises HesscopeError for a file that is missing, a column that is not there, or a form that is none of them.
    """
    if isinstance(data, (str, Path)):
        return _read_named(str(data), split, data_config, text_column)
    if isinstance(data, Tensor):
        return Source("sequences", list(_token_matrix(data)), "tensor")
    if hasattr(data, "column_names"):
        return _read_dataset(data, text_column, getattr(data, "_fingerprint", None) or "dataset")
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise HesscopeError(
            f"Expected data to be a file, a dataset, texts, token ids or batches, got {type(data).__name__}; "
            "wrap a single batch in a list."
        )
    return _read_items(list(data))


def _read_named(name: str, split: str | None, data_config: str | None, text_column: str) -> Source:
    path = Path(name)
    if path.is_file():
        return _read_file(path, text_column)
    if path.suffix in _FILES:
        raise HesscopeError(f"Expected a data file at {name!r}; there is none.")
    return _read_dataset(_load_dataset(name, data_config, split), text_column, name)


def _read_file(path: Path, text_column: str) -> Source:
    if path.suffix == ".txt":
        try:
            return Source("rows", [path.read_text(encoding="utf-8")], path.name)
        except UnicodeDecodeError as error:
            raise HesscopeError(f"Expected {path.name} to be UTF-8 text: {error}.") from error
    if path.suffix == ".jsonl":
        return Source("texts", _json_lines(path, text_column), path.name)
    if path.suffix == ".parquet":
        from datasets import Dataset
        from pyarrow.parquet import read_schema

        try:
            read_schema(path)  # datasets would write lines of its own
        except (OSError, ValueError) as error:
            raise HesscopeError(f"Expected {path.name} to be a Parquet file: {str(error).splitlines()[0]}.") from error
        rows = _read_dataset(Dataset.from_parquet(str(path)), text_column, path.name)
        return Source("texts" if rows.kind == "rows" else rows.kind, rows.items, path.name)
    raise HesscopeError(f"Expected a data file ending in {', '.join(sorted(_FILES))}, got {path.name!r}.")


def _json_lines(path: Path, text_column: str) -> list[str]:
    import json

    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip():
            try:
                texts.append(json.loads(line)[text_column])
            except (ValueError, KeyError, TypeError) as error:
                raise HesscopeError(
                    f"Expected line {number} of {path.name} to be a JSON object with {text_column!r}; pass text_column= "
                    "if its text has another name."
                ) from error
    return _require_texts(texts, path.name)


def _load_dataset(name: str, data_config: str | None, split: str | None) -> Any:
    from datasets import DatasetDict, load_dataset, load_from_disk

    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            dataset = load_from_disk(name)
            if split is not None and split not in dataset:
                raise KeyError(f"it has no split {split!r} but {', '.join(map(str, dataset))}")
            dataset = dataset[split] if split is not None else dataset
        else:
            dataset = load_dataset(name, data_config, split=split)
    except Exception as error:  # datasets raises a dozen types here, from connection errors to KeyError
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HesscopeError(f"Could not read the dataset {name!r}: {reason}") from error
    if isinstance(dataset, (dict, DatasetDict)):
        raise HesscopeError(f"Expected split= for the dataset {name!r}, which has {', '.join(dataset)}.")
    return dataset


def _read_dataset(dataset: Any, text_column: str, name: str) -> Source:
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if isinstance(columns, dict):
        raise HesscopeError(f"Expected one split of the dataset, got all of {', '.join(columns)}; pass dataset[split].")
    if text_column in columns:
        return Source("rows", _require_texts([row[text_column] for row in dataset], name), name)
    if "input_ids" in columns:
        keys = [key for key in ("input_ids", "attention_mask", "labels") if key in columns]
        rows = [{key: torch.as_tensor(row[key])[None] for key in keys} for row in dataset]
        return Source("batches", rows, name)
    raise HesscopeError(
        f"Expected a column {text_column!r} (or input_ids) in the dataset, found {', '.join(columns)}; pass text_column=."
    )


def _read_items(items: list[Any]) -> Source:
    if not items:
        raise HesscopeError("Expected at least one text or batch, got none; an iterator that was read before is empty.")
    if isinstance(items[0], str):
        return Source("texts", _require_texts(items, "list"), "texts")
    if isinstance(items[0], Tensor):
        if items[0].dim() == 1:
            return Source("sequences", [t.to(torch.int64) for t in items], "tensors")
        return Source("batches", [{"input_ids": _token_matrix(t)} for t in items], "batches")
    if isinstance(items[0], (list, tuple)) and items[0] and isinstance(items[0][0], int):
        return Source("sequences", [torch.tensor(t) for t in items], "token lists")
    if isinstance(items[0], Mapping):
        return Source("batches", [dict(b) for b in items], "batches")
    raise HesscopeError(
        f"Expected texts, token ids or batches with input_ids, got a list of {type(items[0]).__name__}."
    )


def _require_texts(texts: list[Any], name: str) -> list[str]:
    wrong = next((i for i, t in enumerate(texts) if not isinstance(t, str)), None)
    if wrong is not None:
        raise HesscopeError(f"Expected every row of {name} to be text; row {wrong} is {type(texts[wrong]).__name__}.")
    return texts


def _token_matrix(tokens: Tensor) -> Tensor:
    if tokens.dim() != 2 or tokens.is_floating_point():
        raise HesscopeError(
            f"Expected token ids of shape [sequences, length], got {tokens.dtype} of shape {list(tokens.shape)}."
        )
    return tokens.detach().to("cpu", torch.int64)
