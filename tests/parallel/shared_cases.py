"""What is computed on one process and on several, to be held to one another: (name, tensors)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import hesscope as hs
from architectures import ragged_batches, some_of_everything, tiny

Case = tuple[str, dict[str, Tensor]]
Share = Callable[[hs.Problem], hs.Problem]

ENGINES = ("auto", "forward-over-reverse", "reverse-over-forward", "streamed", "finite-difference")
#: {architecture: engines of the Hessian, linear layers}; experts have no forward mode and no trunk of one kind.
ARCHITECTURES: dict[str, tuple[tuple[str, ...], str]] = {
    "llama": (ENGINES, "*_proj.weight"),
    "gpt2": (ENGINES, "transformer.h.*.mlp.*.weight"),
    "gpt-neox": (ENGINES, "*dense*.weight"),
    "mixtral": (("auto", "finite-difference"), "*self_attn.*_proj.weight"),
}
#: Fewer for the quick tests: one architecture with everything, one that mixes batches' tokens in experts.
QUICK = {"gpt2": ARCHITECTURES["gpt2"], "mixtral": (("auto",), ARCHITECTURES["mixtral"][1])}
#: Divided weights are gathered for all engines alike.
DIVIDED = {
    name: (tuple(e for e in engines if e in ("auto", "finite-difference")), linear)
    for name, (engines, linear) in ARCHITECTURES.items()
}
METHODS = ("exact", "hutchinson", "per-sequence", "nystrom", "control-variate", "auto")


def cases(share: Share, architectures: dict[str, tuple[tuple[str, ...], str]]) -> Iterator[Case]:
    """Every case of some architectures, and every algorithm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hs.HesscopeWarning)  # experts that no token chose
        for name, (engines, linear) in architectures.items():
            whole = hs.causal_lm(tiny(name), ragged_batches())
            yield from _products(f"{name}, uneven shares", share(whole), engines, linear)
            if name == "mixtral":  # fewer batches than ranks
                yield from _products(f"{name}, empty shares", share(whole.subset([0])), engines, linear)
        yield from _results(share)
        yield from _diagonals(share)


def _products(where: str, problem: hs.Problem, engines: tuple[str, ...], linear: str) -> Iterator[Case]:
    """Operators and engines."""
    space = hs.select(problem, some_of_everything(problem.model))
    V = space.flatten(space.gaussian(0, [0, 1, 2]))
    for kind, A in _operators(problem, space, engines).items():
        yield f"{where}: {kind}", {"AV": A @ V, "units": torch.tensor(A.units)}
    layers = hs.select(problem, linear)
    v = layers.flatten(layers.gaussian(0, [0]))
    for corrected in (False, True):
        K = hs.kfac(problem, layers, corrected=corrected, samples=2)
        yield f"{where}: kfac, corrected {corrected}", {"Kv": K @ v, "units": torch.tensor(K.units)}


def whole_cases(share: Share) -> Iterator[Case]:
    """Operators over all weights, whose vectors are divided as the weights are, of every architecture."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", hs.HesscopeWarning)
        for name in ARCHITECTURES:
            problem = share(hs.causal_lm(tiny(name), ragged_batches()))
            space = hs.select(problem)
            V = space.flatten(space.gaussian(0, [0, 1]))
            for kind, A in {"hessian": hs.hessian(problem, space), "ggn": hs.ggn(problem, space)}.items():
                yield f"{name}, all weights: {kind}", {"AV": A @ V}


def _operators(problem: hs.Problem, space: hs.Space, engines: tuple[str, ...]) -> dict[str, hs.Operator]:
    found = {f"hessian, {engine}": hs.hessian(problem, space, engine) for engine in engines}
    found |= {
        "hessian, microbatches": hs.hessian(problem, space, microbatch=1),
        "hessian, nothing kept": hs.hessian(problem, space, graph_memory=0),
        "ggn": hs.ggn(problem, space),
        "fisher": hs.fisher(problem, space, samples=2, seed=3),
        "fisher of sequences": hs.fisher(problem, space, per="sequence"),
        "empirical fisher": hs.empirical_fisher(problem, space),
    }
    if "streamed" in engines:
        found["ggn, streamed"] = hs.ggn(problem, space, engine="streamed")
    return found


def _results(share: Share) -> Iterator[Case]:
    """Algorithms, and the objective that needs the gradient."""
    model = tiny("llama")
    problem = share(hs.causal_lm(model, ragged_batches()))
    yield "risk", {"R": torch.tensor(problem.risk())}
    part = hs.select(problem, "model.layers.1.mlp.up_proj.weight", "model.norm.weight")
    layer = hs.select(problem, "model.layers.1.mlp.up_proj.weight")
    H = hs.hessian(problem, part)
    for route in ("weights", "positions"):
        yield f"block, {route}", _block(hs.hessian(problem, layer), route)
    yield "block of a sum", _block(H.shifted(2.0))
    yield "block of K-FAC and unit vectors", _block(hs.kfac(problem, layer) + hs.hessian(problem, layer, "streamed"))
    one = share(hs.causal_lm(model, ragged_batches()[:1]))
    yield "block, one batch", _block(hs.hessian(one, part))
    perplexed = share(hs.causal_lm(model, ragged_batches(), objective="perplexity"))
    yield "block of the perplexity", _block(hs.hessian(perplexed, part))
    yield "GGN of the perplexity", _block(hs.ggn(perplexed, part))
    pairs = hs.eigs(H, k=3, tol=1e-6)
    yield "eigs", {"values": pairs.eigenvalues, "residuals": pairs.residuals}
    power = hs.eigs(H, k=1, tol=1e-3, method="power", batches=2, max_products=40)
    yield "power iteration on some batches", {"values": power.eigenvalues}
    yield "density", {"nodes": hs.density(H, probes=2, steps=8).nodes}
    yield "trace", {"estimate": torch.tensor(hs.trace(H, method="hutch++", budget=30).estimate)}
    groups = hs.groups(H, probes=3, steps=4, max_products=8)
    yield "groups", {name: tensor for name, tensor in groups.tensors().items() if tensor.is_floating_point()}
    yield "verify", {"measured": torch.tensor(float(hs.verify(problem, part).passed))}


def few_cases(share: Share) -> Iterator[Case]:
    """A case of every kind that divided vectors take another way through."""
    whole = hs.causal_lm(tiny("gpt2"), ragged_batches())
    for where, problem in (("uneven shares", share(whole)), ("empty shares", share(whole.subset([0])))):
        space = hs.select(problem, "transformer.h.*", "*ln_f*", "*wpe*")
        V = space.flatten(space.gaussian(0, [0, 1]))
        for kind, A in {
            "hessian": hs.hessian(problem, space),
            "whole vectors": hs.hessian(problem, space, "reverse-over-reverse"),
            "ggn": hs.ggn(problem, space),
            "empirical fisher": hs.empirical_fisher(problem, space),
        }.items():
            yield f"{where}: {kind}", {"AV": A @ V}
    problem = share(whole)
    layers = hs.select(problem, "transformer.h.1.mlp.*.weight")
    H, K = hs.hessian(problem, layers), hs.kfac(problem, layers, samples=2)
    v = layers.flatten(layers.gaussian(0, [0]))
    yield "sum with K-FAC", {"Av": (2.0 * H + K).shifted(1.0) @ v}
    pairs = hs.eigs(H, k=2, tol=1e-6)
    yield "eigs", {"values": pairs.eigenvalues, "vectors": pairs.eigenvectors.abs(), "residuals": pairs.residuals}
    again = hs.eigs(H, k=2, tol=1e-6, start=pairs)
    yield "a warm start", {"values": again.eigenvalues}
    yield "lanczos", {"basis": hs.lanczos(H, 4, keep_basis=True).basis.abs()}
    yield "trace", {"estimate": torch.tensor(hs.trace(H, "hutch++", budget=12).estimate)}
    yield "density", {"nodes": hs.density(H, probes=2, steps=4).nodes}
    for method, budget in {"hutchinson": 4, "nystrom": 16}.items():
        yield f"diagonal, {method}", _diagonal(H, method, budget)
    yield "groups", _groups(H, "kind")
    yield "verify", {"passed": torch.tensor([float(x) for x in hs.verify(problem, layers, "streamed").outcomes()])}
    perplexed = share(hs.causal_lm(whole.model, ragged_batches(), objective="perplexity"))
    part = hs.select(perplexed, "*ln_f*")
    yield "block of the perplexity", _block(hs.hessian(perplexed, part))


def more_diagonals(share: Share) -> Iterator[Case]:
    """The other ways to a diagonal on divided vectors, and groups of a composed operator."""
    problem = share(hs.causal_lm(tiny("gpt2"), ragged_batches()))
    layers = hs.select(problem, "transformer.h.1.mlp.*.weight", "*ln_f*")
    H = hs.hessian(problem, layers)
    # Draws are by double backward, which products make way for.
    yield "diagonal, per-sequence", _diagonal(H, "per-sequence", 4)
    yield "diagonal of a GGN", _diagonal(hs.ggn(problem, layers), "sampled", 4)
    for method, budget in {"gaussian": 4, "deflated": 8, "xdiag": 8, "control-variate": 9}.items():
        yield f"diagonal, {method}", _diagonal(H, method, budget)
    yield "diagonal, auto", _diagonal(hs.hessian(problem, layers, "streamed"), "auto", 60)
    yield "diagonal to a target", _diagonal(H, "hutchinson", 60, target_error=0.6)
    yield "groups of a sum", _groups(H.shifted(2.0), "layer")
    yield "groups of what has no form of its own for a part", _groups(H.sampled(2, seed=0, draw=0), "kind")


def _groups(A: hs.Operator, by: str) -> dict[str, Tensor]:
    found = hs.groups(A, by, probes=2, steps=3, max_products=6, tol=1e9)
    return {name: tensor for name, tensor in found.tensors().items() if tensor.is_floating_point()}


def _diagonal(A: hs.Operator, method: str, budget: int, **limits: float) -> dict[str, Tensor]:
    found = hs.diagonal(A, method, budget, **limits)
    sums = found.provenance["estimator"].get("layer_sums", {})
    return {
        "values": found.flat(),
        "standard errors": torch.cat([x.reshape(-1) for x in found.standard_error.values()]),
        "error": torch.tensor(found.relative_error),
        "products": torch.tensor(float(found.products)),
        "sums": torch.tensor([1.0, *(x for pair in sums.values() for x in pair)], dtype=torch.float64),
    }


def tensor_cases(share: Share, architecture: str, more: bool = False) -> Iterator[Case]:
    """Operators over all weights, with `more` over some of everything, and algorithms, of a model of linear layers."""
    whole = hs.causal_lm(tiny(architecture), ragged_batches())
    problem = share(whole)
    yield "risk", {"R": torch.tensor(problem.risk())}
    everything = hs.select(problem)
    V = everything.flatten(everything.gaussian(0, [0, 1]))
    for kind, A in {
        "hessian": hs.hessian(problem, everything),
        "whole vectors": hs.hessian(problem, everything, "reverse-over-reverse"),
        "finite difference": hs.hessian(problem, everything, "finite-difference"),
        "ggn": hs.ggn(problem, everything),
    }.items():
        yield f"all weights: {kind}", {"AV": A @ V}
    if more:
        yield from _products("some", problem, ("auto",), "*layers.1.mlp.*.weight")
    pairs = hs.eigs(hs.hessian(problem, hs.select(problem, "*layers.1.mlp.*")), k=2, basis_dtype="float16")
    yield "eigs in a rounded basis", {"values": pairs.eigenvalues}
    yield "diagonal", {"values": hs.diagonal(hs.hessian(problem, hs.select(problem, "*norm*")), "exact").flat()}


def grouped_cases(share: Share) -> Iterator[Case]:
    """What hands several vectors over at once, on three batches and on one."""
    whole = hs.causal_lm(tiny("gpt2"), ragged_batches())
    for where, problem in (("three batches", share(whole)), ("one batch", share(whole.subset([0])))):
        space = hs.select(problem, "transformer.h.1.mlp.*", "transformer.ln_f.weight")
        for kind, A in {
            "hessian": hs.hessian(problem, space, "reverse-over-reverse"),
            "streamed": hs.hessian(problem, space, "streamed"),
            "nothing kept": hs.hessian(problem, space, graph_memory=0),
            "ggn": hs.ggn(problem, space),
            "fisher": hs.fisher(problem, space, samples=2, seed=3),
        }.items():
            V = space.flatten(space.gaussian(0, [0, 1, 2, 3, 4]))
            yield f"{where}: {kind}", {"AV": A @ V, "Av": A @ V[:, 0]}
        H = hs.hessian(problem, space)
        exact = hs.block(hs.hessian(problem, hs.select(problem, "transformer.h.1.mlp.c_fc.weight", first=5)))
        yield f"{where}: block", {"matrix": exact.matrix, "products": torch.tensor(float(exact.products))}
        for name, found in {
            "trace": hs.trace(H, method="hutchinson", budget=12),
            "trace to a target": hs.trace(H, method="hutchinson", target_error=0.9, budget=60),
            "hutch++": hs.trace(H, method="hutch++", budget=24),
        }.items():
            yield (
                f"{where}: {name}",
                {"estimate": torch.tensor([found.estimate, found.standard_error], dtype=torch.float64)},
            )
        of = hs.density(H, probes=3, steps=6)
        yield (
            f"{where}: density",
            {"nodes": of.nodes, "weights": of.weights, "products": torch.tensor(float(of.products))},
        )
        for method in ("hutchinson", "nystrom"):
            yield f"{where}: diagonal, {method}", {"values": hs.diagonal(H, method, budget=40).flat()}


def _block(A: hs.Operator, route: str = "auto") -> dict[str, Tensor]:
    found = hs.block(A, route)
    return {"matrix": found.matrix, "products": torch.tensor(float(found.products))}


def _diagonals(share: Share) -> Iterator[Case]:
    """Every way to a diagonal."""
    problem = share(hs.causal_lm(tiny("gpt2"), ragged_batches()))
    part = hs.select(problem, "transformer.h.1.mlp.c_fc.weight", "transformer.ln_f.weight")
    for method in METHODS:
        found = hs.diagonal(hs.hessian(problem, part), method, budget=None if method == "exact" else 60)
        # Ranks that share a batch's columns build its graph twice.
        cost = {} if method == "exact" else {"units": torch.tensor(found.units)}
        yield f"diagonal, {method}", {"values": found.flat(), "error": torch.tensor(found.relative_error)} | cost
    yield "diagonal of a GGN", {"values": hs.diagonal(hs.ggn(problem, part), "sampled", budget=4).flat()}
