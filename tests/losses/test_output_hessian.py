"""The output Hessian's product against diag(p) - p p^T, dense and in float64, for every kernel that can run here."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hesscope as hs
from hesscope.losses import output_hessian
from hesscope.losses.output_hessian import choose_kernel, cross_entropy_hessian_product

ROWS, CLASSES, VECTORS = 6, 11, 3
TARGETS = {
    "every row": [0, 3, 10, 2, 2, 5],
    "some rows": [-100, 3, -100, 2, 0, -100],
    "one row": [-100, -100, -100, -100, 5, -100],
    "no row": [-100] * ROWS,
}
#: Uniform, ordinary, and so peaked that exp of the logits would overflow in any dtype.
SCALES = [0.0, 1.0, 1e4]
INTERPRET = "TRITON_INTERPRET"
SUMS = {torch.float64: 4e-14, torch.float32: 4e-6}


def require_compiler() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler, found neither g++ nor clang++")


def require_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed; pip install 'hesscope[triton]'")


@pytest.fixture(params=["eager", pytest.param("compile", marks=pytest.mark.slow), "triton"])
def kernel(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        require_triton()
        if os.environ.get(INTERPRET) != "1":
            pytest.skip("the interpreter has to be on from the start: see test_the_triton_kernel_by_its_interpreter")
    if request.param == "compile":
        require_compiler()
    name: str = request.param
    return name


def case(scale: float, rows: int = ROWS, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(rows, classes, generator=g, dtype=torch.float64)
    return logits, torch.randn(VECTORS, rows, classes, generator=g, dtype=torch.float64)


def dense(logits: Tensor, targets: Tensor, u: Tensor) -> Tensor:
    """Every row's matrix, in float64, from the logits as they are."""
    p = logits.double().softmax(-1)
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    H[targets == -100] = 0.0
    return torch.einsum("tvw,ktw->ktv", H, u.double())


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Sums are float32 or wider; half precision is rounded to once, at the end."""
    assert found.dtype == dtype
    rounded, sums = (torch.finfo(dtype).eps, torch.float32) if dtype.itemsize < 4 else (0.0, dtype)
    torch.testing.assert_close(found.double(), expected, rtol=rounded, atol=SUMS[sums])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_five_percent_are_not_close(dtype: torch.dtype) -> None:
    (z, u), y = case(1.0), torch.tensor(TARGETS["some rows"])
    expected = dense(z, y, u)
    close(expected.to(dtype), expected, dtype)
    with pytest.raises(AssertionError, match="not close"):
        close((1.05 * expected).to(dtype), expected, dtype)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("rows", TARGETS)
def test_against_the_dense_matrix(kernel: str, rows: str, scale: float) -> None:
    (z, u), y = case(scale), torch.tensor(TARGETS[rows])
    found = cross_entropy_hessian_product(z, y, u, kernel)
    close(found, dense(z, y, u), torch.float64)
    assert not found[:, y == -100].any()
    assert bool((found.abs() > 1e-6).any()) == (rows != "no row" and scale < 1e4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_in_less_than_float64(kernel: str, dtype: torch.dtype, scale: float) -> None:
    """Sums are float32; the answer is rounded once, at the end."""
    z, u = (x.to(dtype) for x in case(scale))
    y = torch.tensor(TARGETS["some rows"])
    close(cross_entropy_hessian_product(z, y, u, kernel), dense(z, y, u), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_first_look_at_peaked_rows_does_not_condemn_a_kernel(
    kernel: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Probabilities far below rounding come out as different small numbers, or zeros."""
    monkeypatch.setattr(output_hessian, "_trusted", {})
    z, u = (x.to(dtype) for x in case(30.0))
    y = torch.tensor(TARGETS["some rows"])
    close(cross_entropy_hessian_product(z, y, u, kernel), dense(z, y, u), dtype)


def test_half_precision_logits_with_wider_vectors(kernel: str) -> None:
    z, u = case(1.0)
    z, y = z.bfloat16(), torch.tensor(TARGETS["some rows"])
    close(cross_entropy_hessian_product(z, y, u.float(), kernel), dense(z, y, u.float()), torch.float32)


def test_one_vector_is_one_of_several(kernel: str) -> None:
    (z, u), y = case(1.0), torch.tensor(TARGETS["some rows"])
    several = cross_entropy_hessian_product(z, y, u, kernel)
    assert several.shape == u.shape
    for k in range(VECTORS):
        torch.testing.assert_close(cross_entropy_hessian_product(z, y, u[k], kernel), several[k], rtol=1e-14, atol=0)


def test_many_classes_with_some_impossible(kernel: str) -> None:
    """Several blocks of the kernel; minus infinity is how a class is ruled out, whole blocks of them first."""
    z, u = case(3.0, rows=1, classes=4500)
    z[:, :4200] = -torch.inf
    y = torch.tensor([4499])
    found = cross_entropy_hessian_product(z, y, u, kernel)
    close(found, dense(z, y, u), torch.float64)
    assert not found[..., :4200].any()


def test_rows_and_columns_that_are_not_contiguous(kernel: str) -> None:
    (z, u), y = case(1.0), torch.tensor(TARGETS["some rows"])
    expected = dense(z, y, u)
    wide = torch.full((ROWS, 2 * CLASSES), torch.nan).double()
    wide[:, :CLASSES] = z
    for logits in (wide[:, :CLASSES], z.T.contiguous().T):
        close(cross_entropy_hessian_product(logits, y, u.transpose(0, 1).contiguous().transpose(0, 1), kernel), expected, torch.float64)  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 4, 5, 6, 100])
def test_chunks_change_nothing(chunk: int) -> None:
    (z, u), y = case(1.0), torch.tensor(TARGETS["some rows"])
    expected = cross_entropy_hessian_product(z, y, u, "eager")
    torch.testing.assert_close(cross_entropy_hessian_product(z, y, u, "eager", chunk), expected, rtol=1e-14, atol=0)


def test_chunks_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    own = output_hessian._eager

    def watched(z: Tensor, y: Tensor, u: Tensor) -> Tensor:
        seen.append(tuple(u.shape))
        return own(z, y, u)

    monkeypatch.setattr(output_hessian, "_eager", watched)
    monkeypatch.setattr(output_hessian, "_CHUNK_ENTRIES", 2 * VECTORS * CLASSES)
    (z, u), y = case(1.0), torch.zeros(ROWS, dtype=torch.int64)
    cross_entropy_hessian_product(z, y, u)
    assert seen == [(VECTORS, 2, CLASSES)] * 3


def test_offsets_beyond_32_bits(kernel: str) -> None:
    """Rows 2^30 entries apart: the third begins at 2^31. Only what is touched of the buffer becomes real memory."""
    try:
        room = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("no room to reserve 4 GiB of addresses")
    z = room.as_strided((3, 7), (2**30, 1))
    z.copy_(torch.randn(3, 7, generator=torch.Generator().manual_seed(0)))
    y, u = torch.tensor([1, -100, 2]), torch.randn(3, 7, generator=torch.Generator().manual_seed(1))
    found = cross_entropy_hessian_product(z, y, u, kernel)
    close(found[None], dense(z, y, u[None]), torch.float32)
    assert found[2].any()


def test_nothing_to_do(kernel: str) -> None:
    for T, V in ((0, 5), (3, 0)):
        z = torch.zeros(T, V)
        assert cross_entropy_hessian_product(z, torch.zeros(T, dtype=torch.int64), z, kernel).shape == (T, V)


def test_what_does_not_count_may_hold_anything(kernel: str) -> None:
    z, u = case(1.0)
    z[1], u[:, 1] = torch.nan, torch.inf
    y = torch.tensor([2, -100, 2, 2, 2, 2])
    found = cross_entropy_hessian_product(z, y, u, kernel)
    assert not found[:, 1].any()
    assert torch.isfinite(found).all()


def test_the_triton_kernel_by_its_interpreter() -> None:
    """The tests above on a CPU, in a process of their own: Triton decides when it is imported how kernels will run."""
    require_triton()
    if os.environ.get(INTERPRET) == "1":
        pytest.skip("this is that process")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        str(Path(__file__)),
        "-k",
        "triton and not interpreter",
    ]
    done = subprocess.run(command, env={**os.environ, INTERPRET: "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


# ---- which kernel runs, and why


CPU = torch.device("cpu")


def test_auto_on_a_cpu_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    name, reason = choose_kernel("auto", CPU)
    assert name == "eager"
    assert reason.startswith("triton ")


def test_auto_on_a_gpu_is_triton_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose_kernel("auto", cuda) == ("triton", "the logits are on a GPU")
    assert choose_kernel("triton", cuda) == ("triton", "as asked")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose_kernel("auto", cuda) == ("eager", "triton is not installed")


@pytest.mark.parametrize("installed", [True, False])
def test_triton_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    (z, u), y = case(1.0), torch.tensor(TARGETS["some rows"])
    reason = "triton needs logits on a GPU, not on cpu" if installed else "triton is not installed"
    with pytest.warns(hs.HesscopeWarning, match=f"The eager kernel stands in for triton: {reason}"):
        found = cross_entropy_hessian_product(z, y, u, "triton")
    close(found, dense(z, y, u), torch.float64)


def test_a_compiler_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Tensor) -> Tensor:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(output_hessian, "_compiled", lambda: fails)
    monkeypatch.setattr(output_hessian, "_trusted", {})
    (z, u), y = case(1.0), torch.tensor(TARGETS["some rows"])
    for _ in range(2):
        with pytest.warns(hs.HesscopeWarning, match=r"it does not run here \(RuntimeError: no compiler\)"):
            found = cross_entropy_hessian_product(z, y, u, "compile")
        close(found, dense(z, y, u), torch.float64)


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(z: Tensor, y: Tensor, u: Tensor) -> Tensor:
        return 1.001 * output_hessian._eager(z, y, u)

    monkeypatch.setattr(output_hessian, "_compiled", lambda: wrong)
    monkeypatch.setattr(output_hessian, "_trusted", {})
    (z, u), y = case(1.0), torch.tensor(TARGETS["every row"])
    with pytest.warns(hs.HesscopeWarning, match="it differs from the eager kernel by"):
        found = cross_entropy_hessian_product(z.float(), y, u.float(), "compile")
    close(found, dense(z.float(), y, u.float()), torch.float32)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kernel": "cuda"}, "Expected kernel to be auto, eager, compile or triton, got 'cuda'"),
        ({"chunk": 0}, "Expected chunk to be at least 1 row, got 0"),
        ({"u": torch.zeros(2, 4)}, r"Expected u to be \[2, 3\] as the logits"),
        ({"u": torch.zeros(2, 3, dtype=torch.int64)}, "in a floating dtype, got"),
        ({"logits": torch.zeros(1, 2, 3)}, r"Expected logits \[T, V\] in a floating dtype, got \[1, 2, 3\]"),
        ({"targets": torch.zeros(3).long()}, r"Expected one target for each of 2 rows of logits, got \[3\]"),
    ],
)
def test_bad_input(change: dict[str, object], complaint: str) -> None:
    right: dict[str, object] = {"logits": torch.zeros(2, 3), "targets": torch.zeros(2).long(), "u": torch.zeros(2, 3)}
    with pytest.raises(hs.HesscopeError, match=complaint):
        cross_entropy_hessian_product(**{**right, **change})  # type: ignore[arg-type]
