"""The Fisher matrix approximated by Kronecker products, one a linear layer, and the form with corrected eigenvalues."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from hesscope.communicator import Communicator
from hesscope.engines.linear_uses import Box, Use
from hesscope.errors import HesscopeError, UnusedParameters
from hesscope.losses import SamplingLoss
from hesscope.models import named_parameters, state_key
from hesscope.operators.asked import own_space
from hesscope.operators.base import Operator
from hesscope.operators.batch_plan import (
    box_of,
    boxes_of,
    receives_every_position,
    sequences_and_length,
    sequences_are_apart,
    watch_every_use,
)
from hesscope.operators.fisher import SampledBatches
from hesscope.operators.free import short_of
from hesscope.operators.kronecker import KroneckerBlock
from hesscope.operators.kronecker_factors import KroneckerFactors, Labelled
from hesscope.operators.matrix_run import DiagonalBlocks, MatrixRun
from hesscope.problem import Problem
from hesscope.problem.microbatches import microbatched
from hesscope.space import Coordinates, Space, Vectors
from hesscope.space.random import resolve_seed

_LABELS, _PER = ("sampled", "empirical"), ("token", "sequence")
_Uses = list[dict[str, list[Use] | None]]


def kfac(
    problem: Problem,
    space: Space | None = None,
    corrected: bool = False,
    labels: str = "sampled",
    samples: int = 1,
    seed: int | None = 0,
    per: str = "token",
    microbatch: int | None = None,
) -> Operator:
    """The Kronecker-factored approximation of the Fisher matrix over weights of linear layers (K-FAC, EKFAC).

    A layer receives a_p and gives y_p = W a_p (+ bias) at the positions p of the data; g_p is the derivative in y_p of the
    summed loss, for labels drawn from the model. Over the P positions that the loss depends on, with N the problem's count
    (a mean over `samples` label sets stands before every sum of g's),

        K = G kron A,    A = (1/P) sum_p a_p a_p^T,    G = (1/N) sum_p g_p g_p^T

    is one layer's block; blocks between layers are zero. It equals (1/N) sum_p g_p g_p^T kron a_p a_p^T, every position a
    term of its own ("expand"), where there is one position, where all inputs are equal, or where a and g are uncorrelated in
    their products. With `corrected`, U and V are the eigenbases of G and A, and

        K = (U kron V) diag(S) (U kron V)^T,    S_ij = (1/N) sum_p (U^T g_p)_i^2 (V^T a_p)_j^2

    or, with per="sequence", S_ij = (1/N) sum over sequences s of (U^T (sum of g_p a_p^T over s) V)_ij^2: the best S for
    `hesscope.fisher(problem, space, per="sequence")` of the same seed, in the Frobenius norm, with that matrix's own trace.

    Factors are made at the first use, and again when the parameters change: a forward and a backward pass over the data a
    label set, twice when corrected. Products and the diagonal cost no pass. Of parts of weights only those parts are kept;
    they are parts of the whole weight's block. A weight that several calls use has the positions of all of them.

    Args:
        space: weights of linear layers, whole or in part; every trainable parameter by default.
        corrected: whether eigenvalues are corrected (EKFAC).
        labels: "sampled" (the labels of `hesscope.fisher` for the same seed) or "empirical" (the data's own).
        samples: label sets drawn and averaged.
        seed: of the labels; None draws one and records it.
        per: "token" or "sequence": what the corrected eigenvalues are means over.
        microbatch: as for `hesscope.hessian`.

    Raises:
        HesscopeError: a parameter that is not the weight of a linear layer, a loss without outputs or without sampled
            labels, objective="perplexity", an unknown setting, factors that would not fit in memory, batches that cannot be split.

    Source: J. Martens and R. Grosse, 2015; R. Grosse and J. Martens, 2016; T. George et al., 2018; R. Eschenhagen et al., 2023.

    Example:
        >>> import torch, hesscope as hs
        >>> model = torch.nn.Linear(1, 2, bias=False).requires_grad_(False)
        >>> _ = model.weight.zero_()                                    # both classes have probability 1/2
        >>> problem = hs.supervised(model, [(torch.ones(3, 1), torch.tensor([0, 1, 1]))])
        >>> hs.kfac(problem, hs.select(problem, "weight")) @ torch.tensor([1.0, 0.0])
        tensor([ 0.2500, -0.2500])
    """
    vectors_of = own_space(problem, space)
    space = vectors_of.whole
    _require_settings(problem, corrected, labels, samples, per)
    seed = problem.comm.on_first(lambda: resolve_seed(seed))
    kind: dict[str, Any] = {"operator": "ekfac" if corrected else "kfac", "labels": labels}
    kind |= {"samples": samples, "seed": seed} if labels == "sampled" else {}
    kind |= {"per": per} if corrected else {}
    kind |= {} if microbatch is None else {"microbatch": microbatch}
    parts = problem if microbatch is None else microbatched(problem, microbatch)
    uses = watch_every_use(parts, space)
    boxes = _linear_boxes(parts, space, uses)
    sequences = _sequences(parts, space, boxes, uses) if per == "sequence" else None
    _require_memory(problem.comm, space, boxes, corrected)
    labelled: Labelled = (
        SampledBatches(parts, problem.loss, samples, seed)
        if labels == "sampled" and isinstance(problem.loss, SamplingLoss)
        else lambda b, outputs: [parts.on_device(b)]
    )
    return KroneckerFactored(
        problem, KroneckerFactors(parts, space, boxes, labelled, samples, sequences), vectors_of, kind
    )


class KroneckerFactored(Operator):
    """One Kronecker-factored block a weight, made from the parameters as they are at a product."""

    def __init__(self, problem: Problem, factors: KroneckerFactors, space: Space, kind: dict[str, Any]) -> None:
        super().__init__(space, positive_semidefinite=True)
        self.problem = problem
        self._factors, self._kind = factors, kind
        self._current: tuple[object, dict[str, KroneckerBlock]] | None = None

    def blocks(self) -> dict[str, KroneckerBlock]:
        """The block of every weight."""
        key = state_key(self.problem.model)
        if self._current is None or self._current[0] != key:
            self._current = None  # the old ones go before the new ones come
            corrected = self._kind["operator"] == "ekfac"
            self._current = key, self._factors.corrected() if corrected else self._factors.products()
        return self._current[1]

    def _matmat(self, V: Vectors) -> Vectors:
        blocks = self.blocks()
        whole = self.space.gathered(V)
        return self.space.own({name: blocks[name].product(x.flatten(1)).view_as(x) for name, x in whole.items()})

    def matrix_run(self, route: str) -> MatrixRun:
        return DiagonalBlocks(self.space.whole, lambda name, start, stop: self.blocks()[name].rows(start, stop))

    @property
    def knows_diagonal(self) -> bool:
        return True

    def known_diagonal(self) -> Vectors:
        blocks = self.blocks()
        found = {
            c.name: blocks[c.name].diagonal().reshape(1, *c.shape).to(c.device) for c in self.space.whole.coordinates
        }
        return self.space.own(found)

    @property
    def numbers(self) -> int:
        """How many numbers stand for the matrix."""
        return sum(block.numbers for block in self.blocks().values())

    @property
    def units(self) -> float:
        return self._factors.units

    @property
    def comm(self) -> Communicator:
        return self.problem.comm

    def describe(self) -> dict[str, Any]:
        return dict(self._kind)

    def origin(self) -> dict[str, Any] | None:
        return self.problem.describe()


def _require_settings(problem: Problem, corrected: bool, labels: str, samples: int, per: str) -> None:
    problem.require_split_loss()
    if problem.objective != "nll":
        raise HesscopeError(
            f"Expected objective='nll' for K-FAC, got {problem.objective!r}: it approximates the Fisher matrix, and exp(R) is "
            "no log-likelihood; hs.ggn and hs.hessian take it."
        )
    if labels not in _LABELS:
        raise HesscopeError(f"Expected labels to be 'sampled' or 'empirical', got {labels!r}.")
    if labels == "sampled" and not isinstance(problem.loss, SamplingLoss):
        raise HesscopeError(
            "Expected a loss with sample(outputs, batch, key, first), for the labels are drawn from the model; "
            f"{type(problem.loss).__name__} lacks it, so add it or pass labels='empirical'."
        )
    if samples < 1 or (labels == "empirical" and samples != 1):
        raise HesscopeError(f"Expected samples to be at least 1, and 1 with the data's own labels, got {samples}.")
    if per not in _PER:
        raise HesscopeError(f"Expected per to be 'token' or 'sequence', got {per!r}.")
    if per == "sequence" and not corrected:
        raise HesscopeError(
            "Expected per='sequence' only with corrected=True, whose eigenvalues are means over sequences; the factors "
            "themselves take every position as a term of its own."
        )


def _linear_boxes(problem: Problem, space: Space, uses: _Uses) -> dict[str, Box]:
    """The boxes of all selected parameters; raises HesscopeError for one that is not the weight of a linear layer."""
    boxes, named = boxes_of(problem, space, uses), named_parameters(problem.model)
    unused = []
    for c in space.coordinates:
        if len(c.parameter_shape) == 2 and all(batch[c.name] == [] for batch in uses):
            boxes[c.name] = box_of(problem, c, c.unit_axis, named[c.name])
            unused.append(c.name)
        elif c.name not in boxes:
            raise HesscopeError(
                f"Expected weights of linear layers for K-FAC, but {c.name} {_instead(c, uses)}; select the linear "
                "layers' weights alone, such as layers='all' or \"*_proj.weight\"."
            )
    if unused:
        warnings.warn(UnusedParameters(unused), stacklevel=3)
    return boxes


def _instead(c: Coordinates, uses: _Uses) -> str:
    """What a parameter is, where it is not the weight of a linear layer."""
    if len(c.parameter_shape) != 2:
        shape = " x ".join(map(str, c.parameter_shape))
        return "is a bias or belongs to a norm" if len(c.parameter_shape) < 2 else f"is a stack of shape {shape}"
    if any(batch[c.name] is None for batch in uses):
        return "is used by something else, such as an embedding (to which it may be tied)"
    return "is used by layers that read it both ways round"


def _sequences(problem: Problem, space: Space, boxes: dict[str, Box], uses: _Uses) -> list[int]:
    """How many sequences each batch has; raises HesscopeError where a layer's positions do not tell them apart."""
    found = []
    for b, used in enumerate(uses):
        tokens = sequences_and_length(problem, b)
        for name, box in boxes.items():
            calls = used[name] or []
            if tokens is None or not all(receives_every_position(box, [call], tokens) for call in calls):
                raise HesscopeError(
                    f"Expected a language model's layers, each of which receives every position of every sequence, for "
                    f"per='sequence'; {name} in batch {b} does not, so use per='token'."
                )
        assert tokens is not None
        found.append(tokens[0])
    if not sequences_are_apart(problem, space, boxes):
        raise HesscopeError(
            "Expected a language model that keeps the sequences of a batch apart, along the first axis of what its layers "
            "receive, for per='sequence'; make batches of one sequence, or use per='token'."
        )
    return found


def _require_memory(comm: Communicator, space: Space, boxes: dict[str, Box], corrected: bool) -> None:
    """Raise HesscopeError, on every rank, where the factors would not fit, each on its layer's device."""
    needed: dict[torch.device, int] = {}
    for box in boxes.values():
        R, C = (box.out_features, box.in_features) if corrected else box.shape
        # Eigenvectors are found one layer at a time, in float64 and with as much to work in.
        own = (R * R + C * C + R * C * corrected) * space.dtype.itemsize
        needed[box.device] = needed.get(box.device, 0) + own
    if (short := short_of(comm, needed)) is not None:
        device, size, free = short
        raise HesscopeError(
            f"Expected Kronecker factors that fit in memory: they take {size / 2**30:.1f} GiB on {device}, of which "
            f"{free / 2**30:.1f} are free; select fewer layers, or leave out the output projection, whose factor is as wide "
            "as the vocabulary."
        )
