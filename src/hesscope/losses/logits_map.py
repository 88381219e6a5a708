"""What a model does to its logits one by one after the output projection: scales and soft caps, with two derivatives.

    z = f_k(... f_1(a)),    each f a multiplication by a number or tanh

By the chain rule, one step f after another:  z'' <- f''(z) z'^2 + f'(z) z'',  z' <- f'(z) z',  z <- f(z).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

#: A derivative: None is zero everywhere, a number is the same everywhere.
Slope = Tensor | float | None


@dataclass(frozen=True)
class LogitsMap:
    """The steps in their order: a number multiplies, None is tanh."""

    steps: tuple[float | None, ...] = ()

    def then(self, step: float | None) -> LogitsMap:
        """This map, followed by one more step; multiplications in a row become one."""
        if step is not None and self.steps and self.steps[-1] is not None:
            return LogitsMap((*self.steps[:-1], self.steps[-1] * step))
        return LogitsMap((*self.steps, step))

    def value(self, a: Tensor) -> Tensor:
        """z, in the memory of a."""
        for step in self.steps:
            a = a.tanh_() if step is None else a.mul_(step)
        return a

    def expanded(self, a: Tensor, order: int = 2) -> tuple[Tensor, Slope, Slope]:
        """z, dz/da and, for order 2, d2z/da2; z in the memory of a."""
        z, first, second = a, 1.0, None  # type: tuple[Tensor, Slope, Slope]
        for step in self.steps:
            if step is not None:
                z = z.mul_(step)
                first, second = _times(first, step), _times(second, step)
                continue
            z = z.tanh_()
            slope = z.square().neg_().add_(1.0)
            if order == 2:
                bend = _times(_times(z * slope, -2.0), _times(first, first))
                second = bend if second is None else _times(second, slope) + bend  # type: ignore[operator]
            first = _times(slope, first)
        return z, first, second

    def __str__(self) -> str:
        names = ["tanh" if step is None else f"times {step:.6g}" for step in self.steps]
        return ", ".join(names) or "as they are"


#: The identity.
AS_THEY_ARE = LogitsMap()


def _times(x: Slope, y: Slope) -> Slope:
    return None if x is None or y is None else x * y
