"""The Triton kernels against PyTorch's form in float64, by Triton's interpreter, and the choice between the two."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import masking_utils as masks

import hesscope as hs
from hesscope.models.attention import forms
from hesscope.models.attention.forms import PYTORCH, form_for, triton_form
from hesscope.models.attention.scores import Inputs, Shape, Tangents
from hesscope.models.attention.visibility import causal, of_transformers
from operations import numbers
from oracles import relative

INTERPRET = "TRITON_INTERPRET"
B, T = 2, 19
KEPT = torch.ones(B, T, dtype=torch.bool)
KEPT[0, :3], KEPT[1, 14:] = False, False


def require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; pip install 'hesscope[triton]'")


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    require_triton()
    if os.environ.get(INTERPRET) != "1":
        pytest.skip("the interpreter has to be on from the start: see test_the_kernels_by_their_interpreter")
    from hesscope.models.attention import triton_form as kernels

    monkeypatch.setattr(kernels, "_SIDES", (16, 16))


VISIBLE = {
    "causal": lambda: causal(T, T, "cpu"),
    "padded": lambda: of_transformers(B, T, T, attention_mask=KEPT),
    "window": lambda: of_transformers(
        B, T, T, attention_mask=KEPT, mask_function=masks.sliding_window_causal_mask_function(6)
    ),
    "chunks": lambda: of_transformers(
        B, T, T, mask_function=masks.chunked_causal_mask_function(7, torch.tensor([5, 0]))
    ),
}


#: Sequences, key heads and query heads on each.
HEADS = {"causal": (1, 2, 1), "padded": (2, 1, 2), "window": (2, 1, 2), "chunks": (2, 2, 1)}


def case(dtype: torch.dtype, name: str, seed: int) -> list[Tensor | None]:
    """q, k, v, sinks (for windows) and something like the output."""
    B, H, G = HEADS[name]
    shapes = [(B, H, G, T, 5), (B, H, T, 5), (B, H, T, 9), (H, G), (B, H, G, T, 9)]
    parts: list[Tensor | None] = [numbers(*shape, seed=seed + i).to(dtype) for i, shape in enumerate(shapes)]
    return parts if name == "window" else [*parts[:3], None, parts[4]]


def results(form: forms.Form, name: str, cap: float | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything that a form computes, from inputs rounded to float32 first."""
    rounded = torch.float32 if dtype == torch.float64 else dtype
    q, k, v, z, w = (y if y is None else y.to(rounded).to(dtype) for y in case(torch.float64, name, 0))
    dq, dk, dv, dz, dw = (y if y is None else y.to(rounded).to(dtype) for y in case(torch.float64, name, 10))
    assert q is not None and k is not None and v is not None and w is not None  # noqa: PT018
    x, dot, shape = Inputs(q, k, v, z), Tangents(dq, dk, dv, dz), Shape(VISIBLE[name](), 0.7, cap)
    o, L = form.output(x, shape)
    found = {"o": o, "L": L[torch.isfinite(L)], "forward": form.forward(x, o, L, dot, shape)}
    several = {"reverse": form.reverse(x, o, L, w, shape)}
    if name == "chunks":
        several["second"] = twice_of(form.second(x, o, L, w, Tangents(dq, None, None, None), None, shape))
    else:
        several["second"] = twice_of(form.second(x, o, L, w, dot, dw, shape))
    for what, values in several.items():
        found |= {f"{what} {i}": y for i, y in enumerate(values) if y is not None}
    return found


def twice_of(x: forms.Second) -> tuple[Tensor | None, ...]:
    return x.o, x.q, x.k, x.v, x.sinks


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("name", "cap"), [("causal", None), ("padded", None), ("window", 2.0), ("chunks", 2.0)])
def test_kernels_against_the_form_in_float64(name: str, cap: float | None) -> None:
    expected, found = results(PYTORCH, name, cap, torch.float64), results(triton_form(), name, cap, torch.float32)
    assert set(found) == set(expected)
    assert {what: gap for what in found if (gap := relative(found[what], expected[what])) > 5e-6} == {}


@pytest.mark.usefixtures("interpreter")
def test_half_precision_is_rounded_at_the_borders_alone() -> None:
    x = [y.bfloat16() if y is not None else None for y in case(torch.float64, "window", 0)]
    assert x[0] is not None and x[1] is not None and x[2] is not None  # noqa: PT018
    shape = Shape(VISIBLE["window"](), 0.7)
    o, _ = triton_form().output(Inputs(x[0], x[1], x[2], x[3]), shape)
    wide = [y.double() if y is not None else None for y in x]
    expected, _ = PYTORCH.output(Inputs(wide[0], wide[1], wide[2], wide[3]), shape)  # type: ignore[arg-type]
    assert o.dtype == torch.bfloat16
    assert relative(o, expected) < torch.finfo(torch.bfloat16).eps


@pytest.mark.usefixtures("interpreter")
def test_where_they_run_kernels_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_CHECKED", 20)
    q = torch.zeros(1, 1, 1, 4, 8)
    assert form_for(q, q[0], Shape(causal(4, 4, "cpu"), 1.0)).name == "triton"
    assert form_for(q.double(), q[0].double(), Shape(causal(4, 4, "cpu"), 1.0)) is PYTORCH


def test_the_kernels_by_their_interpreter() -> None:
    """The tests above on a CPU, in a process of their own: Triton decides when it is imported how kernels will run."""
    require_triton()
    if os.environ.get(INTERPRET) == "1":
        pytest.skip("this is that process")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", str(Path(__file__))]
    command += ["-k", "kernels_against or half_precision or where_they_run"]
    done = subprocess.run(command, env={**os.environ, INTERPRET: "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


# ---- the choice


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, kernels: forms.Form) -> forms.Form:
    """What would be chosen if these were the kernels."""
    monkeypatch.setattr(forms, "_chosen", {})
    monkeypatch.setattr(forms, "_has_triton", lambda device: True)
    monkeypatch.setattr(forms, "triton_form", lambda: kernels)
    q = torch.zeros(1, 1, 1, 4, 8)
    return form_for(q, q[0], Shape(causal(4, 4, "cpu"), 1.0))


def test_kernels_that_agree_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    same = forms.Form("same", PYTORCH.output, PYTORCH.reverse, PYTORCH.forward, PYTORCH.second)
    assert on_a_gpu(monkeypatch, same) is same


def test_kernels_that_are_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object) -> Tensor:
        return 1.001 * PYTORCH.forward(*args)  # type: ignore[arg-type]

    with pytest.warns(hs.HesscopeWarning, match=r"without its Triton kernels, for they differ by 1\.0e-03"):
        assert (
            on_a_gpu(monkeypatch, forms.Form("wrong", PYTORCH.output, PYTORCH.reverse, wrong, PYTORCH.second))
            is PYTORCH
        )


def test_kernels_that_fail_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> tuple[Tensor, Tensor]:
        raise RuntimeError("no compiler\nand more")

    with pytest.warns(hs.HesscopeWarning, match=r"they do not run here \(RuntimeError: no compiler\)"):
        assert (
            on_a_gpu(monkeypatch, forms.Form("none", fails, PYTORCH.reverse, PYTORCH.forward, PYTORCH.second))
            is PYTORCH
        )
