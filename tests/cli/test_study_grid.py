"""Studies of a diagonal over numbers of sequences and blocks: a folder each, one figure, and nothing is run twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hesscope as hs

Command = Callable[..., int]
GRID = ["--layers", "q_proj", "-t", "6", "--method", "hutchinson", "--method", "per-sequence", "--budget", "4",
        "--budget", "8", "--seeds", "1", "--over-sequences", "2,1", "--over-blocks", "all", "--output-dir", "grid"]  # fmt: skip


def test_every_study_has_a_folder(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("diagonal-study", *GRID) == 0
    names = {f"sequences000{s}-block0{b}" for s in (1, 2) for b in (0, 1)}
    assert {path.name for path in (tmp_path / "grid").iterdir()} == names | {"diagonal-study-grid.png"}
    studies = {name: hs.load(tmp_path / "grid" / name) for name in names}
    assert all(study.methods == ["hutchinson", "per-sequence"] for study in studies.values())
    assert len({study.provenance["problem"]["fingerprint"] for study in studies.values()}) == 2
    assert "4 studies in grid" in capsys.readouterr().out
    plain = ["--params", "*.0.self_attn.q_proj.weight[0]", "--method", "hutchinson", "--budget", "4", "--seeds", "1"]
    assert command("diagonal-study", *plain, "--over-sequences", "1,2", "--output-dir", "plain") == 0
    assert {path.name for path in (tmp_path / "plain").glob("*/")} >= {"sequences0001", "sequences0002"}
    single = [
        "--layers",
        "q_proj",
        "-t",
        "6",
        "--method",
        "hutchinson",
        "--budget",
        "8",
        "--seeds",
        "1",
        "--blocks",
        "1",
    ]
    assert command("diagonal-study", *single, "--output-dir", "single") == 0
    one, same = hs.load(tmp_path / "single"), studies["sequences0002-block01"]
    assert one.row("hutchinson")[8] == same.row("hutchinson")[8]


def test_a_grid_that_was_stopped_goes_on(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = hs.diagonal_study, [0]

    def counted(*arguments: Any, **keywords: Any) -> Any:
        made[0] += 1
        if made[0] == 3:
            raise hs.HesscopeError("stopped here")
        return real(*arguments, **keywords)

    monkeypatch.setattr(hs, "diagonal_study", counted)
    assert command("diagonal-study", *GRID) == 2
    assert command("diagonal-study", *GRID) == 0
    assert made[0] == 3 + 2
    assert command("diagonal-study", *GRID) == 0
    assert made[0] == 5


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["--over-sequences", "two"], "numbers by commas, such as 4,16,64"),
        (["--over-sequences", "0,2"], "numbers by commas, such as 4,16,64"),
        (["--over-blocks", "7"], "blocks"),
        (["--over-blocks", "0", "--exact", "x"], "every study has its own"),
    ],
)
def test_impossible_grids(own: list[str], message: str, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("diagonal-study", "--layers", "q_proj", *own) != 0
    assert message in capsys.readouterr().err
