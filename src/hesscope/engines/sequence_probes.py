"""Samples of a Hessian's diagonal with a probe for every sequence, in one pass and without a vector a sequence.

The Hessian of a batch's loss is the sum of its sequences' H_s. Sequence s and each linear weight have the probe v_s = r_s c_s^T,
a sign for every output unit times a sign for every input. Along all probes at once the loss has the slope

    phi = sum over layers and positions t of s of  (gy_t . r_s) (x_t . c_s),      gy = dl/dy,

which depends on W through y = x W^T and gx = gy W only, so that

    sum_s v_s * (H_s v_s) = sum over t of  (r_s * dphi/dy_t) (c_s * x_t)^T + (r_s * gy_t) (c_s * dphi/dgx_t)^T

is two matrix products a layer. Other parameters have one probe v, of independent signs, for all sequences, and v * dphi/dw.
Legend: S sequences, T positions of one, r output units, c inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hesscope.arithmetic import linear_passes
from hesscope.engines.base import parameter_values
from hesscope.engines.forward_rules import Replacing
from hesscope.engines.linear_taps import Tap
from hesscope.engines.linear_uses import Box, PerturbLinears
from hesscope.engines.reverse_over_reverse import (
    SavedBytes,
    missing_derivatives_in_words,
    require_second_derivative,
)
from hesscope.engines.second_derivatives import WRITTEN_OUT
from hesscope.problem import Problem
from hesscope.space import Space, Vectors


@dataclass(frozen=True)
class RankOne:
    """Every sequence's probe of one weight: signs of its output units [S, r] and of its inputs [S, c]."""

    units: Tensor
    inputs: Tensor


class SequenceProbes:
    """One batch's gradient with its graph, for any number of probes.

    Args:
        boxes: of the weights that have a probe for each of the `sequences`, each used by one linear layer; all of a box is
            selected.
    """

    def __init__(self, problem: Problem, b: int, space: Space, boxes: dict[str, Box], sequences: int) -> None:
        self._space, self._sequences = space, sequences
        values = parameter_values(problem, space)
        self._taps = {name: Tap(box) for name, box in boxes.items()}
        self._whole = {name: p.requires_grad_() for name, p in values.items() if name not in boxes}
        meter = SavedBytes(problem.model.parameters())
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(meter.pack, meter.unpack):
            with Replacing(WRITTEN_OUT), PerturbLinears(self._taps, values):
                total, _ = problem.total(b, values)
            self._gradients = self._differentiate(total)
        for tap in self._taps.values():
            for held in (tap.inputs, tap.gx, tap.dy):
                if held is not None:
                    meter.pack(held)
        require_second_derivative(list(self._gradients.values()))
        self.bytes = meter.bytes

    def _differentiate(self, total: Tensor) -> dict[str, Tensor | None]:
        """The derivatives in every tapped layer's outputs and in every other parameter; None where there is none."""
        leaves = self._leaves()
        if not total.requires_grad:
            return dict.fromkeys(leaves)
        found = torch.autograd.grad(total, list(leaves.values()), create_graph=True, allow_unused=True)
        for tap in self._taps.values():
            tap.close()
        return dict(zip(leaves, found, strict=True))

    def _leaves(self) -> dict[str, Tensor]:
        return {name: tap.dy for name, tap in self._taps.items() if tap.dy is not None} | self._whole

    @property
    def unused(self) -> list[str]:
        """Selected parameters on which this batch's loss does not depend."""
        return [name for name in self._space.names if self._gradients.get(name) is None]

    def add(self, probes: dict[str, RankOne], shared: Vectors, into: Vectors, weight: float) -> None:
        """Add weight times the sample for these probes to the one vector `into`."""
        slopes, backward = self._derivatives(probes, shared)
        for c in self._space.coordinates:
            slope = slopes.get(c.name)
            if c.name in self._taps:
                box = self._taps[c.name].box
                sample = self._read_out(c.name, probes[c.name], slope, backward.get(c.name))
                sample = sample.reshape(-1)[box.place].reshape(c.shape)
            elif slope is not None:
                sample = c.gather(slope).to(shared[c.name]) * shared[c.name][0]
            else:
                continue
            into[c.name][0].add_(sample.to(c.device), alpha=weight)

    def leak(self, probes: dict[str, RankOne]) -> float:
        """How much the second half of the sequences feels the probes of the first, relative to the first; 0 if apart."""
        half = self._sequences // 2
        first = {name: RankOne(torch.cat([p.units[:half], torch.zeros_like(p.units[half:])]), p.inputs)
                 for name, p in probes.items()}  # fmt: skip
        slopes, _ = self._derivatives(first, {})
        inside, outside = 0.0, 0.0
        for name, tap in self._taps.items():
            if (slope := slopes.get(name)) is not None:
                apart = self._by_sequence(slope, tap.box.shape[0]).double().square().sum((1, 2))
                inside, outside = inside + float(apart[:half].sum()), outside + float(apart[half:].sum())
        return (outside / inside) ** 0.5 if inside > 0 else float(outside > 0)

    def _derivatives(
        self, probes: dict[str, RankOne], shared: Vectors
    ) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
        """dphi/dy or, of other parameters, dphi/dw; and dphi/dgx. phi depends on gy and x, whose seeds are its derivatives."""
        seeded = [pair for name, p in probes.items() for pair in self._rank_one_seeds(name, p)]
        for c in self._space.coordinates:
            gradient = self._gradients.get(c.name)
            if c.name in self._whole and c.name in shared and gradient is not None:
                seeded.append((gradient, c.scatter(shared[c.name][0])))
        # Where the loss is linear in a parameter its derivative is a constant.
        seeded = [(root, seed.to(root)) for root, seed in seeded if root.requires_grad]
        if not seeded:
            return {}, {}
        leaves = self._leaves()
        back = {name: tap.gx for name, tap in self._taps.items() if tap.gx is not None and tap.gx.requires_grad}
        roots, seeds = zip(*seeded, strict=True)
        with missing_derivatives_in_words(), linear_passes():
            found = torch.autograd.grad(
                roots, [*leaves.values(), *back.values()], seeds, retain_graph=True, allow_unused=True
            )
        return dict(zip(leaves, found, strict=False)), dict(zip(back, found[len(leaves) :], strict=True))

    def _rank_one_seeds(self, name: str, probe: RankOne) -> list[tuple[Tensor, Tensor]]:
        """gy with dphi/dgy = (x . c) r, and x with dphi/dx = (gy . r) c."""
        found = self._inputs_and_derivatives(name)
        tap = self._taps[name]
        if found is None or tap.inputs is None:
            return []
        x_STc, gy_STr = found
        along_c, along_r = x_STc @ probe.inputs[:, :, None], gy_STr @ probe.units[:, :, None]
        for_gy, for_x = along_c * probe.units[:, None], along_r * probe.inputs[:, None]
        gradient, x = self._gradients[name], tap.inputs
        assert gradient is not None
        if tap.box.shape[1] < tap.box.in_features:
            whole = for_x.new_zeros(*for_x.shape[:-1], tap.box.in_features)
            for_x = whole.index_copy(-1, tap.box.inputs, for_x)
        return [(gradient, for_gy.reshape(gradient.shape)), (x, for_x.reshape(x.shape))]

    def _read_out(self, name: str, probe: RankOne, slope: Tensor | None, backward: Tensor | None) -> Tensor:
        """sum_s v_s * (H_s v_s) over the box, [r, c]."""
        box = self._taps[name].box
        total = torch.zeros(box.shape, dtype=self._space.dtype, device=probe.units.device)
        found = self._inputs_and_derivatives(name)
        if found is None:
            return total
        x_STc, gy_STr = found
        if slope is not None:
            total += _outer(self._by_sequence(slope, box.shape[0]), x_STc, probe)
        if backward is not None:
            total += _outer(gy_STr, self._by_sequence(box.inputs_of(backward), box.shape[1]), probe)
        return total

    def _inputs_and_derivatives(self, name: str) -> tuple[Tensor, Tensor] | None:
        """x [S, T, c] and gy [S, T, r] without their graphs; None where the loss does not depend on the layer."""
        tap, gradient = self._taps[name], self._gradients.get(name)
        if gradient is None or tap.inputs is None:
            return None
        x = self._by_sequence(tap.box.inputs_of(tap.inputs.detach()), tap.box.shape[1])
        return x, self._by_sequence(gradient.detach(), tap.box.shape[0])

    def _by_sequence(self, x: Tensor, width: int) -> Tensor:
        return x.reshape(self._sequences, -1, width).to(self._space.dtype)


def _outer(left_STr: Tensor, right_STc: Tensor, probe: RankOne) -> Tensor:
    """sum over s, t of (r_s * left)(c_s * right)^T, [r, c]."""
    left, right = left_STr * probe.units[:, None], right_STc * probe.inputs[:, None]
    return left.flatten(0, 1).T @ right.flatten(0, 1)
