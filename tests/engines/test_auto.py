"""The automatic choice: reverse-over-reverse, unless a measurement finds something clearly faster."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.algorithms.identity import identity
from hesscope.engines import auto
from hesscope.engines.base import Linearization
from hesscope.engines.checking import leading_part
from hesscope.engines.forward_mode import ForwardOverReverse, ReverseOverForward
from hesscope.space import Vectors
from oracles import relative

SLOW, QUICK = 0.5, 0.01


#: What the first of the ragged batches is of all of them.
COUNTS = hs.causal_lm(tiny("gpt2"), ragged_batches()).counts
FIRST = COUNTS[0] / sum(COUNTS)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure after two products, on the whole first batch, and on models of any size."""
    monkeypatch.setattr(auto, "PART", 1)
    monkeypatch.setattr(auto, "PAYS", 2 / FIRST)
    monkeypatch.setattr(auto, "WORTHWHILE", 0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Seconds that each engine's work is said to take; the work itself is done."""
    seconds = {"reverse-over-reverse": QUICK, "forward-over-reverse": SLOW, "reverse-over-forward": SLOW}
    names = ["reverse-over-reverse"]
    own = auto._trial

    def trial(engine: Any, *arguments: Any) -> Any:
        names.append(engine.name)
        found = own(engine, *arguments)
        names.pop()
        return found

    def timed(problem: Any, work: Any) -> float:
        work()
        return seconds[names[-1]]

    monkeypatch.setattr(auto, "_trial", trial)
    monkeypatch.setattr(auto, "_seconds", timed)
    return seconds


def operator(name: str = "gpt2", **options: Any) -> Any:
    problem = hs.causal_lm(tiny(name), ragged_batches())
    return hs.hessian(problem, hs.select(problem, "*.1.*weight"), **options)


def vectors_of(H: Any, count: int = 2) -> Tensor:
    return torch.randn(H.shape[0], count, dtype=H.dtype, generator=torch.Generator().manual_seed(0))


def choice(H: Any) -> str:
    described: dict[str, Any] = H.describe()
    assert described["engine"] == "auto"
    text: str = described["engine_choice"]
    return text


def test_a_short_run_is_not_measured() -> None:
    H = operator()
    H @ vectors_of(H)
    assert choice(H) == "reverse-over-reverse: not measured, the run is short"
    assert H.units == pytest.approx(3 + 2 * 6)


@pytest.mark.parametrize("products", [1, 3])
def test_it_is_measured_once_a_run_has_paid_for_it(products: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost is that of what is looked at, which may be a small part of the data."""
    monkeypatch.setattr(auto, "PAYS", (products + 0.5) / FIRST)
    H = operator()
    v = vectors_of(H, 1)
    for _ in range(products + 1):
        H @ v
    assert choice(H).endswith("the run is short")
    H @ v
    assert "seconds a product on the first batch" in choice(H)


def test_a_small_model_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "WORTHWHILE", 10**9)
    H = operator()
    for _ in range(3):
        H @ vectors_of(H)
    assert choice(H) == "reverse-over-reverse: not measured, the model and its data are small"
    assert H.units == pytest.approx(3 + 6 * 6)


def test_what_is_clearly_faster_takes_over(clock: dict[str, float]) -> None:
    clock["forward-over-reverse"] = 0.5 * QUICK
    H = operator()
    V = vectors_of(H)
    before, after = H @ V, H @ V
    assert choice(H) == (
        "forward-over-reverse: seconds a product on the first batch, 2 vectors at once: reverse-over-reverse 0.005; "
        f"forward-over-reverse 0.0025, differs by {difference(H):s}; "
        f"reverse-over-forward 0.25, differs by {difference(H, 1):s}"
    )
    assert not torch.equal(before, after)
    assert relative(after, before) < 1e-12
    # Nobody keeps the other engine's graphs.
    assert H.describe()["graph_bytes"] == 0


def test_a_part_of_the_first_batch_comes_first(clock: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is faster there, it is all that is looked at."""
    monkeypatch.setattr(auto, "PART", 8)
    monkeypatch.setattr(auto, "PAYS", 0)
    H = operator()
    v = vectors_of(H, 1)
    H @ v
    part = leading_part(H.problem, H.problem.N / 8).counts[0]
    assert part < COUNTS[0]
    assert choice(H).startswith(
        f"reverse-over-reverse: seconds a product on {part} of the first batch's {COUNTS[0]} terms: "
    )
    share = part / H.problem.N
    # A graph and a product; each arrangement twice, and its own linearization; then the product itself.
    assert H.units == pytest.approx(9 + share * ((3 + 6) + (3 + 2 * 3 + 2 * 6) + (3 + 2 * 1 + 2 * 8)))


@pytest.mark.parametrize("slow_as_a_whole", [False, True])
def test_what_is_faster_on_a_part_is_timed_on_the_whole_first_batch(
    slow_as_a_whole: bool, clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "PART", 8)
    monkeypatch.setattr(auto, "PAYS", 0)
    clock["forward-over-reverse"] = 0.5 * QUICK
    race = auto._race

    def raced(problem: hs.Problem, *rest: Any, whole: bool) -> Any:
        if whole and slow_as_a_whole:
            clock["forward-over-reverse"] = SLOW
        return race(problem, *rest, whole=whole)

    monkeypatch.setattr(auto, "_race", raced)
    H = operator()
    H @ vectors_of(H)
    kept = "reverse-over-reverse" if slow_as_a_whole else "forward-over-reverse"
    assert choice(H).startswith(
        f"{kept}: seconds a product on the first batch, 2 vectors at once: reverse-over-reverse 0.005; "
    )
    assert "reverse-over-forward" not in choice(H)


def difference(H: Any, which: int = 0) -> str:
    text: str = H.describe()["engine_choice"].split("differs by ")[which + 1]
    assert float(text.split(";")[0]) < 1e-12
    return text.split(";")[0]


@pytest.mark.parametrize("share", [0.8, 1.0, 3.0])
def test_what_is_not_clearly_faster_does_not(clock: dict[str, float], share: float) -> None:
    clock["forward-over-reverse"] = share * QUICK
    H = operator()
    V = vectors_of(H)
    before, after = H @ V, H @ V
    assert choice(H).startswith("reverse-over-reverse: seconds a product")
    assert torch.equal(before, after)
    assert H.describe()["graphs_kept"] == 3


def test_the_fastest_of_several(clock: dict[str, float]) -> None:
    clock["forward-over-reverse"], clock["reverse-over-forward"] = 0.5 * QUICK, 0.1 * QUICK
    H = operator()
    for _ in range(2):
        H @ vectors_of(H)
    assert choice(H).startswith("reverse-over-forward: ")


def test_what_is_faster_but_wrong_is_passed_over(clock: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    clock["reverse-over-forward"] = 0.1 * QUICK
    monkeypatch.setattr(ReverseOverForward, "replacements", ForwardOverReverse.replacements)
    H = operator()
    V = vectors_of(H)
    before, after = H @ V, H @ V
    assert choice(H).startswith("reverse-over-reverse: ")
    assert "reverse-over-forward 0.0005, wrong, differs by" in choice(H)
    assert torch.equal(before, after)


def test_what_does_not_run_is_passed_over() -> None:
    H = operator("bloom")
    V = vectors_of(H)
    before, after = H @ V, H @ V
    assert "forward-over-reverse does not run (an operation of the model does not run in forward mode" in choice(H)
    assert torch.equal(before, after)


@pytest.mark.parametrize("graph_memory", [0, None])
def test_the_measurement_is_paid_for(graph_memory: int | None) -> None:
    H = operator(graph_memory=graph_memory)
    V = vectors_of(H)
    H @ V
    before = H.units
    H @ V
    measured = H.units - before - (12 if graph_memory is None else 15)
    share = H.problem.counts[0] / H.problem.N
    own = 2 * 6 if graph_memory is None else 3 + 3 + 2 * 6
    assert measured == pytest.approx(share * (own + (3 + 2 * 3 + 4 * 6) + (3 + 2 * 1 + 4 * 8)))


def test_it_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Vectors] = []
    measure = auto.Auto.measure

    def counted(self: Any, problem: Any, space: Any, V: Vectors, first: Linearization, kept: bool) -> float:
        calls.append(V)
        return measure(self, problem, space, V, first, kept)

    monkeypatch.setattr(auto.Auto, "measure", counted)
    H = operator()
    for _ in range(4):
        H @ vectors_of(H)
    assert len(calls) == 1


def test_a_run_that_was_measured_still_continues_itself(clock: dict[str, float]) -> None:
    """What the clock said is no part of what a run is."""
    clock["forward-over-reverse"] = 0.5 * QUICK
    H = operator()
    before = identity(H, "trace", {}, {})
    for _ in range(2):
        H @ vectors_of(H)
    assert choice(H).startswith("forward-over-reverse: seconds a product")
    assert identity(H, "trace", {}, {}) == before
