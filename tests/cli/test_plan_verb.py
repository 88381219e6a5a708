"""`hesscope plan`: from a configuration alone or with data, and the memory that other verbs heed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import hesscope as hs
from hesscope.cli.main import run

Command = Callable[..., int]


def test_from_the_configuration_alone(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny / "model.safetensors").rename(tmp_path / "away")  # no weights are needed
    try:
        assert run(["plan", "--model", str(tiny), "--length", "16", "--batch-size", "2", "--params", "*mlp*"]) == 0
    finally:
        (tmp_path / "away").rename(tiny / "model.safetensors")
    said = capsys.readouterr().out
    assert "reverse-over-reverse" in said
    assert "streamed" in said
    assert "would fit, each by itself: length 32," in said


def test_with_data_it_writes_a_folder_when_asked(command: Command, tmp_path: Path) -> None:
    assert command("plan", "--what", "block", "--params", "*mlp*", "--output-dir", "out") == 0
    found = hs.load(tmp_path / "out")
    assert found.kind == "plan"
    assert found.chosen == "reverse-over-reverse"
    assert (tmp_path / "out" / "plan.png").stat().st_size > 5000


def test_without_an_output_folder_nothing_is_written(command: Command, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    assert command("plan", "--no-measure") == 0
    assert set(tmp_path.iterdir()) == before


def test_memory_that_is_no_amount_is_refused(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("trace", "--memory", "lots", "--output-dir", "none") == 2
    assert "Expected an amount of memory" in capsys.readouterr().err


def test_a_run_that_does_not_fit_is_refused_unless_forced(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    own = ("trace", "--budget", "4", "--memory", "1MB")
    assert command(*own, "--output-dir", "refused") == 2
    assert "--force" in capsys.readouterr().err
    assert command(*own, "--force", "--output-dir", "forced") == 0
