"""A run that is killed and started again ends with the very numbers of one that was not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import hesscope as hs
from hesscope.algorithms import checkpoint as checkpoints
from hesscope.algorithms.checkpoint import Checkpoint
from hesscope.algorithms.driver import Iteration
from hesscope.operators.batch_columns import BatchColumns
from hesscope.results import Result
from spectra import SPECTRA, generic, noisy, symmetric


class Killed(BaseException):
    """What stands for a SIGKILL: nothing in the package catches it."""


@pytest.fixture
def killed_in_every_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Result]], tuple[Result, int]]:
    """Repeat a call, each time killed at the end of its second step, before anything of that is kept, until it returns.

    Returns the result and how often the call was killed.
    """
    monkeypatch.setattr(checkpoints, "_SHARE", 0.0)
    made, depth = [-(10**9)], [0]

    def interrupted(step: Callable[[Any], None]) -> Callable[[Any], None]:
        def counted(self: Any) -> None:
            depth[0] += 1  # an iteration may be made of others, whose steps are parts of its own
            try:
                step(self)
            finally:
                depth[0] -= 1
            made[0] += depth[0] == 0
            if made[0] == 2:
                raise Killed

        return counted

    def repeat(call: Callable[[], Result]) -> tuple[Result, int]:
        for times in range(1000):
            made[0] = 0
            try:
                return call(), times
            except Killed:
                continue
            finally:
                made[0] = -(10**9)
        raise AssertionError("the run makes no headway")

    for kind in _descendants(Iteration):
        if "step" in vars(kind):
            monkeypatch.setattr(kind, "step", interrupted(kind.step))
    return repeat


def _descendants(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from _descendants(child)


ALGORITHMS: dict[str, Callable[..., Result]] = {
    "block": hs.block,
    "block through weights": lambda H, **c: hs.block(H, "weights", **c),
    "block through positions": lambda H, **c: hs.block(H, "positions", **c),
    "exact diagonal": lambda H, **c: hs.diagonal(H, "exact", **c),
    "diagonal": lambda H, **c: hs.diagonal(H, "hutchinson", budget=53, **c),
    "diagonal to a target": lambda H, **c: hs.diagonal(H, "hutchinson", target_error=0.25, **c),
    "gaussian diagonal": lambda H, **c: hs.diagonal(H, "gaussian", budget=21, **c),
    "deflated diagonal": lambda H, **c: hs.diagonal(H, "deflated", budget=21, **c),
    "XDiag": lambda H, **c: hs.diagonal(H, "xdiag", budget=20, **c),
    "Nystroem diagonal to a target": lambda H, **c: hs.diagonal(H, "nystrom", budget=60, target_error=0.01, **c),
    "automatic diagonal": lambda H, **c: hs.diagonal(H, max_seconds=1e6, budget=min(61, H.shape[0] - 1), **c),
    "per-sequence diagonal": lambda H, **c: hs.diagonal(H, "per-sequence", budget=9, **c),
    "control-variate diagonal": lambda H, **c: hs.diagonal(H, "control-variate", budget=19, **c),
    "diagonal to a target in vain": lambda H, **c: hs.diagonal(H, target_error=1e-3, budget=400, **c),
    "diagonal study": lambda H, **c: hs.diagonal_study(H, ["nystrom"], [8, 12], seeds=2, **c),
    "exact trace": lambda H, **c: hs.trace(H, "exact", **c),
    "trace": lambda H, **c: hs.trace(H, "hutchinson", budget=53, **c),
    "trace to a target": lambda H, **c: hs.trace(H, "hutchinson", target_error=0.2, **c),
    "eigs": lambda H, **c: hs.eigs(H, k=3, which="BE", **c),
    "eigs within a limit": lambda H, **c: hs.eigs(H, k=3, which="BE", max_products=42, **c),
    "lanczos": lambda H, **c: hs.lanczos(H, min(12, H.shape[0]), keep_basis=True, **c),
    "density": lambda H, **c: hs.density(H, probes=3, steps=7, **c),
    "eigs with restarts": lambda H, **c: hs.eigs(H, k=3, max_basis=8, max_products=60, **c),
    "power": lambda H, **c: hs.eigs(H, k=2, method="power", momentum="auto", max_products=45, tol=0.05, **c),
    "stochastic power": lambda H, **c: hs.eigs(H, k=2, method="power", batches=1, max_products=24, **c),
    "groups": lambda H, **c: hs.groups(H, "layer", probes=3, steps=4, max_products=5, tol=10.0, **c),
    "hutch++": lambda H, **c: hs.trace(H, "hutch++", budget=36, **c),
    "xtrace to a target": lambda H, **c: hs.trace(H, "xtrace", budget=36, target_error=0.01, **c),
    "three-term lanczos": lambda H, **c: hs.lanczos(H, min(12, H.shape[0]), reorthogonalize=False, **c),
    "three-term density": lambda H, **c: hs.density(H, probes=3, steps=7, basis=False, **c),
}


def matrix(dtype: torch.dtype) -> hs.Operator:
    return hs.operator((generic(40) + 2 * torch.eye(40)).to(dtype))


def wide_matrix(dtype: torch.dtype) -> hs.Operator:
    return hs.operator(generic(110).to(dtype))


def language_model(dtype: torch.dtype, engine: str = "auto", objective: str = "nll") -> hs.Operator:
    from architectures import tiny

    torch.manual_seed(0)
    batches = [torch.randint(0, 20, (2, 7)), torch.randint(0, 20, (1, 4))]
    problem = hs.causal_lm(tiny("llama", dtype), [{"input_ids": ids} for ids in batches], objective=objective)
    return hs.hessian(problem, hs.select(problem, "model.layers.1.self_attn.k_proj.weight"), engine)


def assert_same(found: Result, expected: Result) -> None:
    """The same bits in every tensor, the same facts but for the cost in seconds and the provenance."""
    assert list(found.tensors()) == list(expected.tensors())
    for name, tensor in expected.tensors().items():
        if name == "cell_seconds":  # a cost, of each part
            continue
        assert torch.equal(found.tensors()[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name
        assert found.tensors()[name].dtype == tensor.dtype
    own = ("seconds", "units", "provenance")
    assert {k: v for k, v in found.facts().items() if k not in own} == {
        k: v for k, v in expected.facts().items() if k not in own
    }


def perplexity(dtype: torch.dtype) -> hs.Operator:
    """A sum with a rank-one matrix."""
    return language_model(dtype, objective="perplexity")


def finite_differences(dtype: torch.dtype) -> hs.Operator:
    return language_model(dtype, "finite-difference")


def repeated_eigenvalues(dtype: torch.dtype) -> hs.Operator:
    """Where one Krylov space ends, and an eigenvalue search restarts."""
    return hs.operator(symmetric(SPECTRA["repeated"]).to(dtype))


def zero(dtype: torch.dtype) -> hs.Operator:
    """Where every step restarts or ends the run."""
    return hs.operator(torch.zeros(40, 40, dtype=dtype))


def noisy_products(dtype: torch.dtype) -> hs.Operator:
    """Where noise of the products stands in the residuals."""
    return hs.operator(noisy((generic(40) + 2 * torch.eye(40)).to(dtype).__matmul__, bits=11), size=40, dtype=dtype)


def two_layers(dtype: torch.dtype) -> hs.Operator:
    H = language_model(dtype)
    return hs.hessian(H.problem, hs.select(H.problem, "model.layers.1.self_attn.[kv]_proj.weight"))  # type: ignore[attr-defined]


CASES = [
    *(
        (name, matrix)
        for name in ALGORITHMS
        if not any(word in name for word in ("through", "stochastic", "per-sequence", "control", "in vain"))
    ),
    ("per-sequence diagonal", language_model),
    ("control-variate diagonal", language_model),
    ("control-variate diagonal", perplexity),
    ("diagonal to a target in vain", wide_matrix),
    ("stochastic power", language_model),
    ("groups", two_layers),
    *((name, language_model) for name in ("block through weights", "diagonal", "eigs", "density")),
    ("block through positions", perplexity),
    ("lanczos", finite_differences),
    *((name, repeated_eigenvalues) for name in ("eigs", "eigs with restarts", "lanczos", "density")),
    ("eigs", noisy_products),
    ("eigs within a limit", noisy_products),
    *((name, zero) for name in ("block", "diagonal to a target", "eigs", "density")),
]


@pytest.mark.filterwarnings("ignore:.* eigenpairs missed tol")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "make"), CASES)
def test_a_run_killed_in_every_step_ends_with_the_same_bits(
    name: str,
    dtype: torch.dtype,
    make: Callable[[torch.dtype], hs.Operator],
    killed_in_every_step: Callable[..., tuple[Result, int]],
    tmp_path: Path,
) -> None:
    run = ALGORITHMS[name]
    expected = run(make(dtype))
    found, kills = killed_in_every_step(lambda: run(make(dtype), checkpoint=Checkpoint(tmp_path / "kept", every=0.0)))
    assert kills > 0
    assert_same(found, expected)
    assert found.provenance["resumed"] == kills
    assert expected.provenance["resumed"] == 0


def test_a_choice_of_a_probe_for_every_sequence_is_kept(
    killed_in_every_step: Callable[..., tuple[Result, int]], tmp_path: Path
) -> None:
    from architectures import tiny

    def run(**kept: Any) -> Result:
        problem = hs.causal_lm(tiny("llama"), [{"input_ids": torch.arange(3, 8).repeat(24, 1)}])
        return hs.diagonal(hs.hessian(problem, hs.select(problem, "*.0.*_proj.weight")), budget=60, **kept)

    found, kills = killed_in_every_step(lambda: run(checkpoint=Checkpoint(tmp_path / "kept", every=0.0)))
    assert kills > 10
    assert found.facts()["method"] == "per-sequence"
    assert_same(found, run())


def test_a_choice_of_a_control_variate_and_its_labels_are_kept(
    killed_in_every_step: Callable[..., tuple[Result, int]], tmp_path: Path
) -> None:
    def run(**kept: Any) -> Result:
        x = torch.randn(48, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        model = torch.nn.Linear(60, 3, bias=False, dtype=torch.float64)
        torch.nn.init.zeros_(model.weight)
        return hs.diagonal(hs.hessian(hs.supervised(model, [(x, torch.arange(48) % 3)])), budget=110, **kept)

    found, kills = killed_in_every_step(lambda: run(checkpoint=Checkpoint(tmp_path / "kept", every=0.0)))
    assert kills > 3
    assert found.facts()["method"] == "control-variate"
    assert_same(found, run())


def test_a_block_is_divided_as_before_whatever_memory_is_free_now(
    killed_in_every_step: Callable[..., tuple[Result, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process finds room for another number of columns at once."""
    expected = hs.block(language_model(torch.float64), "weights")
    room = iter(range(1, 10**6))
    monkeypatch.setattr(BatchColumns, "_copies", lambda self, wanted: max(1, min(wanted, next(room) % 5)))
    first = hs.block(language_model(torch.float64), "weights")
    room = iter(range(1, 10**6))
    found, kills = killed_in_every_step(
        lambda: hs.block(language_model(torch.float64), "weights", checkpoint=Checkpoint(tmp_path / "kept", every=0.0))
    )
    assert kills > 10
    assert_same(found, first)
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-9, atol=1e-13)
