"""Results made by hand are shared with the tests of reports; drawn figures can be looked at before they are gone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every figure of the test, laid out and drawn, but not turned into pixels, which takes most of the time."""
    figures: list[Any] = []

    def remember(self: Any, path: Path, **_: Any) -> None:
        self.draw_without_rendering()
        path.touch()
        figures.append(self)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures
