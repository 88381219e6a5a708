"""K-FAC as an operator: parts of weights, diagonal and block without products, precision, states, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.errors import UnusedParameters
from kfac_cases import language_model, network
from oracles import relative

F64 = torch.float64
EXACT = 1e-10


# ---- parts of weights


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("weight", ["model.layers.1.self_attn.k_proj.weight", "transformer.h.0.attn.c_attn.weight"])
def test_parts_are_parts_of_the_whole_weights_block(weight: str, corrected: bool) -> None:
    name = "llama" if weight.startswith("model") else "gpt2"
    problem, whole = language_model(name, weight)
    K = hs.kfac(problem, whole, corrected=corrected).to_dense()
    columns = whole.coordinates[0].shape[1]
    some = torch.randperm(whole.size, generator=torch.Generator().manual_seed(0))[:9]
    for index, flat in (
        ((slice(1, 3), slice(0, 4)), torch.arange(whole.size).view(-1, columns)[1:3, :4].flatten()),
        (some, some),
        ([5], torch.tensor([5])),
    ):
        part = hs.select(problem, {weight: index})
        M = hs.kfac(problem, part, corrected=corrected)
        expected = K[flat][:, flat]
        assert relative(M.to_dense(), expected) < EXACT
        assert relative(hs.block(M).matrix, expected) < EXACT
        assert relative(hs.diagonal(M, method="exact").flat(), expected.diagonal()) < EXACT


@pytest.mark.parametrize("corrected", [False, True])
def test_block_diagonal_and_known_without_products(corrected: bool) -> None:
    problem = network()
    K = hs.kfac(problem, corrected=corrected)
    assert (K.units, K.positive_semidefinite) == (0, True)
    diagonal = hs.diagonal(K, budget=1)
    assert (diagonal.method, diagonal.products, diagonal.relative_error) == ("exact", 0, 0.0)
    assert diagonal.units == pytest.approx(6 if corrected else 3)
    trace, block = hs.trace(K), hs.block(K)
    assert (trace.products, trace.units, block.products, block.units) == (0, 0, 0, 0)
    dense = K.to_dense()
    assert relative(block.matrix, dense) < EXACT
    assert relative(diagonal.flat(), dense.diagonal()) < EXACT
    assert trace.estimate == pytest.approx(float(dense.trace()), rel=1e-12)
    assert dense[:12, 12:].abs().max() == 0
    assert float(dense[:12, :12].norm()) > 0
    assert float(dense[12:, 12:].norm()) > 0
    assert float(torch.linalg.eigvalsh(dense).min()) > -1e-12
    assert K.units == pytest.approx(6 if corrected else 3)  # nothing since


def test_composed_operators_know_diagonals_or_do_not() -> None:
    problem = network()
    K, H = hs.kfac(problem), hs.hessian(problem)
    g = torch.arange(float(K.shape[0]), dtype=F64)
    head = hs.select(problem, "2.weight")
    for A in (2.0 * K, K.shifted(0.5), K.updated(g, 0.3), K.restricted_to(head), K - K * 3.0):
        found = hs.diagonal(A, method="exact", budget=1)
        assert found.products == 0
        assert relative(found.flat(), A.to_dense().diagonal()) < EXACT
    for A in (H, K + H, H.restricted_to(head)):
        assert not A.knows_diagonal
    with pytest.raises(hs.HesscopeError, match="does not know its diagonal"):
        H.known_diagonal()
    study = hs.diagonal_study(K, methods=["hutchinson"], budgets=[4], seeds=1)
    assert relative(study.exact, K.to_dense().diagonal()) < EXACT


# ---- numbers and states


def test_half_precision_is_accumulated_in_float32() -> None:
    """Sums of a thousand products of bfloat16 numbers; in bfloat16 itself they would be off by percents."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4, bias=False).bfloat16()
    X, y = torch.randn(1000, 3).bfloat16(), torch.arange(1000) % 4
    problem = hs.supervised(model, [(X[:300], y[:300]), (X[300:], y[300:])])
    r = (model(X).float().softmax(-1) - nn.functional.one_hot(y)).bfloat16().double().detach()
    a = X.double()
    for corrected in (False, True):
        K = hs.kfac(problem, corrected=corrected, labels="empirical")
        assert K.dtype == torch.float32
        if not corrected:
            assert relative(K.to_dense(), torch.kron(r.T @ r / 1000, a.T @ a / 1000)) < 1e-5
        expected = float((r.square().sum(1) * a.square().sum(1)).mean()) if corrected else float(K.to_dense().trace())
        assert hs.trace(K).estimate == pytest.approx(expected, rel=1e-5)


def test_it_follows_the_parameters() -> None:
    problem = network()
    K = hs.kfac(problem, corrected=True)
    before = K.to_dense()
    with torch.no_grad():
        problem.model[0].weight.mul_(2)  # type: ignore[index]
    after = K.to_dense()
    assert relative(after, before) > 0.01
    assert torch.equal(after, hs.kfac(problem, corrected=True).to_dense())


def test_a_weight_that_the_loss_does_not_use_has_a_zero_block() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    problem = hs.supervised(Spare(), [(torch.ones(3, 2), torch.tensor([0, 1, 1]))])
    for corrected in (False, True):
        with pytest.warns(UnusedParameters, match=r"spare\.weight"):
            K = hs.kfac(problem, corrected=corrected)
        dense = K.to_dense()
        assert dense[4:].abs().max() == 0
        assert dense[:4, :4].abs().max() > 0


def test_a_record_says_which() -> None:
    problem = network()
    assert hs.kfac(problem).describe() == {"operator": "kfac", "labels": "sampled", "samples": 1, "seed": 0}
    expected = {"operator": "ekfac", "labels": "empirical", "per": "token"}
    assert hs.kfac(problem, corrected=True, labels="empirical").describe() == expected
    assert hs.kfac(problem).origin() == problem.describe()


# ---- refusals


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["*.0.mlp.c_fc.*"], r"transformer\.h\.0\.mlp\.c_fc\.bias is a bias or belongs to a norm"),
        (["*ln_f.weight"], "is a bias or belongs to a norm"),
        (["*wte.weight"], "such as an embedding"),
        (["*wpe.weight"], "such as an embedding"),
    ],
)
def test_what_is_not_the_weight_of_a_linear_layer(patterns: list[str], said: str) -> None:
    problem, space = language_model("gpt2", *patterns)
    with pytest.raises(hs.HesscopeError, match=f"{said}.*select the linear layers' weights alone"):
        hs.kfac(problem, space)


def test_a_stack_of_experts() -> None:
    problem = hs.causal_lm(tiny("mixtral"), ragged_batches())
    with pytest.raises(hs.HesscopeError, match="is a stack of shape 4 x 24 x 8"):
        hs.kfac(problem, hs.select(problem, "*.0.mlp.experts.gate_up_proj"))


class _WithoutSamples:
    """Cross-entropy that draws no labels."""

    def outputs(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return model(batch[0])  # type: ignore[no-any-return]

    def total_of_outputs(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        return F.cross_entropy(outputs, batch[1], reduction="sum"), int((batch[1] != -100).sum())

    def total(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        return self.total_of_outputs(self.outputs(model, batch), batch)


def test_settings_that_cannot_be() -> None:
    problem = network()
    for settings, said in (
        ({"labels": "true"}, "'sampled' or 'empirical'"),
        ({"samples": 0}, "at least 1"),
        ({"samples": 2, "labels": "empirical"}, "1 with the data's own labels"),
        ({"per": "layer", "corrected": True}, "'token' or 'sequence'"),
        ({"per": "sequence"}, "only with corrected=True"),
        ({"per": "sequence", "corrected": True}, "use per='token'"),
    ):
        with pytest.raises(hs.HesscopeError, match=said):
            hs.kfac(problem, **settings)  # type: ignore[arg-type]
    with pytest.raises(hs.HesscopeError, match="objective='nll'"):
        hs.kfac(problem.related(objective="perplexity"))
    without = hs.Problem(problem.model, _WithoutSamples(), problem.batches)
    with pytest.raises(hs.HesscopeError, match="labels='empirical'"):
        hs.kfac(without)
    ours, theirs = (hs.kfac(p, labels="empirical").to_dense() for p in (without, problem))
    assert relative(ours, theirs) < 1e-12


def test_factors_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hesscope.operators.free.available_bytes", lambda device: 100)
    with pytest.raises(hs.HesscopeError, match="fit in memory"):
        hs.kfac(network())
