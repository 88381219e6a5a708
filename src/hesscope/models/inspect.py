"""Questions about a model that do not depend on its architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hesscope.errors import HesscopeError
from hesscope.models.elsewhere import device_of
from hesscope.models.offload import offloaded, placed_parameters

# The names under which configurations state the longest input, the common one first.
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length")


def context_length(model: nn.Module) -> int | None:
    """The longest input that the model's configuration admits, or None where it states none."""
    config: Any = getattr(model, "config", getattr(model, "cfg", None))
    if config is None:
        return None
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in _CONTEXT_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def require_one_device(model: nn.Module) -> torch.device:
    """The device that holds all parameters; raises HesscopeError where there are several or a parameter has no data."""
    devices = {p.device for p in model.parameters()}
    if not devices:
        raise HesscopeError("Expected a model with parameters; this one has none.")
    if offloaded(model) is not None or (len(devices) > 1 and getattr(model, "hf_device_map", None)):
        _require_ties(model)
        _require_ties_on_one_device(model)
        name, first = next(iter(model.named_parameters()))
        return device_of(model, name, first)  # hooks of the model move what comes in and goes out
    if len(devices) > 1 or ("meta" in {d.type for d in devices} and not is_shadow(model)):
        found = ", ".join(sorted(map(str, devices)))
        raise HesscopeError(
            f"Expected all parameters on one device, found {found}, and no hooks that move data "
            "between them; spread a model, or offload it, with device_map= of from_pretrained."
        )
    return devices.pop()


def _require_ties(model: nn.Module) -> None:
    """Raise HesscopeError where the model's tied weights have become two, as they do when accelerate offloads what was loaded."""
    named = dict(model.named_parameters(remove_duplicate=False))
    for one, other in dict(getattr(model, "all_tied_weights_keys", None) or {}).items():
        if one in named and other in named and named[one] is not named[other]:
            raise HesscopeError(
                f"Expected {one} and {other} to be one parameter, for the model ties them, but they are two: offload the model as it "
                "is loaded, with device_map= and offload_folder= of from_pretrained."
            )


def _require_ties_on_one_device(model: nn.Module) -> None:
    """Raise HesscopeError where modules that share a parameter run on different devices."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    for prefix, path, p, runs_on in placed_parameters(model):
        shared = names[id(p)]
        if len(shared) > 1 and not p.is_meta and runs_on not in (p.device, torch.device(p.device.type)):
            raise HesscopeError(
                f"Expected {' and '.join(shared)}, which are one parameter, to have one place, but it is on {p.device}, and "
                f"{f'{prefix}.{path}'.strip('.')} is used on {runs_on}: give them the same one in device_map= of from_pretrained."
            )


def mark_as_shadow(model: nn.Module) -> nn.Module:
    """Say that a model is on the meta device on purpose: it is run for its shapes only."""
    model._hesscope_shadow = True  # type: ignore[assignment]
    return model


def is_shadow(model: nn.Module) -> bool:
    """Whether a model is run for its shapes only."""
    return getattr(model, "_hesscope_shadow", False) is True


def first_nonfinite_module(model: nn.Module, run: Callable[[], object]) -> str | None:
    """The name of the first module that turns finite inputs into a non-finite output during `run()`."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if not found and not all(_finite(x) for x in tree_leaves(output)):
                found.append(name)

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if not list(m.children())]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _finite(value: object) -> bool:
    return not isinstance(value, Tensor) or bool(torch.isfinite(value).all())
