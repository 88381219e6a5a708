"""The Fisher matrix with labels sampled from the model, and the empirical Fisher matrix with the data's own.

Both are sums of outer products of gradients. With r = d sum / d outputs (zero but for one token in r_t, one sequence in
r_s) and J = d outputs / d theta, a token's gradient is J^T r_t, a sequence's J^T r_s, and

    sum over t of g_t g_t^T = J^T D J,    D u = sum over t of r_t <r_t, u>,

and the same over s: no gradient is ever formed on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hesscope.engines import make_output_engine
from hesscope.errors import HesscopeError
from hesscope.losses import ChunkedHead, HasTerms, SamplingLoss, TokenMatrix, residual
from hesscope.losses.cross_entropy import cross_entropy_residual
from hesscope.losses.sampling import sample_classes
from hesscope.models import state_key
from hesscope.operators.asked import own_precision, own_space
from hesscope.operators.base import Operator
from hesscope.operators.risk import CurvatureOfRisk
from hesscope.problem import Problem
from hesscope.space import Space
from hesscope.space.random import resolve_seed, stream_key

_PER = ("token", "sequence")


def fisher(
    problem: Problem,
    space: Space | None = None,
    samples: int = 1,
    per: str = "token",
    seed: int | None = 0,
    engine: str = "auto",
    graph_memory: int | None = None,
    microbatch: int | None = None,
    precision: str | None = None,
) -> Operator:
    """The Fisher information matrix of the model's predictions, with sampled labels, over a space.

    For labels y drawn from the model's own distribution at every valid target, g_t = d (-log p(y_t)) / d theta, averaged
    over `samples` draws,

        F = (1/N) sum over tokens t of  g_t g_t^T                  per="token"
        F = (1/N) sum over sequences s of  g_s g_s^T,  g_s = sum of the g_t of s      per="sequence"

    In expectation over the labels both are the GGN: given its inputs, one token's score has mean zero and is independent
    of another's. For a squared error the model's distribution is normal with variance 1/2 around the outputs, and a term
    is an element.

    The labels belong to the operator: the label of the k-th valid target of the frozen data depends on the seed, the
    number of the sample and k (and on the model's probabilities there), not on how the data is cut into batches. Where
    the parameters change they follow. Inputs stay as they are.

    Args:
        samples: label sets drawn and averaged.
        per: "token" (one gradient a term of the loss) or "sequence" (one a row of the outputs' first axis).
        seed: of the labels; None draws one and records it.
        engine, graph_memory, microbatch, precision: as for `hesscope.ggn`.

    Raises:
        HesscopeError: a loss that cannot sample targets, objective="perplexity", an unknown `per`, samples below one, batches
            that cannot be split.

    Example:
        >>> import torch, hesscope as hs
        >>> model = torch.nn.Linear(1, 2, bias=False).requires_grad_(False)
        >>> _ = model.weight.zero_()                                    # both classes have probability 1/2
        >>> problem = hs.supervised(model, [(torch.ones(3, 1), torch.tensor([0, 1, 1]))])
        >>> hs.fisher(problem, hs.select(problem, "weight")) @ torch.tensor([1.0, 0.0])
        tensor([ 0.2500, -0.2500])
    """
    space = _checked(problem, space, per, "Fisher")
    if not isinstance(problem.loss, SamplingLoss):
        raise HesscopeError(
            "Expected a loss with sample(outputs, batch, key, first), for the labels are drawn from the model; "
            f"{type(problem.loss).__name__} lacks it, so add it or use hs.ggn or hs.empirical_fisher."
        )
    if samples < 1:
        raise HesscopeError(f"Expected samples to be at least 1, got {samples}.")
    seed = problem.comm.on_first(lambda: resolve_seed(seed))
    kind = {"operator": "fisher", "per": per, "samples": samples, "seed": seed}
    middle = _OuterProducts(per, SampledBatches(problem, problem.loss, samples, seed))
    kept, precision = make_output_engine(engine, middle), own_precision(precision, problem, engine)
    return CurvatureOfRisk(problem, space, kept, graph_memory, kind, True, microbatch, precision=precision)


def empirical_fisher(
    problem: Problem,
    space: Space | None = None,
    per: str = "token",
    engine: str = "auto",
    graph_memory: int | None = None,
    microbatch: int | None = None,
    precision: str | None = None,
) -> Operator:
    """The empirical Fisher matrix over a space: the gradients' second moment at the data's own labels.

        E = (1/N) sum over tokens t of  g_t g_t^T                  per="token"
        E = (1/N) sum over sequences s of  g_s g_s^T,  g_s = sum of the g_t of s      per="sequence"

    with g_t = d loss_t / d theta. It is no estimate of the Fisher matrix (Kunstner, Balles and Hennig, 2019), and neither
    is the square of a batch's mean gradient an estimate of it.

    Args:
        per: "token" (one gradient a term of the loss) or "sequence" (one a row of the outputs' first axis).
        engine, graph_memory, microbatch, precision: as for `hesscope.ggn`.

    Raises:
        HesscopeError: a loss without outputs, objective="perplexity", an unknown `per`, batches that cannot be split.

    Example:
        >>> import torch, hesscope as hs
        >>> model = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
        >>> _ = model.weight.fill_(1.0)
        >>> problem = hs.supervised(model, [(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1))], loss="mse")
        >>> hs.empirical_fisher(problem, hs.select(problem, "weight")) @ torch.ones(1)   # (2^2 + 8^2) / 2
        tensor([34.])
    """
    space = _checked(problem, space, per, "empirical Fisher")
    kind = {"operator": "empirical-fisher", "per": per}
    middle = _OuterProducts(per, _OwnLabels(problem))
    kept, precision = make_output_engine(engine, middle), own_precision(precision, problem, engine)
    return CurvatureOfRisk(problem, space, kept, graph_memory, kind, True, microbatch, precision=precision)


def _checked(problem: Problem, space: Space | None, per: str, name: str) -> Space:
    """The space, once problem, objective and `per` are known to have such a matrix."""
    space = own_space(problem, space)
    loss = problem.require_split_loss()
    if problem.objective != "nll":
        raise HesscopeError(
            f"Expected objective='nll' for the {name} matrix, got {problem.objective!r}: exp(R) is no log-likelihood; "
            "hs.ggn and hs.hessian take it."
        )
    if per not in _PER:
        raise HesscopeError(f"Expected per to be 'token' or 'sequence', got {per!r}.")
    if per == "token" and not isinstance(loss, HasTerms):
        raise HesscopeError(
            f"Expected a loss with term_axes(outputs), which tells one term's outputs from another's; "
            f"{type(loss).__name__} lacks it, so add it or use per='sequence'."
        )
    return space


class SampledBatches:
    """Every batch with sampled labels in place of its own, drawn once and again only when the parameters change."""

    def __init__(self, problem: Problem, loss: SamplingLoss, samples: int, seed: int) -> None:
        self._problem, self._loss, self._samples, self._seed = problem, loss, samples, seed
        self._keys = [stream_key(seed, f"fisher/{i}") for i in range(samples)]
        self._drawn: dict[int, list[Any]] = {}
        self._drawn_targets: dict[int, list[Tensor]] = {}
        self._state: object = None

    def of(self, problem: Problem) -> SampledBatches:
        """Of another problem with the same loss."""
        return SampledBatches(problem, self._loss, self._samples, self._seed)

    def __call__(self, b: int, outputs: Tensor) -> list[Any]:
        """The batch with other labels, a batch for every set of labels."""
        self._forget_old()
        if b not in self._drawn:
            first, batch = sum(self._problem.counts[:b]), self._problem.on_device(b)
            self._drawn[b] = [self._loss.sample(outputs, batch, key, first) for key in self._keys]
        return self._drawn[b]

    def targets(self, b: int, head: ChunkedHead) -> list[Tensor]:
        """The same labels of the tokens that count alone, from logits in chunks."""
        self._forget_old()
        if b not in self._drawn_targets:
            first = sum(self._problem.counts[:b])
            self._drawn_targets[b] = [torch.cat(drawn) for drawn in zip(*self._by_chunk(head, first), strict=True)]
        return self._drawn_targets[b]

    def _by_chunk(self, head: ChunkedHead, first: int) -> Iterator[list[Tensor]]:
        for rows in head.slices or [slice(0, 0)]:
            z_TV = head.form.map.value(head.projected(rows))
            every = torch.ones(len(z_TV), dtype=torch.bool, device=z_TV.device)
            yield [sample_classes(z_TV, every, key, first + rows.start) for key in self._keys]

    def _forget_old(self) -> None:
        state = state_key(self._problem.model)
        if state != self._state:
            self._drawn.clear()
            self._drawn_targets.clear()
            self._state = state


class _OwnLabels:
    """The labels that the data has."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def of(self, problem: Problem) -> _OwnLabels:
        """Of another problem."""
        return _OwnLabels(problem)

    def __call__(self, b: int, outputs: Tensor) -> list[Any]:
        return [self._problem.on_device(b)]

    def targets(self, b: int, head: ChunkedHead) -> list[Tensor]:
        return [head.y_T]


class _OuterProducts:
    """u -> the mean over label sets of sum_i r_i <r_i, u>, i counting tokens or sequences."""

    def __init__(self, per: str, labelled: SampledBatches | _OwnLabels) -> None:
        self._per, self._labelled = per, labelled
        self.apart = per == "token"

    def of(self, problem: Problem) -> _OuterProducts:
        """Of another problem with the same loss."""
        return _OuterProducts(self._per, self._labelled.of(problem))

    def __call__(self, problem: Problem, b: int, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        loss = problem.require_split_loss()
        batches = self._labelled(b, outputs)
        terms = loss.term_axes(outputs) if isinstance(loss, HasTerms) else ()
        axes = tuple(sorted({*range(1, outputs.dim()), *terms})) if self._per == "sequence" else terms

        def multiply(u: Tensor) -> Tensor:
            return sum(_along(residual(loss, outputs, batch), u, axes) for batch in batches) / len(batches)  # type: ignore[return-value]

        return multiply

    def by_token(self, problem: Problem, b: int, head: ChunkedHead) -> TokenMatrix:
        """(which tokens, their logits, q) to r_t <r_t, q_t>, the mean over label sets."""
        drawn = self._labelled.targets(b, head)

        def multiply(rows: slice, z_TV: Tensor, q_TV: Tensor) -> Tensor:
            return sum(_along(cross_entropy_residual(z_TV, y_T[rows]), q_TV, (1,)) for y_T in drawn) / len(drawn)  # type: ignore[return-value]

        return multiply


def _along(r: Tensor, u: Tensor, axes: tuple[int, ...]) -> Tensor:
    """r times the sums of r * u over some axes."""
    products = r * u
    return r * (products.sum(axes, keepdim=True) if axes else products)
