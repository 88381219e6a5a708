"""Shares of energy with closed forms, chance levels, and the numbers of a spectrum."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import hesscope as hs
from hesscope.algorithms.membership import membership
from hesscope.results import Block
from oracles import energy_by_class
from spectra import symmetric

#: Two blocks of two layers each, GPT-2's way (a row is a column), a bias that belongs to its layer, and a head outside.
PLACES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "h.0.attn.weight": ((2, 3), {"block": 0, "layer": "attn", "unit_axis": 1}),
    "h.0.attn.bias": ((3,), {"block": 0, "layer": "attn", "unit_axis": 0}),
    "h.0.mlp.weight": ((3, 2), {"block": 0, "layer": "mlp", "unit_axis": 1}),
    "h.1.attn.weight": ((2, 3), {"block": 1, "layer": "attn", "unit_axis": 1}),
    "ln.weight": ((2,), {"block": None, "layer": None, "unit_axis": 0}),
    "head.weight": ((2, 2), {"block": None, "layer": None, "unit_axis": 0}),
}
#: What these say, written out: rows of the weights are columns here, a vector is one row.
ROW = [*[0, 1, 2] * 2, *[3] * 3, *[4, 5] * 3, *[6, 7, 8] * 2, *[9] * 2, *[10, 10, 11, 11]]
LAYER = [0] * 9 + [1] * 6 + [2] * 6 + [3] * 2 + [4] * 4
BLOCK = [0] * 15 + [1] * 6 + [2] * 2 + [3] * 4


def labels() -> list[str]:
    return [
        f"{name}[{', '.join(map(str, place))}]"
        for name, (shape, _) in PLACES.items()
        for place in torch.ones(shape).nonzero().tolist()
    ]


def block(matrix: Tensor, **problem: Any) -> Block:
    parameters = {name: {"shape": list(shape), **about} for name, (shape, about) in PLACES.items()}
    provenance = {"selection": {"size": len(matrix), "parameters": parameters}, "problem": problem or None}
    return Block(products=len(matrix), units=0.0, seconds=0.0, provenance=provenance, matrix=matrix, labels=labels(),
                 asymmetry=0.0)  # fmt: skip


def random(seed: int = 0) -> Tensor:
    n = len(ROW)
    B = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return B + B.T


def test_rows_layers_and_blocks_are_read_from_labels_and_the_selections_record() -> None:
    members = membership(labels(), block(random()).provenance["selection"])
    layer = members.layer_of_row[members.row]
    assert members.row.tolist() == ROW
    assert layer.tolist() == LAYER
    assert members.block_of_layer[layer].tolist() == BLOCK
    assert members.layers == ["0.attn", "0.mlp", "1.attn", "ln.weight", "head.weight"]
    assert members.blocks == ["block 0", "block 1", "ln.weight", "head.weight"]


def test_without_a_record_a_parameter_is_a_layer_and_its_first_axis_counts_units() -> None:
    members = membership(["w[0, 0]", "w[0, 1]", "w[1, 0]", "b[0]", "b[1]", "scale"], None)
    assert members.row.tolist() == [0, 0, 1, 2, 2, 3]
    assert members.layers == members.blocks == ["w", "b", "scale"]


@pytest.mark.parametrize("chunk", [1, 27 * 8 * 5, 2**26])
def test_energies_are_those_of_an_entry_by_entry_sum(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesscope.algorithms.energy._CHUNK_BYTES", chunk)
    A = random()
    found = hs.structure(block(A))
    expected = torch.tensor(energy_by_class(A, ROW, LAYER, BLOCK), dtype=torch.float64)
    torch.testing.assert_close(found.energy, expected, rtol=1e-13, atol=0)
    assert float(found.shares.sum()) == pytest.approx(1.0, abs=1e-14)
    counts = energy_by_class(torch.ones_like(A), ROW, LAYER, BLOCK)
    assert found.entries.tolist() == counts
    torch.testing.assert_close(
        found.chance, torch.tensor(counts, dtype=torch.float64) / len(A) ** 2, rtol=1e-14, atol=0
    )
    parts = torch.stack([torch.stack([A[_is(i)][:, _is(j)].norm() for j in range(5)]) for i in range(5)])
    torch.testing.assert_close(found.layer_norms, parts, rtol=1e-13, atol=0)
    sizes = torch.tensor([9.0, 6, 6, 2, 4], dtype=torch.float64)
    assert found.layer_sizes == sizes.tolist()
    torch.testing.assert_close(found.layer_rms, parts / torch.outer(sizes, sizes).sqrt(), rtol=1e-13, atol=0)


def _is(layer: int) -> Tensor:
    return torch.tensor(LAYER) == layer


def test_the_map_of_blocks_joins_that_of_layers() -> None:
    A = random(1)
    found = hs.structure(block(A))
    of = torch.tensor(BLOCK)
    expected = torch.stack([torch.stack([A[of == i][:, of == j].norm() for j in range(4)]) for i in range(4)])
    torch.testing.assert_close(found.block_norms, expected, rtol=1e-13, atol=0)
    sizes = torch.tensor([15.0, 6, 2, 4], dtype=torch.float64)
    torch.testing.assert_close(found.block_rms, expected / torch.outer(sizes, sizes).sqrt(), rtol=1e-13, atol=0)


def test_all_ones_has_every_share_at_its_chance_level() -> None:
    found = hs.structure(block(torch.ones(27, 27)))
    torch.testing.assert_close(found.shares, found.chance, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.times_chance, torch.ones(5, dtype=torch.float64), rtol=1e-14, atol=0)


def test_a_diagonal_matrix_has_exactly_nothing_beside_its_diagonal() -> None:
    values = torch.linspace(-1, 3, 27, dtype=torch.float64) / 3
    found = hs.structure(block(values.diag()))
    assert found.shares.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(found.eigenvalues, values, rtol=0, atol=1e-15)


def test_a_block_diagonal_matrix_has_exactly_nothing_across() -> None:
    of = torch.tensor(BLOCK)
    A = random() * (of[:, None] == of)
    found = hs.structure(block(A))
    assert float(found.shares[4]) == 0.0
    assert float(found.shares[3]) > 0.0
    # What is left out by keeping only the layers' own parts, from the shares.
    layers = torch.tensor(LAYER)
    left = (A * (layers[:, None] != layers)).norm() / A.norm()
    assert math.sqrt(1 - float(found.shares[:3].sum())) == pytest.approx(float(left), rel=1e-12)


def test_tiny_energies_beside_large_ones_are_kept() -> None:
    """No class is the difference of two others."""
    A = torch.eye(27, dtype=torch.float64)
    A[0, 26] = A[26, 0] = 1e-12
    assert float(hs.structure(block(A)).energy[4]) == pytest.approx(2e-24, rel=1e-12)


def test_a_float32_matrix_is_summed_in_float64() -> None:
    A = random().float()
    expected = torch.tensor(energy_by_class(A.double(), ROW, LAYER, BLOCK), dtype=torch.float64)
    torch.testing.assert_close(hs.structure(block(A)).energy, expected, rtol=1e-13, atol=0)


def test_the_matrix_given_is_not_changed() -> None:
    A = random()
    before = A.clone()
    hs.structure(block(A))
    assert torch.equal(A, before)


# ---- the spectrum


def test_spectral_numbers_of_a_prescribed_spectrum() -> None:
    values = [4.0, 2.0, 1.0, -1.0, -2.0]
    s = hs.structure(hs.operator(symmetric(values))).spectrum
    assert (s.size, s.zeros, s.negative) == (5, 0, 2)
    assert (s.largest, s.smallest, s.condition) == pytest.approx((4.0, -2.0, 4.0), rel=1e-12)
    assert s.negative_share == 0.4
    assert s.negative_trace == pytest.approx(0.3, rel=1e-12)
    weights = [abs(v) / 10 for v in values]
    assert s.effective_rank == pytest.approx(math.exp(-sum(w * math.log(w) for w in weights)), rel=1e-12)


def test_what_is_zero_to_rounding_has_no_sign_and_no_part_in_the_condition() -> None:
    found = hs.structure(hs.operator(symmetric([1.0, 0.5, -1e-17, 0.0]).float()))
    s = found.spectrum
    assert found.rounding == torch.finfo(torch.float32).eps
    assert s.threshold == pytest.approx(4 * found.rounding * s.largest)
    assert (s.zeros, s.negative) == (2, 0)
    assert s.condition_above == pytest.approx(2.0, rel=1e-5)
    assert s.condition > 1e6
    assert s.effective_rank == pytest.approx(1.8899, abs=1e-3)  # exp of the entropy of (2/3, 1/3)


def test_coarse_weights_make_coarse_zeros() -> None:
    assert hs.structure(block(random().float(), dtype="bfloat16")).rounding == torch.finfo(torch.bfloat16).eps
    assert hs.structure(block(random(), dtype="float32")).rounding == torch.finfo(torch.float32).eps


def test_one_coordinate() -> None:
    found = hs.structure(hs.operator(torch.tensor([[-3.0]])))
    assert found.shares.tolist() == found.chance.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert (found.spectrum.condition, found.spectrum.negative, found.spectrum.effective_rank) == (1.0, 1, 1.0)
    assert "1 x 1" in found.summary()


def test_the_zero_matrix_has_no_shares_and_says_so() -> None:
    found = hs.structure(block(torch.zeros(27, 27)))
    assert found.shares.tolist() == [0.0] * 5
    assert "every entry is zero" in found.summary()
    assert (found.spectrum.zeros, found.spectrum.negative_trace, found.spectrum.effective_rank) == (27, 0.0, 0.0)


# ---- operators, models, comparisons


def test_an_operator_and_its_block_give_the_same_and_the_cost_is_the_blocks() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    batches = [(torch.randn(b, 3, dtype=torch.float64), torch.arange(b) % 2) for b in (2, 5)]
    H = hs.hessian(hs.supervised(model, batches))
    direct, exact = hs.structure(H), hs.block(H)
    again = hs.structure(exact)
    assert (direct.products, again.products, again.units) == (26, exact.products, exact.units)
    torch.testing.assert_close(direct.energy, again.energy, rtol=1e-12, atol=0)
    torch.testing.assert_close(again.eigenvalues, torch.linalg.eigvalsh(exact.matrix), rtol=0, atol=1e-14)
    assert again.provenance["problem"]["fingerprint"] == exact.provenance["problem"]["fingerprint"]
    assert "0.weight" in again.layers


def test_a_dictionary_gives_a_comparison() -> None:
    named = {"ones": hs.operator(torch.ones(4, 4)), "block": block(random()), "done": hs.structure(block(random(3)))}
    found = hs.structure(named)
    assert found.cases == list(named)
    for i, part in enumerate(map(hs.structure, named.values())):
        assert torch.equal(found.shares[i], part.shares)
        assert torch.equal(found.chance[i], part.chance)
        assert found.spectra[found.cases[i]] == part.spectrum
    assert found.layouts() == [[0], [1, 2]]
    assert found.products == 4 + 27 + 27
    text = found.summary()
    assert all(name in text for name in named)
    assert text.count("chance") == 2


@pytest.mark.parametrize("wrong", [torch.eye(2), 3, None, {}, {"a": torch.eye(2)}])
def test_what_is_no_operator_is_refused(wrong: Any) -> None:
    with pytest.raises(hs.HesscopeError, match=r"Expected .*operator"):
        hs.structure(wrong)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_block_that_is_not_finite_is_refused(bad: float) -> None:
    A = random()
    A[3, 20] = A[20, 3] = bad
    with pytest.raises(hs.HesscopeError, match="finite"):
        hs.structure(block(A))


def test_too_little_memory_is_said_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesscope.operators.free.available_bytes", lambda _: 8 * 20 * 20)
    with pytest.raises(hs.HesscopeError, match="at most 20 coordinates"):
        hs.structure(block(random()))
