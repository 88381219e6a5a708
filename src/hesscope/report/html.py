"""Several results on one self-contained page: nothing is fetched, nothing runs."""

from __future__ import annotations

import base64
import html
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hesscope.errors import HesscopeError
from hesscope.figures.numbers import number
from hesscope.figures.subject import model_name, problem_of, selection_line
from hesscope.report.css import CSS
from hesscope.report.section import Section
from hesscope.report.table import COLUMNS, KeyNumber, caption, key_rows
from hesscope.results import Diagonal, Result
from hesscope.results.base import jsonable
from hesscope.results.layer_rows import HEADINGS

_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}
# A browser that knows this line refuses every request the page could make.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(folder: Path, sections: Sequence[Section]) -> Path:
    """Write `report.html` to a folder, all or nothing: figures and style are inside, and it needs no JavaScript.

    Args:
        folder: where to; made if it does not exist.
        sections: what to show, in order, each with the file of its picture.

    Returns:
        The path of `report.html`.

    Raises:
        HesscopeError: no sections, or a picture that is missing or neither .png nor .svg.
    """
    if not sections:
        raise HesscopeError("Expected at least one section to report, got none.")
    page = _page(sections)
    folder.mkdir(parents=True, exist_ok=True)
    stage = folder / f".report-{secrets.token_hex(4)}.html"
    try:
        stage.write_text(page, encoding="utf-8")
        os.replace(stage, folder / "report.html")
    finally:
        stage.unlink(missing_ok=True)
    return folder / "report.html"


def _page(sections: Sequence[Section]) -> str:
    results = [section.result for section in sections]
    title = _title(results)
    body = "\n".join(
        [f"<h1>{_text(title)}</h1>", _lead(results), *_facts(results), _numbers(results)]
        + [_section(section) for section in sections]
        + [_provenance(sections)]
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_text(_POLICY)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(title)}</title>
<style>{CSS}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _title(results: Sequence[Result]) -> str:
    names = list(dict.fromkeys(model_name(problem) for problem in _problems(results)))
    return f"The curvature of {', '.join(names)}" if any(names) else "Curvature"


def _lead(results: Sequence[Result]) -> str:
    products = sum(result.products for result in results)
    seconds = sum(result.seconds for result in results)
    count = f"{len(results)} result{'s' if len(results) != 1 else ''}"
    return f'<p class="lead">{count} from {products:,} products with the operator, {seconds:.1f} seconds in all.</p>'


def _problems(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The distinct problems that the results are about, in order."""
    found = {json.dumps(jsonable(problem_of(result)), sort_keys=True): problem_of(result) for result in results}
    return [problem for problem in found.values() if problem]


def _facts(results: Sequence[Result]) -> list[str]:
    """What was measured: one box a problem."""
    return [_box(problem, [r for r in results if problem_of(r) == problem]) for problem in _problems(results)]


def _box(problem: dict[str, Any], results: Sequence[Result]) -> str:
    selections = dict.fromkeys(line for line in map(selection_line, results) if line)
    terms = problem.get("terms")
    risk = problem.get("risk", next((r.provenance["risk"] for r in results if "risk" in r.provenance), None))
    facts = {
        "model": model_name(problem),
        "architecture": problem.get("model") if problem.get("model") != model_name(problem) else "",
        "weights": "; ".join(selections),
        "data": problem.get("data"),
        "loss terms N": f"{terms:,}" if isinstance(terms, int) else terms,
        "sequence length": problem.get("length"),
        "objective": problem.get("objective"),
        "risk R": number(risk, 5) if isinstance(risk, float) else risk,
        "numbers": problem.get("dtype"),
        "attention": problem.get("attention"),
        "fingerprint": str(problem.get("fingerprint", ""))[:12],
    }
    return f"<dl>{''.join(_fact(k, v) for k, v in facts.items() if v not in (None, ''))}</dl>"


def _fact(name: str, value: Any) -> str:
    wide = ' class="wide"' if len(str(value)) > 28 else ""
    return f"<div{wide}><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>"


def _numbers(results: Sequence[Result]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in COLUMNS)
    groups = "\n".join(f"<tbody>{''.join(map(_row, group))}</tbody>" for group in key_rows(results))
    note = f'<p class="note">{_text(caption(results))}</p>' if caption(results) else ""
    table = f"<table><thead><tr>{head}</tr></thead>\n{groups}\n</table>"
    return f'<section><h2>Key numbers</h2>\n<div class="scroll">{table}</div>{note}</section>'


def _row(row: KeyNumber) -> str:
    where = f'<span class="where">{_text(row.where)}</span>' if row.where else ""
    cells = "".join(f"<td>{_text(cell)}</td>" for cell in (row.value, row.error, row.cost))
    return f"<tr><td>{_text(row.quantity)}{where}</td>{cells}</tr>"


def _section(section: Section) -> str:
    summary = section.result.summary()
    if isinstance(section.result, Diagonal):
        summary = summary.splitlines()[0]  # its layers have a table
    picture = f'<img src="{_embedded(section.figure)}" alt="{_text(f"{section.title}: {summary}")}">'
    return (
        f'<section class="result"><h2>{_text(section.title)}</h2>\n<p>{_text(section.explanation)}</p>\n'
        f'<figure><div class="plate">{picture}</div>\n<figcaption>{_text(summary)}</figcaption></figure>'
        f"{_layers(section.result)}</section>"
    )


def _layers(result: Result) -> str:
    """A diagonal's layers as a table; nothing for one layer, and for other results."""
    if not isinstance(result, Diagonal) or len(result.values) < 2:
        return ""
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in HEADINGS)
    rows = "\n".join(
        f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row.cells())}</tr>" for row in result.layers()
    )
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table>"
    return f'\n<h3>By layers</h3>\n<div class="scroll">{table}</div>'


def _embedded(path: Path) -> str:
    """A picture as a data URI; an SVG too, so that its names and scripts stay its own."""
    kind = _TYPES.get(path.suffix.lower())
    if kind is None:
        raise HesscopeError(f"Expected a report's figure to end in {' or '.join(_TYPES)}, got {path.name!r}.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise HesscopeError(f"Expected a figure at {str(path)!r}; draw it before the report is written.") from error
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _provenance(sections: Sequence[Section]) -> str:
    parts = "\n".join(
        f"<h3>{_text(s.title)}</h3>\n<pre>{_text(json.dumps(jsonable(s.result.provenance), indent=2, ensure_ascii=False))}</pre>"
        for s in sections
    )
    return f"<details><summary>Provenance: options, versions and fingerprints</summary>\n{parts}\n</details>"
