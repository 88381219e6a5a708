"""What tells models with the same weights apart, and what does not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import hesscope as hs
from hesscope.algorithms.checkpoint import Checkpoint
from other_process import said_by_another_process

FACTOR = 1.0


class Scaled(nn.Module):
    """A layer, a function and a number."""

    def __init__(self, act: Any = torch.tanh, scale: Any = 1.0) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.act, self.scale = act, scale
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.act(self.layer(x))
        return FACTOR * self.scale * self.kept  # type: ignore[no-any-return]


class Halved(Scaled):
    """The same name, and another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


Halved.__name__ = Halved.__qualname__ = "Scaled"


def sequence(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), *between, nn.Linear(4, 2))


def gpt2(**own: Any) -> GPT2LMHeadModel:
    config = {
        "vocab_size": 7,
        "n_positions": 8,
        "n_embd": 4,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return GPT2LMHeadModel(
        GPT2Config(
            **config | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 1.0} | own
        )
    )


#: Two models that have the same weights, under the same names.
PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "activation": (lambda: sequence(nn.Tanh()), lambda: sequence(nn.Sigmoid())),
    "setting": (lambda: sequence(nn.GELU()), lambda: sequence(nn.GELU(approximate="tanh"))),
    "eps": (lambda: nn.LayerNorm(3), lambda: nn.LayerNorm(3, eps=0.1)),
    "built-in": (lambda: Scaled(torch.tanh), lambda: Scaled(torch.sigmoid)),
    "function": (lambda: Scaled(F.softplus), lambda: Scaled(F.mish)),
    "own function": (lambda: Scaled(lambda x: x**2), lambda: Scaled(lambda x: x**3)),
    "partial": (lambda: Scaled(functools.partial(F.elu, alpha=1.0)), lambda: Scaled(functools.partial(F.elu, alpha=2.0))),
    "number": (lambda: Scaled(scale=1.0), lambda: Scaled(scale=2.0)),
    "code": (lambda: Scaled(), lambda: Halved()),
    "configuration": (lambda: gpt2(activation_function="gelu"), lambda: gpt2(activation_function="silu")),
    "attention": (lambda: gpt2(), lambda: gpt2(scale_attn_by_inverse_layer_idx=True)),
}  # fmt: skip


def problem(make: Callable[[], nn.Module]) -> hs.Problem:
    torch.manual_seed(0)
    model = make()
    if isinstance(model, GPT2LMHeadModel):
        return hs.causal_lm(model, torch.arange(6)[None])
    return hs.supervised(model, [(torch.arange(6.0).view(2, 3).sin(), torch.tensor([0, 1]))])


@pytest.mark.parametrize("what", PAIRS)
def test_models_of_the_same_weights_are_told_apart(what: str) -> None:
    one, again, other = (problem(PAIRS[what][i]) for i in (0, 0, 1))
    assert one.describe()["weights_fingerprint"] == other.describe()["weights_fingerprint"]
    assert one.risk() != other.risk()
    assert one.fingerprint == again.fingerprint != other.fingerprint


def test_globals_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = problem(Scaled).fingerprint
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    assert problem(Scaled).fingerprint != before


def test_what_a_model_keeps_of_its_runs_does_not_count() -> None:
    made = problem(Scaled)
    hs.trace(hs.hessian(made))
    assert made.model.kept is not None
    again = hs.supervised(made.model, made.batches)
    assert made.fingerprint == made.related().fingerprint == again.fingerprint == problem(Scaled).fingerprint


def test_where_a_model_comes_from_and_how_it_is_run_do_not_count(tmp_path: Path) -> None:
    before = problem(gpt2)
    before.model.save_pretrained(tmp_path / "saved")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "saved", attn_implementation="eager", dtype=torch.float32)
    loaded.config.use_cache = False
    for module in loaded.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    after = problem(lambda: loaded)
    assert after.fingerprint == before.fingerprint
    assert problem(lambda: loaded.train()).fingerprint == before.fingerprint


def test_a_model_that_says_which_it_is_is_taken_at_its_word() -> None:
    def named(scale: float, name: str) -> nn.Module:
        model = Scaled(scale=scale)
        model.fingerprint = name  # type: ignore[assignment]
        return model

    one, same, other = (problem(lambda x=x: named(*x)).fingerprint for x in ((1.0, "a"), (2.0, "a"), (2.0, "b")))  # type: ignore[misc]
    assert one == same != other


PROGRAM = """
import test_architecture as t
print(*(t.problem(make).architecture for pair in t.PAIRS.values() for make in pair), sep="\\n")
"""


def test_every_process_finds_the_same() -> None:
    assert said_by_another_process(PROGRAM, Path(__file__).parent) == [
        problem(make).architecture for pair in PAIRS.values() for make in pair
    ]


def test_a_run_of_another_model_is_not_continued(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path / "kept", every=0.0, keep_finished=True)
    one, other = (hs.hessian(problem(make)) for make in PAIRS["activation"])
    hs.trace(one, "hutchinson", budget=4, checkpoint=kept)
    with pytest.raises(hs.HesscopeError, match="of another run: architecture "):
        hs.trace(other, "hutchinson", budget=4, checkpoint=kept)
