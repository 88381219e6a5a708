"""Kept graphs go away when they are released: no cycle holds the activations."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
from torch import nn

import hesscope as hs


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 6), nn.Softmax(dim=-1), nn.Linear(6, 3)]
    return nn.Sequential(*layers)


def watch_outputs(model: nn.Module) -> list[weakref.ref[Any]]:
    """Weak references to every module's output."""
    seen: list[weakref.ref[Any]] = []
    for module in model.modules():
        module.register_forward_hook(lambda _, __, output: seen.append(weakref.ref(output)))
    return seen


def test_no_activation_outlives_a_released_graph() -> None:
    model = small_model()
    batches = [(torch.randn(n, 4), torch.randint(0, 3, (n,))) for n in (5, 2)]
    problem = hs.supervised(model, batches)
    assert problem.N == 7
    H = hs.hessian(problem)
    seen = watch_outputs(model)
    H @ torch.ones(H.shape[0])
    assert H.describe()["graph_bytes"] > 0
    H.release()  # type: ignore[attr-defined]
    gc.collect()
    assert [ref for ref in seen if ref() is not None] == []


def test_nothing_is_held_between_products_without_graph_memory() -> None:
    model = small_model()
    problem = hs.supervised(model, [(torch.randn(5, 4), torch.randint(0, 3, (5,)))])
    H = hs.hessian(problem, graph_memory=0)
    seen = watch_outputs(model)
    H @ torch.ones(H.shape[0])
    gc.collect()
    assert [ref for ref in seen if ref() is not None] == []


def test_graphs_of_probes_for_every_sequence_go_too() -> None:
    """When they are released, and when a product needs the room."""
    model = small_model()
    problem = hs.supervised(model, [(torch.randn(n, 4), torch.randint(0, 3, (n,))) for n in (5, 2)])
    H = hs.hessian(problem)
    for let_go in (lambda: H.release(), lambda: H @ torch.ones(H.shape[0])):  # type: ignore[attr-defined]
        seen = watch_outputs(model)
        H.probe_diagonal(0, 0)
        held = len([ref for ref in seen if ref() is not None])
        made = list(seen)
        let_go()
        gc.collect()
        assert held > 0
        assert [ref for ref in made if ref() is not None] == []
