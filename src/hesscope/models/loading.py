"""Models and tokenizers by Hub id or local path."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hesscope.errors import HesscopeError

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A torch dtype from itself or its name."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise HesscopeError(f"Expected dtype to be one of {', '.join(DTYPES)}, got {dtype!r}.")
    return DTYPES[dtype]


def resolve_device(device: torch.device | str | None) -> torch.device | None:
    """A torch device that exists here; raises HesscopeError otherwise."""
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise HesscopeError(
            f"Expected a device that this machine has, got {str(device)!r}: {_first_line(error)}"
        ) from error
    return torch.device("cuda", torch.cuda.current_device()) if str(found) == "cuda" else found


def load_model(
    name: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    encoder_decoder: bool = False,
    device_map: str | dict[str, Any] | None = None,
    offload_folder: str | Path | None = None,
    **hub: Any,
) -> nn.Module:
    """Load a language model in float32 unless told otherwise, on a GPU if there is one, in evaluation mode.

    Raises HesscopeError where the name is neither a model folder nor a Hub id that can be reached, and for weights on disk
    without a folder.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    family, words = (
        (AutoModelForSeq2SeqLM, "an encoder-decoder")
        if encoder_decoder
        else (AutoModelForCausalLM, "a causal language model")
    )
    _require_config(name)
    spread = _spread(device_map, offload_folder, device)
    try:
        with _bars_on_terminals_only():
            config = AutoConfig.from_pretrained(name, **hub)
            model = family.from_pretrained(name, config=config, dtype=dtype or torch.float32, **spread, **hub)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise HesscopeError(f"Could not load {str(name)!r} as {words}: {_first_line(error)}") from error
    if spread:
        return model.eval()  # type: ignore[no-any-return]
    moved: nn.Module = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return moved.eval()


def _spread(
    device_map: str | dict[str, Any] | None, offload_folder: str | Path | None, device: torch.device | str | None
) -> dict[str, Any]:
    """What from_pretrained is told about places; nothing where the model goes to one device."""
    if device_map is None:
        if offload_folder is not None:
            raise HesscopeError("Expected device_map= with offload_folder=, such as 'auto' or 'disk'.")
        return {}
    if device is not None:
        raise HesscopeError(f"Expected device= or device_map=, got both ({str(device)!r} and {device_map!r}).")
    places: Any = {"": "disk"} if device_map == "disk" else device_map
    if isinstance(places, dict) and "disk" in places.values() and offload_folder is None:
        raise HesscopeError("Expected offload_folder= with weights on disk: the folder where they are put.")
    return {"device_map": places} | ({} if offload_folder is None else {"offload_folder": str(offload_folder)})


def load_skeleton(name: str | Path, dtype: torch.dtype | None = None, **hub: Any) -> nn.Module:
    """The model that a configuration describes, without its weights: every parameter is on the meta device.

    Raises HesscopeError where the name is neither a folder with a config.json nor a Hub id that can be reached.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    _require_config(name)
    try:
        config = AutoConfig.from_pretrained(name, **hub)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise HesscopeError(f"Could not read {str(name)!r} as a causal language model: {_first_line(error)}") from error
    return model.eval()


def _require_config(name: str | Path) -> None:
    if _is_path(name) and not (Path(name) / "config.json").is_file():
        raise HesscopeError(
            f"Expected {str(name)!r} to be a model folder with a config.json, or a Hub id; there is no config.json in it."
        )


def load_tokenizer(name: str | Path, **hub: Any) -> Any:
    """Load a tokenizer; raises HesscopeError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **hub)
    except Exception as error:  # tokenizer files fail in as many ways as there are formats
        raise HesscopeError(
            f"Could not load a tokenizer from {str(name)!r} ({_first_line(error)}); pass tokenizer=, or data as token ids."
        ) from error


def place_model(model: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None) -> nn.Module:
    """The model itself where dtype and device already fit, otherwise a converted copy: the caller's is never changed."""
    parameters = list(model.parameters())
    fits = all(
        (dtype is None or p.dtype == dtype) and (device is None or p.device == torch.device(device)) for p in parameters
    )
    if not fits and getattr(model, "hf_device_map", None):
        raise HesscopeError(
            "Expected no other dtype= or device= with a model that is spread over devices or offloaded; load it as it is to be used, "
            "with dtype= and device_map= of from_pretrained."
        )
    return model if fits else copy.deepcopy(model).to(device=device, dtype=dtype)


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Keep the progress bars of transformers out of logs and pipes."""
    from transformers.utils import logging

    silence = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if silence:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if silence:
            logging.enable_progress_bar()


def _is_path(name: str | Path) -> bool:
    """Whether a name cannot be a Hub id, which is `name` or `owner/name`, or stands for something on disk."""
    return isinstance(name, Path) or Path(name).exists() or name.startswith((".", "/", "~")) or name.count("/") > 1


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
