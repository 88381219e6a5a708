"""Diagonals and groups on divided vectors: how much of a vector each rank has at once, and runs that stop and go on elsewhere."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.algorithms.checkpoint import Checkpoint
from hesscope.exchange import Exchange
from hesscope.operators import Operator
from hesscope.space import vectors

Share = Callable[[hs.Problem], hs.Problem]
Runs = Mapping[str, tuple[int, Callable[[hs.Operator, Checkpoint | None], Any]]]

#: Estimators of a diagonal that multiply vectors and nothing else; "auto" chooses among them.
MULTIPLY = {"hutchinson": 4, "nystrom": 12, "gaussian": 4, "deflated": 8, "xdiag": 8, "auto": 16}
#: How many of them the quick tests take.
FEW = 2
#: Runs that stop in the product of that number.
STOPPED: Runs = {
    "hutchinson": (4, lambda H, kept: hs.diagonal(H, "hutchinson", 8, target_error=1e-9, checkpoint=kept)),
    "nystrom": (2, lambda H, kept: hs.diagonal(H, "nystrom", 14, checkpoint=kept)),
    "groups": (7, lambda H, kept: _groups(H, kept)),
}
#: Runs of the other algorithms, that stop on one layout and go on with another.
ELSEWHERE: Runs = {
    "eigs with restarts": (14, lambda H, kept: hs.eigs(H, k=2, tol=1e-4, max_basis=6, max_products=60, checkpoint=kept)),
    "power": (9, lambda H, kept: hs.eigs(H, k=2, tol=1e-2, method="power", max_products=24, checkpoint=kept)),
    "power on some batches": (
        9, lambda H, kept: hs.eigs(H, k=1, tol=1e-2, method="power", batches=2, max_products=20, checkpoint=kept),
    ),
    "hutch++": (2, lambda H, kept: hs.trace(H, "hutch++", budget=24, checkpoint=kept)),
    "xtrace": (2, lambda H, kept: hs.trace(H, "xtrace", budget=40, target_error=1e-9, checkpoint=kept)),
    "xdiag": (2, lambda H, kept: hs.diagonal(H, "xdiag", 40, checkpoint=kept)),
    "deflated": (7, lambda H, kept: hs.diagonal(H, "deflated", 44, checkpoint=kept)),
    "density": (7, lambda H, kept: hs.density(H, probes=2, steps=5, checkpoint=kept)),
    "density without a basis": (7, lambda H, kept: hs.density(H, probes=2, steps=5, basis=False, checkpoint=kept)),
    "track": (9, lambda H, kept: _tracked(H, kept)),
}  # fmt: skip
#: {from where: to where} is every one of these but itself.
LAYOUTS = ("one", "data", "fsdp")


def _tracked(H: hs.Operator, kept: Checkpoint | None) -> Any:
    """A search that ends, and one from its vectors that stops."""
    chain = {"before": H, "after": hs.ggn(H.problem, H.space, engine="streamed")}  # type: ignore[attr-defined]
    where: dict[str, Any] = {} if kept is None else {"folder": kept.folder, "every": kept.every}
    return hs.track_eigs(chain, k=1, tol=1e-9, max_products=6, **where)


def _groups(H: hs.Operator, kept: Checkpoint | None = None) -> Any:
    return hs.groups(H, "kind", probes=2, steps=2, max_products=2, tol=1e9, checkpoint=kept)


def _operator(share: Share) -> hs.Operator:
    problem = share(hs.causal_lm(tiny("gpt2"), ragged_batches()))
    return hs.hessian(problem, hs.select(problem, "transformer.h.1.mlp.c_fc.*", "*ln_f*"), "streamed")


def held_and_gathered(share: Share, methods: Sequence[str]) -> dict[str, Any]:
    """For every algorithm: the most numbers of a vector that an operator was given here, and those that were gathered in all."""
    H = _operator(share)
    found: dict[str, Any] = {"size": H.space.size, "own": sum(c.size for c in H.space.coordinates)}
    H.matmat(H.space.rademacher(0, [0]))  # with the check before the first
    for method in methods:
        with _counted() as count:
            hs.diagonal(H, method, MULTIPLY[method])
        found[method] = dict(count)
    with _counted() as count:
        _groups(H)
    found["groups"] = dict(count)
    with _counted() as count:
        hs.verify(H.problem, H.space, "streamed")  # type: ignore[attr-defined]
    return found | {"verify": dict(count)}


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    count = {"held": 0, "gathered": 0}
    gather, matmat = Exchange.gather_rows, Operator.matmat

    def gathered(self: Any, own: Tensor, rows: int) -> Tensor:
        whole = gather(self, own, rows)
        count["gathered"] += whole.numel()
        return whole

    def given(self: Any, V: Any) -> Any:
        count["held"] = max(count["held"], sum(part.numel() for part in V.values()) // vectors.count(V))
        return matmat(self, V)

    Exchange.gather_rows, Operator.matmat = gathered, given  # type: ignore[method-assign]
    try:
        yield count
    finally:
        Exchange.gather_rows, Operator.matmat = gather, matmat  # type: ignore[method-assign]


def stopped(share: Share, folder: Path, runs: Runs = STOPPED) -> None:
    """Runs that the last rank interrupts."""
    for name, (product, run) in runs.items():
        H = _operator(share)
        with _interrupted(product):
            try:
                run(H, Checkpoint(folder / name, every=0))
            except KeyboardInterrupt:
                continue
        raise AssertionError(f"{name} was not interrupted")


def continued(share: Share, folder: Path | None, runs: Runs = STOPPED) -> dict[str, dict[str, Tensor]]:
    """What they give, from where they stopped, or as a whole without a folder; vectors up to their signs."""
    found = {}
    for name, (_, run) in runs.items():
        result = run(_operator(share), None if folder is None else Checkpoint(folder / name, every=1e9))
        parts = result.provenance.get("checkpoints", {"": result.provenance}).values()
        assert sum(part["resumed"] for part in parts) == (folder is not None), name
        found[name] = {key: x.abs() for key, x in result.tensors().items() if x.is_floating_point()}
        found[name]["products"] = torch.tensor(float(result.products))
    return found


@contextmanager
def _interrupted(product: int) -> Iterator[None]:
    made, matmat = [0], Operator.matmat
    last = not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1

    def counted(self: Any, V: Any) -> Any:
        made[0] += 1
        if made[0] == product and last:
            signal.raise_signal(signal.SIGINT)
        return matmat(self, V)

    Operator.matmat = counted  # type: ignore[method-assign]
    try:
        yield
    finally:
        Operator.matmat = matmat  # type: ignore[method-assign]
