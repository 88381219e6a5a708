"""English prose that every CPython carries: the help topics of `pydoc`, split for training and for measuring."""

from collections.abc import Iterable
from importlib import import_module
from typing import Literal

from hesscope.errors import HesscopeError

Split = Literal["train", "held_out"]

HELD_OUT_EVERY = 10


def prose(split: Split | None = None) -> str:
    """Return the help topics joined by blank lines: all of them, or one of the two splits.

    Every tenth topic in sorted-key order, from the first on, is held out; the train split has the other topics without
    the paragraphs that the held-out ones share with them. Raises `HesscopeError` if this Python carries no help topics
    or if `split` names none.
    """
    topics = _topics()
    if split is None:
        return _joined(topics)
    if split == "train":
        return _train(topics)
    if split == "held_out":
        return _held_out(topics)
    raise HesscopeError(f"No split of the prose is called {split!r}: choose 'train' or 'held_out'.")


def _topics() -> list[str]:
    try:
        # Some distributions package pydoc_data apart from Python itself.
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise HesscopeError("This Python has no help topics: its standard module pydoc_data is missing.") from error
    return [topics[key].strip() for key in sorted(topics)]


def _held_out(topics: list[str]) -> str:
    return _joined(topics[::HELD_OUT_EVERY])


def _train(topics: list[str]) -> str:
    # Many topics repeat passages of others word for word, and a repeated passage would make the held-out loss flatter.
    measured = {_normal(paragraph) for paragraph in _paragraphs(_held_out(topics))}
    others = (topic for index, topic in enumerate(topics) if index % HELD_OUT_EVERY)
    return _joined(paragraph for paragraph in _paragraphs(_joined(others)) if _normal(paragraph) not in measured)


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(parts)


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]


def _normal(paragraph: str) -> str:
    return " ".join(paragraph.split())
