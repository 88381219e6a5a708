"""Blocks, layers and output units are found in any architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES, STRUCTURES, tiny
from hesscope.models import find_trunk, layer_names, places
from hesscope.models.anatomy import Place
from hesscope.space import units

ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LLAMA = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
NEOX = ["query_key_value", "dense"], ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
FUSED = [f"self_attention.{name}" for name in NEOX[0]] + NEOX[1]
SHARED = [f"feed_forward.shared_expert.{name}_proj" for name in ("gate", "up", "down")]

#: Where the trunk is, and which matrices its last block has.
EXPECTED = {
    "llama": ("model.layers", LLAMA),
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "opt": ("model.decoder.layers", [f"self_attn.{n}_proj" for n in ("k", "v", "q", "out")] + ["fc1", "fc2"]),
    "gpt-neox": ("gpt_neox.layers", [f"attention.{name}" for name in NEOX[0]] + NEOX[1]),
    "qwen2": ("model.layers", LLAMA),
    "qwen3": ("model.layers", LLAMA),
    "mistral": ("model.layers", LLAMA),
    "gemma2": ("model.layers", LLAMA),
    "gemma3": ("model.layers", LLAMA),
    "mixtral": ("model.layers", [*ATTENTION, "mlp.gate", *EXPERTS]),
    "qwen3-moe": ("model.layers", [*ATTENTION, *EXPERTS, "mlp.gate"]),
    "llama4": (
        "model.layers",
        [*ATTENTION, *(n.replace("mlp", "feed_forward") for n in EXPERTS), "feed_forward.router", *SHARED],
    ),
    "bloom": ("transformer.h", FUSED),
    "phi": ("model.layers", [*ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2"]),
    "phi3": ("model.layers", ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
    "falcon": ("transformer.h", FUSED),
    "jamba": (
        "model.layers",
        [*ATTENTION, "feed_forward.router", *(n.replace("mlp", "feed_forward") for n in EXPERTS)],
    ),
    "gpt-oss": ("model.layers", [*ATTENTION, "mlp.router", *EXPERTS]),
    "t5": (
        "decoder.block",
        [f"layer.0.SelfAttention.{n}" for n in "qkvo"]
        + [f"layer.1.EncDecAttention.{n}" for n in "qkvo"]
        + ["layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"],
    ),
    "bert": (
        "bert.encoder.layer",
        [f"attention.self.{n}" for n in ("query", "key", "value")]
        + ["attention.output.dense", "intermediate.dense", "output.dense"],
    ),
}


def last_block(model: nn.Module) -> dict[str, Place]:
    """The matrices of the last block."""
    trunk = find_trunk(model)
    assert trunk is not None
    found = places(model, trunk)
    return {name: p for name, p in found.items() if p.block == len(trunk.blocks) - 1 and p.is_matrix}


@pytest.mark.parametrize("name", [*ARCHITECTURES, *STRUCTURES])
def test_trunk_and_layers_of_an_architecture(name: str) -> None:
    model = tiny(name)
    prefix, layers = EXPECTED[name]
    trunk = find_trunk(model)
    assert trunk is not None
    assert trunk.prefix == prefix
    assert trunk.blocks == tuple(model.get_submodule(prefix))
    assert sorted(p.layer for p in last_block(model).values()) == sorted(layers)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *STRUCTURES])
def test_an_input_reaches_the_entries_of_its_column_only(name: str) -> None:
    """The gradient of a layer at an input e_j is zero off column j of the unit-major view, whatever is stored how."""
    model = tiny(name)
    checked = 0
    for parameter_name, place in last_block(model).items():
        owner = model.get_submodule(parameter_name.rpartition(".")[0])
        weight = model.get_parameter(parameter_name)
        if type(owner).__name__ not in ("Linear", "FalconLinear", "Conv1D"):
            continue
        shape = tuple(weight.shape)
        inputs = weight.numel() // units.count(shape, place.unit_axis)
        for j in (0, inputs - 1):
            one_hot = torch.eye(inputs, dtype=torch.float64)[j].reshape(1, 1, -1)
            (gradient,) = torch.autograd.grad(owner(one_hot).square().sum(), weight)
            view = units.flat_indices(shape, place.unit_axis, torch.arange(weight.numel()).reshape(-1, inputs))
            assert gradient.reshape(-1)[view].any(0).nonzero()[:, 0].tolist() == [j]
        checked += 1
    assert checked >= 4


def experts_output(experts: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Every expert applied to each token."""
    if "Llama4" in type(experts).__name__:
        return experts(hidden.repeat(4, 1)).reshape(4, -1, hidden.shape[-1]).sum(0)
    chosen = torch.arange(experts.num_experts).expand(len(hidden), -1)
    return experts(hidden, chosen, torch.ones(chosen.shape, dtype=torch.float64))


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "llama4", "gpt-oss", "jamba"])
def test_the_units_of_a_stack_of_experts(name: str) -> None:
    """Into the experts an input has its column; out of them an output has its row in every expert."""
    model = tiny(name, num_experts=4) if name == "jamba" else tiny(name)
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")
    stacks = {p.layer.split(".")[-1]: n for n, p in last_block(model).items() if ".experts." in n}
    where = last_block(model)
    owner = model.get_submodule(stacks["down_proj"].rpartition(".")[0])

    into = model.get_parameter(stacks["gate_up_proj"])
    axis, shape = where[stacks["gate_up_proj"]].unit_axis, tuple(into.shape)
    assert units.count(shape, axis) == into.numel() // 8
    (gradient,) = torch.autograd.grad(experts_output(owner, torch.eye(8, dtype=torch.float64)[[3]]).sum(), into)
    view = units.flat_indices(shape, axis, torch.arange(into.numel()).reshape(-1, 8))
    assert gradient.reshape(-1)[view].any(0).nonzero()[:, 0].tolist() == [3]

    out = model.get_parameter(stacks["down_proj"])
    axis, shape = where[stacks["down_proj"]].unit_axis, tuple(out.shape)
    assert units.count(shape, axis) == 4 * 8
    (gradient,) = torch.autograd.grad(experts_output(owner, torch.ones(1, 8, dtype=torch.float64))[0, 5], out)
    view = units.flat_indices(shape, axis, torch.arange(out.numel()).reshape(32, -1))
    assert gradient.reshape(-1)[view].any(1).nonzero()[:, 0].tolist() == [5, 13, 21, 29]


def test_a_square_stack_of_experts_is_read_as_its_module_says() -> None:
    stack = nn.ParameterDict({"up": torch.zeros(2, 3, 3), "down": torch.zeros(2, 3, 3)})
    assert {p.unit_axis for p in places(stack, None).values()} == {1}
    stack.is_transposed = True
    assert {p.unit_axis for p in places(stack, None).values()} == {2}


def test_experts_as_separate_modules_are_inside_their_block() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(8)])

    model = nn.ModuleDict({"embed": nn.Embedding(3, 4), "h": nn.ModuleList([Block()])})
    trunk = find_trunk(model)
    assert trunk is not None
    assert (trunk.prefix, len(trunk.blocks)) == ("h", 1)
    assert places(model, trunk)["h.0.experts.7.1.weight"] == Place(0, "experts.7.1", 0, True)


def test_tied_and_shared_layers_stand_under_each_place() -> None:
    model = tiny("llama")
    trunk = find_trunk(model)
    assert layer_names(model, trunk)[None, "lm_head"] == "model.embed_tokens.weight"
    model.model.layers[1] = model.model.layers[0]
    known = layer_names(model, find_trunk(model))
    assert known[1, "mlp.up_proj"] == known[0, "mlp.up_proj"] == "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)),
        nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]),  # layers, not blocks
        nn.Sequential(tiny("llama").model.embed_tokens, nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))),
        nn.Sequential(nn.Sequential(nn.Linear(2, 2))),
    ],
)
def test_models_without_blocks(model: nn.Module) -> None:
    assert find_trunk(model) is None


def test_kinds_of_parameters_outside_blocks_and_vectors_inside() -> None:
    model = tiny("gpt2")
    found = places(model, find_trunk(model))
    assert found["transformer.wpe.weight"] == Place(None, "transformer.wpe", 0, True)
    assert found["transformer.h.1.attn.c_attn.weight"] == Place(1, "attn.c_attn", 1, True)
    assert found["transformer.h.1.attn.c_attn.bias"] == Place(1, "attn.c_attn.bias", 0, False)
    assert found["transformer.ln_f.weight"] == Place(None, "transformer.ln_f", 0, False)
    oss = tiny("gpt-oss")
    bias = places(oss, find_trunk(oss))["model.layers.0.mlp.experts.down_proj_bias"]
    assert not bias.is_matrix  # [experts, out]
