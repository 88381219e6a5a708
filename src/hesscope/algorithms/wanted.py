"""Which eigenvalues are wanted, and which are worth keeping at a restart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: As in SciPy's `eigsh`.
WHICH = ("LM", "LA", "SA", "BE")


def wanted(values: Tensor, k: int, which: str) -> Tensor:
    """Positions of the k wanted among ascending values, in the order in which they are returned."""
    m = len(values)
    if which == "LM":
        return values.abs().argsort(descending=True, stable=True)[:k]
    if which == "SA":
        return torch.arange(min(k, m))
    if which == "LA":
        return torch.arange(m - 1, max(m - 1 - k, -1), -1)
    low = k // 2
    return torch.cat([torch.arange(m - 1, m - 1 - (k - low), -1), torch.arange(low - 1, -1, -1)])


def ends(found: Tensor, which: str) -> list[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """The ends of the spectrum that are wanted: what is largest there, and the values found there."""
    if which == "LM":
        return [(torch.abs, found)]
    if which == "LA":
        return [(torch.positive, found)]
    if which == "SA":
        return [(torch.neg, found)]
    upper = len(found) - len(found) // 2
    return [end for end in ((torch.positive, found[:upper]), (torch.neg, found[upper:])) if len(end[1])]


def worth_keeping(values: Tensor, k: int, which: str, unconverged: Tensor, most: int) -> Tensor:
    """Positions of the Ritz values to go on from, among m ascending ones: the most wanted p, k <= p <= most.

    Steps after a restart multiply an error by a Chebyshev polynomial that is small on the interval of what was dropped.
    For a wanted value at relative distance g beyond that interval, d steps gain a factor of about exp(2 d sqrt(2 g)):
    keeping more widens g and leaves fewer steps d = most + 2 - p until the next restart. The p with the largest
    d sqrt(g), for the slowest of the wanted that have not converged, is taken (after Yamazaki, Bai, Simon, Wang and Wu,
    2010, who weigh the same two).

    Args:
        unconverged: positions of wanted values that still matter; all k where there are none.
    """
    order = _by_preference(values, which)
    targets = values[unconverged if len(unconverged) else order[:k]]
    best, chosen = -1.0, k
    for p in range(k, most + 1):
        dropped = values[order[p:]]
        if len(dropped) < 2:
            break
        middle, radius = (dropped.max() + dropped.min()) / 2, (dropped.max() - dropped.min()) / 2
        gap = float(((targets - middle).abs() / radius.clamp(min=1e-300) - 1).min().clamp(min=1e-12))
        gain = (most + 2 - p) * gap**0.5
        if gain > best:
            best, chosen = gain, p
    return order[:chosen]


def _by_preference(values: Tensor, which: str) -> Tensor:
    """All positions among ascending values, the most wanted first."""
    m = len(values)
    if which != "BE":
        return wanted(values, m, which)
    outside_in = torch.stack([torch.arange(m - 1, -1, -1), torch.arange(m)], 1).flatten()
    return outside_in[:m]
