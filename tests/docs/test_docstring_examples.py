"""The examples in the docstrings of the public names give what they print."""

from __future__ import annotations

import doctest

import pytest

import hesscope as hs

EXAMPLES = {
    test.name: test
    for name in hs.__all__
    for test in doctest.DocTestFinder().find(getattr(hs, name), f"hesscope.{name}", module=False, globs={})
    if test.examples
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_docstring_example(name: str) -> None:
    report: list[str] = []
    result = doctest.DocTestRunner().run(EXAMPLES[name], out=report.append)
    assert result.failed == 0, "".join(report)


def test_the_main_calls_have_examples() -> None:
    wanted = {"block", "diagonal", "eigs", "trace", "hessian", "operator", "supervised"}
    assert {f"hesscope.{name}" for name in wanted} <= set(EXAMPLES)
