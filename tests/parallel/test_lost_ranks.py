"""A rank that never comes, falls silent, is asked to stop or is killed where nothing is reduced: the others stop in time."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from launching import Started, run_ranks, start_command
from programs import DEMO
from test_killed_ranks import LONG, ends, said_by, wait_for_checkpoint

pytestmark = pytest.mark.slow
#: For what takes a fixed time: what a busy machine adds.
BUSY = 20.0


def last_words(folder: Path, processes: dict[int, Started], status: int, within: float) -> list[str]:
    """What each of these ranks says when it stops."""
    assert set(ends(processes, within).values()) == {status}
    return [said_by(folder, rank) for rank in processes]


def test_a_rank_that_is_never_started(tmp_path: Path) -> None:
    """Ten times --timeout, and again where it is rank 0, whom the others try to reach."""
    came = {}
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        came[rank] = start_command(tmp_path / str(rank) / "out", 2, "trace", *DEMO, "--timeout", "0.5", only=[rank])
    for rank, processes in came.items():
        (said,) = last_words(tmp_path / str(rank), processes, 1, 2 * 10 * 0.5 + BUSY)
        assert said.startswith(f"hesscope: rank {rank}: Could not join the other processes within 5 seconds (")
        assert said.count("\n") == 1


def test_a_rank_that_is_killed_before_or_beside_the_reductions(tmp_path: Path) -> None:
    expected = {
        "never_came": "Rank 1 has not come: not started, or stopped before;",
        "killed_in_arranging": "Rank 1 stopped without a word: killed",
        "killed_in_gathering": "Rank 1 stopped without a word: killed",
    }

    def left(program: str) -> dict[str, Any]:
        (tmp_path / program).mkdir()
        (found,) = run_ranks(2, tmp_path / program, program, seconds=60, killed=[1])
        return dict(found[program])

    with ThreadPoolExecutor() as at_once:
        for said, found in zip(expected.values(), at_once.map(left, expected), strict=True):
            assert found["said"].startswith(said)
            assert found["seconds"] < 5 + BUSY


def test_a_rank_that_falls_silent_or_is_asked_to_stop(tmp_path: Path) -> None:
    """Rank 0 keeps the store, where no launcher does."""
    signals = {"0": (0, signal.SIGSTOP), "1": (1, signal.SIGSTOP), "stop": (1, signal.SIGTERM)}
    started = {}
    for name in signals:
        (tmp_path / name).mkdir()
        started[name] = start_command(tmp_path / name / "out", 2, *LONG, "--timeout", "4")
    try:
        for name, (rank, kind) in signals.items():
            wait_for_checkpoint(tmp_path / name / "out", started[name])
            started[name][rank].send_signal(kind)
        (without_0,) = last_words(tmp_path / "0", {1: started["0"][1]}, 1, 4 + BUSY)
        (without_1,) = last_words(tmp_path / "1", {0: started["1"][0]}, 1, 4 + BUSY)
        stopped = last_words(tmp_path / "stop", started["stop"], 130, BUSY)
    finally:
        for process in (process for processes in started.values() for process in processes.values()):
            process.kill()
            process.wait()
    assert without_0.startswith("hesscope: rank 1: The rank or launcher that keeps the ranks' store does not answer:")
    assert without_1.startswith("hesscope: rank 0: Rank 1 stopped without a word: killed")
    assert (without_0.count("\n"), without_1.count("\n")) == (1, 1)
    partial = tmp_path / "stop" / "out.partial"
    assert stopped[0] == f"hesscope: rank 0: Stopped; run the same command again to continue from {partial}.\n"
    assert (partial / "state.safetensors").exists()
