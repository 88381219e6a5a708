"""A plan says beforehand what a run then takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hesscope as hs
from architectures import tiny
from hesscope.algorithms.planning import plan_block
from hesscope.engines import make_engine
from hesscope.models import load_model, load_skeleton
from hesscope.operators import free

ENGINE = "reverse-over-reverse"


@pytest.mark.parametrize("size", [7, 120])
def test_a_run_takes_no_more_products_and_forward_passes_than_planned(size: int) -> None:
    batches = [{"input_ids": torch.tensor([[3, 4, 5, 6]])}, {"input_ids": torch.tensor([[7, 8]])}]
    problem = hs.causal_lm(tiny("gpt2"), batches)
    space = hs.select(problem, {"transformer.wte.weight": list(range(size))})
    H = hs.hessian(problem, space, engine=ENGINE)
    plan = plan_block(space.size, space.dtype.itemsize, make_engine(ENGINE))
    block = hs.block(H)
    assert 0.9 * plan.products <= block.products <= plan.products == size
    assert 0.3 * plan.passes <= H.units <= plan.passes
    assert plan.probe_products == (3 if block.provenance["probe"] else 0)
    assert block.matrix.nbytes == plan.matrix_bytes


def test_a_block_that_is_planned_to_fit_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_block(40, 4, make_engine(ENGINE))
    H = hs.operator(torch.eye(40))
    monkeypatch.setattr(free, "available_bytes", lambda _: plan.peak_bytes)
    assert hs.structure(H).size == 40
    monkeypatch.setattr(free, "available_bytes", lambda _: plan.peak_bytes - 1)
    with pytest.raises(hs.HesscopeError, match="at most 39"):
        hs.structure(H)


def test_a_skeleton_has_the_names_shapes_and_ties_of_the_model_and_no_weights(model_folder: Path) -> None:
    model, skeleton = load_model(model_folder), load_skeleton(model_folder)
    assert {n: p.shape for n, p in skeleton.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert {p.dtype for p in load_skeleton(model_folder, torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["./missing", "no-such-folder/of/a/model"])
def test_a_skeleton_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(hs.HesscopeError, match=r"config\.json"):
        load_skeleton(name)
