"""What a model is beside its weights: modules, their code and settings, as one hash that is the same in every process.

Two models may have the same weights under the same names and still be two functions: another activation, another scale in an
attribute, another `forward`.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from enum import Enum
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn

from hesscope.losses.fingerprint import Reader, is_foreign

#: Hexadecimal digits that are kept.
_DIGITS = 16
#: What says of a configuration where it came from and how it is run, and not what it computes.
_OF_CONFIG = frozenset(
    {
        "architectures",
        "device",
        "dtype",
        "name_or_path",
        "n_devices",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "seed",
        "tokenizer_name",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
#: What frameworks note on modules: where they came from, and what they are wrapped in for a while.
_OF_FRAMEWORKS = frozenset({"training", "gradient_checkpointing", "name_or_path", "forward", "warnings_issued"})
_PLAIN = (bool, int, float, complex, str, Enum, torch.dtype, FunctionType, BuiltinFunctionType, functools.partial, type)


def architecture(model: nn.Module) -> str:
    """A SHA-256 of every module's name, class and settings, and of the model's configuration.

    Modules of installed packages count by their class and `extra_repr`, and what a configuration of transformers or
    TransformerLens says; others by their class's code, with what it reads, and by their attributes that are numbers, texts,
    functions or classes, or lists and dictionaries of these. Tensors are no settings: a module may keep anything in them.

    A model whose code or settings change from run to run without changing its outputs may say which it is by an attribute
    `fingerprint`, a string, and is taken at its word.
    """
    said = getattr(model, "fingerprint", None)
    if isinstance(said, str):
        return hashlib.sha256(said.encode()).hexdigest()[:_DIGITS]
    reader = Reader(model)
    found = hashlib.sha256()
    for name, module in model.named_modules():
        found.update(f"{len(name)} {name} ".encode() + reader.digest(_kind(module)))
        if is_foreign(_kind(module).__module__):
            shown = module.extra_repr().encode()
            found.update(f"{len(shown)} ".encode() + shown)
        else:
            for key, value in _settings(module):
                found.update(f"{len(key)} {key} ".encode() + reader.digest(value))
    found.update(json.dumps(_configured(model), sort_keys=True, default=str).encode())
    return found.hexdigest()[:_DIGITS]


def _kind(module: nn.Module) -> type:
    """The module's own class, which `fully_shard` puts another in front of."""
    return next(c for c in type(module).__mro__ if not c.__module__.startswith("torch.distributed.fsdp"))


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, value in sorted(vars(module).items()):
        if key not in _OF_FRAMEWORKS and not key.startswith(("_hf", "_is_hf", "_fsdp")) and _is_setting(value):
            yield key, value


def _is_setting(value: Any, depth: int = 4) -> bool:
    if isinstance(value, _PLAIN):
        return True
    if depth and type(value) in (list, tuple, set, frozenset):
        return bool(value) and all(_is_setting(part, depth - 1) for part in value)
    if depth and type(value) is dict:
        return bool(value) and all(_is_setting(part, depth - 1) for pair in value.items() for part in pair)
    return False


def _configured(model: nn.Module) -> Any:
    """What the model's configuration says of the function that it computes."""
    config = getattr(model, "config", None) or getattr(model, "cfg", None)
    told: Any = getattr(config, "to_dict", None)
    return _without(told()) if callable(told) else None


def _without(said: Any) -> Any:
    if isinstance(said, dict):
        return {str(key): _without(value) for key, value in said.items() if not _is_circumstance(str(key))}
    return [_without(part) for part in said] if isinstance(said, (list, tuple)) else said


def _is_circumstance(key: str) -> bool:
    return key in _OF_CONFIG or key.startswith(("_", "attn_implementation"))
