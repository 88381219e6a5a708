"""Negative log-likelihoods of tokens, summed over the targets that count; one class for each way targets are aligned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from hesscope.losses.cross_entropy import IGNORED, cross_entropy_residual, summed_cross_entropy
from hesscope.losses.output_hessian import Kernel, cross_entropy_hessian_product
from hesscope.losses.sampling import sample_classes
from hesscope.models.hooked import hooked_logits, is_hooked


class LogitsLoss(ABC):
    """A loss of a language model's logits. A batch is a dictionary of `labels` and whatever the model's forward takes."""

    #: In the logits.
    convex = True
    #: The second derivative in the logits does not depend on the targets.
    canonical = True
    #: What of a batch is the loss's alone.
    unread: tuple[str, ...] = ("labels",)

    def outputs(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The logits, [B, T, vocabulary]."""
        if is_hooked(model):
            return hooked_logits(model, batch)
        inputs = {key: value for key, value in batch.items() if key not in self.unread}
        output = model(**(inputs | {"use_cache": False} if hasattr(model, "config") else inputs))
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    @abstractmethod
    def total_of_outputs(self, outputs: Tensor, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Sum and count from the logits."""

    def total(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, int]:
        """Sum and count of one batch."""
        return self.total_of_outputs(self.outputs(model, batch), batch)


class TokenLoss(LogitsLoss):
    """The sum over valid targets of -log softmax(logits[t])[targets[t]], in nats.

    Targets of -100 do not count. Half-precision logits are raised to float32 first.
    """

    @abstractmethod
    def targets(self, batch: dict[str, Any]) -> Tensor:
        """The target of every position of the logits, [B, T]."""

    @abstractmethod
    def with_targets(self, batch: dict[str, Any], targets: Tensor) -> dict[str, Any]:
        """The batch with other targets; what the model reads stays."""

    def total_of_outputs(self, outputs: Tensor, batch: dict[str, Any]) -> tuple[Tensor, int]:
        targets = self.targets(batch)
        return summed_cross_entropy(raised(outputs).flatten(0, 1), targets.flatten()), self.count(batch)

    def count(self, batch: dict[str, Any]) -> int:
        """The number of valid targets, without running the model."""
        return int((self.targets(batch) != IGNORED).sum())

    def residual(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        """p - e_target at every valid position, [B, T, vocabulary]."""
        rows = cross_entropy_residual(raised(outputs).flatten(0, 1), self.targets(batch).flatten())
        return rows.reshape(outputs.shape)

    def output_hessian_product(
        self, outputs: Tensor, batch: dict[str, Any], u: Tensor, kernel: str | Kernel = "auto"
    ) -> Tensor:
        """(diag p - p p^T) u at every valid position, [B, T, vocabulary]."""
        rows = raised(outputs).flatten(0, 1), self.targets(batch).flatten(), raised(u).flatten(0, 1)
        return cross_entropy_hessian_product(*rows, kernel).reshape(outputs.shape)

    def term_axes(self, outputs: Tensor) -> tuple[int, ...]:
        """The vocabulary: a term is a token."""
        return (outputs.dim() - 1,)

    def sample(self, outputs: Tensor, batch: dict[str, Any], key: int, first: int) -> dict[str, Any]:
        """The batch with a token drawn from the model's distribution as the target of every valid position."""
        targets = self.targets(batch)
        drawn = sample_classes(outputs.flatten(0, 1), (targets != IGNORED).flatten(), key, first)
        return self.with_targets(batch, drawn.reshape(targets.shape))


def raised(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.element_size() >= 4 else x.float()
