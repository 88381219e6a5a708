"""PyTorch's own launcher starts the command."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import environment, free_port
from programs import DEMO
from test_data_parallel import assert_same_result
from test_killed_ranks import BROKEN, LONG, Started, wait_for_checkpoint

from hesscope.cli.main import run

pytestmark = pytest.mark.slow


def torchrun(folder: Path, *command: str) -> Started:
    """The command on two ranks; what they and the launcher write goes to a file beside the folder."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    own = {name: value for name, value in environment(0, 2, 0).items() if name not in names}
    launcher = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    words = [sys.executable, "-m", *launcher, "-m", "hesscope", *command, "--output-dir", str(folder)]
    with (folder.parent / "said").open("w") as said:
        return subprocess.Popen(words, env=own, stdout=said, stderr=subprocess.STDOUT)


def test_a_command_has_the_numbers_of_one_process(tmp_path: Path) -> None:
    command = ["trace", *DEMO, "--method", "hutchinson", "--budget", "6"]
    launched = torchrun(tmp_path / "two", *command)
    assert run([*command, "--output-dir", str(tmp_path / "one")]) == 0
    assert launched.wait(timeout=120) == 0, (tmp_path / "said").read_text()
    assert_same_result(tmp_path / "two", tmp_path / "one")
    assert (tmp_path / "said").read_text().count("products = ") == 1


def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    launched = torchrun(tmp_path / "out", *LONG)
    wait_for_checkpoint(tmp_path / "out", {0: launched})
    ranks = {child.environ()["RANK"]: child for child in psutil.Process(launched.pid).children()}
    ranks["1"].kill()
    began = time.monotonic()
    assert launched.wait(timeout=BROKEN + 10) == 1
    said = (tmp_path / "said").read_text()
    assert time.monotonic() - began < BROKEN
    assert "hesscope: rank 0: Rank 1 stopped without a word: killed" in said
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / "state.safetensors").exists()
