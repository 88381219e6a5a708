"""A command that is killed and given again ends with the same numbers."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import hesscope as hs
from hesscope.algorithms import checkpoint as checkpoints
from hesscope.algorithms.checkpoint import STATE
from hesscope.algorithms.krylov import Krylov
from hesscope.cli.resuming import partial_folder

Command = Callable[..., int]
DEMO = ["--model", "demo", "--data", "demo", "--length", "64", "--checkpoint-every", "0"]
SMALL = ("density", "--params", "*mlp*", "--probes", "2", "--steps", "5", "--checkpoint-every", "0")


class Killed(BaseException):
    """Nothing in the package catches it."""


@pytest.fixture
def stopped(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Path:
    """The checkpoint beside `out` of a density run that was interrupted in its seventh step."""
    monkeypatch.setattr(checkpoints, "_SHARE", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Krylov, "step", _interrupted_at(7))
        assert command(*SMALL, "--output-dir", "out") == 130
    assert "run the same command again to continue from out.partial" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    return tmp_path / "out.partial"


def _interrupted_at(wanted: int) -> Callable[[Krylov], None]:
    import signal

    step, made = Krylov.step, [0]

    def counted(self: Krylov) -> None:
        made[0] += 1
        if made[0] == wanted:
            signal.raise_signal(signal.SIGINT)
        step(self)

    return counted


def assert_same_tensors(found: Path, expected: Path) -> None:
    one, other = hs.load(found).tensors(), hs.load(expected).tensors()
    assert list(one) == list(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_the_same_command_continues_and_says_so(
    stopped: Path, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*SMALL, "--output-dir", "out") == 0
    said = capsys.readouterr().err
    assert "density: resumed from the checkpoint in out.partial (7 of 10 products, " in said
    assert not stopped.exists()
    assert command(*SMALL, "--output-dir", "whole") == 0
    assert_same_tensors(tmp_path / "out", tmp_path / "whole")
    assert hs.load(tmp_path / "out").provenance["resumed"] == 1
    assert hs.load(tmp_path / "out").products == 10


def test_options_that_decide_no_number_do_not_matter(
    stopped: Path, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL[:-1], "30", "--also-pt", "--overwrite", "--output-dir", str(tmp_path / "out")]
    assert command(*options) == 0
    assert "resumed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (["--seed", "1"], "seed 0 -> 1"),
        (["--steps", "6"], "steps 5 -> 6"),
        (["--params", "!*down*"], "selection "),
        (["--dtype", "float64"], "dtype float32 -> float64"),
        (["--objective", "perplexity"], "objective nll -> perplexity"),
        (["--batch-size", "2"], "data "),
        (["--length", "8"], "data "),
        (["--engine", "finite-difference"], "engine finite-difference"),
        (["--overwrite", "--bandwidth", "0.1"], "bandwidth None -> 0.1"),
    ],
)
def test_another_run_is_refused_and_keeps_the_checkpoint(
    own: list[str], said: str, stopped: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (stopped / STATE).read_bytes()
    assert command(*SMALL, "--output-dir", "out", *own) == 2
    complaint = capsys.readouterr().err.strip()
    assert "\n" not in complaint
    assert said in complaint
    assert "--restart" in complaint
    assert (stopped / STATE).read_bytes() == before


def test_other_text_and_other_weights_are_refused(
    stopped: Path, command: Command, tiny: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    (tmp_path / "other.txt").write_text(text.read_text().upper())
    assert command(*SMALL, "--output-dir", "out", data=tmp_path / "other.txt") == 2
    assert "another run: data " in capsys.readouterr().err
    model = LlamaForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    model.save_pretrained(tmp_path / "trained")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "trained")
    assert command(*SMALL, "--output-dir", "out", model=tmp_path / "trained") == 2
    assert "another run: weights " in capsys.readouterr().err


def test_restart_discards(stopped: Path, command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*SMALL, "--output-dir", "out", "--seed", "1", "--restart") == 0
    assert "resumed" not in capsys.readouterr().err
    assert not stopped.exists()


def test_restart_of_a_command_that_is_refused_discards_nothing(stopped: Path, command: Command) -> None:
    before = (stopped / STATE).read_bytes()
    assert command(*SMALL, "--output-dir", "out", "--restart", "--params", "no.such") == 2
    assert (stopped / STATE).read_bytes() == before


def test_another_verb_in_that_folder_leaves_the_checkpoint(stopped: Path, command: Command) -> None:
    assert command("verify", "--params", "*mlp*", "--output-dir", "out") == 0
    assert (stopped / STATE).exists()


def test_a_figure_that_fails_loses_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoints, "_SHARE", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr("hesscope.results.density.Density.plot", lambda *_: 1 / 0)
        assert command(*SMALL, "--output-dir", "out") == 1
    assert (tmp_path / "out.partial" / STATE).exists()
    assert command(*SMALL, "--output-dir", "out") == 0
    assert "(10 of 10 products" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_one_sentence(
    stopped: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    (stopped / STATE).write_bytes((stopped / STATE).read_bytes()[:-9])
    assert command(*SMALL, "--output-dir", "out") == 2
    complaint = capsys.readouterr().err.strip()
    assert "damaged" in complaint
    assert "\n" not in complaint


def test_the_checkpoint_lies_beside_the_folder() -> None:
    assert partial_folder(Path("runs/eigs")) == Path("runs/eigs.partial")
    assert partial_folder(Path("out/")) == Path("out.partial")
    here = Path.cwd()
    assert partial_folder(Path(".")) == here.parent / f"{here.name}.partial"
    assert partial_folder(Path("..")) == here.parent.parent / f"{here.parent.name}.partial"


# ---- one result a layer

LAYERS = [*SMALL[:1], *SMALL[3:], "--layers", "up_proj,down_proj", "--blocks", "all", "--separately"]


def test_a_run_through_the_layers_continues_in_the_middle_of_one(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoints, "_SHARE", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(Krylov, "step", _interrupted_at(27))
        assert command(*LAYERS, "--output-dir", "out") == 130
    assert "run the same command again to continue in out" in capsys.readouterr().err
    names = ["block00-mlp.up_proj", "block00-mlp.down_proj", "block01-mlp.up_proj.partial"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    assert command(*LAYERS, "--output-dir", "out", "--seed", "1") == 2
    assert "already holds a run" in capsys.readouterr().err
    steps = [0]
    with monkeypatch.context() as patch:
        patch.setattr(Krylov, "step", _counted(steps))
        assert command(*LAYERS, "--output-dir", "out") == 0
    assert steps == [13]
    captured = capsys.readouterr()
    assert captured.err.count("resumed") == 1
    assert "4 of 4 layers in out:" in captured.out
    assert command(*LAYERS, "--output-dir", "whole") == 0
    for name in sorted(path.name for path in (tmp_path / "whole").iterdir()):
        assert_same_tensors(tmp_path / "out" / name, tmp_path / "whole" / name)
    assert len(list((tmp_path / "out").iterdir())) == 4
    assert command(*LAYERS, "--output-dir", "out") == 2


def _counted(steps: list[int]) -> Callable[[Krylov], None]:
    step = Krylov.step

    def counted(self: Krylov) -> None:
        steps[0] += 1
        step(self)

    return counted


# ---- SIGKILL


def start(arguments: list[str], folder: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hesscope", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_at_work(arguments: list[str], folder: Path, state: Path, delay: float) -> bool:
    """Start, and kill `delay` seconds after a checkpoint was written; whether there was still something to kill."""
    before = state.stat().st_mtime_ns if state.exists() else None
    process = start(arguments, folder)
    while process.poll() is None and (not state.exists() or state.stat().st_mtime_ns == before):
        time.sleep(0.002)
    time.sleep(delay)
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return alive


def finish(arguments: list[str], folder: Path) -> str:
    process = start(arguments, folder)
    said = process.communicate()[1].decode()
    assert process.returncode == 0, said
    return said


def test_a_killed_command_ends_with_the_same_matrix(tmp_path: Path) -> None:
    """SIGKILL while a block is computed."""
    block = ["block", *DEMO, "--sequences", "4", "--params", "model.layers.3.mlp.down_proj.weight[0]"]
    state = tmp_path / "out.partial" / STATE
    assert kill_at_work([*block, "--output-dir", "out"], tmp_path, state, delay=0.2)
    assert state.exists()
    assert not (tmp_path / "out").exists()
    assert "resumed" in finish([*block, "--output-dir", "out"], tmp_path)
    # A kill while the result was being written leaves its hidden stage behind, and nothing else.
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".out-")] == ["out"]
    problem = _demo_problem()
    expected = hs.block(hs.hessian(problem, hs.select(problem, block[-1])))
    assert torch.equal(hs.load(tmp_path / "out").matrix, expected.matrix)


def _demo_problem() -> hs.Problem:
    from hesscope.assets import model_path, prose

    return hs.causal_lm(model_path(), [prose("held_out")], length=64, sequences=4, pack=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "run",
    [
        ["eigs", "-k", "4", "--which", "BE"],
        ["density", "--probes", "3", "--steps", "30"],
        ["trace", "--budget", "150"],
        ["diagonal", "--method", "hutchinson", "--budget", "160"],
    ],
    ids=lambda run: run[0],
)
def test_commands_killed_at_random_moments(run: list[str], tmp_path: Path) -> None:
    draw = random.Random(run[0])
    command = [*run, *DEMO, "--sequences", "4", "--params", "model.layers.3.*"]
    state = tmp_path / "out.partial" / STATE
    kills = sum(
        kill_at_work([*command, "--output-dir", "out"], tmp_path, state, draw.uniform(0, 1.5)) for _ in range(3)
    )
    assert kills > 0
    if not (tmp_path / "out").exists():
        finish([*command, "--output-dir", "out"], tmp_path)
    finish([*command, "--output-dir", "whole"], tmp_path)
    assert_same_tensors(tmp_path / "out", tmp_path / "whole")
    assert hs.load(tmp_path / "out").provenance["resumed"] > 0


@pytest.mark.slow
def test_sigterm_keeps_the_last_step(tmp_path: Path) -> None:
    command = ["trace", *DEMO, "--sequences", "8", "--method", "hutchinson", "--budget", "90", "--output-dir", "out"]
    process = start(command, tmp_path)
    while not (tmp_path / "out.partial" / STATE).exists():
        time.sleep(0.01)
    process.terminate()
    said = process.communicate()[1].decode()
    assert process.returncode == 130
    assert "stopping after this step" in said
    assert "run the same command again" in said
    assert "resumed" in finish(command, tmp_path)
