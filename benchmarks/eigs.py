"""Products to the five leading eigenpairs: hesscope, with a whole basis and with a fifth of it, against SciPy's `eigsh`.

    python benchmarks/eigs.py --model ../shared/assets/stories260k --text ../shared/assets/text/tinystories_sample.jsonl

All parameters of a causal LM on 64 sequences of 256 tokens, to residuals |H v - lambda v| <= 1e-3 |lambda|, on one operator.
The residuals of every side are measured anew, by further products that do not count.
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


def run_ours(H: hs.Operator, seed: int, max_basis: int | None) -> tuple[Tensor, Tensor]:
    """`hs.eigs` from the same start vector."""
    start = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(seed), dtype=H.dtype)
    found = hs.eigs(H, k=K, which="LM", tol=TOL, start=start, max_basis=max_basis)
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
    arguments = parser.parse_args()
    H = make_operator(arguments.model, arguments.text, arguments.sequences, arguments.length)
    found: dict[str, list[dict[str, Any]]] = {"eigsh": [], "whole basis": [], "a fifth of the basis": []}
    for seed in range(arguments.seeds):
        found["eigsh"].append(measured(H, lambda seed=seed: run_scipy(H, seed)))
        whole = measured(H, lambda seed=seed: run_ours(H, seed, None))
        basis = max(K + 2, whole["products"] // 5)
        found["whole basis"].append(whole)
        found["a fifth of the basis"].append(
            measured(H, lambda seed=seed, basis=basis: run_ours(H, seed, basis)) | {"basis": basis}
        )
        print({side: (runs[-1]["products"], round(runs[-1]["seconds"], 1)) for side, runs in found.items()}, flush=True)
    totals = {side: sum(run["products"] for run in runs) for side, runs in found.items()}
    print(f"{'':24s}{'products':>10s}{'of eigsh':>10s}{'largest residual':>18s}")
    for side, runs in found.items():
        residual = max(run["largest relative residual"] for run in runs)
        print(f"{side:24s}{totals[side]:10d}{totals[side] / totals['eigsh']:10.2f}{residual:18.1e}")
    ratios = {
        "whole basis over eigsh": totals["whole basis"] / totals["eigsh"],
        "a fifth of the basis over the whole": totals["a fifth of the basis"] / totals["whole basis"],
    }
    print(ratios)
    path = write_record("eigs", {"sides": found, "ratios": ratios}, ["hesscope", "torch", "transformers", "scipy"])
    print(f"written to {path.parent.name}/{path.name}")


if __name__ == "__main__":
    main()
