"""A model that is not on the CPU runs where it is, with the numbers that it has on the CPU; a spread one has everything."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

PROGRAM = Path(__file__).with_name("program.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_nothing_is_left_on_the_cpu(name: str) -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no backends written in Python")
    done = subprocess.run([sys.executable, str(PROGRAM), name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(found) > 3
    assert {what: gap for what, gap in found.items() if isinstance(gap, str) or gap > 1e-5} == {}
