"""GGN and Fisher matrices: closed forms, expectations over labels, splitting of batches, costs, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.engines.reverse_over_reverse import SavedBytes
from hesscope.losses import CrossEntropyLoss, SquaredErrorLoss
from oracles import causal_lm, cross_entropy_hessian, jacobian, linearized_lm, relative, squared_error_hessian

EXACT = 1e-12
F64 = torch.float64

Batch = tuple[Tensor, Tensor]


def inputs(*counts: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, 4, generator=g, dtype=F64) for n in counts]


def linear(outputs: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, outputs, bias=False).double()


def classification() -> tuple[nn.Linear, list[Batch]]:
    """Softmax regression; examples labelled -100 do not count."""
    targets = [torch.tensor([0, 2]), torch.tensor([1, -100, 1, 0, 2]), torch.tensor([-100])]
    return linear(3), list(zip(inputs(2, 5, 1), targets, strict=True))


def regression() -> tuple[nn.Linear, list[Batch]]:
    g = torch.Generator().manual_seed(1)
    return linear(3), [(x, torch.randn(len(x), 3, generator=g, dtype=F64)) for x in inputs(2, 5, 1)]


def tiny_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


# ---- closed forms


def test_linear_regression() -> None:
    """G = H = (2/N) I kron X^T X; residuals are 2 (y - target), and a term is an element."""
    model, batches = regression()
    problem = hs.supervised(model, batches, loss="mse")
    X, Y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert relative(hs.ggn(problem).to_dense(), squared_error_hessian(X, 3)) < EXACT
    r = 2 * (model(X).detach() - Y)
    per_row = torch.einsum("bi,bj,bk,bl->ikjl", r, r, X, X).reshape(12, 12) / Y.numel()
    per_element = torch.einsum("bi,bk,bl->ikl", r.square(), X, X) / Y.numel()
    assert relative(hs.empirical_fisher(problem, per="sequence").to_dense(), per_row) < EXACT
    assert relative(hs.empirical_fisher(problem).to_dense(), torch.block_diag(*per_element)) < EXACT


def test_softmax_regression() -> None:
    """G = H; an example is a token and a sequence at once."""
    model, batches = classification()
    problem = hs.supervised(model, batches)
    X, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    X, y = X[y != -100], y[y != -100]
    z = model(X).detach()
    assert relative(hs.ggn(problem).to_dense(), cross_entropy_hessian(X, z)) < EXACT
    r = z.softmax(-1) - F.one_hot(y, 3)
    expected = torch.einsum("bi,bj,bk,bl->ikjl", r, r, X, X).reshape(12, 12) / len(y)
    for per in ("token", "sequence"):
        assert relative(hs.empirical_fisher(problem, per=per).to_dense(), expected) < EXACT


def test_logistic_regression() -> None:
    """Two classes; with logits (0, w x) the GGN is (1/N) sum p (1 - p) x x^T."""

    class Logistic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.5, -1.0, 0.2, 0.1], dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            return F.pad((x @ self.w)[:, None], (1, 0))

    model, X = Logistic(), inputs(3, 4)
    problem = hs.supervised(model, [(x, torch.ones(len(x)).long()) for x in X])
    p = torch.sigmoid(torch.cat(X) @ model.w.detach())
    expected = torch.cat(X).T @ torch.diag(p * (1 - p)) @ torch.cat(X) / 7
    assert relative(hs.ggn(problem).to_dense(), expected) < EXACT


# ---- losses with and without derivatives of their own


class Plain:
    """A loss stripped of everything but outputs and total: autograd differentiates it in the outputs."""

    def __init__(self, loss: Any) -> None:
        self._loss = loss

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return self._loss.outputs(model, batch)  # type: ignore[no-any-return]

    def total_of_outputs(self, outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        return self._loss.total_of_outputs(outputs, batch)  # type: ignore[no-any-return]

    def total(self, model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        return self.total_of_outputs(self.outputs(model, batch), batch)


def targets_of(kind: str, x: Tensor, g: torch.Generator) -> Tensor:
    if kind == "classes":
        return torch.randint(3, (len(x),), generator=g)
    if kind == "probabilities":
        return torch.randn(len(x), 3, generator=g, dtype=F64).softmax(-1) * 1.7  # need not sum to one
    if kind == "masked":
        return (
            torch.eye(3, dtype=F64)[torch.randint(3, (len(x),), generator=g)] * (torch.arange(len(x)) % 3 > 0)[:, None]
        )
    if kind == "positions":
        return torch.randint(3, (len(x), 2, 2), generator=g)
    return torch.randn(len(x), 3, generator=g, dtype=F64)


class Positions(nn.Module):
    """Outputs [B, 3, 2, 2]: classes on the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 12))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).reshape(-1, 3, 2, 2)  # type: ignore[no-any-return]


def problem_with(kind: str, plain: bool = False) -> hs.Problem:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(5)
    model = Positions().double() if kind == "positions" else tiny_network()
    batches = [(x, targets_of(kind, x, g)) for x in inputs(2, 5)]
    if kind in ("classes", "positions"):
        batches[1][1][1] = -100
    loss = SquaredErrorLoss() if kind == "numbers" else CrossEntropyLoss()
    return hs.Problem(model, Plain(loss) if plain else loss, batches)


KINDS = ["classes", "probabilities", "positions", "numbers"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_losss_own_derivatives_are_autograds(kind: str) -> None:
    own, plain = problem_with(kind), problem_with(kind, plain=True)
    V = torch.randn(hs.ggn(own).shape[0], 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    assert relative(hs.ggn(own) @ V, hs.ggn(plain) @ V) < EXACT
    ours, theirs = (hs.empirical_fisher(p, per="sequence") for p in (own, plain))
    assert relative(ours @ V, theirs @ V) < EXACT
    assert hs.ggn(own).positive_semidefinite
    assert not hs.ggn(plain).positive_semidefinite  # who knows


@pytest.mark.parametrize("kind", KINDS)
def test_the_ggn_is_the_hessian_of_the_linearised_model(kind: str) -> None:
    """J^T H_out J, with J and H_out written down."""
    problem = problem_with(kind)
    parameters = list(problem.model.parameters())
    picked = [(i, j) for i, p in enumerate(parameters) for j in range(p.numel())]
    expected = torch.zeros(len(picked), len(picked), dtype=F64)
    for batch in problem.batches:
        z = problem.model(batch[0])
        J = jacobian(z, parameters, picked).flatten(0, -2)

        def total(flat: Tensor, z: Tensor = z, batch: Any = batch) -> Tensor:
            return problem.loss.total_of_outputs(flat.reshape(z.shape), batch)[0]  # type: ignore[attr-defined,no-any-return]

        expected += J.T @ torch.autograd.functional.hessian(total, z.detach().flatten()) @ J
    assert relative(hs.ggn(problem).to_dense(), expected / problem.N) < EXACT


# ---- sampled labels

SEEDS = 150


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["classes", "probabilities", "masked", "positions", "numbers"])
def test_the_fisher_matrix_is_the_ggn_in_expectation(kind: str, per: str) -> None:
    """Over fixed seeds, along two directions: within its standard error, entry by entry."""
    problem = problem_with(kind)
    G = hs.ggn(problem)
    V = torch.randn(G.shape[0], 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    draws = torch.stack([V.T @ (hs.fisher(problem, per=per, seed=s) @ V) for s in range(SEEDS)])
    z = (draws.mean(0) - V.T @ (G @ V)) / (draws.std(0) / math.sqrt(SEEDS))
    assert float(z.abs().max()) < 4
    assert float((draws.std(0) / draws.mean(0)).abs().max()) > 0.05  # it is random at all


@pytest.mark.parametrize("kind", ["classes", "probabilities", "masked"])
def test_the_trace_of_corrected_kronecker_factors_is_the_ggns_in_expectation(kind: str) -> None:
    problem = problem_with(kind)
    space = hs.select(problem, "*.weight")
    traces = torch.tensor(
        [hs.trace(hs.kfac(problem, space, corrected=True, seed=s)).estimate for s in range(SEEDS)], dtype=F64
    )
    expected = hs.trace(hs.ggn(problem, space), "exact").estimate
    assert abs(float(traces.mean()) - expected) < 4 * float(traces.std()) / math.sqrt(SEEDS)
    assert 0.01 < float(traces.std()) / expected < 0.5


def test_samples_are_averaged() -> None:
    """The first of two samples is the only one of one; what is left is the second's own matrix."""
    problem = problem_with("classes")
    one, two = (hs.fisher(problem, samples=m).to_dense() for m in (1, 2))
    rest = 2 * two - one
    assert relative(one, two) > 0.05
    assert float(torch.linalg.eigvalsh(rest).min()) > -EXACT * float(rest.norm())
    v = torch.ones(len(one), dtype=F64)
    spread = [torch.stack([hs.fisher(problem, samples=m, seed=s) @ v for s in range(60)]) for m in (1, 8)]
    ratio = float(spread[0].var(0).sum() / spread[1].var(0).sum())
    assert 4 < ratio < 16  # 8 in expectation


def language_batches(sizes: list[int]) -> list[dict[str, Tensor]]:
    """The same sequences in batches of these sizes, padded on the right, their first tokens not counted."""
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 37, (n,), generator=g) for n in (9, 2, 5, 12, 3, 7, 4)]
    batches = []
    for size in sizes:
        group, rows = rows[:size], rows[size:]
        ids = nn.utils.rnn.pad_sequence(group, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in group], batch_first=True)
        labels = torch.where(mask.bool(), ids, -100)
        labels[:, 1][mask.sum(1) > 8] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


@pytest.mark.parametrize("per", ["token", "sequence"])
@pytest.mark.parametrize("sizes", [[1] * 7, [3, 4], [2, 1, 4]])
def test_labels_do_not_depend_on_how_sequences_are_batched(sizes: list[int], per: str) -> None:
    model = tiny("gpt2")
    whole, split = (hs.fisher(hs.causal_lm(model, language_batches(s)), samples=2, per=per) for s in ([7], sizes))
    V = torch.randn(whole.shape[0], 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    assert relative(split @ V, whole @ V) < EXACT
    other = hs.fisher(hs.causal_lm(model, language_batches([7])), samples=2, per=per, seed=1)
    assert relative(other @ V, whole @ V) > 1e-2


def test_labels_are_drawn_once_and_follow_the_parameters() -> None:
    """With and without kept graphs; a change of the weights changes the probabilities, not the random numbers."""
    model = tiny("gpt2")
    kept, dropped = (hs.fisher(hs.causal_lm(model, ragged_batches()), graph_memory=m) for m in (None, 0))
    v = torch.ones(kept.shape[0], dtype=F64)
    first = kept @ v
    for A in (kept, dropped):
        assert torch.equal(A @ v, first)
        assert torch.equal(A @ v, first)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1.2)
    fresh = hs.fisher(hs.causal_lm(model, ragged_batches())) @ v
    for A in (kept, dropped):
        assert torch.equal(A @ v, fresh)
    assert relative(first, fresh) > 1e-2


def test_a_seed_of_none_is_drawn_and_recorded() -> None:
    problem = problem_with("classes")
    A = hs.fisher(problem, seed=None)
    again = hs.fisher(problem, seed=A.describe()["seed"])
    assert torch.equal(A.to_dense(), again.to_dense())


# ---- models


def test_batch_normalisation_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double().eval()
    net[1].running_var.fill_(2.0)
    X = torch.cat(inputs(2, 5))
    targets = torch.arange(7) % 3
    whole, split = (
        hs.supervised(net, [(X[a:b], targets[a:b]) for a, b in cuts]) for cuts in ([(0, 7)], [(0, 2), (2, 7)])
    )
    for make in (hs.ggn, hs.fisher, hs.empirical_fisher):
        assert relative(make(split).to_dense(), make(whole).to_dense()) < EXACT
    parameters = list(net.parameters())
    picked = [(i, j) for i, p in enumerate(parameters) for j in range(p.numel())]
    z = net(X)
    J, p = jacobian(z, parameters, picked), z.detach().softmax(-1)
    H_out = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    assert relative(hs.ggn(whole).to_dense(), torch.einsum("bvi,bvw,bwj->ij", J, H_out, J) / 7) < EXACT


def test_an_unused_parameter_has_zero_rows_and_a_warning() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = linear(3), nn.Parameter(torch.ones(2, dtype=F64))

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    problem = hs.supervised(Partly(), classification()[1])
    for make in (hs.ggn, hs.fisher, hs.empirical_fisher):
        A = make(problem)
        with pytest.warns(hs.HesscopeWarning, match="does not depend on unused"):
            dense = A.to_dense()
        assert A.space.names[0] == "unused"
        assert not dense[:2].any()
        alone = hs.select(problem, "used.*")
        assert relative(A.restricted_to(alone).to_dense(), make(problem, alone).to_dense()) < EXACT
    with pytest.warns(hs.HesscopeWarning, match="does not depend on unused"):
        assert not hs.ggn(problem, hs.select(problem, "unused")).to_dense().any()


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_perplexity(name: str) -> None:
    """P (G + g g^T)."""
    model = tiny(name)
    problem = hs.causal_lm(model, ragged_batches(), objective="perplexity")
    picked = {n: [0, 1] for n, p in model.named_parameters() if p.numel() > 1}
    space = hs.select(problem, picked)
    first = causal_lm(model, ragged_batches(), space)
    dense = linearized_lm(model, ragged_batches(), space).ggn()
    expected = math.exp(first.risk) * (dense + torch.outer(first.gradient, first.gradient))
    G = hs.ggn(problem, space)
    V = torch.randn(space.size, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    assert relative(G @ V, expected @ V) < 1e-10
    assert G.positive_semidefinite
    # 3 for the graphs, 2 for the gradient, 4 for every product.
    assert G.units == pytest.approx(5 + 4 * 3)
    with torch.no_grad():
        next(model.parameters()).mul_(1.1)
    assert relative(G @ V, expected @ V) > 1e-3


# ---- cost


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_units_are_what_the_products_cost(name: str) -> None:
    """In multiplications: 3 forward passes for the graphs, 4 a product, against what torch counts."""
    model = tiny(name)
    # All of one length, so that a forward pass is worth its share of the tokens.
    batches = [{"input_ids": torch.randint(3, 37, (rows, 8))} for rows in (2, 1)]
    problem = hs.causal_lm(model, batches)
    with FlopCounterMode(display=False) as counter:
        for b in range(len(batches)):
            problem.outputs(b)
    unit = counter.get_total_flops()
    G = hs.ggn(problem)
    V = torch.ones(G.shape[0], 3, dtype=F64)
    for expected in (3 + 4 * 3, 4 * 3):
        before = G.units
        with FlopCounterMode(display=False) as counter:
            G @ V
        assert counter.get_total_flops() / unit == pytest.approx(expected, rel=0.02)
        assert G.units - before == pytest.approx(expected)
    dropped = hs.ggn(problem, graph_memory=0)
    dropped @ V[:, 0]
    dropped @ V[:, 0]
    assert dropped.units == pytest.approx(14)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_is_kept_is_hardly_more_than_the_outputs_graph(name: str) -> None:
    """The way back of u = 0 is zero, and kept without memory; kept as it is, it would be as large again.

    What a way back computes for itself (the powers in RMSNorm, SiLU's slope) is kept.
    """
    model = tiny(name)
    problem = hs.causal_lm(model, ragged_batches())
    meter = SavedBytes(model.parameters())
    with saved_tensors_hooks(meter.pack, meter.unpack):
        leaves = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
        outputs = [problem.outputs(b, leaves) for b in range(3)]
    forward = meter.bytes + sum(z.nbytes for z in outputs)
    G, H = hs.ggn(problem), hs.hessian(problem)
    for A in (G, H):
        A @ torch.ones(A.shape[0], dtype=F64)
    assert G.describe()["graph_bytes"] < 1.4 * forward
    assert G.describe()["graph_bytes"] < 0.6 * H.describe()["graph_bytes"]


# ---- what is said, and what is refused


def test_a_result_says_which_matrix_it_is_of() -> None:
    problem = problem_with("classes")
    found = hs.trace(hs.fisher(problem, samples=2, per="sequence", seed=7)).provenance["operator"]
    assert {key: found[key] for key in ("operator", "per", "samples", "seed")} == {
        "operator": "fisher",
        "per": "sequence",
        "samples": 2,
        "seed": 7,
    }
    assert hs.empirical_fisher(problem).describe()["per"] == "token"
    assert all(A.positive_semidefinite for A in (hs.fisher(problem), hs.empirical_fisher(problem)))


class Total:
    """A loss that does not pass through outputs."""

    def total(self, model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return model(batch[0]).square().sum(), len(batch[0])


@pytest.mark.parametrize("make", [hs.ggn, hs.fisher, hs.empirical_fisher])
def test_a_loss_without_outputs_is_refused(make: Any) -> None:
    problem = hs.Problem(tiny_network(), Total(), problem_with("classes").batches)
    with pytest.raises(hs.HesscopeError, match=r"Expected a loss with outputs.*Total lacks them"):
        make(problem)
    mean = hs.Problem(tiny_network(), lambda m, b: m(b[0]).mean(), problem_with("classes").batches, count=lambda b: 1)
    with pytest.raises(hs.HesscopeError, match="Expected a loss with outputs"):
        make(mean)


def test_what_has_no_fisher_matrix_is_refused() -> None:
    plain, sampled = problem_with("classes", plain=True), problem_with("classes")
    with pytest.raises(hs.HesscopeError, match=r"Expected a loss with sample\(.*Plain lacks it"):
        hs.fisher(plain, per="sequence")
    with pytest.raises(hs.HesscopeError, match=r"Expected a loss with term_axes.*use per='sequence'"):
        hs.empirical_fisher(plain)
    with pytest.raises(hs.HesscopeError, match="Expected per to be 'token' or 'sequence', got 'batch'"):
        hs.fisher(sampled, per="batch")
    with pytest.raises(hs.HesscopeError, match="Expected samples to be at least 1, got 0"):
        hs.fisher(sampled, samples=0)
    with pytest.raises(
        hs.HesscopeError, match=r"Expected engine to be auto, reverse-over-reverse or streamed .*, got 'finite"
    ):
        hs.ggn(sampled, engine="finite-difference")
    perplexity = hs.supervised(*classification(), objective="perplexity")
    for make in (hs.fisher, hs.empirical_fisher):
        with pytest.raises(hs.HesscopeError, match=r"Expected objective='nll' .*exp\(R\) is no log-likelihood"):
            make(perplexity)


@pytest.mark.parametrize("make", [hs.ggn, hs.fisher, hs.empirical_fisher])
def test_the_record_says_which_engine_ran(make: Callable[..., hs.Operator]) -> None:
    chosen = [make(problem_with("classes"), engine=name).describe() for name in ("auto", "reverse-over-reverse")]
    assert [found["engine_choice"] for found in chosen] == [
        "reverse-over-reverse: where nothing else is asked for",
        "reverse-over-reverse, as asked",
    ]
    assert {found["engine"] for found in chosen} == {"reverse-over-reverse"}


class Once(torch.autograd.Function):
    """x^2, whose gradient cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]  # type: ignore[no-any-return]


def test_a_model_without_second_derivatives_is_refused() -> None:
    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear(3)

        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(self.layer(x))  # type: ignore[no-any-return,no-untyped-call]

    G = hs.ggn(hs.supervised(Squared(), classification()[1]))
    with pytest.raises(hs.HesscopeError, match="cannot be differentiated again; replace that part of the model"):
        G @ torch.ones(12, dtype=F64)
