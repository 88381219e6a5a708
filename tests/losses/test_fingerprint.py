"""What tells losses apart: code, constants, closures, globals and attributes, in every process alike."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
from hesscope.losses import fingerprint, loss_fingerprint
from other_process import said_by_another_process

F64 = torch.float64
POWER, WEIGHTS, LOG = 4, torch.tensor([1.0, 2.0]), logging.getLogger("hesscope.tests")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batches() -> list[Tensor]:
    return [torch.randn(n, 3, generator=torch.Generator().manual_seed(n), dtype=F64) for n in (2, 5)]


def problem(loss: Any) -> hs.Problem:
    return hs.Problem(network(), loss, batches(), count=None if hasattr(loss, "total") else len)


def of(loss: Any) -> str:
    return problem(loss).fingerprint


# ---- pairs of losses, and how they differ


def fourth(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).pow(4).mean()


def sixth(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).pow(6).mean()


def by_closure(scale: Any) -> Callable[..., Tensor]:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (torch.as_tensor(scale) * model(batch).pow(2)).mean()

    return loss


def by_default(power: int) -> Callable[..., Tensor]:
    def loss(model: nn.Module, batch: Tensor, power: int = power) -> Tensor:
        return model(batch).pow(power).mean()

    return loss


def raised(power: int, model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).pow(power).mean()


def with_criterion(criterion: nn.Module) -> Callable[..., Tensor]:
    return lambda model, batch: criterion(model(batch), torch.zeros(len(batch), dtype=torch.int64))


def by_helper(helper: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda model, batch: helper(model(batch)).mean()


class Powers:
    """The sum of powers, by an attribute."""

    def __init__(self, power: Any) -> None:
        self.power = power

    def total(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        return self.of(model(batch)).sum(), len(batch)

    def of(self, x: Tensor) -> Tensor:
        return (x * 1.0) ** self.power


class Doubled(Powers):
    """The same name of the class, and another method."""

    __qualname__ = "Powers"

    def of(self, x: Tensor) -> Tensor:
        return 2 * (x * 1.0) ** self.power


@dataclasses.dataclass
class Weighted:
    """A dataclass."""

    weight: Tensor
    names: dict[str, float] = dataclasses.field(default_factory=dict)

    def total(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        return (model(batch).square() * self.weight).sum(), len(batch)


class Slotted:
    """Attributes without a dictionary."""

    __slots__ = ("scale",)

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def total(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, int]:
        return self.scale * model(batch).square().sum(), len(batch)


PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "code": (lambda: fourth, lambda: sixth),
    "constant": (lambda: lambda m, b: m(b).pow(2).mean(), lambda: lambda m, b: m(b).pow(4).mean()),
    "closure": (lambda: by_closure(1.0), lambda: by_closure(10.0)),
    "tensor": (lambda: by_closure(torch.ones(2)), lambda: by_closure(torch.tensor([1.0, 2.0]))),
    "array": (lambda: by_closure(np.ones(2)), lambda: by_closure(np.array([1.0, 2.0]))),
    "default": (lambda: by_default(2), lambda: by_default(4)),
    "partial": (lambda: functools.partial(raised, 2), lambda: functools.partial(raised, 4)),
    "helper": (lambda: by_helper(torch.square), lambda: by_helper(torch.abs)),
    "inner helper": (lambda: by_helper(lambda x: x**2), lambda: by_helper(lambda x: x**4)),
    "cached helper": (lambda: by_helper(functools.cache(lambda x: x)), lambda: by_helper(functools.cache(lambda x: -x))),
    "wrapped": (lambda: torch.enable_grad()(fourth), lambda: torch.enable_grad()(sixth)),
    "criterion": (lambda: with_criterion(nn.CrossEntropyLoss()), lambda: with_criterion(nn.CrossEntropyLoss(label_smoothing=0.1))),
    "criterion's weights": (
        lambda: with_criterion(nn.CrossEntropyLoss(torch.ones(2, dtype=F64))),
        lambda: with_criterion(nn.CrossEntropyLoss(WEIGHTS.double())),
    ),
    "attribute": (lambda: Powers(2), lambda: Powers(4)),
    "kind of attribute": (lambda: Powers(2), lambda: Powers(2.0)),
    "method": (lambda: Powers(2), lambda: Doubled(2)),
    "dataclass": (lambda: Weighted(torch.ones(2)), lambda: Weighted(WEIGHTS)),
    "dictionary": (lambda: Weighted(WEIGHTS, {"a": 1.0}), lambda: Weighted(WEIGHTS, {"a": 2.0})),
    "slot": (lambda: Slotted(1.0), lambda: Slotted(2.0)),
    "bound method": (lambda: Bound(1.0).mean, lambda: Bound(2.0).mean),
}  # fmt: skip


class Bound:
    """A mean as a method."""

    def __init__(self, scale: float) -> None:
        self.scale, self.log = scale, LOG

    def mean(self, model: nn.Module, batch: Tensor) -> Tensor:
        self.log.debug("called")
        return self.scale * model(batch).square().mean()


@pytest.mark.parametrize("what", PAIRS)
def test_losses_that_differ_are_told_apart(what: str) -> None:
    one, other = PAIRS[what]
    assert of(one()) == of(one())
    assert of(one()) != of(other())


def test_globals_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).pow(POWER).mean()

    before = of(loss)
    monkeypatch.setitem(globals(), "POWER", 6)
    assert of(loss) != before


PACKAGE = {
    "__init__.py": "",
    "core.py": "from own_package import parts\n\ndef of(x):\n    return parts.of(x)\n",
    "parts.py": "def of(x):\n    return x.square()\n",
}
LOSSES = {
    "a module's module": "import own_package.core\n\ndef loss(model, batch):\n    return own_package.core.of(model(batch)).mean()\n",
    "an import inside": "def loss(model, batch):\n    from own_package.core import of\n    return of(model(batch)).mean()\n",
    "a module imported inside": "def loss(model, batch):\n    import own_package.core as c\n    return c.of(model(batch)).mean()\n",
}  # fmt: skip


@pytest.mark.parametrize("how", LOSSES)
def test_code_of_the_callers_own_modules_counts(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However deep, and wherever it is imported: before it has run as well as after."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "own_package").mkdir()

    def found(parts: str, run: bool = False) -> str:
        for name, code in (PACKAGE | {"parts.py": parts}).items():
            (tmp_path / "own_package" / name).write_text(code)
        for name in [name for name in sys.modules if name.partition(".")[0] == "own_package"]:
            monkeypatch.delitem(sys.modules, name)
        importlib.invalidate_caches()
        space: dict[str, Any] = {"__name__": "own_script"}
        exec(LOSSES[how], space)
        made = problem(space["loss"])
        if run:
            made.risk()
            assert of(space["loss"]) == made.fingerprint
        return made.fingerprint

    before = found(PACKAGE["parts.py"])
    assert found(PACKAGE["parts.py"], run=True) == before
    assert found("def of(x):\n    return x.square() * 2.0\n") != before


def test_a_problem_keeps_what_its_loss_was_when_it_was_made() -> None:
    calls: list[int] = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append(1)
        return model(batch).square().mean()

    made = problem(loss)
    before = made.fingerprint
    made.risk()
    assert calls
    assert (made.fingerprint, made.related().fingerprint, made.subset([0, 1]).fingerprint) == (before,) * 3


def test_the_model_counts_by_its_place() -> None:
    model = network()

    def through(part: nn.Module) -> Callable[..., Tensor]:
        return lambda m, batch: m(batch).square().mean() + part.weight.sum()  # type: ignore[operator]

    first, last = (loss_fingerprint(through(part), model) for part in (model[0], model[2]))
    assert first != last
    with torch.no_grad():
        model[0].weight.add_(1.0)
    assert loss_fingerprint(through(model[0]), model) == first


def test_losses_that_hold_themselves_or_what_shows_no_state() -> None:
    loss = Powers(2)
    loss.itself, loss.generator, loss.many = loss, (i for i in range(3)), {"b", "a"}  # type: ignore[attr-defined]
    assert len(loss_fingerprint(loss, network()).split()[1]) == 16


def test_a_loss_that_says_which_it_is_is_taken_at_its_word() -> None:
    one, other = Powers(2), Powers(4)
    one.fingerprint = other.fingerprint = "powers"  # type: ignore[attr-defined]
    assert of(one) == of(other)
    other.fingerprint = "other powers"  # type: ignore[attr-defined]
    assert of(one) != of(other)


def test_the_librarys_own_losses_go_by_name() -> None:
    made = hs.supervised(network(), [(torch.ones(2, 3, dtype=F64), torch.tensor([0, 1]))])
    assert made.loss_fingerprint == made.describe()["loss"] == "CrossEntropyLoss"


PROGRAM = """
import torch, test_fingerprint as t
print(*(t.loss_fingerprint(made(), t.network()) for pair in t.PAIRS.values() for made in pair), sep="\\n")
"""


def test_every_process_finds_the_same() -> None:
    here = [loss_fingerprint(made(), network()) for pair in PAIRS.values() for made in pair]
    assert said_by_another_process(PROGRAM, Path(__file__).parent) == here


def test_what_a_compiler_wraps_around_a_loss_is_not_read() -> None:
    def wrapped(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(loss, backend="eager")

    assert of(wrapped(fourth)) == of(wrapped(fourth)) != of(wrapped(sixth))
    criteria = [torch.compile(nn.CrossEntropyLoss(label_smoothing=x), backend="eager") for x in (0.0, 0.0, 0.1)]
    one, again, other = (of(with_criterion(criterion)) for criterion in criteria)
    assert one == again != other


# ---- what it is for


def test_a_run_of_another_loss_is_neither_continued_nor_taken(tmp_path: Path) -> None:
    from hesscope.algorithms.checkpoint import Checkpoint

    def H(scale: float) -> hs.Operator:
        return hs.hessian(problem(by_closure(scale)))

    kept = Checkpoint(tmp_path / "kept", every=0.0, keep_finished=True)
    hs.trace(H(1.0), "hutchinson", budget=4, checkpoint=kept)
    with pytest.raises(hs.HesscopeError, match="of another run: loss MeanLoss"):
        hs.trace(H(10.0), "hutchinson", budget=4, checkpoint=kept)
    hs.track_eigs({"a": H(1.0)}, k=1, folder=tmp_path / "track")
    with pytest.raises(hs.HesscopeError, match="holds another run: loss MeanLoss"):
        hs.track_eigs({"a": H(10.0)}, k=1, folder=tmp_path / "track")
    with pytest.raises(hs.HesscopeError, match="fingerprint"):
        hs.approximations(H(10.0), exact=hs.block(H(1.0)))


def test_the_code_of_installed_packages_is_not_read() -> None:
    def loss(net: nn.Module, batch: Any) -> Tensor:
        assert batch is not None  # which pytest rewrites, to calls of its own
        return net(batch) * float(pytest.approx(1.0).expected)

    reader = fingerprint.Reader(nn.Linear(1, 1))
    reader.digest(loss)
    read = [Path(value.co_filename) for value, _ in reader._done.values() if isinstance(value, CodeType)]
    assert {path.name for path in read} == {"test_fingerprint.py"}
