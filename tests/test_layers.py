"""Imports point down: a module imports from its own layer or from one below."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "src" / "hesscope"

#: From the bottom up; names on one line may import each other.
LAYERS = [
    {"errors", "arithmetic", "communicator", "digest", "exchange", "memory", "resting", "tensor_file"},
    {"space"},
    {"models", "losses", "assets"},
    {"data"},
    {"problem"},
    {"dryrun"},
    {"engines"},
    {"operators"},
    {"results", "figures"},
    {"algorithms"},
    {"verification", "report", "studies", "integrations", "parallel", "planning"},
    {"cli"},
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}


def imported(path: Path) -> set[str]:
    """Parts of the package that a file imports while it runs: what only a type checker reads does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    found |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    return {name.split(".")[1] for name in found if name.startswith("hesscope.")}


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.parent != PACKAGE or p.stem in HEIGHT]


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])
def test_imports_point_down(path: Path) -> None:
    own = HEIGHT[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]
    assert {name for name in imported(path) if HEIGHT[name] > own} == set()


def test_the_guard_sees_an_import() -> None:
    assert imported(PACKAGE / "operators" / "hessian.py") >= {"engines", "problem", "space"}
