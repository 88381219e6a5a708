"""A probe for every sequence: each draw is v_s * (H_s v_s) summed over sequences, of plain double backward passes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hesscope as hs
from architectures import ARCHITECTURES, ragged_batches, tiny, unused_experts_allowed
from hesscope.operators import probed_diagonal as probed_module
from hesscope.space import Space
from hesscope.space.random import signs, stream_key
from oracles import Batch, causal_lm_products, derivatives, labels_of, relative

F64 = torch.float64
EXACT, CASTS = 1e-10, 1e-6


def hessian(name: str, *patterns: Any, batches: list[Batch] | None = None, **more: Any) -> Any:
    problem = hs.causal_lm(tiny(name), batches or ragged_batches(), **more)
    return hs.hessian(problem, hs.select(problem, *patterns))


def singles(batches: list[Batch]) -> Iterator[Batch]:
    for batch in batches:
        for s in range(len(batch["input_ids"])):
            yield {key: x[s : s + 1] for key, x in batch.items()}


def probe(space: Space, apart: set[str], seed: int, number: int, s: int) -> dict[str, Tensor]:
    """Sequence s's probe of whole parameters, made from the random functions alone."""
    stream, found = f"per-sequence/{number}", {}
    for c in space.coordinates:
        units, inputs = c.parameter_shape[c.unit_axis], c.parameter_shape[1 - c.unit_axis] if c.name in apart else 0
        if c.name in apart:
            r = signs(stream_key(seed, stream, c.name, "units"), s * units + torch.arange(units))
            k = signs(stream_key(seed, stream, c.name, "inputs"), s * inputs + torch.arange(inputs))
            v = torch.outer(r, k) if c.unit_axis == 0 else torch.outer(k, r)
            found[c.name] = c.scatter(c.gather(v.to(F64)))
        else:
            found[c.name] = c.scatter(space.rademacher(seed, [stream])[c.name][0])
    return found


def expected_draw(H: Any, batches: list[Batch], seed: int, number: int) -> Tensor:
    """(1/N) sum_s v_s * (H_s v_s), each product by a double backward pass over one sequence."""
    apart = set(H.space.names) - set(H._probes().shared)
    total = {
        name: torch.zeros(c.parameter_shape, dtype=F64)
        for name, c in zip(H.space.names, H.space.coordinates, strict=True)
    }
    count = 0
    for s, single in enumerate(singles(batches)):
        terms = int((labels_of(single)[:, 1:] != -100).sum())
        count += terms
        if terms:
            v = probe(H.space, apart, seed, number, s)
            (Hv,) = causal_lm_products(H.problem.model, [single], [v])
            for name in v:
                total[name] += terms * v[name] * Hv[name]
    return torch.cat([c.gather(total[c.name] / count).reshape(-1) for c in H.space.coordinates])


def draw(H: Any, seed: int = 3, number: int = 0) -> Tensor:
    flat: Tensor = H.space.flatten(H.probe_diagonal(seed, number))[:, 0]
    return flat


# ---- the very sums


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_draw_over_all_parameters(name: str) -> None:
    """Linear layers with probes of their own, Conv1D, fused and grouped ones too; norms, embeddings, experts with shared ones."""
    with unused_experts_allowed():
        H = hessian(name)
        found = draw(H)
    assert H.probed_groups == 6
    assert any("embed" in other or "wte" in other for other in H._probes().shared)
    tolerance = CASTS if ARCHITECTURES[name].casts else EXACT
    assert relative(found, expected_draw(H, ragged_batches(), 3, 0)) < tolerance


@pytest.mark.parametrize(
    "pattern",
    ["*.0.self_attn.q_proj.weight", "*.1.mlp.down_proj.weight[1:4]", "*.1.self_attn.v_proj.weight[:, 2:5]",
     "*.0.mlp.up_proj.weight[3, 1:6]"],
)  # fmt: skip
def test_one_layer_and_parts_of_it(pattern: str) -> None:
    H = hessian("llama", pattern)
    assert not H._probes().shared
    for number in (0, 1):
        assert relative(draw(H, 5, number), expected_draw(H, ragged_batches(), 5, number)) < CASTS


def test_scattered_entries_share_a_probe() -> None:
    """They are no rows times columns."""
    H = hessian("llama", {"model.layers.0.mlp.up_proj.weight": [3, 17, 40], "model.layers.1.mlp.up_proj.weight": None})
    assert H._probes().shared == ["model.layers.0.mlp.up_proj.weight"]
    assert relative(draw(H), expected_draw(H, ragged_batches(), 3, 0)) < CASTS


def test_float32_agrees() -> None:
    model = tiny("llama", torch.float32)
    problem = hs.causal_lm(model, ragged_batches())
    H = hs.hessian(problem, hs.select(problem, "*_proj.weight"))
    assert relative(draw(H), expected_draw(H, ragged_batches(), 3, 0)) < 1e-4


def test_layers_in_a_row_whose_derivatives_are_one_tensor() -> None:
    """Without anything between them, gx of the second layer is gy of the first; examples of a batch stay together."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).to(F64)
    batches = [(torch.randn(n, 3, dtype=F64), torch.randn(n, 2, dtype=F64)) for n in (4, 1)]
    H: Any = hs.hessian(hs.supervised(model, batches, loss="mse"))
    assert H.probed_groups == 2
    total, names = torch.zeros(H.space.size, dtype=F64), set(H.space.names)
    for b, (x, y) in enumerate(batches):
        A = derivatives(((model(x) - y) ** 2).sum(), list(model.parameters())).hessian
        v = torch.cat([part.reshape(-1) for part in probe(H.space, names, 3, 0, b).values()])
        total += v * (A @ v) / H.problem.N
    assert relative(draw(H), total) < EXACT


# ---- what does not matter, and what does


def test_batches_do_not_change_a_draw() -> None:
    ids = torch.randint(3, 37, (6, 5), generator=torch.Generator().manual_seed(1))
    patterns = ("*_proj.weight", "*norm.weight")
    draws = [draw(hessian("llama", *patterns, batches=[{"input_ids": x} for x in ids.split(n)])) for n in (6, 2, 1, 4)]
    problem = hs.causal_lm(tiny("llama"), [{"input_ids": ids}])
    draws.append(draw(hs.hessian(problem, hs.select(problem, *patterns), microbatch=4)))
    for other in draws[1:]:
        assert relative(other, draws[0]) < EXACT


def test_draws_differ_by_seed_and_number_and_follow_the_parameters() -> None:
    H = hessian("llama", "*.0.mlp.up_proj.weight")
    first = draw(H, 0, 0)
    assert torch.equal(first, draw(H, 0, 0))
    assert not torch.allclose(first, draw(H, 0, 1))
    assert not torch.allclose(first, draw(H, 1, 0))
    with torch.no_grad():
        H.problem.model.model.layers[1].mlp.down_proj.weight.mul_(2)
    assert relative(draw(H, 0, 0), draw(hs.hessian(H.problem, H.space), 0, 0)) < EXACT
    assert not torch.allclose(first, draw(H, 0, 0))


def test_a_perplexity_has_its_rank_one_part_exactly() -> None:
    H = hessian("llama", "*.0.mlp.up_proj.weight")
    of_perplexity = hs.hessian(H.problem.related(objective="perplexity"), H.space)
    gradient = H.space.flatten(H.risk_and_gradient()[1])[:, 0]
    expected = math.exp(H.problem.risk()) * (draw(H) + gradient**2)
    assert relative(draw(of_perplexity), expected) < EXACT
    assert hs.diagonal(of_perplexity, method="per-sequence", budget=3).products == 3


class MixesSequences(nn.Module):
    """A language model whose layers see the mean over the batch, as strongly as told: no sum over sequences."""

    def __init__(self, strength: float | None = None) -> None:
        super().__init__()
        self.strength = strength
        self.embed = nn.Embedding(7, 4)
        self.first, self.last = nn.Linear(4, 6, bias=False), nn.Linear(6, 7, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = torch.tanh(self.first(self.embed(input_ids)))
        mean = x.mean(0, keepdim=True)
        logits: Tensor = self.last(x * (mean if self.strength is None else 1.0 + self.strength * mean))
        return logits


def test_sequences_that_touch_one_another_share_a_probe() -> None:
    torch.manual_seed(0)
    problem = hs.causal_lm(MixesSequences().double(), [{"input_ids": torch.randint(7, (3, 2))}] * 2)
    H: Any = hs.hessian(problem, hs.select(problem, "first.weight"))
    d = H.to_dense().diagonal()
    draws = torch.stack([draw(H, 1, k) for k in range(300)])
    assert H.probed_groups == 2
    z = (draws.mean(0) - d) / (draws.std(0) / 300**0.5)
    assert float(z.abs().max()) < 4.5


@pytest.mark.parametrize("strength", [0.3, 0.03])
def test_sequences_that_touch_one_another_are_noticed_in_bfloat16(strength: float) -> None:
    """A hundred roundings of bfloat16 are nearly one."""
    torch.manual_seed(0)
    problem = hs.causal_lm(MixesSequences(strength).bfloat16(), [{"input_ids": torch.randint(7, (3, 2))}] * 2)
    H: Any = hs.hessian(problem, hs.select(problem, "first.weight"))
    H.probe_diagonal(0, 0)
    assert H.probed_groups == 2


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sequences_that_are_apart_are_so_in_bfloat16(name: str) -> None:
    problem = hs.causal_lm(tiny(name, torch.bfloat16), ragged_batches())
    H: Any = hs.hessian(problem, hs.select(problem))
    with unused_experts_allowed():
        H.probe_diagonal(0, 0)
    assert H.probed_groups == 6


# ---- estimates


def test_estimates_are_unbiased_and_their_intervals_cover() -> None:
    H = hessian("llama", "*.0.self_attn.v_proj.weight", batches=ragged_batches()[:1])
    d = H.to_dense().diagonal()
    runs = [hs.diagonal(H, method="per-sequence", budget=16, seed=s) for s in range(40)]
    assert {run.degrees_of_freedom for run in runs} == {15}
    values = torch.stack([run.flat() for run in runs])
    z = (values.mean(0) - d) / (values.std(0) / 40**0.5)
    assert float(z.abs().max()) < 4.5
    ends = [run.interval() for run in runs]
    low, high = (torch.stack([part[name] for part in side for name in part]) for side in zip(*ends, strict=True))
    inside = (low.flatten(1) <= d) & (d <= high.flatten(1))
    assert 0.93 <= float(inside.double().mean()) <= 0.97


def test_sequences_that_agree_have_less_variance_than_one_probe_for_all() -> None:
    """And exactly as much as the sum over sequences of each one's off-diagonal energy."""
    ids = torch.randint(3, 37, (2, 6), generator=torch.Generator().manual_seed(0)).repeat(4, 1)
    H = hessian("llama", "*.1.mlp.down_proj.weight", batches=[{"input_ids": ids}])
    parts = [hs.hessian(p, H.space).to_dense() for p in (H.problem.by_sequence().subset([s]) for s in range(8))]
    off = [part - part.diagonal().diag() for part in parts]
    expected = sum(float(part.square().sum()) for part in off) / 64
    draws = torch.stack([draw(H, 2, k) for k in range(300)])
    assert float(draws.var(0).sum()) / expected == pytest.approx(1.0, abs=0.15)
    together = H.to_dense()
    assert expected < 0.5 * float((together - together.diagonal().diag()).square().sum())


def test_all_ones() -> None:
    """The Hessian of (sum of weights)^2 / 2 is the matrix of ones, its diagonal one."""
    model = nn.Linear(6, 1, bias=False).to(F64)
    H: Any = hs.hessian(hs.supervised(model, [(torch.ones(1, 6, dtype=F64), torch.zeros(1, 1, dtype=F64))], loss="mse"))
    draws = torch.stack([draw(H, 0, k) for k in range(400)]) / 2
    assert abs(float(draws.mean()) - 1) < 4 * float(draws.mean(1).std()) / 20
    assert torch.allclose(draws, draws.round(), atol=1e-12)


def test_one_weight_and_a_zero_hessian() -> None:
    H = hessian("llama", "*.0.mlp.up_proj.weight[2, 3]")
    assert relative(hs.diagonal(H, method="per-sequence", budget=2).flat(), H.to_dense().diagonal()) < CASTS
    model = nn.Linear(3, 2, bias=False).to(F64)
    flat = hs.Problem(model, lambda m, x: m(x).mean(), [torch.ones(4, 3, dtype=F64)], count=len)
    found = hs.diagonal(hs.hessian(flat), method="per-sequence", budget=3)
    assert not found.flat().any()
    assert found.relative_error == 0


# ---- cost and refusals


def test_products_passes_and_kept_graphs() -> None:
    H = hessian("llama", "*_proj.weight")
    found = hs.diagonal(H, method="per-sequence", budget=7)
    assert found.products == H.products == 7
    # A look at the layers; the check that sequences are apart, on the first batch; the graphs, once; and the probes.
    share = H.problem.counts[0] / H.problem.N
    build, each = probed_module.BUILD_UNITS, probed_module.PROBE_UNITS
    assert found.units == pytest.approx(1 + each * share + build + 7 * each)
    again = hs.hessian(H.problem, H.space, graph_memory=0)
    assert hs.diagonal(again, method="per-sequence", budget=7).units == pytest.approx(
        1 + each * share + 7 * (build + each)
    )


def test_what_cannot_be_taken_apart_is_refused() -> None:
    H = hessian("llama", "*norm.weight")
    others = (
        H,
        2.0 * H,
        hs.ggn(H.problem, H.space),
        hs.hessian(H.problem, hs.select(H.problem, "*up_proj.weight"), engine="finite-difference"),
        hs.operator(torch.eye(3)),
    )
    for operator in others:
        assert operator.probed_groups == 0
        with pytest.raises(hs.HesscopeError, match=r"for method='per-sequence', got .*; use method='hutchinson'"):
            hs.diagonal(operator, method="per-sequence", budget=5)
        with pytest.raises(hs.HesscopeError, match="no probes for single sequences"):
            operator.probe_diagonal(0, 0)


def test_an_unused_parameter_is_zero_and_warned_of() -> None:
    model = tiny("llama")
    model.model.extra = nn.Linear(3, 3, bias=False, dtype=F64)
    problem = hs.causal_lm(model, ragged_batches())
    H = hs.hessian(problem, hs.select(problem, "*.extra.weight", "*.0.mlp.up_proj.weight"))
    with pytest.warns(hs.HesscopeWarning, match="does not depend on"):
        found = H.probe_diagonal(0, 0)
    assert not found["model.extra.weight"].any()
    assert found["model.layers.0.mlp.up_proj.weight"].any()


def test_auto_chooses_probes_for_every_sequence_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all sequences agree, 24 probes are as good as 24 passes."""
    ids = torch.randint(3, 37, (1, 5), generator=torch.Generator().manual_seed(0)).repeat(24, 1)
    H = hessian("llama", "*_proj.weight", batches=[{"input_ids": ids}])
    found = hs.diagonal(H, budget=61)
    chosen = found.provenance["estimator"]["chosen"]
    assert found.products == H.products == 61
    assert found.method == "per-sequence"
    assert 8 < chosen["per_sequence_gain"] < 80
    assert "per-sequence (chosen by a pilot)" in found.summary()
    # Where memory holds few vectors, nothing that keeps them competes.
    for module in ("automatic", "scheduled"):
        monkeypatch.setattr(f"hesscope.algorithms.diagonals.{module}.vectors_that_fit", lambda *_: 100)
    lean = hs.diagonal(hs.hessian(H.problem, H.space), budget=61)
    assert lean.method == "per-sequence"
    assert lean.provenance["estimator"]["chosen"]["reason"] == "the free memory and a pilot"
    assert lean.provenance["estimator"]["draws"] == 61 - 12
