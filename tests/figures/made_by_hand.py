"""Small results whose fields are known, as the algorithms would return them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hesscope.results import (
    Block,
    Density,
    Diagonal,
    Eigenpairs,
    LanczosRun,
    Structure,
    StructureComparison,
    Trace,
    Verification,
)

WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def provenance(objective: str = "nll", selection: dict[str, list[int]] | None = None, **problem: Any) -> dict[str, Any]:
    """What a Hessian of a language model leaves behind."""
    shapes = selection or {WEIGHT: [2, 3]}
    described = {"size": 6, "parameters": {name: {"shape": shape} for name, shape in shapes.items()}}
    facts = {"model_name": "tiny", "model": "LlamaForCausalLM", "data": "stories.txt", "terms": 1234}
    facts |= {"loss": "CausalLMLoss", "objective": objective, "fingerprint": "0123456789abcdef" * 4, **problem}
    base = {"operator": "hessian", "selection": described, "problem": facts}
    if objective == "perplexity":
        update = {"operator": "rank-one", "weight": 1.0}
        base = {"operator": "multiple", "factor": 3.0, "of": {"operator": "sum", "terms": [base, update]}}
    return {"operator": base, "options": {"seed": 0}, "probe": None, "versions": {"hesscope": "0.0", "torch": "0.0"}}


def spent(**changes: Any) -> dict[str, Any]:
    """The fields every result has."""
    return {"products": 6, "units": 40.0, "seconds": 1.5, "provenance": provenance()} | changes


def labels(**shapes: tuple[int, ...]) -> list[str]:
    """One label a coordinate; double underscores are dots."""
    found = []
    for name, shape in shapes.items():
        places = torch.ones(shape).nonzero().tolist()
        found += [
            f"{name.replace('__', '.')}[{', '.join(map(str, p))}]" if p else name.replace("__", ".") for p in places
        ]
    return found


def block(matrix: Tensor, names: list[str] | None = None, **changes: Any) -> Block:
    names = names or [f"{WEIGHT}[0, {i}]" for i in range(len(matrix))]
    return Block(**spent(**changes), matrix=matrix, labels=names, asymmetry=1e-7)


def diagonal(values: dict[str, Tensor], method: str = "exact", error: float = 0.0, **changes: Any) -> Diagonal:
    errors = {name: torch.full_like(value, error) for name, value in values.items()}
    return Diagonal(**spent(**changes), method=method, values=values, standard_error=errors,
                    relative_error=0.0 if method == "exact" else 0.2, degrees_of_freedom=9, seed=0)  # fmt: skip


def eigenpairs(values: list[float], residuals: list[float], converged: bool = True, **changes: Any) -> Eigenpairs:
    k = len(values)
    return Eigenpairs(**spent(**changes), which="LM", eigenvalues=torch.tensor(values).double(),
                      vectors={WEIGHT: torch.eye(k).double()}, residuals=torch.tensor(residuals).double(), tol=1e-3,
                      converged=converged, steps=k, seed=0)  # fmt: skip


def lanczos(nodes: list[float], weights: list[float], **changes: Any) -> LanczosRun:
    t = torch.tensor(nodes).double()
    return LanczosRun(**spent(**changes), T=t.diag(), nodes=t, weights=torch.tensor(weights).double(), residual_norm=0.1,
                      basis_vectors={}, seed=0)  # fmt: skip


def density(nodes: Tensor, weights: Tensor, size: int = 100, **changes: Any) -> Density:
    from hesscope.results.quadrature import smooth

    nodes, weights = nodes.double(), weights.double()
    used = nodes[weights > 0]
    width = float(used.max() - used.min()) / 100 or 0.01
    grid = torch.linspace(float(used.min()) - 5 * width, float(used.max()) + 5 * width, 200).double()
    curves = torch.stack([smooth(t, w, grid, width) for t, w in zip(nodes, weights, strict=True)])
    powers = torch.stack([(weights * nodes**p).sum(1) for p in range(1, 5)], 1)
    several = len(nodes) > 1
    return Density(**spent(**changes), nodes=nodes, weights=weights, grid=grid, density=curves.mean(0),
                   density_standard_error=curves.std(0) / len(nodes) ** 0.5 if several else torch.full_like(grid, torch.nan),
                   moments=powers.mean(0), moments_standard_error=powers.std(0) / len(nodes) ** 0.5 if several else torch.full((4,), torch.nan),
                   bandwidth=width, size=size, seed=0)  # fmt: skip


def structure(matrix: Tensor, places: dict[str, tuple[int, int | None]], **changes: Any) -> Structure:
    """Layers by name, each with its number of rows of two weights and its block."""
    import hesscope as hs

    names, parameters = [], {}
    for name, (rows, number) in places.items():
        names += [f"{name}[{i}, {j}]" for i in range(rows) for j in range(2)]
        own = None if number is None else name.partition(".")[2]
        parameters[name] = {"shape": [rows, 2], "unit_axis": 0, "block": number, "layer": own}
    selection = {"size": len(names), "parameters": parameters}
    about = provenance() | {"selection": selection}
    return hs.structure(block(matrix, names, **{"provenance": about} | changes))


def comparison(**cases: Structure) -> StructureComparison:
    import hesscope as hs

    return hs.structure(cases)


def trace(samples: list[float], method: str = "hutchinson", **changes: Any) -> Trace:
    x = torch.tensor(samples).double()
    exact = method == "exact"
    error = 0.0 if exact else float(x.std() / len(x) ** 0.5) if len(x) > 1 else float("inf")
    return Trace(**spent(**changes), method=method, estimate=float(x.sum() if exact else x.mean()), standard_error=error,
                 degrees_of_freedom=0 if exact else len(x) - 1, size=12, seed=0, samples=x)  # fmt: skip


def verification(measured: list[float], limits: list[float]) -> Verification:
    names = [f"check {i}" for i in range(len(measured))]
    return Verification(**spent(), names=names, explanations=[f"what {name} compares" for name in names],
                        measured=torch.tensor(measured).double(), limits=torch.tensor(limits).double())  # fmt: skip
