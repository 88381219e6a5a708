"""A model spread over several devices has, with every operator and algorithm, the numbers that it has on one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

pytest.importorskip("accelerate", reason="accelerate spreads models")

PROGRAM = Path(__file__).with_name("spread.py")
#: Relative differences: a float64 model that casts to float32 inside rounds as float32 does, and so does what is asked for in it.
LIMITS = {"gpt2": 1e-10, "llama": 1e-6}
IN_FLOAT32 = ("float32", "bfloat16", "product error")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout", "few"),
    [
        ("gpt2", "two devices", []),
        ("gpt2", "two devices and the CPU", ["few"]),
        ("llama", "head elsewhere", ["few"]),
        ("llama", "CPU computes too", ["few"]),
    ],
)
def test_numbers_are_those_of_one_device(name: str, layout: str, few: list[str]) -> None:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no backends written in Python")
    done = subprocess.run(
        [sys.executable, str(PROGRAM), name, layout, *few], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(found) > (10 if few else 40)
    limits = {what: 1e-5 if what in IN_FLOAT32 else LIMITS[name] for what in found}
    assert {what: gap for what, gap in found.items() if isinstance(gap, str) or gap > limits[what]} == {}
