"""An exact block, through weights and through positions, equals a dense double backward for any selection."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import hesscope as hs
from architectures import ARCHITECTURES, ragged_batches, tiny
from hesscope.operators import batch_plan as plan_module
from oracles import causal_lm, relative

EXACT, CASTS, SINGLE = 1e-10, 1e-6, 1e-5
#: Four that differ most are quick; the rest of them take minutes.
QUICK = ("llama", "gpt2", "gemma2", "mixtral")
every_architecture = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ARCHITECTURES]
)


def rows_of_linear_layers(model: nn.Module) -> dict[str, Any]:
    """Rows, parts of rows and scattered entries of every weight that only linear layers use; a row of a Conv1D is a column."""
    g = torch.Generator().manual_seed(3)
    picked: dict[str, Any] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        kind = type(module).__name__
        if kind not in ("Linear", "Conv1D") or weight is model.get_input_embeddings().weight:
            continue
        unit = len(picked) % 3
        whole = torch.arange(weight.numel()).view(weight.shape)
        row = whole[unit] if kind == "Linear" else whole[:, unit]
        some = torch.randperm(weight.numel(), generator=g)[:3]
        picked[f"{name}.weight"] = row if unit < 2 else some
    return picked


def dense_and_block(model: nn.Module, index: Any, route: str, **more: Any) -> tuple[torch.Tensor, Any]:
    problem = hs.causal_lm(model, ragged_batches(), **more)
    space = hs.select(problem, index)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The loss does not depend on", hs.HesscopeWarning)
        found = hs.block(hs.hessian(problem, space), route=route)
    dense = causal_lm(model, ragged_batches(), space)
    expected = dense.perplexity_hessian if more.get("objective") == "perplexity" else dense.hessian
    return expected, found


@every_architecture
def test_parts_of_every_parameter(name: str) -> None:
    model = tiny(name)
    g = torch.Generator().manual_seed(1)
    index = {n: torch.randperm(p.numel(), generator=g)[:2] for n, p in model.named_parameters()}
    expected, found = dense_and_block(model, index, "auto")
    assert relative(found.matrix, expected) < (CASTS if ARCHITECTURES[name].casts else EXACT)
    assert found.provenance["matrix"]["route"] == "weights"


@every_architecture
@pytest.mark.parametrize("route", ["weights", "positions"])
def test_rows_of_linear_layers_across_layers_and_blocks(name: str, route: str) -> None:
    model = tiny(name)
    expected, found = dense_and_block(model, rows_of_linear_layers(model), route)
    assert relative(found.matrix, expected) < (CASTS if ARCHITECTURES[name].casts else EXACT)


@pytest.mark.parametrize("copies_of", [1, 64])
@pytest.mark.parametrize("route", ["weights", "positions", "auto"])
@pytest.mark.parametrize("name", ["gpt2", pytest.param("gpt-neox", marks=pytest.mark.slow), "opt"])
def test_copies_of_a_batch_do_not_change_the_block(
    name: str, route: str, copies_of: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plan_module._BUSY_TOKENS, "cpu", copies_of)
    model = tiny(name)
    expected, found = dense_and_block(model, rows_of_linear_layers(model), route)
    assert relative(found.matrix, expected) < EXACT
    assert (found.provenance["matrix"]["copies"] > 1) == (copies_of > 1)


def test_routes_are_taken_as_asked_and_auto_takes_the_fewer_products() -> None:
    model = tiny("llama")
    names = ["model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"]
    index = {names[0]: torch.arange(12), names[1]: torch.arange(2)}
    problem = hs.causal_lm(model, torch.randint(3, 37, (2, 5), generator=torch.Generator().manual_seed(0)))
    space = hs.select(problem, index)
    found = {route: hs.block(hs.hessian(problem, space), route=route) for route in ("weights", "positions", "auto")}
    assert found["weights"].products == 14
    assert found["positions"].products == 10
    assert found["auto"].products == 7  # five positions for the row of twelve, two weights for the pair
    assert found["auto"].provenance["matrix"]["route"] == "both"
    for other in ("positions", "auto"):
        assert relative(found[other].matrix, found["weights"].matrix) < CASTS


def test_float32_is_symmetric_before_symmetrisation() -> None:
    model = tiny("gpt2", torch.float32)
    expected, found = dense_and_block(model, rows_of_linear_layers(model), "weights")
    assert relative(found.matrix, expected) < SINGLE
    assert 0 < found.asymmetry < 5e-6


@pytest.mark.parametrize("route", ["weights", "positions"])
def test_perplexity_is_a_rank_one_update(route: str) -> None:
    model = tiny("gpt2")
    expected, found = dense_and_block(model, rows_of_linear_layers(model), route, objective="perplexity")
    assert relative(found.matrix, expected) < EXACT


def test_sums_and_multiples_of_hessians_have_their_matrices() -> None:
    model = tiny("gpt2")
    problem = hs.causal_lm(model, ragged_batches())
    space = hs.select(problem, "transformer.h.1.attn.c_proj.weight[:, 0]")
    H = hs.hessian(problem, space)
    expected = hs.block(H).matrix
    torch.testing.assert_close(hs.block(2.0 * H - 0.5 * H).matrix, 1.5 * expected, rtol=1e-10, atol=1e-14)


def test_frozen_dropout_keeps_one_mask() -> None:
    model = tiny("gpt2", resid_pdrop=0.3, attn_pdrop=0.3).train()
    problem = hs.causal_lm(model, ragged_batches(), dropout="frozen")
    space = hs.select(problem, "transformer.h.0.mlp.c_fc.weight[:, 0]")
    H = hs.hessian(problem, space)
    expected = H @ torch.eye(space.size, dtype=torch.float64)
    assert relative(hs.block(H).matrix, expected) < EXACT


class MixesSequences(nn.Module):
    """A language model whose layers see the mean over the batch: no sum over sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.first, self.last = nn.Linear(4, 6, bias=False), nn.Linear(6, 7, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(self.embed(input_ids)))
        logits: torch.Tensor = self.last(x * x.mean(0, keepdim=True))
        return logits


def test_a_model_that_mixes_sequences_is_noticed_through_positions() -> None:
    torch.manual_seed(0)
    model = MixesSequences().double()
    problem = hs.causal_lm(model, [{"input_ids": torch.randint(7, (3, 2))}])
    space = hs.select(problem, "first.weight[0]")
    with pytest.raises(hs.HesscopeError, match="mixes sequences of a batch; pass route='weights'"):
        hs.block(hs.hessian(problem, space), route="positions")


class SequenceFirst(nn.Module):
    """Attention and a layer on [T, S, C], or on [S, T, C]."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.up = nn.Embedding(7, 4), nn.Linear(4, 12, bias=False), nn.Linear(4, 3)
        self.head, self.first = nn.Linear(3, 7), first

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        x = x.transpose(0, 1) if self.first else x
        q, k, v = (y.transpose(0, 1) if self.first else y for y in self.qkv(x).chunk(3, -1))
        seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
        mixed = (q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ v
        z = self.head(torch.tanh(self.up(x + (mixed.transpose(0, 1) if self.first else mixed))))
        logits: torch.Tensor = z.transpose(0, 1) if self.first else z
        return logits


def sequence_first(first: bool, sizes: tuple[int, ...], index: Any) -> tuple[hs.Problem, Any]:
    g = torch.Generator().manual_seed(1)
    problem = hs.causal_lm(
        SequenceFirst(first).double(), [{"input_ids": torch.randint(7, (n, 4), generator=g)} for n in sizes]
    )
    return problem, hs.select(problem, index)


@pytest.mark.parametrize("make", [hs.hessian, hs.ggn])
@pytest.mark.parametrize("index", [{"qkv.weight": None}, {"qkv.weight": slice(0, 3), "up.weight": slice(0, 1)}])
@pytest.mark.parametrize("sizes", [(1,), (1, 3), (3, 2)])
def test_a_model_whose_first_axis_is_not_that_of_sequences(sizes: tuple[int, ...], index: Any, make: Any) -> None:
    """Neither copies of a batch nor its sequences are along the first axis of what its layers receive."""
    (problem, space), (usual, same) = (sequence_first(first, sizes, index) for first in (True, False))
    H = make(problem, space)
    dense = H @ torch.eye(space.size, dtype=torch.float64)
    assert relative(make(usual, same) @ torch.eye(space.size, dtype=torch.float64), dense) < EXACT
    assert relative(hs.block(H).matrix, dense) < EXACT
    assert relative(hs.block(make(usual, same), route="positions").matrix, dense) < EXACT
    assert relative(hs.diagonal(H, method="exact").flat(), dense.diagonal()) < EXACT
    with pytest.raises(hs.HesscopeError, match="mixes sequences of a batch; pass route='weights'"):
        hs.block(H, route="positions")


@pytest.mark.parametrize("route", ["weights", "auto"])
def test_copies_of_a_batch_do_not_mix_in_a_model_that_mixes(route: str) -> None:
    torch.manual_seed(0)
    problem = hs.causal_lm(MixesSequences().double(), [{"input_ids": torch.randint(7, (3, 2))}])
    H = hs.hessian(problem, hs.select(problem, "first.weight"))
    dense = H @ torch.eye(H.space.size, dtype=torch.float64)
    assert relative(hs.block(H, route=route).matrix, dense) < EXACT
    assert relative(hs.diagonal(H, method="exact").flat(), dense.diagonal()) < EXACT


def test_draws_and_eigenvalues_per_sequence_of_such_a_model() -> None:
    (problem, space), (usual, same) = (sequence_first(first, (3, 1), {"qkv.weight": None}) for first in (True, False))
    G = hs.ggn(problem, space)
    exact = (G @ torch.eye(space.size, dtype=torch.float64)).diagonal()
    found = hs.diagonal(G, method="sampled", budget=2000)
    error = torch.cat([x.flatten() for x in found.standard_error.values()])
    assert float(((found.flat() - exact) / error).abs().max()) < 4.5
    with pytest.raises(hs.HesscopeError, match="sequences of a batch apart"):
        hs.kfac(problem, space, corrected=True, per="sequence")
    hs.kfac(usual, same, corrected=True, per="sequence")


def test_an_unused_parameter_has_zero_rows_and_a_warning() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    torch.manual_seed(0)
    problem = hs.supervised(Unused().double(), [(torch.randn(4, 3).double(), torch.tensor([0, 1, 1, 0]))])
    with pytest.warns(hs.HesscopeWarning, match=r"spare\.weight"):
        found = hs.block(hs.hessian(problem))
    assert float(found.matrix[6:].abs().max()) == 0.0
    assert float(found.matrix[:6, :6].abs().min()) > 0.0


def test_an_unknown_route_is_refused() -> None:
    with pytest.raises(hs.HesscopeError, match="Expected route to be one of auto, weights, positions, got 'rows'"):
        hs.block(hs.operator(torch.eye(2)), route="rows")


def test_the_graphs_of_the_probe_before_a_long_run_make_room_for_the_blocks_own() -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    H = hs.hessian(problem, hs.select(problem, "transformer.h.0.mlp.c_fc.weight"))
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    assert H.describe()["graphs_kept"] == 3
    assert H.shape[0] >= 100  # so that a probe comes first
    hs.block(H)
    assert H.describe()["graphs_kept"] == 0


@pytest.mark.parametrize("route", ["weights", "positions"])
def test_a_batch_without_targets_adds_nothing(route: str) -> None:
    model, batches = tiny("gpt2"), ragged_batches()
    empty = batches[0] | {"labels": torch.full_like(batches[0]["input_ids"], -100)}

    def found(given: list[Any]) -> torch.Tensor:
        problem = hs.causal_lm(model, given)
        return hs.block(hs.hessian(problem, hs.select(problem, "*h.1.attn.c_proj.weight[:, 0]")), route=route).matrix

    assert relative(found([*batches, empty]), found(batches)) < EXACT
