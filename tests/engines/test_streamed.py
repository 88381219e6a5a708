"""Products of which one block's graph lives at a time are those of the whole graph, on every architecture that allows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn

import hesscope as hs
from architectures import ARCHITECTURES, ragged_batches, tiny, unused_experts_allowed
from hesscope.engines import make_engine
from hesscope.losses import CausalLMLoss, PositionsLoss, chunked_head, positions
from hesscope.models import find_trunk
from oracles import KeepDouble, relative

EXACT, CASTS, SINGLE = 1e-10, 1e-6, 1e-5

every_architecture = pytest.mark.parametrize("name", list(ARCHITECTURES))
OPERATORS = {"hessian": hs.hessian, "ggn": hs.ggn, "empirical fisher": hs.empirical_fisher}


def product(
    model: nn.Module, engine: str, count: int = 2, pattern: str = "*", operator: str = "hessian"
) -> tuple[Tensor, Any]:
    problem = hs.causal_lm(model, ragged_batches())
    A = OPERATORS[operator](problem, hs.select(problem, pattern), engine=engine)
    with unused_experts_allowed():
        return A.space.flatten(A.matmat(A.space.gaussian(1, list(range(count))))), A


@every_architecture
@pytest.mark.parametrize("operator", ["hessian", "ggn"])
def test_in_float64(name: str, operator: str) -> None:
    model = tiny(name)
    expected, _ = product(model, "reverse-over-reverse", operator=operator)
    found, A = product(model, "streamed", operator=operator)
    assert relative(found, expected) < (CASTS if ARCHITECTURES[name].casts else EXACT)
    assert A.describe()["engine_choice"].startswith("streamed, as asked: agrees with reverse-over-reverse to")


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_in_float64_with_the_models_casts_taken_out(name: str) -> None:
    model = tiny(name)
    with KeepDouble():
        assert relative(product(model, "streamed")[0], product(model, "reverse-over-reverse")[0]) < EXACT


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt"])
def test_in_float32(name: str) -> None:
    model = tiny(name, torch.float32)
    assert relative(product(model, "streamed")[0], product(model, "reverse-over-reverse")[0]) < SINGLE


#: One name a piece of the model, and several pieces at once.
SELECTIONS = [
    "transformer.h.1.*",
    "transformer.h.0.mlp.*",
    "transformer.ln_f.*",
    "transformer.wpe.weight",
    "transformer.wte.weight",
]


@pytest.mark.parametrize("pattern", SELECTIONS)
@pytest.mark.parametrize("operator", list(OPERATORS))
def test_parts_of_a_model(pattern: str, operator: str) -> None:
    """Before, in, and after the trunk; the tied embedding is on both sides of it."""
    model = tiny("gpt2")
    expected, _ = product(model, "auto", 3, pattern, operator)
    assert relative(product(model, "streamed", 3, pattern, operator)[0], expected) < EXACT


def test_parts_of_parameters_and_one_vector_or_several() -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    space = hs.select(problem, {"transformer.h.1.attn.c_attn.weight": [3, 90, 41], "transformer.ln_f.bias": None})
    identity = torch.eye(space.size, dtype=torch.float64)
    expected, H = hs.hessian(problem, space) @ identity, hs.hessian(problem, space, "streamed")
    assert relative(H @ identity, expected) < EXACT
    assert relative(torch.stack([H @ e for e in identity], 1), expected) < EXACT


def test_the_gradient_and_the_perplexity() -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches(), objective="perplexity")
    space = hs.select(problem, "transformer.h.*")
    V = torch.randn(space.size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative(hs.hessian(problem, space, "streamed") @ V, hs.hessian(problem, space) @ V) < EXACT


@pytest.mark.parametrize("operator", ["hessian", "ggn"])
def test_logits_of_a_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    """Down to one token a chunk, in batches whose tokens are no multiples of a chunk."""
    model = tiny("gpt2")
    expected, _ = product(model, "reverse-over-reverse", operator=operator)
    for rows in (1, 4):
        monkeypatch.setattr(chunked_head.HeadForm, "most", lambda self, weight, rows=rows: rows)
        found, H = product(model, "streamed", operator=operator)
        assert relative(found, expected) < EXACT
        assert H.describe()["head"] == f"logits in chunks of at most {rows} tokens"


def test_positions_add_up_to_the_whole_loss() -> None:
    """For a model that treats positions one by one."""
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7)).double()

    class Wrapped(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            out: Tensor = model(input_ids)
            return out

    ids = torch.randint(0, 7, (3, 5), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids == 2, -100)}
    loss = CausalLMLoss()
    total, count = loss.total(Wrapped(), batch)
    parts = [PositionsLoss(loss, slice(a, a + 2)).total(Wrapped(), batch) for a in (0, 2, 4)]
    torch.testing.assert_close(sum(part for part, _ in parts), total)
    assert sum(n for _, n in parts) == count


@pytest.mark.parametrize("length", [1, 2, 7])
def test_odd_lengths(length: int) -> None:
    model = tiny("llama")
    ids = torch.randint(3, 30, (2, length + 1), generator=torch.Generator().manual_seed(0))
    problem = hs.causal_lm(model, ids, batch_size=1)
    space = hs.select(problem, "model.layers.*")
    v = torch.ones(space.size, dtype=torch.float64)
    assert relative(hs.hessian(problem, space, "streamed") @ v, hs.hessian(problem, space) @ v) < CASTS


def test_what_is_kept_is_the_borders() -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    space = hs.select(problem, "transformer.h.1.*")
    made = make_engine("streamed").linearize(problem, 0, space)
    sequences, length = problem.batches[0]["input_ids"].shape
    borders = 2 * sequences * length * 8 * 8  # into block 1 and out of it, width 8, float64
    assert borders <= made.bytes < borders + 2 * sequences * length**2 * 8  # and the masks that blocks are given
    assert made.total == pytest.approx(float(problem.total(0)[0]))


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral", "phi", "bloom"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_first_product_runs_no_block_more_often_than_a_further_one(name: str, count: int) -> None:
    """The run that records how blocks are called is the way up; Bloom's own function takes it apart."""
    problem = hs.causal_lm(tiny(name), ragged_batches()[:1])
    space = hs.select(problem)
    engine = make_engine("streamed")
    engine.prepare(problem, space)
    trunk = find_trunk(problem.model)
    assert trunk is not None
    runs: list[int] = []
    for block in trunk.blocks:
        kind = type(block)
    before = kind.forward

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return before(self, *args, **kwargs)

    made, V, found = engine.linearize(problem, 0, space), space.rademacher(0, list(range(count))), []
    kind.forward = counted  # type: ignore[method-assign]
    try:
        for _ in range(2):
            runs.clear()
            with unused_experts_allowed():
                made.add_product(V, space.zeros(count))
            found.append(len(runs) / len(trunk.blocks))
    finally:
        kind.forward = before  # type: ignore[method-assign]
    assert found[1] == (1 + count if name != "bloom" else 1 + 2 * count), found
    assert found[0] == found[1] + (name == "bloom"), found


def test_the_model_comes_back_as_it_was() -> None:
    model = tiny("gpt2")
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    product(model, "streamed")
    for name, module in model.named_modules():
        assert set(module.__dict__) == set(before[name])
        assert "forward" not in module.__dict__


def test_an_operator_for_a_part_of_the_selection() -> None:
    """It runs through other pieces of the model than the whole."""
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    H = hs.hessian(problem, hs.select(problem, "transformer.h.1.*"), "streamed")
    H @ torch.ones(H.shape[0], dtype=torch.float64)
    part = hs.select(problem, "transformer.h.1.mlp.c_fc.weight")
    v = torch.ones(part.size, dtype=torch.float64)
    assert relative(H.narrowed(part) @ v, hs.hessian(problem, part) @ v) < EXACT


def test_the_model_follows_a_change_of_its_weights() -> None:
    model = tiny("gpt2")
    problem = hs.causal_lm(model, ragged_batches())
    space = hs.select(problem, "transformer.h.1.*")
    v = torch.ones(space.size, dtype=torch.float64)
    H = hs.hessian(problem, space, "streamed")
    before = H @ v
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight.mul_(1.5)
    assert relative(H @ v, hs.hessian(problem, space) @ v) < EXACT
    assert relative(H @ v, before) > 1e-4


def test_an_unused_parameter_has_zero_rows_and_a_warning() -> None:
    model = tiny("gpt2")
    model.register_parameter("spare", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    problem = hs.causal_lm(model, ragged_batches())
    H = hs.hessian(problem, hs.select(problem, "transformer.ln_f.*", "spare"), "streamed")
    with pytest.warns(hs.HesscopeWarning, match="does not depend on spare"):
        product = H @ torch.ones(H.shape[0], dtype=torch.float64)
    parts = H.space.unflatten(product[:, None])
    assert not parts["spare"].any()
    assert parts["transformer.ln_f.weight"].all()


# ---- what is refused


def test_a_model_without_a_trunk_is_refused() -> None:
    problem = hs.supervised(nn.Linear(3, 2), [(torch.ones(2, 3), torch.zeros(2).long())])
    with pytest.raises(hs.HesscopeError, match=r"Expected a model with a list of like blocks for engine='streamed'"):
        hs.hessian(problem, engine="streamed") @ torch.ones(8)


def test_frozen_dropout_is_refused() -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches(), dropout="frozen")
    with pytest.raises(hs.HesscopeError, match="another mask"):
        hs.hessian(problem, hs.select(problem, "transformer.ln_f.*"), "streamed") @ torch.ones(16).double()


def test_a_detour_around_the_blocks_is_refused() -> None:
    """T5 hands every block a bias that its first block has computed from a parameter."""
    model = T.T5ForConditionalGeneration(
        T.T5Config(vocab_size=37, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2, decoder_start_token_id=0)
    ).double()
    ids = torch.randint(3, 30, (2, 5), generator=torch.Generator().manual_seed(0))
    problem = hs.seq2seq_lm(model.eval(), [{"input_ids": ids, "labels": ids}])
    with pytest.raises(hs.HesscopeError):
        hs.hessian(problem, engine="streamed") @ torch.ones(sum(p.numel() for p in model.parameters())).double()


class Chain(nn.Module):
    """A small chain of blocks, with places where a model may do what a chain does not."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(2)])
        self.out = nn.Linear(width, 11, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, input_ids: Tensor) -> Tensor:
        start = self.before(input_ids)
        h = start
        for layer in self.layers:
            h = self.between(layer(h))
        return self.read(self.out(self.after(h, start)))

    def read(self, logits: Tensor) -> Tensor:
        return logits

    def before(self, input_ids: Tensor) -> Tensor:
        h: Tensor = self.embed(input_ids)
        return h

    def between(self, h: Tensor) -> Tensor:
        return h

    def after(self, h: Tensor, start: Tensor) -> Tensor:
        return h


def gap(model: nn.Module, length: int = 5, pattern: str = "*", loss: Any = None) -> float:
    """How far the streamed product is from reverse over reverse."""
    ids = torch.randint(0, 11, (2, length), generator=torch.Generator().manual_seed(0))
    problem = hs.Problem(model.double(), loss or CausalLMLoss(), [{"input_ids": ids, "labels": ids}])
    space = hs.select(problem, pattern)
    v = torch.randn(space.size, generator=torch.Generator().manual_seed(1)).double()
    return relative(hs.hessian(problem, space, "streamed") @ v, hs.hessian(problem, space) @ v)


def test_a_chain() -> None:
    assert gap(Chain()) < EXACT


class Skipping(Chain):
    """Its head reads the input of the first block again: the head's piece makes it anew, from the same parameters."""

    def after(self, h: Tensor, start: Tensor) -> Tensor:
        return h * start


def test_a_skip_connection_past_the_trunk() -> None:
    assert gap(Skipping()) < EXACT


class Leaking(Chain):
    """The first block's output reaches the head as well, with little weight."""

    share = 1e-4

    def between(self, h: Tensor) -> Tensor:
        self.seen = getattr(self, "seen", h)
        return h

    def after(self, h: Tensor, start: Tensor) -> Tensor:
        seen, self.seen = self.seen, None
        del self.seen
        return h if seen is h else h + self.share * seen


def test_a_small_detour_is_noticed() -> None:
    with pytest.raises(hs.HesscopeError, match="carries something around them"):
        gap(Leaking())


@pytest.mark.parametrize(("name", "seed"), [("llama", 5), ("gpt2", 2), ("opt", 1)])
def test_single_coordinates_in_bfloat16_are_rounding_and_no_detour(name: str, seed: int) -> None:
    """Some are off by more than half of themselves, in either arrangement."""
    problem = hs.causal_lm(tiny(name, torch.bfloat16), ragged_batches())
    space = hs.select(problem, random=40, seed=seed)
    v = torch.ones(space.size)
    H = hs.hessian(problem, space, "streamed")
    assert relative(H @ v, hs.hessian(problem, space) @ v) < 16 * torch.finfo(torch.bfloat16).eps
    assert H.describe()["engine_choice"].endswith(", which is rounding")


class LeakingMuch(Leaking):
    share = 0.5


def test_a_detour_in_bfloat16_is_noticed_all_the_same() -> None:
    ids = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))
    problem = hs.Problem(LeakingMuch().bfloat16(), CausalLMLoss(), [{"input_ids": ids, "labels": ids}])
    with pytest.raises(hs.HesscopeError, match="carries something around them"):
        hs.hessian(problem, engine="streamed") @ torch.ones(hs.select(problem).size)


class Between(Chain):
    """Something between the blocks."""

    def between(self, h: Tensor) -> Tensor:
        return h * 2.0


class InPlace(Chain):
    """The same, unseen by identity."""

    def between(self, h: Tensor) -> Tensor:
        return h.detach().mul_(2.0) if not h.requires_grad else h.mul_(2.0)


@pytest.mark.parametrize(
    ("kind", "reason"), [(Between, "puts something between them"), (InPlace, "changes them in place")]
)
def test_something_between_the_blocks_is_refused(kind: type[Chain], reason: str) -> None:
    with pytest.raises(hs.HesscopeError, match=reason):
        gap(kind())


class Residual(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        x += super().forward(x)
        return x


class Named(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return {"hidden": super().forward(x)}


class Unpacking(Chain):
    def between(self, h: Any) -> Tensor:
        hidden: Tensor = h["hidden"] if isinstance(h, dict) else h
        return hidden


@pytest.mark.parametrize(
    ("kind", "reason"), [(Residual, "changes them in place"), (Named, "to return its hidden states")]
)
def test_blocks_that_write_into_their_input_or_return_something_else_are_refused(
    kind: type[nn.Linear], reason: str
) -> None:
    model = Unpacking()
    model.layers = nn.ModuleList([nn.Sequential(kind(4, 4)) for _ in range(2)])
    with pytest.raises(hs.HesscopeError, match=reason):
        gap(model)


def test_a_parameter_tied_inside_a_block_and_one_shared_by_blocks() -> None:
    model = Chain()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2)])
    for layer in model.layers:
        layer[2].weight = layer[0].weight
    model.layers[1][0].bias = model.layers[0][0].bias
    assert gap(model) < EXACT


class Mixing(Chain):
    """Positions meet after the blocks."""

    def after(self, h: Tensor, start: Tensor) -> Tensor:
        return h + 0.5 * h.cumsum(1)


class Numbered(Chain):
    """Positions are numbered from what the model is given, and reach the head around the blocks."""

    def before(self, input_ids: Tensor) -> Tensor:
        return super().before(input_ids) + torch.arange(input_ids.shape[1])[:, None] / 10

    def after(self, h: Tensor, start: Tensor) -> Tensor:
        return h * start


class WithPenalty(CausalLMLoss):
    """A loss that builds on the next-token loss."""

    def total_of_outputs(self, outputs: Tensor, batch: dict[str, Any]) -> tuple[Tensor, int]:
        total, count = super().total_of_outputs(outputs, batch)
        return total + 0.1 * outputs.logsumexp(-1).square().sum(), count


@pytest.mark.parametrize("kind", [Mixing, Numbered])
@pytest.mark.parametrize("pattern", ["*", "layers.*"])
def test_a_few_positions_at_a_time_that_do_not_add_up_are_refused(
    kind: type[Chain], pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look at a short sequence has one chunk and agrees; the long batch has several.

    Positions are cut where the model does something to its logits that is not known to be done one by one.
    """
    monkeypatch.setattr(Chain, "read", lambda self, logits: logits.clamp(-50, 50))
    assert gap(kind(), 200, pattern) < EXACT
    monkeypatch.setattr(positions, "_CHUNK_BYTES", 64 * 2 * 11 * 8)
    assert gap(Chain(), 200, pattern) < EXACT
    with pytest.raises(hs.HesscopeError, match="mixes positions after its blocks"):
        gap(kind(), 200, pattern)


def test_a_loss_that_builds_on_the_next_token_loss_is_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "_CHUNK_BYTES", 64 * 2 * 11 * 8)
    assert gap(Chain(), 200, loss=WithPenalty()) < EXACT


def test_a_mask_over_pairs_of_tokens() -> None:
    """What lies along the tokens in a way of its own is not cut for the look at a short sequence."""
    model = tiny("gpt2")
    ids = torch.randint(3, 30, (1, 16), generator=torch.Generator().manual_seed(0))
    seen = torch.ones(16, 16, dtype=torch.bool).tril()
    mask = torch.zeros(16, 16, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min)[None, None]
    problem = hs.causal_lm(model, [{"input_ids": ids, "attention_mask": mask, "labels": ids}])
    monkey = hs.select(problem, "transformer.h.1.*")
    v = torch.ones(monkey.size, dtype=torch.float64)
    from hesscope.engines import checking

    assert checking.short_slice(problem, 8).batches[0]["input_ids"].shape == (1, 16)
    assert relative(hs.hessian(problem, monkey, "streamed") @ v, hs.hessian(problem, monkey) @ v) < EXACT
