"""Products, algorithms, precisions and memory figures on a device, held to the same on the CPU in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hesscope as hs
from architectures import ARCHITECTURES, ragged_batches, tiny
from hesscope.memory import available_bytes
from oracles import causal_lm_products, relative

pytestmark = pytest.mark.gpu
NAMES = ["gpt2", "llama", "opt", "mistral", "gemma2"]
ENGINES = ["reverse-over-reverse", "forward-over-reverse", "reverse-over-forward", "streamed"]


def limit(name: str, dtype: torch.dtype) -> float:
    if dtype == torch.float32:
        return 1e-4
    return 1e-6 if ARCHITECTURES[name].casts else 1e-10


def pair(name: str, device: torch.device, dtype: torch.dtype, **more: Any) -> tuple[hs.Problem, hs.Problem]:
    """The same problem on the device and, in float64, on the CPU."""
    model = tiny(name, dtype)
    cpu = hs.causal_lm(model, ragged_batches(), dtype="float64", device="cpu")
    return hs.causal_lm(model, ragged_batches(), device=device, **more), cpu


def signs(problem: hs.Problem, count: int = 3) -> tuple[hs.Space, Tensor]:
    space = hs.select(problem)
    return space, space.flatten(space.rademacher(0, list(range(count))))


def joined(v: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten().cpu() for part in v.values()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_hessian_products(name: str, engine: str, dtype: torch.dtype, device: torch.device) -> None:
    here, cpu = pair(name, device, dtype)
    v = {name: part[0] for name, part in hs.select(here).rademacher(0, [0]).items()}
    V = [{name: part.cpu().double() for name, part in v.items()}]
    (expected,) = causal_lm_products(cpu.model, ragged_batches(), V)
    found = hs.hessian(here, engine=engine) @ v
    assert all(part.device.type == device.type for part in found.values())
    assert relative(joined(found), joined(expected)) < limit(name, dtype)


@pytest.mark.parametrize("engine", ["auto", "streamed"])
@pytest.mark.parametrize("make", [hs.ggn, hs.fisher, hs.empirical_fisher])
def test_products_through_outputs(make: Any, engine: str, device: torch.device) -> None:
    here, cpu = pair("llama", device, torch.float64)
    space, V = signs(here)
    expected = make(cpu, hs.select(cpu)) @ V.cpu()
    assert relative((make(here, space, engine=engine) @ V).cpu(), expected) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_attention_in_tiles(engine: str, device: torch.device) -> None:
    here, cpu = pair("mistral", device, torch.float32, attention="tiled")
    space, V = signs(here)
    expected = hs.hessian(cpu, hs.select(cpu)) @ V.cpu().double()
    assert relative((hs.hessian(here, space, engine=engine) @ V).cpu(), expected) < 1e-4


def test_vectors_are_the_same_everywhere(device: torch.device) -> None:
    here, cpu = pair("gpt2", device, torch.float32)
    for draw in ("rademacher", "gaussian"):
        a, b = (getattr(hs.select(p), draw)(3, ["x"]) for p in (here, cpu))
        assert all(part.device.type == device.type for part in a.values())
        assert all(torch.allclose(a[name].cpu().double(), b[name], atol=1e-6) for name in a)


def test_lanczos_eigenpairs_and_density(device: torch.device) -> None:
    here, cpu = pair("llama", device, torch.float64)
    A, B = (hs.hessian(p, hs.select(p, "model.layers.1.*")) for p in (here, cpu))
    for run in (
        lambda H: hs.eigs(H, k=3, tol=1e-6).eigenvalues,
        lambda H: hs.lanczos(H, 12).T,
        lambda H: hs.density(H, probes=2, steps=6).nodes,
        lambda H: hs.eigs(H, k=1, method="power", tol=1e-3, max_products=200).eigenvalues,
    ):
        assert relative(run(A).cpu(), run(B)) < 1e-5


@pytest.mark.parametrize("method", ["exact", "hutchinson", "deflated", "xdiag", "per-sequence", "control-variate"])
def test_diagonals_and_traces(method: str, device: torch.device) -> None:
    here, cpu = pair("gpt2", device, torch.float64)
    A, B = (hs.hessian(p, hs.select(p, "transformer.h.1.mlp.c_fc.weight")) for p in (here, cpu))
    how = {"budget": None if method == "exact" else 40}
    assert relative(hs.diagonal(A, method, **how).flat().cpu(), hs.diagonal(B, method, **how).flat()) < 1e-6
    if method in ("exact", "hutchinson"):
        assert hs.trace(A, method, **how).estimate == pytest.approx(hs.trace(B, method, **how).estimate)


@pytest.mark.parametrize("route", ["weights", "positions"])
def test_blocks(route: str, device: torch.device) -> None:
    here, cpu = pair("gpt2", device, torch.float64)
    picked = "transformer.h.1.mlp.c_fc.weight[:, 0:2]", "transformer.h.0.attn.c_proj.weight[:, 1]"
    A, B = (hs.hessian(p, hs.select(p, *picked)) for p in (here, cpu))
    assert relative(hs.block(A, route).matrix.cpu(), hs.block(B, "weights").matrix) < 1e-8


def test_kfac(device: torch.device) -> None:
    here, cpu = pair("llama", device, torch.float64)
    A, B = (hs.kfac(p, hs.select(p, "model.layers.1.mlp.*"), corrected=True) for p in (here, cpu))
    V = torch.ones(A.shape[0], 1, dtype=torch.float64)
    assert relative((A @ V.to(device)).cpu(), B @ V) < 1e-6


@pytest.mark.parametrize("engine", ["auto", "streamed"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bfloat16(name: str, engine: str, device: torch.device) -> None:
    here, _ = pair(name, device, torch.bfloat16)
    found = hs.hessian(here, engine=engine).product_error()
    assert found.relative is not None
    assert 1e-3 < found.relative < 0.3


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_precisions(precision: str, device: torch.device) -> None:
    here, _ = pair("llama", device, torch.float32)
    if precision == "tf32" and device.type != "cuda":
        pytest.skip("TF32 is a format of CUDA devices")
    before = torch.backends.cuda.matmul.fp32_precision
    found = hs.hessian(here, precision=precision).product_error().relative
    assert found is not None
    assert found < {"float32": 1e-4, "tf32": 2e-2, "bfloat16": 5e-2}[precision]
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_results_are_written_from_a_device(device: torch.device, tmp_path: Any) -> None:
    here, _ = pair("gpt2", device, torch.float32)
    result = hs.eigs(hs.hessian(here, hs.select(here, "transformer.h.1.ln_2.*")), k=1, tol=1e-2)
    back = hs.load(result.save(tmp_path / "run"))
    assert torch.equal(back.eigenvalues, result.eigenvalues.cpu())


def test_memory_figures_are_the_allocators(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("the figures of a CUDA device")
    torch.cuda.empty_cache()
    before = available_bytes(device)
    held = torch.zeros(2**26, device=device)
    assert before - available_bytes(device) == pytest.approx(held.nbytes, rel=0.2)
    del held  # still reserved by torch, and there to be used again
    assert available_bytes(device) == pytest.approx(before, rel=0.01)
    here, _ = pair("gpt2", device, torch.float32)
    assert hs.plan(here, measure=False).engines["reverse-over-reverse"]["peak_bytes"] > 0
