"""The generalised Gauss-Newton matrix of a problem's objective."""

from __future__ import annotations

from hesscope.engines import make_output_engine
from hesscope.operators.asked import own_precision, own_space
from hesscope.operators.base import Operator
from hesscope.operators.output_hessian import output_hessian
from hesscope.operators.perplexity import with_objective
from hesscope.operators.risk import CurvatureOfRisk
from hesscope.problem import Problem
from hesscope.space import Space


def ggn(
    problem: Problem,
    space: Space | None = None,
    engine: str = "auto",
    graph_memory: int | None = None,
    microbatch: int | None = None,
    precision: str | None = None,
    kernel: str = "auto",
) -> Operator:
    """The generalised Gauss-Newton matrix of the problem's objective over a space.

    With z the model's outputs, J = dz / d theta and H_out the second derivative of the summed loss in the outputs,

        G = (1/N) sum over batches of  J^T H_out J,

    the Hessian of the risk with the model linearised (Schraudolph, 2002). For objective="perplexity" it is P (G + g g^T),
    with P = exp(R) and g = d R / d theta. Products are exact: J v by a reverse pass through the graph of J^T, then H_out,
    then J^T. They cost 3 forward passes once a batch and 4 a product.

    It follows the parameters, as `hesscope.hessian` does, and declares itself positive semidefinite where the loss is
    convex in the outputs: cross-entropy, squared error, and a loss of your own with an attribute `convex = True`.

    Args:
        problem: its loss must pass through outputs: `outputs(model, batch)` and `total_of_outputs(outputs, batch)`.
        space: from `hesscope.select`; every trainable parameter by default.
        engine: "auto", which is "reverse-over-reverse".
        graph_memory: bytes that graphs kept between products may take; half of the free memory by default, 0 keeps none.
        microbatch, precision: as for `hesscope.hessian`.
        kernel: of a cross-entropy's H_out: "eager", "compile" (`torch.compile`), "triton", or "auto": triton for logits on a GPU
            where it is installed, eager otherwise. One that does not run, or differs from the eager one on the first rows, gives
            way to it with a HesscopeWarning. `describe()["kernel"]` says what ran and why.

    Raises:
        HesscopeError: a loss without outputs, an unknown engine or kernel, a kernel for a loss that is no cross-entropy, a loss
            that is not finite, or batches that cannot be split.

    Example:
        >>> import torch, hesscope as hs
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> batch = (torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1))
        >>> hs.ggn(hs.supervised(model, [batch], loss="mse")) @ torch.ones(2)      # linear: G = H = (2/N) X^T X
        tensor([1., 4.])
    """
    space = own_space(problem, space)
    loss = problem.require_split_loss()
    kept = make_output_engine(engine, output_hessian(problem, kernel))
    precision = own_precision(precision, problem, engine)
    convex = bool(getattr(loss, "convex", False))
    kind = {"operator": "ggn"}
    return with_objective(
        CurvatureOfRisk(problem, space, kept, graph_memory, kind, convex, microbatch, precision=precision)
    )
