"""From the operations of a dry run to seconds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hesscope as hs
from architectures import tiny
from hesscope.dryrun import META, Kind, Meter, Work
from hesscope.dryrun.kinds import kind_of
from hesscope.engines import make_engine
from hesscope.engines.dry import DryRuns
from hesscope.planning.speed import Clock, Pace, Rates, _pace

CPU = torch.device("cpu")
RATES = Rates(flops=1e9, bytes=1e9, overhead=1e-6)


def _work(device: torch.device) -> Work:
    x, weight = torch.ones(3, 4, device=device), torch.ones(5, 4, device=device)
    with Meter() as meter:
        nn.functional.softmax(x @ weight.mT, -1)
        torch.cat([x.expand(2, 3, 4)[0], x], 1).add_(1)
        nn.functional.embedding(torch.tensor([2, 0], device=device), weight)
    return meter.work


def test_kinds_are_the_same_without_numbers() -> None:
    with_numbers, without = _work(CPU).kinds, _work(META).kinds
    assert with_numbers == without
    assert sum(without.values()) == _work(META).operations > 4


def test_a_kind_runs_on_made_up_arguments_of_its_forms() -> None:
    x = torch.ones(4, 6, dtype=torch.float64)[:, ::2].mT
    kind = kind_of(torch.ops.aten.mm.default, (x, torch.ones(4, 1, dtype=torch.float64).expand(4, 2)), {})
    made = [form.made(CPU) for form in kind.arguments]
    assert [y.stride() for y in made] == [(2, 6), (1, 0)]
    torch.testing.assert_close(kind.run(CPU)(), torch.full((3, 2), 1.0, dtype=torch.float64))
    assert kind.nbytes == 8 * (12 + 4)
    assert kind_of(torch.ops.aten.mul.Tensor, (x, 1), {}) != kind_of(torch.ops.aten.mul.Tensor, (x, 1.0), {})


def test_work_takes_what_its_operations_take(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Kind] = []
    monkeypatch.setattr(Clock, "_timed", lambda _, kind: timed.append(kind) or 0.25)
    clock, work = Clock(RATES, CPU), _work(META)
    assert clock.seconds(work) == clock.seconds(work) == 0.25 * work.operations
    assert len(timed) == len(work.kinds)
    assert Clock(RATES, CPU).seconds(Work()) == 0
    assert Clock(RATES, CPU, each=False).seconds(work) == RATES.seconds(work)


def test_operations_are_really_run() -> None:
    clock = Clock(RATES, CPU)
    small, large = (_products(width) for width in (8, 512))
    found = clock.by_operations(small), clock.by_operations(large)
    assert found[0] is not None
    assert found[1] is not None
    assert 0 < found[0] < found[1]


def test_what_changes_its_argument_meets_the_same_numbers_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[float] = []
    monkeypatch.setattr("hesscope.planning.speed._once", lambda device, run, fault: results.append(float(run())) or 0.0)
    Clock(RATES, CPU).by_operations(
        Work(operations=1, kinds={kind_of(torch.ops.aten.exp_.default, (torch.ones(1),), {}): 1})
    )
    assert results == [pytest.approx(1.6487, rel=1e-4)] * 5


def _products(width: int) -> Work:
    x = torch.empty(width, width, device=META)
    with Meter() as meter:
        _ = x @ x
    return meter.work


def test_rates_where_operations_are_not_known_or_do_not_run() -> None:
    clock = Clock(RATES, CPU)
    unknown = Work(flops=2e9, bytes=3e9, operations=1e6)
    assert clock.by_operations(unknown) is None
    assert clock.seconds(unknown) == pytest.approx(6.0)
    no_room = torch.empty(2**50, device=META)
    with Meter() as meter:
        _ = no_room + 1
    assert Clock(Rates(1e9, 1e18, 1e-6), CPU).by_operations(meter.work) is None
    wrong = kind_of(torch.ops.aten.mm.default, (torch.ones(2, 3), torch.ones(2, 3)), {})
    assert clock.by_operations(Work(1.0, 1.0, 1.0, {wrong: 1})) is None


def test_a_short_run_gives_seconds_beside_or_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "_timed", lambda *_: 0.25)
    clock, small = Clock(RATES, CPU), _work(META)
    took = 0.35 * small.operations
    pace = _pace(clock, small + small, small, took)
    assert pace.factor == 1
    assert pace.beside == pytest.approx(0.1 * small.operations)
    assert pace.seconds(clock, Work()) == 0
    assert pace.seconds(clock, small) == pytest.approx(took)
    assert pace.seconds(clock, small + small) == pytest.approx(took + (0.25 + 1e-6) * small.operations)
    unknown = Work(flops=2e9, bytes=3e9, operations=1e6)
    assert _pace(clock, unknown, small, took) == Pace(factor=took / RATES.seconds(small))


@pytest.mark.parametrize("name", ["reverse-over-reverse", "forward-over-reverse", "streamed"])
def test_one_row_of_tiles_stands_for_all_where_only_the_peak_is_asked(name: str) -> None:
    tokens = torch.randint(0, 37, (2, 700), generator=torch.Generator().manual_seed(0))
    problem = hs.causal_lm(
        tiny("llama", torch.float32, max_position_embeddings=1024), tokens, batch_size=2, attention="tiled"
    )
    runs = DryRuns(problem, hs.hessian(problem).space)
    every, one = (runs.product(lambda: make_engine(name), checked=False, peak_alone=p) for p in (False, True))
    assert one.peak == pytest.approx(every.peak, rel=0.02)
    assert one.product.operations < every.product.operations


def test_a_plan_says_where_its_seconds_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = hs.supervised(nn.Linear(2, 3), [(torch.ones(4, 2), torch.zeros(4).long())])
    engine = ["reverse-over-reverse"]
    said = "operations timed one by one, and a product on a short sequence"
    assert hs.plan(problem, engines=engine).basis_of_time == said
    monkeypatch.setattr("hesscope.planning.speed._LONG", 0.0)
    assert hs.plan(problem, engines=engine).basis_of_time == said.replace(
        "operations timed one by one", "rates of this machine"
    )
    assert hs.plan(problem, engines=engine, measure=False).basis_of_time.startswith("rates of this machine alone")
