"""Selections by layer and block, by rows, by the first entries and at random, against W[index] by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
from architectures import ragged_batches, tiny
from oracles import relative

LLAMA = "model.layers.{}.{}.weight"
MATRICES = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


def names(model: nn.Module, *patterns: Any, **keywords: Any) -> list[str]:
    return hs.select(model, *patterns, **keywords).names


def values(model: nn.Module, *patterns: Any, **keywords: Any) -> Tensor:
    """The selected weights, in the selection's order."""
    space = hs.select(model, *patterns, **keywords)
    return torch.cat([c.gather(model.get_parameter(c.name).detach()).reshape(-1) for c in space.coordinates])


def weight(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(name).detach()


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny("llama", num_hidden_layers=4)


@pytest.mark.parametrize(
    ("keywords", "blocks", "layers"),
    [
        ({"layers": "self_attn.q_proj", "blocks": 0}, [0], ["self_attn.q_proj"]),
        ({"layers": "q_proj", "blocks": "0,3"}, [0, 3], ["self_attn.q_proj"]),
        ({"layers": "q_proj"}, [0, 1, 2, 3], ["self_attn.q_proj"]),
        ({"layers": "mlp.down_proj,self_attn.q_proj", "blocks": ":2"}, [0, 1], ["self_attn.q_proj", "mlp.down_proj"]),
        ({"layers": ["down_proj", " q_proj "], "blocks": [3, 1]}, [1, 3], ["self_attn.q_proj", "mlp.down_proj"]),
        ({"layers": "self_attn.*", "blocks": -1}, [3], MATRICES[:4]),
        ({"layers": "?_proj", "blocks": -1}, [3], MATRICES[:4]),
        ({"layers": "q_proj,self_attn.q_proj.weight", "blocks": 2}, [2], MATRICES[:1]),
        ({"layers": "all", "blocks": 2}, [2], MATRICES),
        ({"blocks": slice(1, 3)}, [1, 2], MATRICES),
        ({"blocks": range(0, 4, 3)}, [0, 3], MATRICES),
        ({"layers": "all"}, [0, 1, 2, 3], MATRICES),
        ({"layers": "input_layernorm", "blocks": 1}, [1], ["input_layernorm"]),
        ({"layers": "*norm", "blocks": 1}, [1], ["input_layernorm", "post_attention_layernorm"]),
    ],
)
def test_layers_and_blocks(llama: nn.Module, keywords: dict[str, Any], blocks: list[int], layers: list[str]) -> None:
    space = hs.select(llama, **keywords)
    assert space.names == [LLAMA.format(block, layer) for block in blocks for layer in layers]
    assert [(c.block, c.layer) for c in space.coordinates] == [(b, layer) for b in blocks for layer in layers]
    assert all(c.index is None for c in space.coordinates)


def test_a_layer_outside_the_blocks_goes_by_its_name_and_a_tied_head_by_the_embeddings(llama: nn.Module) -> None:
    assert names(llama, layers="lm_head") == ["model.embed_tokens.weight"]
    assert names(llama, layers="embed_tokens") == ["model.embed_tokens.weight"]
    assert names(llama, layers="model.norm") == ["model.norm.weight"]
    untied = tiny("gpt-neox")
    assert names(untied, layers="lm_head,attention.dense", blocks=1) == [
        "gpt_neox.layers.1.attention.dense.weight",
        "lm_head.weight",
    ]


def test_a_whole_name_wins_over_an_end_of_others() -> None:
    model = tiny("gpt2")
    assert names(model, layers="c_proj", blocks=0) == [
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_proj.weight",
    ]
    model.transformer.h[0].c_proj = nn.Linear(2, 2)
    assert names(model, layers="c_proj", blocks=0) == ["transformer.h.0.c_proj.weight"]


def test_blocks_that_differ_give_what_they_have() -> None:
    model = tiny("jamba")
    assert names(model, layers="q_proj") == [LLAMA.format(i, "self_attn.q_proj") for i in (1, 3)]
    assert names(model, layers="mamba.in_proj", blocks=":3") == [LLAMA.format(i, "mamba.in_proj") for i in (0, 2)]


def test_a_shared_block_is_selected_once() -> None:
    model = tiny("llama")
    model.model.layers[1] = model.model.layers[0]
    assert (
        names(model, layers="q_proj")
        == names(model, layers="q_proj", blocks=1)
        == ["model.layers.0.self_attn.q_proj.weight"]
    )


def test_a_union_with_patterns_and_an_exclusion(llama: nn.Module) -> None:
    q, k = LLAMA.format(1, "self_attn.q_proj"), LLAMA.format(1, "self_attn.k_proj")
    assert names(llama, "model.norm.weight", layers="q_proj", blocks=1) == [q, "model.norm.weight"]
    assert names(llama, "!*.k_proj.*", layers="q_proj,k_proj", blocks=1) == [q]
    space = hs.select(llama, {k: [5, 2]}, f"{q}[1, 0:2]", "model.norm.weight[:]", layers="v_proj", blocks=0, first=3)
    assert space.labels == [
        *(f"{LLAMA.format(0, 'self_attn.v_proj')}[0, {j}]" for j in range(3)),
        *(f"{q}[1, {j}]" for j in range(2)),
        f"{k}[0, 5]",
        f"{k}[0, 2]",
        *(f"model.norm.weight[{j}]" for j in range(8)),
    ]


# ---- parts of layers, each against W[index]

FIRST = {"llama": LLAMA.format(1, "mlp.down_proj"), "gpt2": "transformer.h.1.mlp.c_proj.weight"}
STACKS = {"mixtral": "model.layers.1.mlp.experts.down_proj", "llama4": "model.layers.1.feed_forward.experts.down_proj"}


def unit_major(architecture: str, W: Tensor) -> Tensor:
    """[units, inputs] by hand: GPT-2 and Llama 4 store the transpose, experts are stacked."""
    W = W.mT if architecture in ("gpt2", "llama4") else W
    return W.reshape(-1, W.shape[-1])


@pytest.mark.parametrize("architecture", [*FIRST, *STACKS])
@pytest.mark.parametrize(
    ("rows", "picked"), [(0, [0]), ("0,5-7", [0, 5, 6, 7]), ([6, 1], [6, 1]), (slice(2, 4), [2, 3]), ("-1", [-1])]
)
def test_rows_are_output_units(architecture: str, rows: Any, picked: list[int]) -> None:
    model, name = tiny(architecture), (FIRST | STACKS)[architecture]
    expected = unit_major(architecture, weight(model, name))[picked]
    keywords = {"layers": name.split(".1.")[1], "blocks": 1, "rows": rows}
    assert torch.equal(values(model, **keywords), expected.reshape(-1))
    assert hs.select(model, **keywords).coordinates[0].shape == expected.shape


@pytest.mark.parametrize("architecture", [*FIRST, *STACKS])
@pytest.mark.parametrize(("rows", "first"), [(None, 5), (None, 40), ([6, 1], 3), ([6, 1], 14)])
def test_the_first_entries_go_row_after_row(architecture: str, rows: Any, first: int) -> None:
    model, name = tiny(architecture), (FIRST | STACKS)[architecture]
    W = unit_major(architecture, weight(model, name))
    expected = (W if rows is None else W[rows]).reshape(-1)[:first]
    assert torch.equal(values(model, name, rows=rows, first=first), expected)


def test_labels_say_parameter_and_index() -> None:
    space = hs.select(tiny("gpt2"), layers="attn.c_attn", blocks=0, rows=[7], first=2)
    assert space.labels == ["transformer.h.0.attn.c_attn.weight[0, 7]", "transformer.h.0.attn.c_attn.weight[1, 7]"]
    space = hs.select(tiny("mixtral"), layers="experts.down_proj", blocks=0, rows=[9], first=2)  # unit 1 of expert 1
    assert space.labels == [f"model.layers.0.mlp.experts.down_proj[1, 1, {j}]" for j in range(2)]


def test_every_layer_has_its_first_entries(llama: nn.Module) -> None:
    found = values(llama, layers="q_proj,k_proj", blocks="0,2", first=5)
    expected = [weight(llama, LLAMA.format(b, f"self_attn.{n}_proj")).reshape(-1)[:5] for b in (0, 2) for n in "qk"]
    assert torch.equal(found, torch.cat(expected))


def test_rows_and_first_cut_patterns_and_vectors_too(llama: nn.Module) -> None:
    name = LLAMA.format(0, "mlp.up_proj")
    W, norm = weight(llama, name), weight(llama, "model.norm.weight")
    assert torch.equal(
        values(llama, name, "model.norm.weight", rows="2,1"), torch.cat([W[[2, 1]].reshape(-1), norm[[2, 1]]])
    )
    assert hs.select(llama, "model.norm.weight", rows="2,1").coordinates[0].shape == (2,)
    assert hs.select(llama, first=1).size == len(list(llama.parameters()))


def test_a_random_subset_is_part_of_the_selection_in_its_order(llama: nn.Module) -> None:
    chosen = {"layers": "q_proj,down_proj", "blocks": "1,3"}
    everything = hs.select(llama, **chosen).labels
    space = hs.select(llama, random=30, seed=4, **chosen)
    where = [everything.index(label) for label in space.labels]
    assert len(where) == 30
    assert where == sorted(set(where))
    assert len(space.names) == 4
    assert hs.select(llama, random=30, seed=4, **chosen).labels == space.labels
    assert hs.select(llama, random=30, seed=5, **chosen).labels != space.labels
    assert set(hs.select(llama, random=12, seed=4, **chosen).labels) < set(space.labels)
    assert hs.select(llama, random=len(everything), **chosen).labels == everything


def test_a_random_subset_of_parts_and_with_parameters_left_out(llama: nn.Module) -> None:
    name = LLAMA.format(0, "mlp.up_proj")
    part = hs.select(llama, {name: [9, 4, 2, 30]}, "model.norm.weight[3]")
    for seed in range(20):
        labels = hs.select(llama, {name: [9, 4, 2, 30]}, "model.norm.weight[3]", random=2, seed=seed).labels
        where = [part.labels.index(label) for label in labels]
        assert where == sorted(where)
    assert hs.select(llama, random=1).size == 1


def test_rows_and_a_random_subset_are_sub_blocks_of_the_hessian() -> None:
    """GPT-2's Conv1D: a row is a column of what is stored."""
    problem = hs.causal_lm(tiny("gpt2", n_embd=4), ragged_batches())
    whole = hs.select(problem, layers="attn.c_attn,mlp.c_fc", blocks=0, first=24)
    H = hs.block(hs.hessian(problem, whole)).matrix
    for space in (
        hs.select(problem, layers="attn.c_attn,mlp.c_fc", blocks=0, rows="1,0"),
        hs.select(problem, layers="attn.c_attn,mlp.c_fc", blocks=0, first=24, random=9),
    ):
        where = [whole.labels.index(label) for label in space.labels]
        assert relative(hs.block(hs.hessian(problem, space)).matrix, H[where][:, where]) < 1e-12


# ---- what a result keeps, and one space a layer


def test_any_selection_records_block_layer_and_axis() -> None:
    model = tiny("gpt2")
    described = hs.select(model, "*.c_attn.weight", "*.wte.*").describe()["parameters"]
    assert described["transformer.h.1.attn.c_attn.weight"] == {
        "shape": [8, 24],
        "unit_axis": 1,
        "block": 1,
        "layer": "attn.c_attn",
    }
    assert described["transformer.wte.weight"] == {
        "shape": [37, 8],
        "unit_axis": 0,
        "block": None,
        "layer": "transformer.wte",
    }
    random = hs.select(model, random=50).coordinates
    assert {c.unit_axis for c in random if "c_" in c.name and c.name.endswith("weight")} == {1}


def test_one_space_for_each_layer(llama: nn.Module) -> None:
    parts = hs.select(llama, layers="q_proj,lm_head", blocks="0,3", first=2).separately()
    assert list(parts) == ["model.embed_tokens", "block00-self_attn.q_proj", "block03-self_attn.q_proj"]
    assert [space.size for space in parts.values()] == [2, 2, 2]
    assert parts["block03-self_attn.q_proj"].names == [LLAMA.format(3, "self_attn.q_proj")]


# ---- complaints


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"layers": "q_prj"}, "LlamaForCausalLM has no layer 'q_prj'; the nearest are self_attn.q_proj"),
        ({"layers": "attn.q_proj"}, "has no layer 'attn.q_proj'; the nearest are self_attn.q_proj"),
        ({"layers": "lm_hed"}, "has no layer 'lm_hed'; the nearest are lm_head"),
        ({"layers": "experts.*"}, "has no layer 'experts"),
        ({"layers": ""}, "Expected the name of at least one layer, or 'all', got ''"),
        ({"layers": 3}, "Expected layers as text or a list of names, got 3"),
        ({"layers": ["q_proj", 3]}, "Expected layers as text or a list of names"),
        ({"blocks": 4}, "Expected blocks of LlamaForCausalLM between 0 and 3, got 4; the nearest is 3"),
        ({"blocks": "0,0"}, "Expected distinct blocks"),
        ({"blocks": "last"}, "Expected blocks as in"),
        (
            {"layers": "q_proj", "rows": "0,8"},
            "Expected rows of model.layers.0.self_attn.q_proj.weight between 0 and 7",
        ),
        ({"layers": "q_proj", "rows": [1, 1]}, "Expected distinct rows"),
        ({"layers": "q_proj", "first": 65}, "first to be between 1 and the 64 entries of model.layers.0.self_attn.q"),
        (
            {"layers": "q_proj", "rows": "1-2", "first": 17},
            "the 16 entries of the 2 rows of model.layers.0.self_attn.q",
        ),
        ({"layers": "q_proj", "first": 0}, "Expected first to be a number of entries, at least 1, got 0"),
        ({"layers": "q_proj", "first": "3"}, "Expected first to be a number of entries"),
        ({"layers": "q_proj", "random": 257}, "Expected random to be at most the 256 selected entries, got 257"),
        ({"random": -1}, "Expected random to be a number of entries, at least 1"),
    ],
)
def test_complaints(llama: nn.Module, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(hs.HesscopeError, match=message):
        hs.select(llama, **keywords)


def test_a_layer_that_other_blocks_have() -> None:
    with pytest.raises(hs.HesscopeError, match=r"No layer 'q_proj' in blocks 0, 2 of Jamba.*; it is in blocks 1, 3"):
        hs.select(tiny("jamba"), layers="q_proj", blocks="0,2")


def test_an_index_beside_rows_or_first_is_ambiguous(llama: nn.Module) -> None:
    name = LLAMA.format(0, "self_attn.q_proj")
    for pattern in ({name: [3]}, f"{name}[0]"):
        with pytest.raises(hs.HesscopeError, match=r"an index of its own, for model.layers.0"):
            hs.select(llama, pattern, layers="q_proj", first=5)
    assert hs.select(llama, {name: [3]}, layers="q_proj", blocks=0).size == 64  # the whole swallows its part


def test_models_without_blocks_have_layers_by_name() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    assert names(model, layers="0,2") == names(model, layers="all") == ["0.weight", "2.weight"]
    assert names(model, layers="2", rows=1) == ["2.weight"]
    with pytest.raises(hs.HesscopeError, match="a list of like blocks, but Sequential has none; leave blocks out"):
        hs.select(model, blocks=0)
