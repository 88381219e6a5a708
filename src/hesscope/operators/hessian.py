"""The Hessian of a problem's objective."""

from __future__ import annotations

from hesscope.engines import make_engine
from hesscope.operators.asked import own_precision, own_space
from hesscope.operators.base import Operator
from hesscope.operators.perplexity import with_objective
from hesscope.operators.risk import CurvatureOfRisk
from hesscope.problem import Problem
from hesscope.space import Space


def hessian(
    problem: Problem,
    space: Space | None = None,
    engine: str = "auto",
    graph_memory: int | None = None,
    microbatch: int | None = None,
    precision: str | None = None,
) -> Operator:
    """The Hessian of the problem's objective over a space.

    For objective="nll", H = d^2 R / d theta^2. For objective="perplexity", with P = exp(R) and g = d R / d theta, it is
    P (H + g g^T), the same operator with a rank-one update.

    The operator follows the parameters: after an optimizer's step its products are those of the new weights. Only a
    change through `parameter.data` goes unseen; call `release()` after one.

    Args:
        problem: what is differentiated.
        space: from `hesscope.select`; every trainable parameter by default.
        engine: "reverse-over-reverse", "forward-over-reverse", "reverse-over-forward" (all exact), "finite-difference", or
            "auto": the first of them, unless a measurement in the course of a long run shows another to be clearly faster.
            `describe()["engine_choice"]` says what was chosen and why.
        graph_memory: bytes that graphs kept between products may take; half of the free memory by default, 0 keeps none.
        microbatch: run so many sequences at once at most, whatever the batches; less memory, the same answer.
        precision: "float32" (never less, and sums over batches in float64), "tf32" (on CUDA) or "bfloat16" (of what is linear in
            the vectors), for weights in float32; as the weights are and torch is set by default, or as `hesscope.precision`
            says. `H.product_error()` measures what that costs in digits.

    Raises:
        HesscopeError: an unknown engine, a precision that means nothing for these weights, there or with that engine, a loss that
            is not finite, or batches that cannot be split.

    Example:
        >>> import torch, hesscope as hs
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batch = (torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))
        >>> hs.hessian(hs.supervised(model, [batch], loss="mse")) @ torch.ones(2)      # (2/N) X^T X v
        tensor([1., 4.])
    """
    space = own_space(problem, space)
    kind, precision = {"operator": "hessian"}, own_precision(precision, problem, engine)
    return with_objective(
        CurvatureOfRisk(
            problem, space, make_engine(engine), graph_memory, kind, microbatch=microbatch, precision=precision
        )
    )
