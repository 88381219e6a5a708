"""Models whose weights rest on the CPU or on disk, as accelerate arranges it, have the curvature that they have in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hesscope as hs
from architectures import ARCHITECTURES, ragged_batches, tiny
from devices.program import difference
from hesscope.engines import ENGINES
from hesscope.models import offloaded
from oracles import relative

accelerate = pytest.importorskip("accelerate", reason="accelerate offloads weights")

from devices.spread import FOR_FLOAT32, PARTS, SPREAD  # noqa: E402

#: What is neither embedding nor block.
OUTSIDE = {"transformer.wte": "cpu", "transformer.wpe": "disk", "transformer.ln_f": "disk", "lm_head": "cpu"}
#: A float64 model that casts to float32 inside rounds as float32 does.
CASTS = {True: 1e-6, False: 1e-10}


def elsewhere(name: str, where: str, folder: Path) -> nn.Module:
    """The model with every weight on disk, or on the CPU but out of the parameters."""
    model = tiny(name)
    if where == "cpu":
        return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))  # type: ignore[no-any-return]
    model.save_pretrained(folder)
    options = {"device_map": {"": "disk"}, "offload_folder": str(folder / "rest")}
    return type(model).from_pretrained(folder, dtype=torch.float64, **options)  # type: ignore[no-any-return]


def pair(name: str, where: str, folder: Path, **more: Any) -> tuple[hs.Problem, hs.Problem]:
    """The same problem on a model in memory, and on one that is elsewhere."""
    there = elsewhere(name, where, folder)
    return hs.causal_lm(tiny(name), ragged_batches(), **more), hs.causal_lm(there, ragged_batches(), **more)


def gap(A: Any, B: Any, k: int = 2) -> float:
    """The relative difference of two operators' products."""
    v = A.space.gaussian(0, [f"v{i}" for i in range(k)])
    return relative(A.space.flatten(A.matmat(v)), B.space.flatten(B.matmat(v)))


def state(model: nn.Module) -> dict[str, Any]:
    """All that a computation on an offloaded model might leave changed."""
    found: dict[str, Any] = {name: (id(p), p.is_meta) for name, p in model.named_parameters(remove_duplicate=False)}
    for name, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        found[f"hook {name}"] = (
            None if hook is None else (id(hook), hook.offload, sorted(vars(hook)), vars(module)["forward"])
        )
    return found


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("gpt2", "disk"),
        ("llama", "disk"),
        ("opt", "disk"),
        ("gemma3", "disk"),
        ("mixtral", "disk"),
        ("mixtral", "cpu"),
        ("gpt-neox", "cpu"),
    ],
)
def test_products_are_those_of_the_model_in_memory(name: str, where: str, tmp_path: Path) -> None:
    here, there = pair(name, where, tmp_path)
    before = state(there.model)
    assert all(p.is_meta for p in there.model.parameters())
    for make in (hs.hessian, hs.ggn):
        H = make(there)
        assert gap(make(here), H) < CASTS[bool(ARCHITECTURES[name].casts)]
        assert H.describe()["engine_choice"].startswith("streamed")
    assert state(there.model) == before


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "auto"])
def test_every_engine(engine: str, tmp_path: Path) -> None:
    here, there = pair("gpt2", "disk", tmp_path)
    space = hs.select(there, "transformer.h.1.*")
    tolerance = 1e-5 if engine == "finite-difference" else 1e-10
    assert gap(hs.hessian(here, space), hs.hessian(there, space, engine=engine)) < tolerance


def test_some_weights_elsewhere(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    places = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "transformer.h.0": "disk", "lm_head": "cpu"}
    places |= {f"transformer.h.{i}": "cpu" for i in range(1, tiny("gpt2").config.n_layer)} | {
        "transformer.ln_f": "disk"
    }
    model = type(tiny("gpt2")).from_pretrained(
        tmp_path, device_map=places, offload_folder=str(tmp_path / "rest"), dtype=torch.float64
    )
    assert 0 < sum(p.is_meta for p in model.parameters()) < len(list(model.parameters()))
    here, there = (hs.causal_lm(m, ragged_batches()) for m in (tiny("gpt2"), model))
    for patterns in ((), ("transformer.h.0.*",), ("transformer.h.1.*",), ("!transformer.h.*",)):
        space = hs.select(there, *patterns)
        assert {c.device.type for c in space.coordinates} == {"cpu"}
        assert gap(hs.hessian(here, space), hs.hessian(there, space)) < 1e-10


def test_algorithms(tmp_path: Path) -> None:
    here, there = pair("gpt2", "disk", tmp_path)
    space = hs.select(there, "transformer.h.1.mlp.*weight")
    A, B = hs.hessian(here, space), hs.hessian(there, space)
    assert relative(hs.eigs(A, k=2).eigenvalues, hs.eigs(B, k=2).eigenvalues) < 1e-8
    assert hs.trace(A, budget=4).estimate == pytest.approx(hs.trace(B, budget=4).estimate, rel=1e-8)
    small = hs.select(there, "transformer.h.1.mlp.c_fc.weight", first=4)
    assert relative(hs.block(hs.hessian(here, small)).matrix, hs.block(hs.hessian(there, small)).matrix) < 1e-10
    for method in ("hutchinson", "nystrom"):
        a, b = (hs.diagonal(H, method=method, budget=40).flat() for H in (A, B))
        assert relative(a, b) < 1e-8
    a, b = (hs.kfac(problem, space) for problem in (here, there))
    assert gap(a, b) < 1e-10
    a, b = (hs.groups(H, by="layer", probes=2, steps=3, tol=1.0).nodes for H in (A, B))
    assert relative(a, b) < 1e-8


@pytest.fixture
def with_hooks() -> nn.Module:
    """A float32 model on one device, with the hooks and the `to` of a model that is spread over several."""
    return accelerate.dispatch_model(tiny("gpt2", torch.float32), {"": "cpu"}, force_hooks=True)  # type: ignore[no-any-return]


def test_verifying_converts_a_copy_and_not_the_model(with_hooks: nn.Module) -> None:
    problem = hs.causal_lm(with_hooks, ragged_batches())
    before = {name: (id(p), p.dtype) for name, p in with_hooks.named_parameters()}
    assert hs.verify(problem).passed
    assert 0 < hs.hessian(problem).product_error().relative < 1e-4  # type: ignore[operator]
    assert {name: (id(p), p.dtype) for name, p in with_hooks.named_parameters()} == before


def test_the_head_is_in_chunks_where_hooks_move_the_logits(with_hooks: nn.Module) -> None:
    for engine in ("reverse-over-reverse", "streamed"):
        for make in (hs.hessian, hs.ggn):
            H = make(hs.causal_lm(with_hooks, ragged_batches()), engine=engine)
            H.matmat(H.space.rademacher(0, [0]))
            assert H.describe()["head"].startswith("logits in chunks")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("places", [{"": "disk"}, {"transformer.h.0": "disk", "transformer.h.1": "cpu"} | OUTSIDE])
def test_every_operator_and_algorithm(places: dict[str, str], tmp_path: Path) -> None:
    found: dict[str, float | str] = {}
    for dtype in (torch.float64, torch.float32):
        tiny("gpt2").save_pretrained(tmp_path)
        options = {"device_map": places, "offload_folder": str(tmp_path / "rest")}
        models = [type(tiny("gpt2")).from_pretrained(tmp_path, dtype=dtype, **more) for more in ({}, options)]
        assert sum(p.is_meta for p in models[1].parameters()) > 2
        here, there = (hs.causal_lm(model, ragged_batches()) for model in models)
        for what, run in SPREAD.items():
            if (what in FOR_FLOAT32) == (dtype == torch.float32):
                found[what] = difference(run, there, here, PARTS["gpt2"])
    assert "no copy in float64" in str(hs.hessian(there).product_error())
    del found["product error"]
    assert len(found) > 35
    # A finite difference has its own error; what runs in float32 has float32's rounding.
    limits = {what: 1e-5 if what in (*FOR_FLOAT32, "finite-difference") else 1e-10 for what in found}
    assert {what: gap for what, gap in found.items() if isinstance(gap, str) or gap > limits[what]} == {}


def test_a_weight_is_not_in_memory_while_it_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A streamed product has no more than a block's weights, and those outside blocks, at a time."""
    _, there = pair("gpt2", "disk", tmp_path)
    H = hs.hessian(there, hs.select(there, "transformer.h.*.mlp.*"))
    H.matmat(H.space.gaussian(0, ["v"]))  # with the check against another engine, which has what it differentiates
    store: Any = offloaded(there.model)
    most, alive = 0, {}

    def load(name: str, real: Any = store.load) -> Any:
        nonlocal most
        value = real(name)
        alive[id(value)] = name
        import weakref

        weakref.finalize(value, alive.pop, id(value))
        most = max(most, len({n.split(".")[2] for n in alive.values() if n.startswith("transformer.h.")}))
        return value

    monkeypatch.setattr(store, "load", load)
    H.matmat(H.space.gaussian(0, ["w"]))
    assert most == 1


def test_an_exception_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    _, there = pair("gpt2", "disk", tmp_path)
    before = state(there.model)

    def stop(*_: Any) -> None:
        raise RuntimeError("in the middle")

    handle = there.model.transformer.h[1].mlp.c_fc.register_forward_hook(stop)  # type: ignore[union-attr,operator,index]
    with pytest.raises(RuntimeError, match="in the middle"):
        there.risk()
    handle.remove()
    assert state(there.model) == before
    assert there.risk() == pytest.approx(hs.causal_lm(tiny("gpt2"), ragged_batches()).risk(), rel=1e-12)


def test_an_autocast_around_the_caller_is_switched_off(tmp_path: Path) -> None:
    tiny("gpt2", torch.float32).save_pretrained(tmp_path)
    options = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "rest"), "dtype": torch.float32}
    there = hs.causal_lm(type(tiny("gpt2")).from_pretrained(tmp_path, **options), ragged_batches())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = there.risk()
    assert inside == there.risk()


def test_ties_that_offloading_has_cut_are_refused() -> None:
    model = accelerate.cpu_offload(tiny("gpt2"), execution_device=torch.device("cpu"))
    with pytest.raises(
        hs.HesscopeError, match=r"Expected lm_head.weight and transformer.wte.weight to be one parameter"
    ):
        hs.causal_lm(model, ragged_batches())


def test_fingerprints_are_those_of_the_weights(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    kind = type(tiny("gpt2"))
    options = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "rest")}
    models = [kind.from_pretrained(tmp_path, dtype=torch.float64, **more) for more in ({}, options)]
    here, there = (hs.causal_lm(model, ragged_batches()).fingerprint for model in models)
    assert here == there


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    model = type(tiny("gpt2")).from_pretrained(tmp_path, device_map={"": "disk"}, offload_folder=str(tmp_path / "rest"))
    with pytest.raises(hs.HesscopeError, match="no other dtype= or device= with a model that is spread"):
        hs.causal_lm(model, ragged_batches(), dtype="float32")
