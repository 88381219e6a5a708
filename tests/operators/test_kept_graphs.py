"""Graphs kept between products change their cost, never their numbers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
from architectures import ragged_batches, tiny
from oracles import causal_lm, relative

EVERYTHING = 2**40


@pytest.fixture
def model() -> Any:
    return tiny("gpt2")


def make(model: nn.Module, graph_memory: int | None) -> Any:
    problem = hs.causal_lm(model, ragged_batches())
    return hs.hessian(
        problem, hs.select(problem, "transformer.h.1.*", "transformer.wte.weight"), graph_memory=graph_memory
    )


def columns(H: Any, count: int = 3) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(H.shape[0], count, generator=g, dtype=torch.float64)


def kept(H: Any) -> tuple[int, int]:
    described = H.describe()
    return described["graphs_kept"], described["graph_bytes"]


def test_kept_or_not_the_numbers_are_the_same(model: nn.Module) -> None:
    none, some, every = make(model, 0), None, make(model, EVERYTHING)
    V = columns(every)
    expected = every @ V
    assert kept(every)[0] == 3
    # Room for one batch's graph, or two, but not for all three.
    some = make(model, kept(every)[1] * 2 // 3)
    for H in (none, some, every):
        assert torch.equal(H @ V, expected)
        assert torch.equal(H @ V, expected)
    assert kept(none) == (0, 0)
    assert 0 < kept(some)[0] < 3
    assert 0 < kept(some)[1] <= kept(every)[1] * 2 // 3


def test_a_block_and_single_columns_agree(model: nn.Module) -> None:
    H = make(model, 0)
    V = columns(H)
    assert relative(torch.stack([H @ v for v in V.T], 1), H @ V) < 1e-14


def test_units_of_kept_graphs(model: nn.Module) -> None:
    """3 forward passes for the gradients' graphs, then 6 a product."""
    H = make(model, EVERYTHING)
    assert (H.units, H.products) == (0, 0)
    V = columns(H)
    spent = []
    for v in (V[:, :1], V[:, 0], V):
        H @ v
        spent.append((H.units, H.products))
    assert [units for units, _ in spent] == pytest.approx([9, 15, 33])
    assert [products for _, products in spent] == [1, 2, 5]


def test_units_of_graphs_that_are_not_kept(model: nn.Module) -> None:
    """3 and 6 for every product, but one graph serves all columns of a block."""
    H = make(model, 0)
    V = columns(H)
    spent = []
    for v in (V[:, 0], V[:, 0], V):
        H @ v
        spent.append(H.units)
    assert spent == pytest.approx([9, 18, 18 + 3 + 18])


def test_units_of_some_graphs_kept(model: nn.Module) -> None:
    """What is built again is paid for by its share of the tokens."""
    full = make(model, EVERYTHING)
    full @ columns(full, 1)
    H = make(model, kept(full)[1] * 2 // 3)
    v = columns(H, 1)
    H @ v
    first = H.units
    H @ v
    assert first == pytest.approx(9)
    assert 6 < H.units - first < 9


def test_a_gradient_needs_no_graph_and_keeps_none(model: nn.Module) -> None:
    H = make(model, EVERYTHING)
    risk, before = H.risk_and_gradient()
    assert H.units == pytest.approx(3)
    assert kept(H)[1] == 0
    H @ columns(H, 1)
    spent = H.units
    assert spent == pytest.approx(12)
    again, after = H.risk_and_gradient()  # from the kept graphs
    assert again == risk
    assert all(torch.allclose(before[name], after[name], rtol=1e-12) for name in before)
    assert H.units - spent == pytest.approx(3)


def test_release_lets_go_of_the_graphs(model: nn.Module) -> None:
    H = make(model, EVERYTHING)
    V = columns(H)
    expected = H @ V
    held = [weakref.ref(g) for g in H._graphs._kept.values()]
    assert len(held) == 3
    H.release()
    gc.collect()
    assert all(ref() is None for ref in held)
    assert kept(H) == (0, 0)
    before = H.units
    assert torch.equal(H @ V[:, 0], expected[:, 0])
    assert H.units - before == pytest.approx(9)
    assert kept(H)[0] == 3


def test_graphs_that_are_not_kept_are_gone_after_a_product(model: nn.Module) -> None:
    """One batch's graph lives at a time."""
    alive: list[int] = []
    made: list[weakref.ref[Any]] = []
    H = make(model, 0)
    linearize = H.engine.linearize

    def watched(problem: Any, b: int, space: Any) -> Any:
        gc.collect()
        alive.append(sum(ref() is not None for ref in made))
        linearization = linearize(problem, b, space)
        made.append(weakref.ref(linearization))
        return linearization

    H.engine.linearize = watched
    H @ columns(H)
    gc.collect()
    assert len(made) == 3
    assert max(alive) <= 1  # the loop's own variable may still hold the one before
    assert all(ref() is None for ref in made)


def step_of_an_optimizer(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(**ragged_batches()[0], labels=ragged_batches()[0]["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def one_entry(model: Any) -> None:
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] += 1.0


def one_outside_the_selection(model: Any) -> None:
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(2.0)


def another_storage(model: Any) -> None:
    model.transformer.ln_f.weight.data = model.transformer.ln_f.weight.data * 2.0


def another_state(model: nn.Module) -> None:
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})


CHANGES = [step_of_an_optimizer, one_entry, one_outside_the_selection, another_storage, another_state]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("graph_memory", [0, EVERYTHING])
def test_products_after_a_change_are_those_of_the_new_weights(
    model: nn.Module, change: Callable[[nn.Module], None], graph_memory: int
) -> None:
    problem = hs.causal_lm(model, ragged_batches())
    space = hs.select(
        problem, {"transformer.h.1.attn.c_attn.bias": [0, 9, 23], "transformer.wte.weight": [0, 77, 5, 200]}
    )
    H = hs.hessian(problem, space, graph_memory=graph_memory)
    identity = torch.eye(space.size, dtype=torch.float64)
    old = H @ identity
    change(model)
    new = causal_lm(model, ragged_batches(), space)
    assert relative(H @ identity, new.hessian) < 1e-10
    assert relative(old, new.hessian) > 1e-3
    risk, gradient = H.risk_and_gradient()
    assert risk == pytest.approx(new.risk, rel=1e-12)
    assert relative(space.flatten(gradient)[:, 0], new.gradient) < 1e-10


def test_products_after_a_change_of_a_buffer() -> None:
    """Running statistics are not parameters, but decide the numbers all the same."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double().eval()
    batches = [(torch.randn(n, 3).double(), torch.zeros(n, 1).double()) for n in (2, 5)]
    H = hs.hessian(hs.supervised(net, batches, loss="mse"), graph_memory=EVERYTHING)
    v = torch.ones(H.shape[0], dtype=torch.float64)
    old = H @ v
    with torch.no_grad():
        net[1].running_var.mul_(2.0)
    new = hs.hessian(hs.supervised(net, batches, loss="mse")) @ v
    assert torch.equal(H @ v, new)
    assert relative(old, new) > 1e-3


def test_perplexity_after_a_change_is_that_of_the_new_weights(model: nn.Module) -> None:
    problem = hs.causal_lm(model, ragged_batches(), objective="perplexity")
    space = hs.select(problem, "transformer.ln_f.*")
    H = hs.hessian(problem, space)
    identity = torch.eye(space.size, dtype=torch.float64)
    H @ identity
    step_of_an_optimizer(model)
    assert relative(H @ identity, causal_lm(model, ragged_batches(), space).perplexity_hessian) < 1e-10
