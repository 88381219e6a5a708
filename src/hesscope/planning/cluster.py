"""What a product takes on many ranks, from the model's shape and stated figures of the devices: `hesscope.plan_cluster`.

Legend: R ranks, of which r divide the weights between them (data: 1; fsdp: R; hsdp: those of a machine); B batches, so that a rank
runs k = ceil(B / R) of them one after another; P weights of s bytes, P_1 those of the largest block, P_o those outside blocks; n
coordinates of v bytes a number, n_1, n_o and n_b those of the largest block, outside and inside blocks; m vectors.

    weights      P s / r
    vectors      (m + 3) n v / r                          a basis of m, and a vector, its product and one more
    gathered     P_1 s + 3 n_1 v + P_o s + 3 n_o v        where r > 1: of a block and of what is outside, with the parts of
                                                          the vector, of the sum and of what is sent
    running      the peak of one batch's product, found by running its code on the shapes of one block and of two
    sent         2 (R - 1) / R n v                        data
                 (r - 1) / r (k (2 P_b s + 3 n_b v) + P_o s + 2 n_o v)
                                                          fsdp and hsdp: weights and vector of the blocks on the way up and down,
                                                          one sum; what is outside blocks once a product
                 + 2 (g - 1) / g n v / r                  hsdp, between the g = R / r machines
    arithmetic   k times the multiplications and additions of one batch's product
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from hesscope.dryrun import shadow_model
from hesscope.engines import make_engine
from hesscope.engines.dry import DryRuns
from hesscope.errors import HesscopeError
from hesscope.memory import parse_bytes
from hesscope.models import find_trunk
from hesscope.operators.asked import own_space
from hesscope.problem import Problem, select
from hesscope.results.plan import in_bytes, in_seconds
from hesscope.space import Space

LAYOUTS = ("data", "fsdp", "hsdp")
#: The part of a device's memory that a plan may fill.
_USABLE = 0.9
_MOST_RANKS = 2**16


@dataclass(frozen=True)
class Shape:
    """What of a model, a selection and a batch decides the figures: numbers of weights and coordinates, bytes of one, and the run
    of one batch's product."""

    weights: int
    largest_block: int
    outside: int
    coordinates: int
    largest_block_coordinates: int
    outside_coordinates: int
    weight_bytes: int
    vector_bytes: int
    running_bytes: int
    flops: float


@dataclass(frozen=True)
class ClusterPlan:
    """Memory, bytes and time of a product on each rank. A prediction: nothing was run.

    Attributes:
        shape: of model, selection and batch.
        layout, ranks, sharing: "data", "fsdp" or "hsdp"; R; and r, among how many ranks weights and vectors are divided.
        batches, basis: B and m.
        flops, bandwidth: operations a second, and bytes a second that a rank sends, as stated.
        device_memory: bytes, as stated.
    """

    shape: Shape
    layout: str
    ranks: int
    sharing: int
    batches: int
    basis: int
    flops: float
    bandwidth: float
    device_memory: int

    @property
    def rounds(self) -> int:
        """Batches that the busiest rank runs, k."""
        return ceil(self.batches / self.ranks)

    @property
    def memory(self) -> dict[str, float]:
        """Bytes on a rank, by what they are for."""
        s, r = self.shape, self.sharing
        block = s.largest_block * s.weight_bytes + 3 * s.largest_block_coordinates * s.vector_bytes
        outside = s.outside * s.weight_bytes + 3 * s.outside_coordinates * s.vector_bytes
        return {
            "weights": s.weights * s.weight_bytes / r,
            "vectors": (self.basis + 3) * s.coordinates * s.vector_bytes / r,
            "gathered": block + outside if r > 1 else 0.0,
            "running": float(s.running_bytes),
        }

    @property
    def total(self) -> float:
        """Bytes on a rank."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether a rank's device has room, with a tenth of it left."""
        return self.total <= _USABLE * self.device_memory

    @property
    def sent(self) -> float:
        """Bytes that a rank sends in a product."""
        s, r = self.shape, self.sharing
        vector = s.coordinates * s.vector_bytes
        if self.layout == "data":
            return 2 * (self.ranks - 1) / self.ranks * vector
        inside, own = s.weights - s.outside, s.coordinates - s.outside_coordinates
        blocks = 2 * inside * s.weight_bytes + 3 * own * s.vector_bytes
        outside = s.outside * s.weight_bytes + 2 * s.outside_coordinates * s.vector_bytes
        machines = self.ranks // r
        return (r - 1) / r * (self.rounds * blocks + outside) + 2 * (machines - 1) / machines * vector / r

    @property
    def arithmetic_seconds(self) -> float:
        """A product's, on the busiest rank."""
        return self.rounds * self.shape.flops / self.flops

    @property
    def sending_seconds(self) -> float:
        """A product's."""
        return self.sent / self.bandwidth

    def advice(self) -> str:
        """What fits where this does not; empty where it does."""
        if self.fits:
            return ""
        tries = [
            ("half of the basis", replace(self, basis=self.basis // 2)),
            ("no basis on the devices", replace(self, basis=0)),
        ]
        if self.layout == "data":
            tries.append(("--layout fsdp", replace(self, layout="fsdp", sharing=self.ranks)))
        ranks = self.ranks
        while self.layout == "fsdp" and ranks < _MOST_RANKS:
            ranks *= 2
            more = replace(self, ranks=ranks, sharing=ranks, batches=max(self.batches, ranks))
            if more.fits:
                tries.append((f"{ranks} ranks", more))
                break
        helps = [f"{name} ({in_bytes(other.total)})" for name, other in tries if other.fits]
        if helps:
            return f"would fit: {'; '.join(helps)}"
        return "would fit: smaller batches, shorter sequences, fewer selected weights or a narrower dtype, of these alone no more ranks"

    def summary(self) -> str:
        """Every figure, in words."""
        lines = [f"{name:>10}  {in_bytes(size):>9}" for name, size in self.memory.items()]
        verdict = "fits" if self.fits else "does not fit"
        compute, send = self.arithmetic_seconds, self.sending_seconds
        lines += [
            f"{'a rank':>10}  {in_bytes(self.total):>9}  {verdict} into {in_bytes(self.device_memory)}, a tenth left",
            f"{'sent':>10}  {in_bytes(self.sent):>9}  a product and rank: {in_seconds(send)} at {in_bytes(self.bandwidth)} a second",
            f"{'arithmetic':>10}  {self.rounds * self.shape.flops:9.2e}  operations a product and rank: {in_seconds(compute)} at "
            f"{self.flops:.1e} a second",
            f"{'a product':>10}  {in_seconds(max(compute, send)):>9}  where sending hides behind arithmetic; "
            f"{in_seconds(compute + send)} where nothing does",
        ]
        return "\n".join([*lines, *([self.advice()] if not self.fits else [])])


def plan_cluster(
    problem: Problem,
    space: Space | None = None,
    ranks: int = 8,
    layout: str = "fsdp",
    *,
    ranks_per_node: int = 8,
    batches: int | None = None,
    basis: int = 30,
    flops: float = 4e14,
    bandwidth: float = 5e10,
    device_memory: int | str = "80GB",
) -> ClusterPlan:
    """What an exact Hessian product takes on every rank of a cluster, by the formulas at the head of this module.

    Nothing is measured, and no weights are needed: the product's code is run on shapes for what one batch takes while it runs.

    Args:
        problem, space: as for `hesscope.hessian`; its largest batch is what a rank runs at a time. `skeleton_problem` makes one
            of a configuration.
        layout: "data", every rank has the model; "fsdp", weights and vectors divided among all ranks; "hsdp", among those of a
            machine.
        ranks_per_node: ranks of a machine.
        batches: B; one a rank by default.
        basis: vectors that the algorithm keeps.
        flops: operations a second of a rank, as reached and not as advertised.
        bandwidth: bytes a second that a rank sends to the others.
        device_memory: of a rank, in bytes or as "80GB".

    Raises:
        HesscopeError: an unknown layout, ranks that a machine's do not divide, numbers below 1, a model without a list of like
            blocks.
    """
    if layout not in LAYOUTS:
        raise HesscopeError(f"Expected layout to be {', '.join(LAYOUTS[:-1])} or {LAYOUTS[-1]}, got {layout!r}.")
    least = {"ranks": ranks, "ranks_per_node": ranks_per_node, "batches": ranks if batches is None else batches}
    for name, number in {**least, "basis": basis + 1, "flops": flops, "bandwidth": bandwidth}.items():
        if not number >= 1:
            raise HesscopeError(f"Expected {name} to be 1 or more, got {number}.")
    if layout == "hsdp" and ranks % ranks_per_node:
        raise HesscopeError(
            f"Expected ranks to be a multiple of ranks_per_node with layout='hsdp', got {ranks} and {ranks_per_node}."
        )
    sharing = {"data": 1, "fsdp": ranks, "hsdp": ranks_per_node}[layout]
    shape = shape_of(problem, own_space(problem, space))
    size = parse_bytes(device_memory)
    return ClusterPlan(shape, layout, ranks, sharing, least["batches"], basis, flops, bandwidth, size)


def shape_of(problem: Problem, space: Space) -> Shape:
    """The figures of a model, a selection and the problem's largest batch."""
    model, trunk = problem.model, find_trunk(problem.model)
    if trunk is None:
        raise HesscopeError(
            f"Expected a model with a list of like blocks, but {type(model).__name__} has none: there is nothing to gather at a time."
        )
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    chosen = {c.name: c.whole.size for c in space.coordinates}
    blocks = [f"{trunk.prefix}.{i}." for i in range(len(trunk.blocks))]

    def largest(of: dict[str, int]) -> int:
        return max(sum(size for name, size in of.items() if name.startswith(block)) for block in blocks)

    def outside(of: dict[str, int]) -> int:
        return sum(size for name, size in of.items() if not name.startswith(f"{trunk.prefix}."))

    one, two = (_dry_run(problem, space, trunk.prefix, count) for count in (1, 2))
    more = len(blocks) - 1
    return Shape(
        weights=sum(sizes.values()),
        largest_block=largest(sizes),
        outside=outside(sizes),
        coordinates=space.size,
        largest_block_coordinates=largest(chosen),
        outside_coordinates=outside(chosen),
        weight_bytes=max(p.itemsize for p in model.parameters()),
        vector_bytes=space.dtype.itemsize,
        running_bytes=int(one[0] + more * (two[0] - one[0])),
        flops=one[1] + more * (two[1] - one[1]),
    )


def _dry_run(problem: Problem, space: Space, prefix: str, count: int) -> tuple[float, float]:
    """Peak bytes and operations of a product of the model with so many blocks; a further block adds the same to both.

    With all weights, where the selection is not in every one of these blocks.
    """
    model = shadow_model(problem.model)
    trunk = model.get_submodule(prefix)
    del trunk[count:]  # type: ignore[operator]
    names = dict(model.named_parameters())
    part = Space([c.whole for c in space.coordinates if c.name in names])
    if any(not any(c.name.startswith(f"{prefix}.{i}.") for c in part.coordinates) for i in range(count)):
        part = select(model)
    runs = DryRuns(problem.related(model=model), part)
    found = runs.product(lambda: make_engine("streamed"), checked=False, replayed=False, result=False)
    return found.peak, (found.build + found.product).flops
