"""Classification and regression losses on (inputs, targets) batches."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hesscope.errors import HesscopeError


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
    not count) or class probabilities of the outputs' shape.
    """

    def total_of_outputs(self, outputs: Tensor, batch: tuple[Any, Tensor]) -> tuple[Tensor, int]:
        return F.cross_entropy(outputs, batch[1], reduction="sum"), self._count(outputs, batch[1])

    def total(self, model: nn.Module, batch: tuple[Any, Tensor]) -> tuple[Tensor, int]:
        return self.total_of_outputs(self.outputs(model, batch), batch)

    def _count(self, outputs: Tensor, targets: Tensor) -> int:
        if targets.is_floating_point():
            return targets.numel() // outputs.shape[1]
        return int((targets != -100).sum())


class SquaredErrorLoss(_Supervised):
    """The sum of (output - target)^2 over elements; the risk is their mean, as for `torch.nn.MSELoss`."""

    def total_of_outputs(self, outputs: Tensor, batch: tuple[Any, Tensor]) -> tuple[Tensor, int]:
        if outputs.shape != batch[1].shape:
            raise HesscopeError(
                f"Expected outputs and targets of one shape for a squared error, got {list(outputs.shape)} and "
                f"{list(batch[1].shape)}; reshape the targets (broadcasting would count terms that are not there)."
            )
        return (outputs - batch[1]).square().sum(), outputs.numel()

    def total(self, model: nn.Module, batch: tuple[Any, Tensor]) -> tuple[Tensor, int]:
        return self.total_of_outputs(self.outputs(model, batch), batch)
