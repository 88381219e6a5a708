"""What another process finds, for what all processes have to find alike."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def said_by_another_process(program: str, folder: Path) -> list[str]:
    """The lines that a program prints in a Python of its own, with other hashes of strings; `folder` is importable there."""
    paths = ":".join([str(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": paths, "PYTHONHASHSEED": "1"}, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    return done.stdout.split("\n")[:-1]
