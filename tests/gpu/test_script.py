"""benchmarks/gpu.py, every line of it, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.slow


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    done = run()
    assert done.returncode == 1
    assert done.stderr.strip().splitlines() == [
        "There is no CUDA device here; --device cpu --small runs every line on the CPU."
    ]


def test_its_dry_form(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed; pip install 'hesscope[triton]'")
    sides = ["gradient", "hessian-eigenthings", "streamed", "ggn"]
    small = ["--device", "cpu", "--small", "--tests", "vectors or output_hessian", "--models", "7B", "--sides", *sides]
    done = run(*small, "--name", str(tmp_path / "gpu"))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert found["tests"]["status"] == 0
    assert found["tests"]["summary"].startswith("10 passed")
    assert len(found["kernels"]) == 10
    assert all(row["gap"] < 1e-2 for row in found["kernels"])
    rows = found["products"]
    assert len(rows) == 4 + 4 + 2
    for row in rows:
        if row["side"] == "hessian-eigenthings" and "remark" in row:
            continue
        assert row["further"][0] > 0
        if row["side"] not in ("gradient", "hessian-eigenthings"):
            limit = 0.1 if "bfloat16" in (row["dtype"], row["precision"]) else 1e-4
            assert row["product_error"]["relative"] < limit
    assert found["versions"]["torch"] == torch.__version__
