"""Classification and regression losses on (inputs, targets) batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hesscope.errors import HesscopeError
from hesscope.losses.cross_entropy import IGNORED, cross_entropy_residual
from hesscope.losses.output_hessian import Kernel, cross_entropy_hessian_product
from hesscope.losses.sampling import sample_classes, sample_normal
from hesscope.losses.tokens import raised

#: (output - target)^2 is the negative log-likelihood, up to a constant, of a normal distribution of this variance.
VARIANCE = 0.5
#: Class probabilities whose sum is so close to 1 add up to it.
_ONE = 1e-6


class _Supervised:
    """Runs the model on the inputs of an (inputs, targets) pair: a tensor, a tuple of arguments or a dictionary."""

    def outputs(self, model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        inputs = batch[0]
        if isinstance(inputs, dict):
            output = model(**inputs)
        elif isinstance(inputs, (tuple, list)):
            output = model(*inputs)
        else:
            output = model(inputs)
        return output if isinstance(output, Tensor) else output.logits


class CrossEntropyLoss(_Supervised):
    """The sum of -log softmax(outputs)[target] over examples, in nats.

    Outputs are [B, C] or [B, C, ...] as for `torch.nn.functional.cross_entropy`; targets are class indices (-100 does
    not count) or class probabilities of the outputs' shape. Half-precision outputs are raised to float32 first.
    """

    #: In the outputs.
    convex = True
    #: The second derivative in the outputs does not depend on the targets.
    canonical = True

    def total_of_outputs(self, outputs: Tensor, batch: tuple[Any, Tensor]) -> tuple[Tensor, int]:
        targets = raised(batch[1]) if batch[1].is_floating_point() else batch[1]
        return F.cross_entropy(raised(outputs), targets, reduction="sum"), self._count(outputs, targets)

    def total(self, model: nn.Module, batch: tuple[Any, Tensor]) -> tuple[Tensor, int]:
        return self.total_of_outputs(self.outputs(model, batch), batch)

    def residual(self, outputs: Tensor, batch: tuple[Any, Tensor]) -> Tensor:
        """p - e_target for every example, or m p - q for class probabilities q of sum m."""
        z, targets = raised(outputs), batch[1]
        if targets.is_floating_point():
            axis = _class_axis(z)
            q = raised(targets)
            return q.sum(axis, keepdim=True) * z.softmax(axis) - q
        return _as_outputs(cross_entropy_residual(_rows(z), targets.reshape(-1)), z)

    def output_hessian_product(
        self, outputs: Tensor, batch: tuple[Any, Tensor], u: Tensor, kernel: str | Kernel = "auto"
    ) -> Tensor:
        """(diag p - p p^T) u for every example; times m for class probabilities of sum m."""
        z, targets = raised(outputs), batch[1]
        if targets.is_floating_point():
            axis = _class_axis(z)
            everywhere = torch.zeros(z.numel() // z.shape[axis], dtype=torch.int64, device=z.device)
            product = cross_entropy_hessian_product(_rows(z), everywhere, _rows(raised(u)), kernel)
            return _as_outputs(product, z) * raised(targets).sum(axis, keepdim=True)
        product = cross_entropy_hessian_product(_rows(z), targets.reshape(-1), _rows(raised(u)), kernel)
        return _as_outputs(product, z)

    def term_axes(self, outputs: Tensor) -> tuple[int, ...]:
        """The classes: a term is an example (or one of its positions)."""
        return (_class_axis(outputs),)

    def sample(self, outputs: Tensor, batch: tuple[Any, Tensor], key: int, first: int) -> tuple[Any, Tensor]:
        """The batch with a class drawn from the model's distribution as the target of every example that counts.

        An example whose class probabilities have another sum m than 1 has the target sqrt(m) times the drawn class: the outer
        product of its derivative is then m times the class's, as its second derivative is.
        """
        inputs, targets = batch
        rows = _rows(outputs)
        counted = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        if not targets.is_floating_point():
            counted = (targets != IGNORED).reshape(-1)
        axis = _class_axis(outputs)
        drawn = sample_classes(rows, counted, key, first).reshape(outputs.select(axis, 0).shape)
        mass = raised(targets).sum(axis, keepdim=True) if targets.is_floating_point() else None
        if mass is None or torch.allclose(mass, torch.ones_like(mass), rtol=0, atol=_ONE):
            return inputs, drawn
        root = mass.clamp(min=0).sqrt()
        return inputs, torch.zeros_like(raised(targets)).scatter_(axis, drawn.unsqueeze(axis), root)

    def _count(self, outputs: Tensor, targets: Tensor) -> int:
        if targets.is_floating_point():
            return targets.numel() // outputs.shape[_class_axis(outputs)]
        return int((targets != IGNORED).sum())


def _class_axis(outputs: Tensor) -> int:
    return min(1, outputs.dim() - 1)


def _rows(outputs: Tensor) -> Tensor:
    """Classes last, everything else in the targets' order: [examples and positions, C]."""
    axis = _class_axis(outputs)
    return outputs.movedim(axis, -1).reshape(-1, outputs.shape[axis])


def _as_outputs(rows: Tensor, outputs: Tensor) -> Tensor:
    """The inverse of `_rows`."""
    axis = _class_axis(outputs)
    return rows.reshape(outputs.movedim(axis, -1).shape).movedim(-1, axis)


class SquaredErrorLoss(_Supervised):
    """The sum of (output - target)^2 over elements; the risk is their mean, as for `torch.nn.MSELoss`.

    As a negative log-likelihood it belongs to independent normal targets of variance 1/2 around the outputs. Half-precision
    outputs are raised to float32 first.
    """

    #: In the outputs.
    convex = True
    #: The second derivative in the outputs does not depend on the targets.
    canonical = True

    def total_of_outputs(self, outputs: Tensor, batch: tuple[Any, Tensor]) -> tuple[Tensor, int]:
        if outputs.shape != batch[1].shape:
            raise HesscopeError(
                f"Expected outputs and targets of one shape for a squared error, got {list(outputs.shape)} and "
                f"{list(batch[1].shape)}; reshape the targets (broadcasting would count terms that are not there)."
            )
        return (raised(outputs) - batch[1]).square().sum(), outputs.numel()

    def total(self, model: nn.Module, batch: tuple[Any, Tensor]) -> tuple[Tensor, int]:
        return self.total_of_outputs(self.outputs(model, batch), batch)

    def residual(self, outputs: Tensor, batch: tuple[Any, Tensor]) -> Tensor:
        """2 (output - target)."""
        return 2.0 * (raised(outputs) - batch[1])

    def output_hessian_product(self, outputs: Tensor, batch: tuple[Any, Tensor], u: Tensor) -> Tensor:
        """2 u."""
        return 2.0 * raised(u)

    def term_axes(self, outputs: Tensor) -> tuple[int, ...]:
        """None: a term is an element."""
        return ()

    def sample(self, outputs: Tensor, batch: tuple[Any, Tensor], key: int, first: int) -> tuple[Any, Tensor]:
        """The batch with targets drawn from the normal distributions around the outputs."""
        return batch[0], sample_normal(raised(outputs), VARIANCE, key, first)
