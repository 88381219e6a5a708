"""What Adam divides its steps by, read from the optimizer's state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hesscope.errors import HesscopeError
from hesscope.models import named_parameters
from hesscope.operators import Operator
from hesscope.operators.congruence import DiagonalCongruence
from hesscope.space import Space


def require_adam(optimizer: Any, model: nn.Module, space: Space) -> None:
    """Raise HesscopeError unless an optimizer of Adam's kind has all selected parameters."""
    groups = getattr(optimizer, "param_groups", [])
    adams = groups and all("betas" in group and "eps" in group for group in groups)
    # Adamax has the options of Adam, and divides by a largest gradient.
    if not adams or isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.Adamax):
        raise HesscopeError(
            f"Expected Adam or AdamW for the preconditioned sharpness, got {type(optimizer).__name__}; leave preconditioned "
            "out."
        )
    held = {id(p) for group in groups for p in group["params"]}
    missing = next((n for n in space.names if id(named_parameters(model)[n]) not in held), None)
    if missing is not None:
        raise HesscopeError(f"Expected the optimizer to train every selected parameter, but {missing} is not in it.")


def preconditioned(H: Operator, optimizer: Any, model: nn.Module) -> DiagonalCongruence:
    """D^(-1/2) H D^(-1/2) with D = sqrt(v_hat) + eps and v_hat = v / (1 - beta_2^t), t counting the parameter's steps.

    Its largest eigenvalue is that of D^(-1) H, the preconditioned sharpness of Cohen et al. (2022, "Adaptive gradient
    methods at the edge of stability"), without their factor 1 - beta_1^t, which tends to one. With `amsgrad` v is the
    largest so far.

    Where v is exactly zero the gradient always was: Adam has never moved that weight (of a token not seen yet, say) but by
    weight decay. Such weights are left out, or they would count 1 / eps times their curvature; `left_out` counts them.

    Raises HesscopeError where the optimizer keeps another state than Adam's.
    """
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parameters = named_parameters(model)
    scales = {}
    for c in H.space.coordinates:
        p = parameters[c.name]
        scale = _scale(optimizer.state.get(p, {}), group_of[id(p)], p, c.name)
        scales[c.name] = c.gather(scale).to(H.dtype)[None]
    return DiagonalCongruence(H, scales)


def left_out(A: DiagonalCongruence) -> int:
    """How many weights a preconditioned operator leaves out."""
    return sum(int((part == 0).sum()) for part in A.scales.values())


def _scale(state: dict[str, Any], group: dict[str, Any], p: Tensor, name: str) -> Tensor:
    """(sqrt(v_hat) + eps)^(-1/2), shaped like the parameter, in float32 at least; zero where v is."""
    wide = torch.promote_types(p.dtype, torch.float32)
    if not state:
        return torch.zeros_like(p, dtype=wide, requires_grad=False)
    v = state.get("max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq")
    if v is None or "step" not in state:
        raise HesscopeError(
            f"Expected the optimizer to keep Adam's exp_avg_sq and step for {name}, found {', '.join(map(str, state))}; leave "
            "preconditioned out."
        )
    correction = 1.0 - float(group["betas"][1]) ** float(state["step"])
    v = v.detach().to(wide)
    scale: Tensor = ((v / correction).sqrt() + float(group["eps"])).rsqrt()
    return scale.masked_fill(v == 0, 0.0)
