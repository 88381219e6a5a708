"""Products to the five leading eigenpairs: hesscope, by size of its basis, against SciPy's `eigsh`.

    python benchmarks/eigs.py --model ../shared/assets/stories260k --text ../shared/assets/text/tinystories_sample.jsonl

All parameters of a causal LM on 64 sequences of 256 tokens, to residuals |H v - lambda v| <= 1e-3 |lambda|, on one operator.
The residuals of every side are measured anew, by further products that do not count. After the whole basis come bounded
ones: of float32 vectors, and of float16 vectors that take a fifth of the whole basis's memory.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from measuring import write_record
from torch import Tensor

import hesscope as hs

K, TOL = 5, 1e-3


def make_operator(model: Path, text: Path, sequences: int, length: int) -> hs.Operator:
    """The Hessian over all parameters."""
    texts = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    problem = hs.causal_lm(str(model), texts, length=length, sequences=sequences, batch_size=8, pack=True)
    return hs.hessian(problem)


def run_scipy(H: hs.Operator, seed: int) -> tuple[Tensor, Tensor]:
    """`eigsh` with its own choice of basis."""
    from scipy.sparse.linalg import eigsh

    start = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(seed), dtype=H.dtype)
    values, V = eigsh(H.to_scipy(), k=K, which="LM", tol=TOL, v0=start.numpy())
    return torch.from_numpy(values), torch.from_numpy(V)


def run_ours(
    H: hs.Operator, seed: int, max_basis: int | None = None, basis_dtype: str | None = None
) -> tuple[Tensor, Tensor]:
    """`hs.eigs` from the same start vector."""
    start = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(seed), dtype=H.dtype)
    found = hs.eigs(H, k=K, which="LM", tol=TOL, start=start, max_basis=max_basis, basis_dtype=basis_dtype)
    return found.eigenvalues, found.eigenvectors


def measured(H: hs.Operator, run: Any) -> dict[str, Any]:
    """One side's products, seconds, eigenvalues and measured residuals."""
    before, began = H.products, time.perf_counter()
    values, V = run()
    products, spent = H.products - before, time.perf_counter() - began
    V = V.to(H.dtype)
    residuals = torch.linalg.vector_norm((H @ V) - V * values.to(V), dim=0) / values.abs()
    return {
        "products": products,
        "seconds": spent,
        "eigenvalues": sorted(values.tolist(), key=abs, reverse=True),
        "largest relative residual": float(residuals.max()),
    }


def main() -> None:
    """Run every side for every seed, print, and write results/eigs.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bases", type=int, nargs="*", default=[8, 10, 12, 20], help="sizes of float32 bases")
    arguments = parser.parse_args()
    H = make_operator(arguments.model, arguments.text, arguments.sequences, arguments.length)
    found: dict[str, list[dict[str, Any]]] = {}

    def note(side: str, run: Any, vectors: int | None = None, bytes_each: int = 4) -> int:
        """Run a side; returns its products, which are the vectors of its basis where that is the whole one."""
        figures = measured(H, run)
        basis = vectors or figures["products"]
        figures["basis"] = {"vectors": basis, "bytes a coordinate": basis * bytes_each}
        found.setdefault(side, []).append(figures)
        print(f"{side}: {figures['products']} products, {figures['seconds']:.1f} s", flush=True)
        return int(figures["products"])

    for seed in range(arguments.seeds):
        note("eigsh", lambda seed=seed: run_scipy(H, seed), vectors=20)
        whole = note("whole basis", lambda seed=seed: run_ours(H, seed))
        fifth = max(2 * whole // 5, K + 2)
        note("float16, a fifth of the memory", lambda s=seed, f=fifth: run_ours(H, s, f, "float16"), fifth, 2)
        for size in arguments.bases:
            note(f"basis of {size}", lambda seed=seed, size=size: run_ours(H, seed, size), size)
    products = {side: sum(run["products"] for run in runs) for side, runs in found.items()}
    memory = {side: sum(run["basis"]["bytes a coordinate"] for run in runs) for side, runs in found.items()}
    print(
        f"{'':32s}{'products':>10s}{'of eigsh':>10s}{'of whole':>10s}{'memory of whole':>17s}{'largest residual':>18s}"
    )
    ratios = {}
    for side, runs in found.items():
        residual = max(run["largest relative residual"] for run in runs)
        ratios[side] = {
            "products over eigsh": products[side] / products["eigsh"],
            "products over whole basis": products[side] / products["whole basis"],
            "memory over whole basis": memory[side] / memory["whole basis"],
        }
        each = "".join(f"{ratio:{width}.2f}" for ratio, width in zip(ratios[side].values(), (10, 10, 17), strict=True))
        print(f"{side:32s}{products[side]:10d}{each}{residual:18.1e}")
    path = write_record("eigs", {"sides": found, "ratios": ratios}, ["hesscope", "torch", "transformers", "scipy"])
    print(f"written to {path.parent.name}/{path.name}")


if __name__ == "__main__":
    main()
