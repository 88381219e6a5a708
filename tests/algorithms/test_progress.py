"""Progress: a time left that can be believed, on made-up clocks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

import hesscope as hs
from hesscope.algorithms import progress
from hesscope.algorithms.budget import probes_for
from hesscope.algorithms.progress import Pace, duration, remaining
from spectra import generic


def pace(steps: Sequence[tuple[float, int]]) -> Pace:
    made = Pace()
    for seconds, products in steps:
        made.observe(seconds, products)
    return made


def test_nothing_is_said_before_there_is_something_to_go_by() -> None:
    assert pace([]).left(10) is None
    assert pace([(100.0, 1)]).left(10) is None


def test_the_first_step_does_not_count() -> None:
    assert pace([(1000.0, 1), (2.0, 1)]).left(10) == pytest.approx(20.0)
    assert pace([(1000.0, 16), *[(8.0, 16)] * 5]).left(160) == pytest.approx(80.0)


def test_steps_of_unequal_size_weigh_by_their_products() -> None:
    assert pace([(9.0, 1), (1.0, 1), (16.0, 16), (4.0, 4)]).rate == pytest.approx(1.0)


def test_a_change_of_speed_is_followed() -> None:
    """A machine that becomes three times slower: after as much time again the estimate is within a third of the truth."""
    fast, slow = [(1.0, 1)] * 300, [(3.0, 1)] * 100
    assert pace(fast).rate == pytest.approx(1.0)
    assert 2.0 < (pace(fast + slow).rate or 0.0) <= 3.0


def test_one_slow_step_is_soon_forgotten() -> None:
    steps = [(1.0, 1)] * 100 + [(60.0, 1)]
    assert (pace(steps + [(1.0, 1)] * 100).rate or 9.9) < 1.3


def test_a_run_that_slows_down_evenly_takes_at_most_half_as_long_again() -> None:
    """A Lanczos run that is all orthogonalisation, whose k-th step costs 1 + k / 100, half-way through."""
    steps = [(1 + k / 100, 1) for k in range(201)]
    truth = sum(s for s, _ in steps[101:])
    left = pace(steps[:101]).left(100) or 0.0
    assert truth / 1.5 < left < truth


def test_ups_and_downs_average_out() -> None:
    """Density: every probe begins with cheap steps and ends with dear ones, two seconds on average."""
    probe = [(0.5 + 3.0 * k / 59, 1) for k in range(60)]
    steps = [*probe * 10]
    for made in range(180, 600, 15):
        assert pace(steps[:made]).rate == pytest.approx(2.0, rel=0.3)


def test_durations_in_words() -> None:
    said = [duration(s) for s in (0.4, 59.4, 59.6, 200, 3599.7, 3600 * 2 + 310, 86400 * 1.2, 86400 * 3)]
    assert said == ["0 s", "59 s", "1 min 00 s", "3 min 20 s", "1 h 00 min", "2 h 05 min", "1 d 5 h", "3 d 0 h"]
    assert remaining(None) == "time left not known yet"
    assert remaining(200.0, at_most=True) == "at most 3 min 20 s left"


def test_probes_to_a_target_follow_from_the_error() -> None:
    assert probes_for(30, error=0.2, target=0.1, most=10_000) == 120
    assert probes_for(30, error=0.05, target=0.1, most=10_000) == 30
    assert probes_for(30, error=float("inf"), target=0.1, most=10_000) == 10_000
    assert probes_for(30, error=0.2, target=0.0, most=10_000) == 10_000


@pytest.fixture
def ten_seconds_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=10.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))


@pytest.mark.usefixtures("ten_seconds_a_step")
def test_without_a_terminal_there_is_a_line_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    hs.trace(hs.operator(generic(400)), "hutchinson", budget=320)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3  # 20 steps of 16 products
    assert lines[0].startswith("hesscope: trace: 96 of 320 products (30%), 0.62 s each, 2 min 20 s left; ")
    assert "192 of 320 products (60%)" in lines[1]
    assert "1 min 20 s left" in lines[1]


@pytest.mark.usefixtures("ten_seconds_a_step")
def test_a_target_predicts_its_own_end(capsys: pytest.CaptureFixture[str]) -> None:
    result = hs.trace(hs.operator(generic(60) + torch.eye(60)), "hutchinson", target_error=0.02, seed=1)
    early, *_, last = capsys.readouterr().err.splitlines()
    assert "at most" in early
    assert "of 10000 products" in early
    assert "at most" not in last
    predicted = int(last.split(" of ")[1].split()[0])
    assert predicted == pytest.approx(result.products, rel=0.2)


def test_short_runs_say_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    hs.trace(hs.operator(generic(50)), "hutchinson", budget=50)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress, "_BAR_EVERY", 0.0)
    hs.trace(hs.operator(generic(50)), "hutchinson", budget=50)
    drawn = capsys.readouterr().err
    assert "trace" in drawn
    assert "50/50" in drawn
    assert "left" in drawn
