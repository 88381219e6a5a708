"""Every `hesscope` command that the documentation prints exists; those on the embedded model run."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from markdown_blocks import PAGES, ROOT, blocks, commands, page_name

from hesscope.cli.app import app
from hesscope.cli.main import run

VERBS = typer.main.get_command(app).commands

pages = pytest.mark.parametrize("page", PAGES, ids=page_name)


@pytest.fixture
def _own_warnings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The command line sets the process's warnings; here they end with the test."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        yield


@pages
def test_the_commands_of_a_page_parse(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_option_files(page)
    for arguments in commands(page):
        verb, *rest = arguments
        assert verb in VERBS, f"{page.name}: hesscope {verb}"
        if rest != ["--help"]:
            VERBS[verb].make_context(verb, list(rest))


@pages
@pytest.mark.usefixtures("_own_warnings")
def test_the_commands_on_the_embedded_model_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_option_files(page)
    for arguments in commands(page):
        if runs_here(arguments):
            assert run(arguments) == 0, f"{page.name}: hesscope {' '.join(arguments)}\n{capsys.readouterr().err}"


def test_the_page_on_the_command_line_names_every_verb_and_option() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    options = {flag for verb in VERBS.values() for p in verb.params for flag in p.opts if flag.startswith("-")}
    missing = [flag for flag in sorted(options) if not re.search(rf"`{flag}[` ]", page)]
    assert [verb for verb in VERBS if f"`{verb}" not in page] + missing == []


def runs_here(arguments: list[str]) -> bool:
    """On the embedded model, by flags or by a file of options; or shows what an earlier command wrote."""
    on_demo = ("--model", "demo") in pairwise(arguments)
    return on_demo or "--config" in arguments or (arguments[0] == "show" and Path(arguments[1]).is_dir())


def write_option_files(page: Path) -> None:
    """A YAML block whose first line is a comment with a file's name is that file."""
    for block in blocks(page, "yaml"):
        name = block.first_line.removeprefix("#").strip()
        if name.endswith((".yaml", ".yml")):
            Path(name).write_text(block.text, encoding="utf-8")
