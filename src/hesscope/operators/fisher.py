"""The Fisher matrix with labels sampled from the model, and the empirical Fisher matrix with the data's own.

Both are sums of outer products of gradients. With r = d sum / d outputs (zero but for one token in r_t, one sequence in
r_s) and J = d outputs / d theta, a token's gradient is J^T r_t, a sequence's J^T r_s, and

    sum over t of g_t g_t^T = J^T D J,    D u = sum over t of r_t <r_t, u>,

and the same over s: no gradient is ever formed on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hesscope.engines import Middle, make_output_engine
from hesscope.errors import HesscopeError
from hesscope.losses import HasTerms, SamplingLoss, residual
from hesscope.models import state_key
from hesscope.operators.base import Operator
from hesscope.operators.risk import CurvatureOfRisk, own_space
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
        engine, graph_memory: as for `hesscope.ggn`.

    Raises:
        HesscopeError: a loss that cannot sample targets, objective="perplexity", an unknown `per`, samples below one.

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
    seed = resolve_seed(seed)
    kind = {"operator": "fisher", "per": per, "samples": samples, "seed": seed}
    middle = _outer_products(per, SampledBatches(problem, problem.loss, samples, seed))
    return CurvatureOfRisk(problem, space, make_output_engine(engine, middle), graph_memory, kind, True)


def empirical_fisher(
    problem: Problem,
    space: Space | None = None,
    per: str = "token",
    engine: str = "auto",
    graph_memory: int | None = None,
) -> Operator:
    """The empirical Fisher matrix over a space: the gradients' second moment at the data's own labels.

        E = (1/N) sum over tokens t of  g_t g_t^T                  per="token"
        E = (1/N) sum over sequences s of  g_s g_s^T,  g_s = sum of the g_t of s      per="sequence"

    with g_t = d loss_t / d theta. It is no estimate of the Fisher matrix (Kunstner, Balles and Hennig, 2019), and neither
    is the square of a batch's mean gradient an estimate of it.

    Args:
        per: "token" (one gradient a term of the loss) or "sequence" (one a row of the outputs' first axis).
        engine, graph_memory: as for `hesscope.ggn`.

    Raises:
        HesscopeError: a loss without outputs, objective="perplexity", an unknown `per`.

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
    middle = _outer_products(per, lambda b, outputs: [problem.on_device(b)])
    return CurvatureOfRisk(problem, space, make_output_engine(engine, middle), graph_memory, kind, True)


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
        self._problem, self._loss = problem, loss
        self._keys = [stream_key(seed, f"fisher/{i}") for i in range(samples)]
        self._drawn: dict[int, list[Any]] = {}
        self._state: object = None

    def __call__(self, b: int, outputs: Tensor) -> list[Any]:
        state = state_key(self._problem.model)
        if state != self._state:
            self._drawn.clear()
            self._state = state
        if b not in self._drawn:
            first, batch = sum(self._problem.counts[:b]), self._problem.on_device(b)
            self._drawn[b] = [self._loss.sample(outputs, batch, key, first) for key in self._keys]
        return self._drawn[b]


def _outer_products(per: str, labelled: Callable[[int, Tensor], list[Any]]) -> Middle:
    """u -> the mean over label sets of sum_i r_i <r_i, u>, i counting tokens or sequences."""

    def middle(problem: Problem, b: int, outputs: Tensor) -> Callable[[Tensor], Tensor]:
        loss = problem.require_split_loss()
        batches = labelled(b, outputs)
        terms = loss.term_axes(outputs) if isinstance(loss, HasTerms) else ()
        axes = tuple(sorted({*range(1, outputs.dim()), *terms})) if per == "sequence" else terms

        def multiply(u: Tensor) -> Tensor:
            return sum(_along(residual(loss, outputs, batch), u, axes) for batch in batches) / len(batches)  # type: ignore[return-value]

        return multiply

    return middle


def _along(r: Tensor, u: Tensor, axes: tuple[int, ...]) -> Tensor:
    """r times the sums of r * u over some axes."""
    products = r * u
    return r * (products.sum(axes, keepdim=True) if axes else products)
