"""The repository's promises about itself."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEMO = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e . && .venv/bin/hesscope demo"
TEST = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e '.[test]' && .venv/bin/pytest -q"


def commands_of_readme() -> list[str]:
    """Lines of the README's first two shell blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    return [block.strip() for block in blocks[:2]]


def test_readme_opens_with_the_two_commands() -> None:
    assert commands_of_readme() == [DEMO, TEST]


def test_continuous_integration_runs_the_readmes_test_command_as_printed() -> None:
    assert commands_of_readme()[1] in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_make_wraps_the_same_commands() -> None:
    lines = [line.strip() for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()]
    assert set(commands_of_readme()) <= set(lines)


def test_constraints_pin_torch_inside_the_supported_range() -> None:
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def test_no_tracked_text_holds_an_absolute_home_or_work_path() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = [p for p in map(ROOT.joinpath, listed) if p.suffix in {".py", ".md", ".toml", ".json", ".txt", ".sh"}]
    here = str(ROOT.parent) + "/"
    assert [str(p) for p in texts if p.exists() and here in p.read_text(encoding="utf-8")] == []
