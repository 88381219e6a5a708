"""What a checkpoint refuses, survives and costs."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
from hesscope.algorithms import checkpoint as checkpoints
from hesscope.algorithms import driver
from hesscope.algorithms.checkpoint import LOCK, STATE, Checkpoint, pause
from spectra import generic

A = generic(40)


class Killed(BaseException):
    """Nothing in the package catches it."""


def killed_after(calls: int, act: Callable[[], None] | None = None, matrix: Tensor = A) -> hs.Operator:
    """The matrix, whose product acts (dies, by default) when it has been asked for so many times."""
    made = [0]

    def product(X_nK: Tensor) -> Tensor:
        made[0] += 1
        if made[0] == calls:
            if act is None:
                raise Killed
            act()
        return matrix @ X_nK

    return hs.operator(product, size=matrix.shape[0], dtype=matrix.dtype)


def whole() -> hs.Operator:
    return killed_after(-1)


@pytest.fixture(autouse=True)
def _every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_SHARE", 0.0)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """The folder of a Lanczos run that was killed in its sixth step, its first product having told the matrix."""
    with pytest.raises(Killed):
        hs.lanczos(killed_after(7), 12, checkpoint=Checkpoint(tmp_path / "kept", every=0.0))
    return tmp_path / "kept"


# ---- the folder


def test_a_folder_given_as_a_path_is_resumed_from_and_removed(kept: Path) -> None:
    result = hs.lanczos(whole(), 12, checkpoint=kept)
    assert torch.equal(result.T, hs.lanczos(whole(), 12).T)
    assert result.provenance["resumed"] == 1
    assert result.products == 12
    assert not kept.exists()


def test_what_was_done_is_not_done_again(kept: Path) -> None:
    H = whole()
    hs.lanczos(H, 12, checkpoint=kept)
    assert H.products == 1 + 12 - 5  # one tells the matrix


def test_the_seconds_of_all_processes_add_up(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = checkpoints.state_file.read(kept / STATE)
    saved["cost"]["seconds"] = 1000.0
    checkpoints.state_file.write(kept / STATE, saved)
    assert hs.lanczos(whole(), 12, checkpoint=kept).seconds > 1000.0


def test_a_short_run_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        hs.lanczos(killed_after(7), 12, checkpoint=tmp_path / "new" / "kept")
    assert not (tmp_path / "new" / "kept").exists()


def test_files_of_others_stay(kept: Path) -> None:
    (kept / "notes.txt").write_text("mine")
    hs.lanczos(whole(), 12, checkpoint=kept)
    assert [path.name for path in kept.iterdir()] == ["notes.txt"]


def test_a_seed_that_was_drawn_is_drawn_once(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        hs.trace(killed_after(4), "hutchinson", budget=80, seed=None, checkpoint=Checkpoint(tmp_path / "k", every=0.0))
    seed = Checkpoint(tmp_path / "k").seed()
    assert hs.trace(whole(), "hutchinson", budget=80, seed=None, checkpoint=tmp_path / "k").seed == seed


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")

    def second() -> None:
        with pytest.raises(hs.HesscopeError, match="Another process"):
            hs.lanczos(whole(), 12, checkpoint=tmp_path / "kept")

    hs.lanczos(killed_after(5, second), 12, checkpoint=tmp_path / "kept")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(hs.HesscopeError, match="folder for the checkpoint"):
        hs.lanczos(whole(), 12, checkpoint=tmp_path / "file")
    with pytest.raises(hs.HesscopeError, match="0 or more"):
        Checkpoint(tmp_path, every=-1.0)


@pytest.mark.parametrize("room", [(10_000, 0), (0, 10_000)])
def test_a_trace_goes_on_as_it_was_begun_whatever_memory_is_free(
    room: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With room for a basis it is XNysTrace that is begun."""

    def trace(free: int, calls: int, **more: Any) -> Any:
        monkeypatch.setattr(sys.modules["hesscope.algorithms.trace"], "vectors_that_fit", lambda *_: free)
        for kind in ("exchangeable", "hutchinson"):
            monkeypatch.setattr(sys.modules[f"hesscope.algorithms.traces.{kind}"], "chunk_size", lambda _: 5)
        H = killed_after(calls, matrix=A @ A)
        H.positive_semidefinite = True
        return hs.trace(H, budget=20, **more)

    before, after = room
    with pytest.raises(Killed):
        trace(before, 4, checkpoint=Checkpoint(tmp_path / "kept", every=0.0))
    found, whole = trace(after, -1, checkpoint=tmp_path / "kept"), trace(before, -1)
    assert found.provenance["resumed"] == 1
    assert (found.method, found.estimate) == (whole.method, whole.estimate)


def test_a_run_of_parts_does_not_repeat_the_finished_ones(tmp_path: Path) -> None:
    run = Checkpoint(tmp_path / "run", every=0.0)
    first = hs.lanczos(whole(), 12, checkpoint=run.part("first"))
    with pytest.raises(Killed):
        hs.lanczos(killed_after(7), 9, checkpoint=run.part("second"))
    assert run.exists
    H = whole()
    assert torch.equal(hs.lanczos(H, 12, checkpoint=run.part("first")).T, first.T)
    assert H.products == 1
    assert torch.equal(hs.lanczos(whole(), 9, checkpoint=run.part("second")).T, hs.lanczos(whole(), 9).T)
    run.discard()
    assert not (tmp_path / "run").exists()


def test_a_restart_discards(kept: Path) -> None:
    H = whole()
    hs.lanczos(H, 11, checkpoint=Checkpoint(kept, restart=True))
    assert H.products == 1 + 11


# ---- refusals


def refused(run: Callable[[], Any], folder: Path) -> str:
    """The sentence of a run that must not resume; the checkpoint is as it was."""
    before = (folder / STATE).read_bytes()
    with pytest.raises(hs.HesscopeError) as caught:
        run()
    assert (folder / STATE).read_bytes() == before
    said = str(caught.value)
    assert "\n" not in said
    assert "--restart" in said
    return said


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"steps": 13}, "steps 12 -> 13"),
        ({"seed": 1}, "seed 0 -> 1"),
        ({"keep_basis": True}, "keep_basis False -> True"),
        ({"start": torch.ones(40)}, "start None -> "),
    ],
)
def test_another_option_refuses(own: dict[str, Any], said: str, kept: Path) -> None:
    assert said in refused(lambda: hs.lanczos(whole(), **{"steps": 12, **own}, checkpoint=kept), kept)


def test_another_matrix_algorithm_or_dtype_refuses(kept: Path) -> None:
    assert "matrix |Az| = " in refused(lambda: hs.lanczos(killed_after(-1, matrix=A + 1), 12, checkpoint=kept), kept)
    assert "algorithm lanczos -> block" in refused(lambda: hs.block(whole(), checkpoint=kept), kept)
    single = killed_after(-1, matrix=A.float())
    assert "dtype float64 -> float32" in refused(lambda: hs.lanczos(single, 12, checkpoint=kept), kept)
    scaled = 2.0 * whole()
    assert "operator" in refused(lambda: hs.lanczos(scaled, 12, checkpoint=kept), kept)


def test_another_version_refuses(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "versions", lambda: {"torch": "9.0", "hesscope": hs.__version__})
    assert "version of torch" in refused(lambda: hs.lanczos(whole(), 12, checkpoint=kept), kept)
    monkeypatch.undo()
    monkeypatch.setattr(checkpoints, "_FORMAT", 2)
    assert "another version of hesscope" in refused(lambda: hs.lanczos(whole(), 12, checkpoint=kept), kept)


def regression(weight: float = 1.0, target: float = 0.0, engine: str = "auto", pattern: str = "*") -> hs.Operator:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        model[0].weight[0, 0] = weight
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    problem = hs.supervised(model, [(x, torch.full((5, 2), target, dtype=torch.float64))], loss="mse")
    return hs.hessian(problem, hs.select(problem, pattern), engine)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"weight": 1.5}, "weights "),
        ({"target": 1.0}, "data "),
        ({"engine": "finite-difference"}, "engine finite-difference"),
        ({"pattern": "*.weight"}, "selection 23 weights of 0.weight and 3 more"),
        ({"pattern": "0.weight[0]"}, " -> 4 weights of 0.weight ["),
    ],
)
def test_another_problem_selection_or_operator_refuses(
    own: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kept"
    with monkeypatch.context() as patch:
        asked = [0]
        is_due = driver.Checkpoint.is_due

        def die(self: Checkpoint, last: bool = False) -> bool:
            asked[0] += not last  # once a step
            if asked[0] == 3:
                raise Killed
            return is_due(self, last)

        patch.setattr(driver.Checkpoint, "is_due", die)
        with pytest.raises(Killed):
            hs.density(regression(), probes=2, steps=3, checkpoint=Checkpoint(folder, every=0.0))
    sentence = refused(lambda: hs.density(regression(**own), probes=2, steps=3, checkpoint=folder), folder)
    assert said in sentence
    assert sentence.count(" -> ") == 1
    assert hs.density(regression(), probes=2, steps=3, checkpoint=folder).provenance["resumed"] == 1


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_one_sentence(share: float, kept: Path) -> None:
    content = (kept / STATE).read_bytes()
    (kept / STATE).write_bytes(content[: int(share * len(content))])
    assert "damaged" in refused(lambda: hs.lanczos(whole(), 12, checkpoint=kept), kept)


@pytest.mark.parametrize("place", [0, 3, 40, -1, -400, -1000])
def test_a_checkpoint_with_a_wrong_byte_is_one_sentence(place: int, kept: Path) -> None:
    content = bytearray((kept / STATE).read_bytes())
    content[place] ^= 0x55
    (kept / STATE).write_bytes(bytes(content))
    assert "damaged" in refused(lambda: hs.lanczos(whole(), 12, checkpoint=kept), kept)


# ---- writing


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_dying_while_writing_leaves_the_last_checkpoint(
    failing: str, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (kept / STATE).read_bytes()

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, die)
        with pytest.raises(Killed):
            hs.lanczos(whole(), 12, checkpoint=Checkpoint(kept, every=0.0))
    assert (kept / STATE).read_bytes() == before
    assert torch.equal(hs.lanczos(whole(), 12, checkpoint=kept).T, hs.lanczos(whole(), 12).T)


def test_a_full_disk_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(hs.HesscopeWarning, match="No space left") as caught:
        result = hs.lanczos(whole(), 12, checkpoint=Checkpoint(tmp_path / "kept", every=0.0))
    assert len(caught) == 1
    assert torch.equal(result.T, hs.lanczos(whole(), 12).T)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_removed_ends_the_run_in_one_sentence(tmp_path: Path) -> None:
    H = killed_after(7, lambda: shutil.rmtree(tmp_path / "disk"))
    with pytest.raises(
        hs.HesscopeError, match=r"The folder '.*kept' of this run's checkpoint is gone \(No such"
    ) as said:
        hs.lanczos(H, 12, checkpoint=Checkpoint(tmp_path / "disk" / "kept", every=0.0))
    assert H.products == 7
    assert "\n" not in str(said.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_moved_away_and_comes_back_is_resumed_from(tmp_path: Path) -> None:
    H = killed_after(7, lambda: (tmp_path / "disk").rename(tmp_path / "elsewhere"))
    with pytest.raises(hs.HesscopeError, match="this run's checkpoint is gone"):
        hs.lanczos(H, 12, checkpoint=Checkpoint(tmp_path / "disk" / "kept", every=0.0))
    (tmp_path / "elsewhere").rename(tmp_path / "disk")
    result = hs.lanczos(whole(), 12, checkpoint=tmp_path / "disk" / "kept")
    assert result.provenance["resumed"] == 1
    assert torch.equal(result.T, hs.lanczos(whole(), 12).T)


def test_leftovers_of_a_killed_write_go(kept: Path) -> None:
    (kept / f".{STATE}.123").write_bytes(b"half")
    with pytest.raises(Killed):
        hs.lanczos(killed_after(2), 12, checkpoint=kept)
    assert sorted(path.name for path in kept.iterdir()) == [LOCK, STATE]


def test_writing_takes_a_twentieth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert pause(60.0, 0.5) == 60.0
    assert pause(60.0, 30.0) == 600.0


def test_checkpoints_come_as_often_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of ten seconds and writes of four, by a clock of the test's own."""
    monkeypatch.undo()
    now, written = [0.0], []
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])

    def write(*_: object) -> None:
        written.append(now[0])
        now[0] += 4.0

    monkeypatch.setattr(checkpoints.state_file, "write", write)
    kept = Checkpoint(tmp_path, every=60.0)
    kept.begin({})
    for _ in range(30):
        now[0] += 10.0
        if kept.is_due():
            kept.write({})
    assert written == [60.0, 144.0, 228.0, 312.0]  # 64 + 80, 148 + 80: twenty times four seconds


# ---- Ctrl-C


def test_an_interrupt_waits_for_the_step_and_keeps_its_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    H = killed_after(7, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        hs.lanczos(H, 12, checkpoint=Checkpoint(tmp_path / "kept", every=0.0))
    assert "stopping after this step" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(checkpoints.state_file.read_facts(tmp_path / "kept" / STATE)["state"]["alphas"]) == 6
    assert torch.equal(hs.lanczos(whole(), 12, checkpoint=tmp_path / "kept").T, hs.lanczos(whole(), 12).T)


def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        hs.lanczos(killed_after(7, twice), 12, checkpoint=Checkpoint(tmp_path / "kept", every=0.0))
    assert len(checkpoints.state_file.read_facts(tmp_path / "kept" / STATE)["state"]["alphas"]) == 5


def test_handlers_of_others_stay(tmp_path: Path) -> None:
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(1))
    try:
        hs.lanczos(killed_after(7, lambda: signal.raise_signal(signal.SIGINT)), 12, checkpoint=tmp_path / "kept")
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == [1]


def test_the_last_checkpoint_keeps_only_what_is_worth_keeping(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        hs.lanczos(killed_after(7, lambda: signal.raise_signal(signal.SIGINT)), 12, checkpoint=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
