"""Questions about a model that do not depend on its architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hesscope.errors import HesscopeError

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
    if len(devices) > 1 or "meta" in {d.type for d in devices}:
        found = ", ".join(sorted(map(str, devices)))
        raise HesscopeError(
            f"Expected all parameters on one device, found {found}; models spread over several devices or offloaded "
            "are not supported yet, so load the model without device_map."
        )
    return devices.pop()


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
