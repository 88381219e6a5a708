"""`hesscope groups`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hesscope as hs
from hesscope.algorithms import checkpoint as checkpoints
from hesscope.algorithms.group_spectra import GroupSpectra

Command = Callable[..., int]
SMALL = ("--probes", "2", "--steps", "3", "--max-products", "4", "--tol", "10")


def test_it_writes_what_python_gives(
    command: Command, tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("groups", "--by", "kind", *SMALL, "--dtype", "float64", "--output-dir", "out") == 0
    found = hs.load(tmp_path / "out")
    assert found.summary() in capsys.readouterr().out
    assert (tmp_path / "out" / "groups.png").stat().st_size > 10_000
    problem = hs.causal_lm(tiny, text, length=16, sequences=2, dtype="float64")
    expected = hs.groups(hs.hessian(problem), "kind", probes=2, steps=3, max_products=4, tol=10.0)
    assert found.names == expected.names
    torch.testing.assert_close(found.squares, expected.squares, rtol=1e-9, atol=1e-20)
    assert found.provenance["command"]["by"] == "kind"


def test_a_stopped_command_goes_on(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_SHARE", 0.0)
    own = ("groups", "--layers", "down_proj", *SMALL, "--checkpoint-every", "0")
    step, made = GroupSpectra.step, []

    def stops(self: GroupSpectra) -> None:
        made.append(self)
        if len(made) == 9:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(GroupSpectra, "step", stops)
        assert command(*own, "--output-dir", "out") == 130
    assert command(*own, "--output-dir", "out") == 0
    assert command(*own, "--output-dir", "whole") == 0
    again, whole = hs.load(tmp_path / "out"), hs.load(tmp_path / "whole")
    assert again.provenance["resumed"] == 1
    for name, tensor in whole.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)


def test_an_unknown_grouping_is_one_sentence(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("groups", "--by", "head") == 2
    assert capsys.readouterr().err.strip().startswith("hesscope: Expected by to be one of block, layer, kind")
