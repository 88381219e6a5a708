"""The GGN's diagonal from gradients at sampled labels: the very squares of sequences' gradients, and unbiased."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hesscope as hs
from architectures import ragged_batches, tiny
from oracles import linearized_lm, relative

F64 = torch.float64


def language_model(name: str, *patterns: str, batch_size: int = 2) -> hs.Operator:
    torch.manual_seed(0)
    model = tiny(name).double()
    problem = hs.causal_lm(model, ragged_batches())
    return hs.ggn(problem, hs.select(problem, *patterns))


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("llama", "*.0.self_attn.*_proj.weight"),
        ("llama", "*.1.mlp.*.weight"),
        ("gpt2", "*.h.0.attn.c_attn.weight"),  # a Conv1D, whose inputs are flattened
        ("gpt2", "*.h.1.mlp.c_proj.weight"),
        ("gpt-neox", "*.dense_h_to_4h.weight"),
    ],
)
def test_a_draw_is_the_diagonal_of_the_fisher_matrix_per_sequence(name: str, pattern: str) -> None:
    G = language_model(name, pattern)
    F = hs.fisher(G.problem, G.space, per="sequence", seed=5)
    found = G.space.flatten(G.draw_diagonal(5, 0))[:, 0]
    assert relative(found, F.to_dense().diagonal()) < 1e-6


@pytest.mark.slow
def test_a_part_of_a_layer_and_whole_parameters() -> None:
    """Rows of a linear layer are taken apart into sequences; a norm's weight and the tied embedding are not."""
    for patterns in (("*.0.self_attn.q_proj.weight[1, :5]",), ("*norm.weight", "*embed_tokens.weight")):
        G = language_model("llama", *patterns)
        d = linearized_lm(G.problem.model, ragged_batches(), G.space).ggn().diagonal()
        draws = torch.stack([G.space.flatten(G.draw_diagonal(1, k))[:, 0] for k in range(200)])
        z = (draws.mean(0) - d) / (draws.std(0) / 200**0.5).clamp(min=1e-9)
        assert float(z.abs().max()) < 4.5


def test_estimates_are_unbiased_and_their_intervals_cover() -> None:
    G = language_model("llama", "*.1.mlp.down_proj.weight")
    d = G.to_dense().diagonal()
    runs = [hs.diagonal(G, method="sampled", budget=20, seed=s) for s in range(25)]
    values = torch.stack([run.flat() for run in runs])
    z = (values.mean(0) - d) / (values.std(0) / 25**0.5)
    assert float(z.abs().max()) < 4.5
    ends = [run.interval() for run in runs]
    low, high = (torch.stack([part[name] for part in side for name in part]) for side in zip(*ends, strict=True))
    inside = (low.flatten(1) <= d) & (d <= high.flatten(1))
    # Squares of nearly normal numbers are skewed: their intervals hold a little less than they say.
    assert 0.88 <= float(inside.double().mean()) <= 0.97


def test_regression_and_classification() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    g = torch.Generator().manual_seed(2)
    X = [torch.randn(n, 3, generator=g, dtype=F64) for n in (1, 6)]
    for loss, targets in (
        ("mse", lambda x: torch.zeros(len(x), 2, dtype=F64)),
        ("cross_entropy", lambda x: x[:, 0].gt(0).long()),
    ):
        G = hs.ggn(hs.supervised(model, [(x, targets(x)) for x in X], loss=loss))
        d = G.to_dense().diagonal()
        draws = torch.stack([G.space.flatten(G.draw_diagonal(1, k))[:, 0] for k in range(300)])
        z = (draws.mean(0) - d) / (draws.std(0) / 300**0.5)
        assert float(z.abs().max()) < 4.5


def test_a_draw_costs_two_forward_passes_and_counts_as_a_product() -> None:
    G = language_model("llama", "*.0.mlp.up_proj.weight")
    found = hs.diagonal(G, method="sampled", budget=7)
    assert found.products == G.products == 7
    assert found.units == pytest.approx(7 * (1 + 2))  # two batches: their graphs are built anew
    assert found.method == "sampled"
    assert found.degrees_of_freedom == 6


def test_auto_chooses_draws_for_a_ggn() -> None:
    """With many sequences: a draw's error falls with their number, whatever the dimension."""
    ids = torch.randint(37, (64, 5), generator=torch.Generator().manual_seed(0))
    problem = hs.causal_lm(tiny("llama").double(), ids, batch_size=64)
    G = hs.ggn(problem, hs.select(problem, "*.0.mlp.up_proj.weight"))
    for budget, reason in ((80, "a pilot"), (30, "the small budget")):
        found = hs.diagonal(G, budget=budget)
        assert (found.method, found.provenance["estimator"]["chosen"]["reason"]) == ("sampled", reason)
        assert found.products == budget


def test_draws_follow_the_parameters() -> None:
    G = language_model("llama", "*.0.mlp.up_proj.weight")
    before = G.space.flatten(G.draw_diagonal(0, 0))
    with torch.no_grad():
        next(p for n, p in G.problem.model.named_parameters() if "1.mlp.down_proj" in n).mul_(2)
    after = G.space.flatten(G.draw_diagonal(0, 0))
    fresh = hs.ggn(G.problem, G.space)
    assert not torch.equal(before, after)
    assert torch.equal(after, fresh.space.flatten(fresh.draw_diagonal(0, 0)))


def test_what_has_no_draws_is_refused() -> None:
    G = language_model("llama", "*.0.mlp.up_proj.weight")
    for operator in (hs.hessian(G.problem, G.space), 2.0 * G, hs.operator(torch.eye(3))):
        assert not operator.draws_diagonal
        with pytest.raises(hs.HesscopeError, match="method='sampled', for labels are drawn"):
            hs.diagonal(operator, method="sampled", budget=5)
        with pytest.raises(hs.HesscopeError, match="draws no diagonals"):
            operator.draw_diagonal(0, 0)
    weighted = hs.supervised(nn.Linear(2, 2), [(torch.ones(1, 2), torch.tensor([[0.5, 1.5]]))])
    assert not hs.ggn(weighted).draws_diagonal
