"""What the package is held to: dense Hessians by plain autograd, and closed forms, written without the package's engines."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hesscope.space import Space, random

Batch = dict[str, Tensor]


def relative(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected| in the Frobenius norm, taken in float64."""
    value, expected = value.detach().double(), expected.detach().double()
    assert value.shape == expected.shape
    return float((value - expected).norm() / expected.norm())


# ---- dense derivatives of a scalar


@dataclass(frozen=True)
class Derivatives:
    """A risk, its gradient [n] and its Hessian [n, n]."""

    risk: float
    gradient: Tensor
    hessian: Tensor

    @property
    def perplexity_hessian(self) -> Tensor:
        """The Hessian of exp(R): exp(R) (H + g g^T)."""
        return math.exp(self.risk) * (self.hessian + torch.outer(self.gradient, self.gradient))


def derivatives(risk: Tensor, parameters: Sequence[Tensor], picked: list[tuple[int, int]] | None = None) -> Derivatives:
    """Gradient and Hessian of a scalar, one backward pass a column, at every entry of the parameters.

    `picked` narrows this to some entries, each given as (which parameter, flat position), in that order.
    """
    if picked is None:
        picked = [(i, flat) for i, p in enumerate(parameters) for flat in range(p.numel())]
    first = torch.autograd.grad(risk, parameters, create_graph=True, materialize_grads=True)
    entries = [first[i].reshape(-1)[flat] for i, flat in picked]
    columns = []
    for entry in entries:
        second: Sequence[Tensor] = [torch.zeros_like(p) for p in parameters]
        if entry.requires_grad:
            second = torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True)
        columns.append(torch.stack([second[i].reshape(-1)[flat] for i, flat in picked]))
    return Derivatives(float(risk.detach()), torch.stack(entries).detach(), torch.stack(columns, 1).detach())


def entries_of(space: Space) -> list[tuple[int, int]]:
    """The coordinates of a space as (which of its parameters, flat position)."""
    return [(i, flat) for i, c in enumerate(space.coordinates) for flat in c.flat_indices().tolist()]


# ---- language models


def causal_lm(model: nn.Module, batches: Sequence[Batch], space: Space, shift: int = 1) -> Derivatives:
    """The mean negative log-likelihood and its dense derivatives over a space, in float64 on a copy of the model.

    Position t predicts the label at t + shift: 0 for an encoder-decoder.
    """
    copied = prepared_copy(model, torch.float64)
    parameters = selected_parameters(copied, space)
    with sdpa_kernel(SDPBackend.MATH):
        return derivatives(mean_nll(copied, batches, shift), parameters, entries_of(space))


def causal_lm_products(
    model: nn.Module, batches: Sequence[Batch], V: list[dict[str, Tensor]], dtype: torch.dtype = torch.float64
) -> list[dict[str, Tensor]]:
    """H v for vectors over whole parameters, by one double backward pass each, over all batches at once."""
    copied = prepared_copy(model, dtype)
    named = dict(copied.named_parameters())
    parameters = [named[name].requires_grad_() for name in V[0]]
    with sdpa_kernel(SDPBackend.MATH):
        risk = mean_nll(copied, batches)
        first = torch.autograd.grad(risk, parameters, create_graph=True, materialize_grads=True)
        results = []
        for v in V:
            slope = sum((g * v[name].to(dtype)).sum() for g, name in zip(first, V[0], strict=True))
            assert isinstance(slope, Tensor)
            second = torch.autograd.grad(slope, parameters, retain_graph=True, materialize_grads=True)
            results.append(dict(zip(V[0], second, strict=True)))
    return results


def mean_nll(model: nn.Module, batches: Sequence[Batch], shift: int = 1) -> Tensor:
    """Sum over all batches, divided once by the number of targets that count in all of them."""
    total, count = torch.zeros(()), 0
    for batch in batches:
        targets = labels_of(batch)[:, shift:]
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        log_p = model(**inputs, use_cache=False).logits[:, : targets.shape[1]].log_softmax(-1)
        valid = targets != -100
        total = total - log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0][valid].sum()
        count += int(valid.sum())
    return total / count


def mean_last_token_nll(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """-log p of the last target that counts in every sequence that has one, averaged over these sequences."""
    terms = []
    for batch in batches:
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
        for z, labels in zip(logits, labels_of(batch), strict=True):
            places = [t for t in range(1, len(labels)) if labels[t] != -100]
            if places:
                terms.append(-z[places[-1] - 1].log_softmax(-1)[labels[places[-1]]])
    return torch.stack(terms).mean()


def mean_one_hot_error(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """(logit - one-hot)^2 of every target that counts, averaged over targets and vocabulary."""
    terms = []
    for batch in batches:
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
        for z, labels in zip(logits, labels_of(batch), strict=True):
            for t in range(1, len(labels)):
                if labels[t] != -100:
                    wanted = torch.eye(z.shape[-1], dtype=z.dtype)[labels[t]]
                    terms.append((z[t - 1] - wanted) ** 2)
    return torch.cat(terms).mean()


def labels_of(batch: Batch) -> Tensor:
    """Labels as given, or the inputs where a token and the one before it are visible."""
    if "labels" in batch:
        return batch["labels"]
    labels = batch["input_ids"].clone()
    mask = batch.get("attention_mask", torch.ones_like(labels)).bool()
    labels[~mask] = -100
    labels[:, 1:][~mask[:, :-1]] = -100
    return labels


def selected_parameters(model: nn.Module, space: Space) -> list[nn.Parameter]:
    """The parameters of a space, all requiring gradients."""
    named = dict(model.named_parameters())
    return [named[c.name].requires_grad_() for c in space.coordinates]


def prepared_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose experts are written out, as grouped kernels have no second derivative, and whose padding row has one.

    An embedding leaves its padding row out; an encoder-decoder sees it where a label does not count.
    """
    copied = copy.deepcopy(model).to(dtype)
    for module in copied.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
        if getattr(getattr(module, "config", None), "_experts_implementation", None) is not None:
            module.config._experts_implementation = "eager"  # type: ignore[union-attr]
    return copied


# ---- models that cast to float32 by themselves


class KeepDouble(TorchFunctionMode):
    """Makes casts from float64 to float32 do nothing, as RMSNorm, softmax, routers and rotary embeddings cast.

    `differentiated` counts those casts whose tensor depends on a weight.
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
            to_float = func is Tensor.float
            if to_float or torch.float32 in args or kwargs.get("dtype") is torch.float32:
                self.differentiated += x.requires_grad
            if to_float:
                return x
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {key: torch.float64 if a is torch.float32 else a for key, a in kwargs.items()}
        return func(*args, **kwargs)


@contextmanager
def keeping_double(model: nn.Module) -> Iterator[KeepDouble]:
    """Run the forward passes of the model's class under one `KeepDouble`, for copies of the model too."""
    mode, cls = KeepDouble(), type(model)
    forward = cls.forward

    def patched(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "forward", patched)
        yield mode


# ---- structure


def energy_by_class(A: Tensor, row: Sequence[int], layer: Sequence[int], block: Sequence[int]) -> list[float]:
    """Sums of squared entries on the diagonal, in the rest of the rows, layers and blocks, and across, entry by entry."""
    sums = [0.0] * 5
    for i in range(len(A)):
        for j in range(len(A)):
            same = [i == j, row[i] == row[j], layer[i] == layer[j], block[i] == block[j], True]
            sums[same.index(True)] += float(A[i, j]) ** 2
    return sums


# ---- closed forms


def squared_error_hessian(inputs: Tensor, outputs: int) -> Tensor:
    """The Hessian of the mean squared error of y = W x over the entries of W [outputs, inputs]: (2/N) I kron X^T X.

    N is the number of elements of y, over all rows of X.
    """
    N = inputs.shape[0] * outputs
    return torch.kron(torch.eye(outputs, dtype=inputs.dtype), 2.0 / N * inputs.T @ inputs)


def cross_entropy_hessian(inputs: Tensor, logits: Tensor) -> Tensor:
    """The Hessian of the mean cross-entropy of softmax(W x) over W [C, inputs]: (1/N) sum (diag p - p p^T) kron x x^T."""
    p = logits.softmax(-1)
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    total = torch.stack([torch.kron(b, torch.outer(x, x)) for b, x in zip(blocks, inputs, strict=True)]).sum(0)
    return total / len(inputs)


# ---- matrices through the outputs, from the Jacobian written down whole


@dataclass(frozen=True)
class Linearized:
    """Logits [M, V] of the M targets that count, their Jacobian [M, V, n], the targets, and the sequence of each."""

    logits: Tensor
    jacobian: Tensor
    targets: Tensor
    sequences: Tensor

    def ggn(self) -> Tensor:
        """(1/M) sum over targets of J^T (diag p - p p^T) J."""
        p = self.logits.softmax(-1)
        H_out = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return torch.einsum("mvi,mvw,mwj->ij", self.jacobian, H_out, self.jacobian) / len(p)

    def sampled(self, seed: int, sample: int = 0) -> Tensor:
        """Labels [M] from the model: the k-th target that counts inverts its distribution at the k-th uniform number."""
        u = random.uniforms(random.stream_key(seed, f"fisher/{sample}"), torch.arange(len(self.logits)))
        return (self.logits.softmax(-1).cumsum(-1) < u[:, None]).sum(-1)

    def empirical_fisher(self, per: str, targets: Tensor | None = None) -> Tensor:
        """(1/M) sum of g g^T, with g = J^T (p - e_target), or its sum over a sequence."""
        picked = self.targets if targets is None else targets
        r = self.logits.softmax(-1) - nn.functional.one_hot(picked, self.logits.shape[-1])
        g = torch.einsum("mvi,mv->mi", self.jacobian, r)
        if per == "sequence":
            g = torch.stack([g[self.sequences == s].sum(0) for s in self.sequences.unique()])
        return g.T @ g / len(picked)


def linearized_lm(
    model: nn.Module, batches: Sequence[Batch], space: Space, shift: int = 1, dtype: torch.dtype = torch.float64
) -> Linearized:
    """Logits and their dense Jacobian by a model in `dtype`; position t predicts the label at t + shift."""
    copied = prepared_copy(model, dtype)
    parameters = selected_parameters(copied, space)
    logits, rows, targets, sequences = [], [], [], []
    first = 0
    with sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            labels = labels_of(batch)[:, shift:]
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            valid = labels != -100
            z = copied(**inputs, use_cache=False).logits[:, : labels.shape[1]][valid]
            logits.append(z.detach().double())
            rows.append(jacobian(z, parameters, entries_of(space)).double())
            targets.append(labels[valid])
            sequences.append(first + torch.nonzero(valid)[:, 0])
            first += len(labels)
    return Linearized(torch.cat(logits), torch.cat(rows), torch.cat(targets), torch.cat(sequences))


def jacobian(z: Tensor, parameters: Sequence[Tensor], picked: list[tuple[int, int]]) -> Tensor:
    """dz / d(the picked entries), [*z.shape, n], a row for each entry of z, by batched backward passes."""
    unit = torch.eye(z.numel(), dtype=z.dtype).reshape(-1, *z.shape)
    found = torch.autograd.grad(z, parameters, unit, is_grads_batched=True, materialize_grads=True)
    columns = [found[i].flatten(1)[:, flat] for i, flat in picked]
    return torch.stack(columns, -1).reshape(*z.shape, len(picked))


# ---- what linear layers receive and what comes back, one target at a time


@dataclass(frozen=True)
class LayerPairs:
    """Of one linear layer the inputs [P, c] and output derivatives [P, r] at the positions whose output some target depends on.

    `sequences` [P] numbers the sequences; `terms` counts the targets of all batches.
    """

    a: Tensor
    g: Tensor
    sequences: Tensor
    terms: int

    def factors(self) -> tuple[Tensor, Tensor]:
        """G = (1/N) sum of g g^T and A, the mean of a a^T, outer product by outer product."""
        G = torch.stack([torch.outer(g, g) for g in self.g]).sum(0) / self.terms
        return G, torch.stack([torch.outer(a, a) for a in self.a]).mean(0)

    def fisher(self, per: str) -> Tensor:
        """(1/N) sum of vec(g a^T) vec(g a^T)^T over positions ("token") or over sums of g a^T over a sequence."""
        parts = torch.einsum("pr,pc->prc", self.g, self.a).flatten(1)
        if per == "sequence":
            parts = torch.stack([parts[self.sequences == s].sum(0) for s in self.sequences.unique()])
        return parts.T @ parts / self.terms


def layer_pairs(model: nn.Module, batches: Sequence[Batch], layer: str, targets: Tensor) -> LayerPairs:
    """Run a causal LM in float64 with these targets, and differentiate -log p of one target after another.

    A position is taken where the derivative of any target is not zero.
    """
    copied = prepared_copy(model, torch.float64).requires_grad_(False)
    module = copied.get_submodule(layer)
    seen: list[tuple[Tensor, Tensor]] = []

    def tap(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output.clone() if output.requires_grad else output.clone().requires_grad_()
        seen.append((inputs[0].detach(), output))
        return output

    module.register_forward_hook(tap)
    found, first, sequences = [], 0, 0
    with sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            labels = labels_of(batch)
            valid = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            log_p = copied(**inputs, use_cache=False).logits.log_softmax(-1)
            a, y = seen.pop()
            places = valid.nonzero().tolist()
            g, taken = torch.zeros_like(y), torch.zeros(y.shape[:2], dtype=torch.bool)
            for (s, t), target in zip(places, targets[first : first + len(places)].tolist(), strict=True):
                of_target = torch.autograd.grad(-log_p[s, t, target], y, retain_graph=True)[0]
                g, taken = g + of_target, taken | of_target.any(-1)
            found.append((a[taken], g[taken], sequences + taken.nonzero()[:, 0]))
            first, sequences = first + len(places), sequences + len(labels)
    a, g, of = (torch.cat(parts) for parts in zip(*found, strict=True))
    return LayerPairs(a, g, of, first)


def sampled_targets(model: nn.Module, batches: Sequence[Batch], seed: int, sample: int = 0) -> Tensor:
    """Labels from a causal LM in float64: the k-th target that counts inverts its distribution at the k-th uniform number."""
    copied, p = prepared_copy(model, torch.float64), []
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            valid = labels_of(batch)[:, 1:] != -100
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            p.append(copied(**inputs, use_cache=False).logits[:, :-1][valid].softmax(-1))
    cumulative = torch.cat(p).cumsum(-1)
    u = random.uniforms(random.stream_key(seed, f"fisher/{sample}"), torch.arange(len(cumulative)))
    return (cumulative < u[:, None]).sum(-1)
