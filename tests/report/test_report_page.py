"""The page: self-contained, escaped, complete, and written whole or not at all."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from made_by_hand import block, density, diagonal, eigenpairs, lanczos, provenance, trace, verification

from hesscope.errors import HesscopeError
from hesscope.report import Section, section, write_report
from hesscope.results import Result

# Pictures are only copied, so that any bytes will do.
PICTURES = {".png": b"\x89PNG http://example.org", ".svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>'}
HOSTILE = "</pre><script>alert('x')</script>\"&"
VOID = {"meta", "img"}


class Page(HTMLParser):
    """Tags in order, with a complaint for every one that is not closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)


def every_kind() -> list[Result]:
    return [
        block(torch.eye(3)),
        density(torch.tensor([[0.0, 1.0], [0.0, 1.1]]), torch.tensor([[0.5, 0.5], [0.4, 0.6]])),
        diagonal({"w": torch.tensor([1.0, -2.0])}, "hutchinson", 0.1),
        eigenpairs([3.0, -1.0], [1e-6, 1e-6]),
        lanczos([-1.0, 2.0], [0.5, 0.5]),
        trace([1.0, 2.0, 4.0]),
        verification([1e-7], [1e-4]),
    ]


@pytest.fixture
def sections(tmp_path: Path) -> list[Section]:
    found = []
    for number, result in enumerate(every_kind()):
        figure = tmp_path / f"{number}{'.svg' if number % 2 else '.png'}"
        figure.write_bytes(PICTURES[figure.suffix] + str(number).encode())
        found.append(section(result, figure))
    return found


def written(folder: Path, sections: list[Section]) -> str:
    return write_report(folder, sections).read_text(encoding="utf-8")


def test_nothing_is_fetched_and_nothing_runs(tmp_path: Path, sections: list[Section]) -> None:
    text = written(tmp_path / "out", sections)
    page = Page(text)
    assert page.open == []
    assert "http" not in re.sub(r'http-equiv="Content', "", text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base", "a"}
    assert not re.search(r"url\(|@import", text)
    assert [a["src"].partition(":")[0] for tag, a in page.tags if tag == "img" and a["src"]] == ["data"] * len(sections)


def test_every_figure_is_inside(tmp_path: Path, sections: list[Section]) -> None:
    text = written(tmp_path / "out", sections)
    for part in sections:
        kind = {".png": "image/png", ".svg": "image/svg+xml"}[part.figure.suffix]
        inside = f'src="data:{kind};base64,{base64.b64encode(part.figure.read_bytes()).decode()}"'
        assert text.count(inside) == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_the_top_says_what_was_measured(tmp_path: Path, sections: list[Section]) -> None:
    words = Page(written(tmp_path, sections)).words
    for fact in ("tiny", "stories.txt", "1,234", "0123456789ab", "nats per squared weight", "Most negative eigenvalue"):
        assert fact in words
    assert "risk R" not in words


def test_the_risk_is_shown_where_it_is_known(tmp_path: Path, sections: list[Section]) -> None:
    known = section(trace([1.0, 2.0], provenance=provenance(risk=1.356305)), sections[0].figure)
    assert re.search(r"risk R\s*1\.3563", Page(written(tmp_path, [known])).words)


def test_two_problems_have_a_box_each(tmp_path: Path, sections: list[Section]) -> None:
    other = section(trace([1.0, 2.0], provenance=provenance(fingerprint="f" * 64)), sections[0].figure)
    assert Page(written(tmp_path, sections)).count("dl") == 1
    assert Page(written(tmp_path, [*sections, other])).count("dl") == 2


def test_an_operator_without_a_problem_can_be_reported(tmp_path: Path, sections: list[Section]) -> None:
    bare = section(block(torch.eye(2), provenance={"operator": {"operator": "matrix"}}), sections[0].figure)
    page = Page(written(tmp_path, [bare]))
    assert page.count("dl") == 0
    assert page.count("img") == 1


def test_text_of_others_is_escaped_everywhere(tmp_path: Path, sections: list[Section]) -> None:
    names = {HOSTILE: [2, 2]}
    changed = provenance(selection=names, model_name=HOSTILE, data=HOSTILE, dtype=HOSTILE, fingerprint=HOSTILE)
    result = block(torch.eye(2), provenance=changed | {"options": {HOSTILE: HOSTILE}})
    plain = trace([1.0, 2.0])
    figure = sections[0].figure
    text = written(tmp_path, [Section(HOSTILE, HOSTILE, result, figure), section(plain, figure)])
    assert "<script" not in text
    page = Page(text)
    assert page.open == []
    assert page.words.count(HOSTILE) >= 6
    assert page.count("img") == 2


def test_provenance_is_folded_away_but_there(tmp_path: Path, sections: list[Section]) -> None:
    page = Page(written(tmp_path, sections))
    assert page.count("details") == 1
    assert page.words.count('"versions"') == len(sections)


@pytest.mark.parametrize("name", ["missing.png", "picture.pdf"])
def test_a_picture_that_cannot_be_embedded_is_an_error_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(HesscopeError, match=name):
        write_report(tmp_path / "out", [section(trace([1.0, 2.0]), tmp_path / name)])
    assert not (tmp_path / "out").exists()


def test_a_report_needs_a_section(tmp_path: Path) -> None:
    with pytest.raises(HesscopeError, match="at least one section"):
        write_report(tmp_path, [])


def test_a_report_replaces_the_last_one(tmp_path: Path, sections: list[Section]) -> None:
    first = written(tmp_path / "out", sections[:1])
    assert written(tmp_path / "out", sections[1:]) != first
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_every_kind_has_an_explanation_with_its_units(sections: list[Section]) -> None:
    said: dict[str, Any] = {part.result.kind: part.explanation for part in sections}
    assert len(set(said.values())) == len(said) == 7
    for kind, text in said.items():
        assert ("no unit" if kind == "verify" else "nats per squared weight") in text


def test_a_diagonals_layers_have_a_table(tmp_path: Path) -> None:
    picture = tmp_path / "d.png"
    picture.write_bytes(PICTURES[".png"])
    several = diagonal({f"m.{i}.w": torch.ones(2, 3) for i in range(15)}, "hutchinson", error=0.1)
    page = write_report(tmp_path, [section(several, picture)]).read_text(encoding="utf-8")
    assert Page(page).open == []
    assert page.count("<td>m.14.w</td>") == 1
    assert "share of trace" in page
    one = write_report(tmp_path, [section(diagonal({"w": torch.ones(2, 3)}), picture)]).read_text(encoding="utf-8")
    assert "share of trace" not in one
