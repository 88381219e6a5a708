"""Is a model about to draw random numbers?"""

from __future__ import annotations

from torch import nn

from hesscope.errors import HesscopeError


def require_no_dropout(model: nn.Module) -> None:
    """Raise HesscopeError where a module in training mode has dropout or a normalisation over the batch."""
    name = next((n for n, m in model.named_modules() if m.training and _is_random(m)), None)
    if name is None:
        return
    raise HesscopeError(
        f"Expected a model without active dropout, but {name or type(model).__name__!r} is in training mode and would "
        "drop or depend on the batch; call model.eval(), or pass dropout='frozen' to study the training loss."
    )


def _is_random(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.track_running_stats
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return _configured_dropout(module) > 0


def _configured_dropout(module: nn.Module) -> float:
    """The largest dropout that a configuration asks for: attention functions read it without a module."""
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return 0.0
    rates = [v for k, v in config.to_dict().items() if _names_a_rate(k) and isinstance(v, float)]
    return max(rates, default=0.0)


def _names_a_rate(key: str) -> bool:
    """Rates of heads that a language model does not have are left out."""
    return any(word in key for word in ("dropout", "pdrop", "layerdrop")) and not key.startswith(
        ("classifier", "summary")
    )
