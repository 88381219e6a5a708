"""What the package is held to: dense Hessians by plain autograd, and closed forms, written without the package's engines."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hesscope.space import Space

Batch = dict[str, Tensor]


def relative(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected| in the Frobenius norm, taken in float64."""
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm())


# ---- dense derivatives of a scalar


def gradient_and_hessian(risk: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Gradient [n] and Hessian [n, n] of a scalar in all entries of the parameters, one backward pass a column."""
    picked = [(i, flat) for i, p in enumerate(parameters) for flat in range(p.numel())]
    return _at(risk, parameters, picked)


def _at(risk: Tensor, parameters: Sequence[Tensor], picked: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """The same at some entries only, each given as (which parameter, flat position)."""
    first = torch.autograd.grad(risk, parameters, create_graph=True, materialize_grads=True)
    entries = [first[i].reshape(-1)[flat] for i, flat in picked]
    columns = []
    for entry in entries:
        if entry.requires_grad:
            second = torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
        else:
            second = tuple(torch.zeros_like(p) for p in parameters)
        columns.append(torch.stack([second[i].reshape(-1)[flat] for i, flat in picked]))
    return torch.stack(entries).detach(), torch.stack(columns, 1).detach()


# ---- language models


def causal_lm(model: nn.Module, batches: Sequence[Batch], space: Space) -> tuple[float, Tensor, Tensor]:
    """R = sum of the negative log-likelihoods of all batches / their number, its gradient and Hessian over a space.

    In float64 on a copy of the model, with attention in its mathematical form and experts written out.
    """
    model = copy.deepcopy(model).double()
    return causal_lm_as_it_is(model, batches, space)


def causal_lm_as_it_is(model: nn.Module, batches: Sequence[Batch], space: Space) -> tuple[float, Tensor, Tensor]:
    """The same in the model's own dtype; the model's parameters must require gradients."""
    named = dict(model.named_parameters())
    parameters = [named[c.name].requires_grad_() for c in space.coordinates]
    picked = [(i, flat) for i, c in enumerate(space.coordinates) for flat in c.flat_indices().tolist()]
    with written_out(model):
        risk = mean_nll(model, batches)
        gradient, hessian = _at(risk, parameters, picked)
    return float(risk.detach()), gradient, hessian


def mean_nll(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Sum over all batches, divided once by the number of targets that count in all of them."""
    total, count = torch.zeros(()), 0
    for batch in batches:
        targets = labels_of(batch)[:, 1:]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        log_p = model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
        valid = targets != -100
        total = total - log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0][valid].sum()
        count += int(valid.sum())
    return total / count


def labels_of(batch: Batch) -> Tensor:
    """Labels as given, or the inputs where a token and the one before it are visible."""
    if "labels" in batch:
        return batch["labels"]
    labels = batch["input_ids"].clone()
    mask = batch.get("attention_mask", torch.ones_like(labels)).bool()
    labels[~mask] = -100
    labels[:, 1:][~mask[:, :-1]] = -100
    return labels


@contextmanager
def written_out(model: nn.Module) -> Iterator[None]:
    """Attention and experts in forms that have second derivatives, set on this model for good."""
    for module in model.modules():
        if getattr(getattr(module, "config", None), "_experts_implementation", None) is not None:
            module.config._experts_implementation = "eager"
    with sdpa_kernel(SDPBackend.MATH):
        yield


class KeepDouble(TorchFunctionMode):
    """Turns casts of float64 tensors to float32 into no casts: RMSNorm, rotary embeddings, softmax and routers do them.

    `differentiated` counts the casts of tensors that depend on a parameter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.differentiated = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        x = args[0] if args else None
        if isinstance(x, Tensor) and x.dtype == torch.float64:
            if func is Tensor.float:
                self.differentiated += x.requires_grad
                return x
            if torch.float32 in args or kwargs.get("dtype") is torch.float32:
                self.differentiated += x.requires_grad
                args = tuple(torch.float64 if a is torch.float32 else a for a in args)
                kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def squared_error_hessian(inputs: Tensor, outputs: int) -> Tensor:
    """The Hessian of the mean squared error of y = W x over the elements of W [outputs, inputs]: (2/N) I kron X^T X."""
    N = inputs.shape[0] * outputs
    return torch.kron(torch.eye(outputs, dtype=inputs.dtype), 2.0 / N * inputs.T @ inputs)


__all__ = ["ExitStack"]
