"""A matrix, a diagonal or a trace that was begun in one way, with graphs or streamed, goes on in that way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.algorithms import driver
from hesscope.algorithms.checkpoint import Checkpoint
from hesscope.operators import risk
from oracles import relative

RUNS: dict[str, Callable[[hs.Operator, Any], Tensor]] = {
    "block": lambda H, kept: hs.block(H, checkpoint=kept).matrix,
    "diagonal": lambda H, kept: hs.diagonal(H, "exact", checkpoint=kept).flat(),
    "trace": lambda H, kept: torch.tensor(hs.trace(H, "exact", checkpoint=kept).estimate),
    "shifted": lambda H, kept: hs.block(H.shifted(2.0), checkpoint=kept).matrix,
    "halved": lambda H, kept: hs.block(0.5 * H, checkpoint=kept).matrix,
}


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def problem() -> hs.Problem:
    return hs.causal_lm(tiny("gpt2"), ragged_batches())


def die_at(step: int, patch: pytest.MonkeyPatch) -> None:
    asked, is_due = [0], driver.Checkpoint.is_due

    def die(self: Checkpoint, last: bool = False) -> bool:
        asked[0] += not last
        if asked[0] == step:
            raise Killed
        return is_due(self, last)

    patch.setattr(driver.Checkpoint, "is_due", die)


def little_memory(patch: pytest.MonkeyPatch) -> None:
    """As if no graph did fit, for engines that nobody asked for by name."""
    patch.setattr(risk, "make_room", lambda engine, streamed, *_: (settled(engine, streamed), None))


def settled(engine: Any, streamed: Any) -> Any:
    if not hasattr(engine, "settle"):
        return streamed()
    engine.settle(streamed(), "for want of memory")
    return engine


@pytest.mark.parametrize("operator", ["hessian", "ggn"])
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("first", ["graphs", "streamed"])
def test_what_was_begun_goes_on(first: str, name: str, operator: str, problem: hs.Problem, tmp_path: Path) -> None:
    def made() -> hs.Operator:
        space = hs.select(problem, "transformer.ln_f.*", "transformer.h.1.ln_2.*", "transformer.h.1.mlp.c_fc.bias")
        return getattr(hs, operator)(problem, space)  # type: ignore[no-any-return]

    expected = RUNS[name](made(), None)
    with pytest.MonkeyPatch.context() as patch:
        if first == "streamed":
            little_memory(patch)
        die_at(2, patch)
        with pytest.raises(Killed):
            RUNS[name](made(), Checkpoint(tmp_path / "run", every=0.0))
    assert (tmp_path / "run" / "state.safetensors").exists()
    with pytest.MonkeyPatch.context() as patch:
        if first == "graphs":
            little_memory(patch)
        assert relative(RUNS[name](made(), tmp_path / "run"), expected) < 1e-10
