"""K-FAC and EKFAC: factors against tokens one at a time, exact cases, and the best eigenvalues."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
from architectures import ARCHITECTURES, ragged_batches, ragged_pairs, tiny
from kfac_cases import language_model, network
from oracles import keeping_double, labels_of, layer_pairs, relative, sampled_targets

F64 = torch.float64
EXACT = 1e-10
CASTS = 1e-6  # the model's own float32 operations
#: A weight by architecture; GPT-2's are Conv1D, stored [inputs, outputs]. c_attn and query_key_value hold all three, GPT-NeoX's
#: and Bloom's head by head.
LAYERS = [
    ("llama", "model.layers.0.self_attn.k_proj"),
    ("llama", "model.layers.0.mlp.down_proj"),
    ("llama", "model.layers.1.self_attn.q_proj"),
    ("gpt2", "transformer.h.0.attn.c_attn"),
    ("gpt2", "transformer.h.1.mlp.c_proj"),
    ("gpt-neox", "gpt_neox.layers.0.attention.query_key_value"),
    ("bloom", "transformer.h.1.self_attention.query_key_value"),
]


def stored(name: str, G: Tensor, A: Tensor) -> Tensor:
    """The Kronecker product in the order in which the architecture stores its weights."""
    return torch.kron(A, G) if name == "gpt2" else torch.kron(G, A)


def singles(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Every sequence a batch of its own, without padding."""
    found = []
    for batch in batches:
        for s, labels in enumerate(labels_of(batch)):
            length = int(batch["attention_mask"][s].sum()) if "attention_mask" in batch else len(labels)
            found.append({"input_ids": batch["input_ids"][s : s + 1, :length], "labels": labels[None, :length]})
    return found


# ---- factors


@pytest.mark.parametrize(("name", "layer"), LAYERS)
def test_factors_are_those_of_tokens_one_at_a_time(name: str, layer: str) -> None:
    problem, space = language_model(name, f"{layer}.weight")
    with keeping_double(problem.model):
        targets = sampled_targets(problem.model, problem.batches, seed=3)
        pairs = layer_pairs(problem.model, problem.batches, layer, targets)
        assert relative(hs.kfac(problem, space, seed=3).to_dense(), stored(name, *pairs.factors())) < EXACT
        own = torch.cat([(y := labels_of(b)[:, 1:])[y != -100] for b in problem.batches])
        pairs = layer_pairs(problem.model, problem.batches, layer, own)
        assert relative(hs.kfac(problem, space, labels="empirical").to_dense(), stored(name, *pairs.factors())) < EXACT


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_and_the_cut_into_batches_change_nothing(name: str, corrected: bool) -> None:
    patterns = {"llama": ["*.0.self_attn.*_proj.weight", "*.1.mlp.*.weight"], "gpt2": ["*attn.c_*.weight"]}[name]
    with keeping_double(tiny(name)):
        ragged, single = (
            hs.kfac(*language_model(name, *patterns, batches=b), corrected=corrected, samples=2)
            for b in (ragged_batches(), singles(ragged_batches()))
        )
        V = torch.randn(ragged.shape[0], 3, generator=torch.Generator().manual_seed(0), dtype=F64)
        assert relative(ragged @ V, single @ V) < EXACT


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder(name: str) -> None:
    """Positions of the encoder and of the decoder are counted apart, and padding in neither."""
    pairs = ragged_pairs()
    apart = [
        {key: x[s : s + 1, : int(b["attention_mask"][s].sum()) if key != "labels" else None] for key, x in b.items()}
        for b in pairs
        for s in range(len(b["labels"]))
    ]
    with keeping_double(tiny(name)):
        found = []
        for batches in (pairs, apart):
            problem = hs.seq2seq_lm(tiny(name), batches)
            space = hs.select(problem, "*encoder*.k*.weight", "*decoder*.v*.weight", "!*norm*")
            found.append(hs.kfac(problem, space, corrected=True).to_dense())
    assert relative(*found) < EXACT
    assert float(found[0].norm()) > 0


def test_samples_are_averaged() -> None:
    """A is one matrix, G the mean of the label sets' own; corrected eigenvalues have the mean trace."""
    problem, space = language_model("gpt2", "transformer.h.0.mlp.c_fc.weight")
    runs = [
        layer_pairs(problem.model, problem.batches, "transformer.h.0.mlp.c_fc", sampled_targets(problem.model, problem.batches, 7, i))
        for i in range(3)
    ]  # fmt: skip
    Gs, As = zip(*(run.factors() for run in runs), strict=True)
    K = hs.kfac(problem, space, samples=3, seed=7)
    assert relative(K.to_dense(), stored("gpt2", sum(Gs) / 3, As[0])) < EXACT
    assert relative(Gs[1], Gs[0]) > 0.01
    for per in ("token", "sequence"):
        E = hs.kfac(problem, space, corrected=True, samples=3, seed=7, per=per)
        expected = sum(float(run.fisher(per).trace()) for run in runs) / 3
        assert hs.trace(E).estimate == pytest.approx(expected, rel=EXACT)


def test_a_squared_errors_factors_are_right_in_expectation() -> None:
    """One layer y = W x: A is X^T X / P exactly, and G is (P / N) 2 I in expectation, as in G = (2/N) I kron X^T X."""
    torch.manual_seed(0)
    X = [torch.randn(n, 2, dtype=F64) for n in (2, 5)]
    problem = hs.supervised(
        nn.Linear(2, 3, bias=False).double(), [(x, torch.zeros(len(x), 3, dtype=F64)) for x in X], "mse"
    )
    draws = torch.stack([hs.kfac(problem, seed=s).to_dense() for s in range(150)])
    G = hs.ggn(problem).to_dense()
    deviation = draws.std(0) / 150**0.5
    assert float(((draws.mean(0) - G) / deviation.clamp(min=1e-9)).abs().max()) < 4.5
    assert float((deviation / G.diagonal().mean()).max()) > 0.01


def test_a_weight_that_is_used_twice_has_the_positions_of_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, X, y = Twice().double(), torch.randn(5, 3, dtype=F64), torch.tensor([0, 1, 1, 0, 1])
    problem = hs.supervised(model, [(X[:2], y[:2]), (X[2:], y[2:])])
    K = hs.kfac(problem, hs.select(problem, "inner.weight"), labels="empirical").to_dense()
    W = model.inner.weight.detach()
    first = (X @ W.T).requires_grad_()
    second = first.tanh() @ W.T
    loss = nn.functional.cross_entropy(model.head(second.tanh()), y, reduction="sum")
    g = torch.cat(torch.autograd.grad(loss, [first, second]))
    a = torch.cat([X, first.detach().tanh()])
    assert relative(K, torch.kron(g.T @ g / 5, a.T @ a / 10)) < EXACT


# ---- where it is exact


@pytest.mark.parametrize("corrected", [False, True])
def test_one_token(corrected: bool) -> None:
    """A sequence of two tokens has one target, and the second position's input has no part in it."""
    ids = torch.tensor([[5, 9]])
    with keeping_double(tiny("llama")):
        problem, space = language_model("llama", "*.0.mlp.up_proj.weight", batches=[{"input_ids": ids}])
        F = hs.fisher(problem, space, seed=4).to_dense()
        assert relative(hs.kfac(problem, space, corrected=corrected, seed=4).to_dense(), F) < EXACT


def test_equal_inputs() -> None:
    torch.manual_seed(0)
    problem = hs.supervised(nn.Linear(3, 4, bias=False).double(), [(torch.ones(6, 3, dtype=F64), torch.arange(6) % 4)])
    for labels, exact in (("sampled", hs.fisher(problem)), ("empirical", hs.empirical_fisher(problem))):
        assert relative(hs.kfac(problem, labels=labels).to_dense(), exact.to_dense()) < EXACT


def test_inputs_and_derivatives_in_all_combinations() -> None:
    """W = 0, so that r = -2 target: every input with every target makes both factors' products uncorrelated."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False).double().requires_grad_(False)
    model.weight.zero_()
    X, Y = torch.randn(4, 3, dtype=F64), torch.randn(5, 2, dtype=F64)
    problem = hs.supervised(model, [(X.repeat_interleave(5, 0), Y.repeat(4, 1))], loss="mse")
    space = hs.select(problem, "weight")
    exact = hs.empirical_fisher(problem, space, per="sequence").to_dense()
    assert relative(hs.kfac(problem, space, labels="empirical").to_dense(), exact) < EXACT
    some = hs.supervised(model, [(X, Y[:4])], loss="mse")  # and otherwise it is no more than an approximation
    exact = hs.empirical_fisher(some, space, per="sequence").to_dense()
    assert relative(hs.kfac(some, space, labels="empirical").to_dense(), exact) > 0.1


# ---- corrected eigenvalues


@pytest.mark.parametrize(("name", "layer"), LAYERS)
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_corrected_eigenvalues_are_the_best(name: str, layer: str, per: str) -> None:
    """S is the diagonal of the matrix in the eigenbasis: its trace, and the least Frobenius error of all diagonals."""
    with keeping_double(tiny(name)):
        problem, space = language_model(name, f"{layer}.weight")
        pairs = layer_pairs(problem.model, problem.batches, layer, sampled_targets(problem.model, problem.batches, 0))
        G, A = pairs.factors()
        F, U = pairs.fisher(per), torch.kron(torch.linalg.eigh(G)[1], torch.linalg.eigh(A)[1])
        best = U @ (U.T @ F @ U).diagonal().diag() @ U.T
        K, E = (hs.kfac(problem, space, corrected=c, per=per if c else "token").to_dense() for c in (False, True))
        order = torch.arange(len(F)).view(len(G), len(A))
        order = (order.T if name == "gpt2" else order).flatten()
        F, best = F[order][:, order], best[order][:, order]
        assert relative(E, best) < EXACT
        assert float(E.trace()) == pytest.approx(float(F.trace()), rel=EXACT)
        assert float((E - F).norm()) < float((K - F).norm())
        if per == "sequence":
            assert relative(hs.fisher(problem, space, per="sequence").to_dense(), F) < EXACT


@pytest.mark.parametrize("name", ["opt", "gpt-neox", "qwen3", "gemma2", "bloom"])
def test_the_trace_in_other_architectures(name: str) -> None:
    """Per sequence it is that of the Fisher matrix per sequence, layer by layer, which another engine draws."""
    problem = hs.causal_lm(tiny(name), ragged_batches())
    space = hs.select(problem, layers="all")
    K = hs.kfac(problem, space, corrected=True, per="sequence", seed=6)
    expected = hs.ggn(problem, space).draw_diagonal(6, 0)
    found = hs.diagonal(K).values
    for weight, part in expected.items():
        tol = CASTS if ARCHITECTURES[name].casts else EXACT
        assert float(found[weight].sum()) == pytest.approx(float(part.sum()), rel=tol)


def test_an_example_is_a_token_and_a_sequence_at_once() -> None:
    problem = network()
    for weight in ("0.weight", "2.weight"):
        space = hs.select(problem, weight)
        F = hs.fisher(problem, space, seed=1).to_dense()
        K, E = (hs.kfac(problem, space, corrected=c, seed=1) for c in (False, True))
        assert hs.trace(E).estimate == pytest.approx(float(F.trace()), rel=1e-12)
        assert relative(E.to_dense(), F) < relative(K.to_dense(), F)
