"""Selections name the coordinates that their text says, in order, and complain helpfully where they cannot."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.problem.indices import parse_index
from oracles import causal_lm, relative


class Tied(nn.Module):
    """Two layers, a tied head, a frozen bias and an integer parameter's neighbour: every case of a name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.layers[1].bias.requires_grad_(False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(input_ids)
        for layer in self.layers:
            h = torch.tanh(layer(h))
        return self.head(h * self.scale)


@pytest.fixture
def model() -> Tied:
    torch.manual_seed(0)
    return Tied().double()


TRAINABLE = ["scale", "embed.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight"]
LAYER_WEIGHTS = ["layers.0.weight", "layers.1.weight"]


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ((), TRAINABLE),
        (("layers.*.weight",), LAYER_WEIGHTS),
        (("*.weight", "scale"), ["scale", "embed.weight", *LAYER_WEIGHTS]),
        (("layers.1.weight", "layers.0.weight"), LAYER_WEIGHTS),  # the model's order, not the caller's
        (("layers.*", "!*.bias"), LAYER_WEIGHTS),
        (("!layers.*", "layers.*", "scale"), ["scale"]),  # what is taken away stays away
        (("!layers.*",), ["scale", "embed.weight"]),  # from every trainable parameter
        (("layers.?.bias",), ["layers.0.bias", "layers.1.bias"]),  # frozen, but asked for
        (("layers.[1].bias",), ["layers.1.bias"]),
        (("re:layers\\.[01]\\.weight",), LAYER_WEIGHTS),
        (("!re:.*\\.(bias|weight)",), ["scale"]),
        ((lambda name, p: p.dim() == 1,), ["layers.0.bias", "layers.1.bias"]),
        ((lambda name, p: "embed" in name, "scale"), ["scale", "embed.weight"]),
        (({"embed.weight": None, "head.weight": [1]},), ["embed.weight"]),
        (({"scale": None, "layers.0.bias": None},), ["scale", "layers.0.bias"]),
        (("layers.0.weight[1]", "layers.0.*"), ["layers.0.weight", "layers.0.bias"]),  # the whole swallows its part
    ],
)
def test_patterns_select_names_in_the_models_order(model: Tied, patterns: tuple[Any, ...], names: list[str]) -> None:
    space = hs.select(model, *patterns)
    assert space.names == names
    parameters = dict(model.named_parameters())
    assert space.size == sum(parameters[name].numel() for name in names)


@pytest.mark.parametrize("alias", ["head.weight", "head.*", "re:head.*", "embed.*"])
def test_a_tied_parameter_is_selected_by_any_of_its_names_and_once(model: Tied, alias: str) -> None:
    assert hs.select(model, alias).names == ["embed.weight"]
    assert hs.select(model, alias, "embed.weight").size == 15


def test_an_index_and_an_exclusion_may_name_the_alias(model: Tied) -> None:
    assert hs.select(model, {"head.weight": [3]}).labels == ["embed.weight[1, 0]"]
    assert hs.select(model, "head.weight[1, 0]").labels == ["embed.weight[1, 0]"]
    assert "embed.weight" not in hs.select(model, "!head.weight").names


MASK = torch.zeros(3, 3, dtype=torch.bool)
MASK[0, 2] = MASK[2, 1] = True


@pytest.mark.parametrize(
    ("index", "positions", "shape"),
    [
        (1, [3, 4, 5], (3,)),
        (-1, [6, 7, 8], (3,)),
        (slice(0, 2), [0, 1, 2, 3, 4, 5], (2, 3)),
        (slice(None, None, 2), [0, 1, 2, 6, 7, 8], (2, 3)),
        ((slice(None), 1), [1, 4, 7], (3,)),
        ((2, 0), [6], ()),
        ((slice(0, 2), slice(1, 3)), [1, 2, 4, 5], (2, 2)),
        ((..., 0), [0, 3, 6], (3,)),
        (([0, 2], [1, 1]), [1, 7], (2,)),
        ([7, 2, 4], [7, 2, 4], (3,)),  # flat, and in the caller's order
        ([-1, 0], [8, 0], (2,)),
        (torch.tensor([7, 2, 4]), [7, 2, 4], (3,)),
        (torch.tensor([[7, 2], [4, 0]]), [7, 2, 4, 0], (2, 2)),
        (torch.tensor([3, 1], dtype=torch.int16), [3, 1], (2,)),
        (np.array([7, 2, 4])[::-1], [4, 2, 7], (3,)),
        (range(7, 3, -2), [7, 5], (2,)),
        (MASK, [2, 7], (2,)),
        (MASK.numpy(), [2, 7], (2,)),
        (MASK.tolist(), [2, 7], (2,)),
        (None, list(range(9)), (3, 3)),
    ],
)
def test_every_form_of_index(model: Tied, index: Any, positions: list[int], shape: tuple[int, ...]) -> None:
    space = hs.select(model, {"layers.0.weight": index})
    (coordinates,) = space.coordinates
    assert coordinates.flat_indices().tolist() == positions
    assert coordinates.shape == shape
    assert space.size == len(positions)
    weight = model.layers[0].weight.detach()
    assert torch.equal(coordinates.gather(weight).reshape(-1), weight.reshape(-1)[positions])
    assert space.labels == [f"layers.0.weight[{p // 3}, {p % 3}]" for p in positions]


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("3", (3,)),
        ("-1", (-1,)),
        ("0:2, 3", (slice(0, 2), 3)),
        (":,1", (slice(None), 1)),
        ("1:, :-1", (slice(1, None), slice(None, -1))),
        ("::2", (slice(None, None, 2),)),
        ("0:8:3", (slice(0, 8, 3),)),
    ],
)
def test_a_text_means_what_brackets_mean_in_python(text: str, index: tuple[Any, ...]) -> None:
    assert parse_index(text) == index


def test_an_indexed_text_selects_what_brackets_read(model: Tied) -> None:
    space = hs.select(model, "layers.0.weight[0:2, 1]", "scale")
    assert space.labels == ["scale", "layers.0.weight[0, 1]", "layers.0.weight[1, 1]"]
    assert space.coordinates[1].shape == (2,)


def test_labels_are_in_the_order_of_flat_vectors(model: Tied) -> None:
    space = hs.select(model, {"layers.0.bias": [2, 0], "scale": None, "layers.1.weight": (1, slice(1, 3))})
    assert space.labels == [
        "scale",
        "layers.0.bias[2]",
        "layers.0.bias[0]",
        "layers.1.weight[1, 1]",
        "layers.1.weight[1, 2]",
    ]
    v = space.unflatten(torch.arange(5.0)[:, None])
    assert v["scale"].tolist() == [0.0]
    assert v["layers.0.bias"].tolist() == [[1.0, 2.0]]
    assert v["layers.1.weight"].tolist() == [[3.0, 4.0]]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("layer.0.weight",), "No parameter matches 'layer.0.weight'; the nearest names are layers.0.weight"),
        (("embed.wieght[3]",), "No parameter matches 'embed.wieght\\[3\\]'; the nearest names are embed.weight"),
        (({"layers.0.wieght": 1},), "No parameter matches 'layers.0.wieght'; the nearest names are layers.0.weight"),
        (("re:layers.0.weigh",), "No parameter matches 're:layers.0.weigh'; the nearest names are layers.0.weight"),
        (("!encoder.*", "scale"), "No parameter matches 'encoder.\\*'; the nearest names are "),
        ((lambda name, p: False,), "No parameter matches"),
        (("re:layers.[",), "Expected a regular expression after 're:', got 'layers.\\['"),
        (("scale", "!scale"), "Expected a selection of at least one parameter"),
        (("!*",), "Expected a selection of at least one parameter"),
        ((3,), "Expected a glob, a function of \\(name, parameter\\) or {name: index}, got int"),
        (({"embed.weight": [1, 4, 1]},), "Expected distinct indices into embed.weight; some are given twice"),
        (({"embed.weight": [14, -1]},), "Expected distinct indices into embed.weight"),
        (({"embed.weight": []},), "Expected the index of embed.weight to select something.*of \\[5, 3\\]"),
        (({"embed.weight": slice(5, 9)},), "Expected the index of embed.weight to select something"),
        (({"embed.weight": [15]},), "Expected flat indices into embed.weight below its 15 entries, got 15..15"),
        (({"embed.weight": [0, -16]},), "Expected flat indices into embed.weight below its 15 entries, got -16..0"),
        (({"embed.weight": [0.5]},), "Expected whole numbers as indices into embed.weight, got torch.float"),
        (({"embed.weight": 5},), "Expected an index that fits embed.weight of shape \\[5, 3\\], got 5"),
        (({"embed.weight": (0, 3)},), "Expected an index that fits embed.weight"),
        (({"embed.weight": MASK},), "Expected an index that fits embed.weight"),
        (({"embed.weight": "0"},), "Expected an index that fits embed.weight"),
        (("embed.weight[7]",), "Expected an index that fits embed.weight"),
        (("embed.weight[0, 0, 0]",), "Expected an index that fits embed.weight"),
        (("embed.weight[a]",), "Expected integers and slices, as in \\[3\\] or \\[0:4, :8\\], got \\[a\\]"),
        (("embed.weight[0,]",), "Expected integers and slices"),
        (("embed.weight[0]", "embed.weight[1]"), "Expected one index for embed.weight, got two"),
        (("embed.weight[0]", {"head.weight": 1}), "Expected one index for embed.weight, got two"),
        (({"embed.weight": [0], "head.weight": [1]},), "Expected one index for embed.weight, got two"),
    ],
)
def test_complaints(model: Tied, patterns: tuple[Any, ...], message: str) -> None:
    with pytest.raises(hs.HesscopeError, match=message):
        hs.select(model, *patterns)


def test_nothing_trainable_is_said(model: Tied) -> None:
    with pytest.raises(hs.HesscopeError, match="none is trainable"):
        hs.select(model.requires_grad_(False))


def test_whole_numbers_cannot_be_selected(model: Tied) -> None:
    model.packed = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(hs.HesscopeError, match=r"floating-point parameters, but packed is torch.int8"):
        hs.select(model, "packed")


@pytest.fixture(scope="module")
def full() -> tuple[Any, hs.Space, torch.Tensor]:
    """A tied GPT-NeoX whose every coordinate is selected, with its Hessian."""
    model = tiny("gpt-neox", hidden_size=4, intermediate_size=5, num_hidden_layers=1, tie_word_embeddings=True)
    problem = hs.causal_lm(model, ragged_batches())
    space = hs.select(problem)
    return problem, space, hs.hessian(problem, space) @ torch.eye(space.size, dtype=torch.float64)


def test_the_whole_hessian_is_the_oracles_and_symmetric(full: tuple[Any, hs.Space, torch.Tensor]) -> None:
    problem, space, H = full
    assert space.size == sum(p.numel() for p in problem.model.parameters())
    assert relative(H, causal_lm(problem.model, ragged_batches(), space).hessian) < 1e-10
    assert relative(H.T, H) < 1e-10


def test_a_selection_is_a_sub_block_of_the_whole_in_its_own_order(full: tuple[Any, hs.Space, torch.Tensor]) -> None:
    problem, everything, H = full
    dense = "gpt_neox.layers.0.attention.query_key_value.weight"
    part = hs.select(
        problem,
        {"gpt_neox.embed_in.weight": [141, 3, 77], dense: (slice(2, 12, 3), slice(1, 3))},
        "gpt_neox.final_layer_norm.weight[1:3]",
        "*.mlp.dense_4h_to_h.*",
    )
    where = {label: i for i, label in enumerate(everything.labels)}
    rows = [where[label] for label in part.labels]
    assert len(rows) == 3 + 8 + 2 + 24
    assert rows != sorted(rows)
    block = hs.hessian(problem, part) @ torch.eye(part.size, dtype=torch.float64)
    assert relative(block, H[rows][:, rows]) < 1e-12


def test_a_frozen_parameter_has_the_same_rows(full: tuple[Any, hs.Space, torch.Tensor]) -> None:
    problem, everything, H = full
    norm = problem.model.gpt_neox.final_layer_norm.weight
    norm.requires_grad_(False)
    try:
        part = hs.select(problem, "gpt_neox.final_layer_norm.weight")
        block = hs.hessian(problem, part) @ torch.eye(4, dtype=torch.float64)
        assert not norm.requires_grad
        assert "gpt_neox.final_layer_norm.weight" not in hs.select(problem).names
    finally:
        norm.requires_grad_(True)
    rows = [everything.labels.index(label) for label in part.labels]
    assert relative(block, H[rows][:, rows]) < 1e-12


class Aside(Tied):
    """With a parameter that no loss uses, and one that the loss is linear in."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) + self.shift  # the same for all logits: cancels in the softmax


def test_a_parameter_without_use_has_zero_rows_and_a_warning() -> None:
    model = Aside().double()
    problem = hs.Problem(model, lambda m, b: m(b).tanh().mean() + m.shift, [torch.tensor([[1, 2]])], count=len)
    H = hs.hessian(problem, hs.select(problem, "unused", "shift", "layers.0.bias"))
    with pytest.warns(hs.HesscopeWarning, match="The loss does not depend on unused: rows and columns there are zero"):
        matrix = H @ torch.eye(6, dtype=torch.float64)
    labels = H.space.labels
    dead = [i for i, label in enumerate(labels) if label.startswith("unused")]
    assert len(dead) == 2
    assert not matrix[dead].any()
    assert not matrix[:, dead].any()
    assert matrix[labels.index("shift"), labels.index("layers.0.bias[0]")] != 0


def test_only_unused_parameters_give_the_zero_matrix() -> None:
    problem = hs.Problem(Aside().double(), lambda m, b: m(b).sin().mean(), [torch.tensor([[1, 2]])], count=len)
    with pytest.warns(hs.HesscopeWarning, match="does not depend on unused"):
        product = hs.hessian(problem, hs.select(problem, "unused")) @ torch.ones(2, dtype=torch.float64)
    assert product.tolist() == [0.0, 0.0]


def test_a_parameter_used_by_some_batches_gives_no_warning() -> None:
    """Row 1 of the first layer's bias is used by the second batch only; it counts with the whole N."""
    model = nn.ParameterDict({"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)})
    batches = [{"which": "a", "n": 3}, {"which": "b", "n": 5}]
    problem = hs.Problem(model, lambda m, b: m[b["which"]].pow(2).sum(), batches, count=lambda b: b["n"])
    H = hs.hessian(problem) @ torch.eye(4, dtype=torch.float64)
    assert torch.allclose(H.diagonal(), torch.tensor([6 / 8, 6 / 8, 10 / 8, 10 / 8], dtype=torch.float64))


def test_unrouted_experts_have_zero_rows() -> None:
    model = tiny("mixtral", num_experts_per_tok=1, experts_implementation="eager")
    batch = {"input_ids": torch.tensor([[5, 9, 30]])}
    problem = hs.causal_lm(model, [batch])
    name = "model.layers.1.mlp.experts.down_proj"
    gradient = torch.autograd.grad(
        model(**batch, labels=batch["input_ids"]).loss, dict(model.named_parameters())[name]
    )[0]
    routed = gradient.flatten(1).any(1)
    assert 0 < int(routed.sum()) < 4
    V = {name: torch.ones_like(gradient)}
    rows = (hs.hessian(problem, hs.select(problem, name)) @ V)[name]
    assert rows.shape == (4, 8, 12)
    assert torch.equal(rows.flatten(1).any(1), routed)
