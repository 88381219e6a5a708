"""The meter against bytes counted by hand, and a dry run against the same run with its numbers."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.dryrun import Meter
from hesscope.dryrun.meter import MAPPED
from hesscope.engines import make_engine, make_output_engine
from hesscope.engines.dry import DryRuns, largest_batch, run_product
from hesscope.operators.output_hessian import OutputHessian


def test_bytes_and_work_counted_by_hand() -> None:
    x, w = torch.ones(3, 4), torch.ones(4, 5)
    with Meter() as meter:
        y = x @ w  # 60 bytes
        z = y.relu()  # 60 more
        view = z.view(5, 3)  # none
        del y
        last = view.sum()  # 4
    assert (meter.peak, meter.live) == (120, 64)
    assert meter.work.flops == 2 * 3 * 4 * 5
    assert list(meter.trace) == [60, 60, -1, 4]
    assert float(last) == 60.0


def test_what_was_there_before_counts_as_nothing() -> None:
    x = torch.ones(1000)
    with Meter() as meter:
        x.mul_(2.0)
        x[:10].view(2, 5)
    assert (meter.peak, meter.live) == (0, 0)


def test_large_empty_memory_counts_as_it_is_written_to() -> None:
    with Meter(mapped=400) as meter:
        small, large = torch.empty(10), torch.empty(100)
        parts = large[:25], large[25:75]
        assert (meter.live, list(meter.trace)) == (40, [40])
        parts[0].zero_()
        parts[0].add_(1.0)
        assert meter.live == 140
        parts[1].copy_(torch.ones(1))  # 4 more, for a moment
        assert (meter.live, meter.peak) == (340, 344)
        large.mul_(2.0)
        assert meter.live == 440
        del parts, large
        assert meter.live == 40
        del small
    assert list(meter.trace) == [
        40,
        100 + MAPPED,
        4,
        200 + MAPPED,
        -3,
        100 + MAPPED,
        *sorted([-2, -4, -5], reverse=True),
        -1,
    ]


@pytest.mark.parametrize("operator", ["hessian", "ggn"])
@pytest.mark.parametrize("engine", ["reverse-over-reverse", "streamed"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "tiled llama"])
def test_a_dry_run_takes_what_the_run_takes(name: str, engine: str, operator: str) -> None:
    """The same code on shapes: tensors alive at once, and multiplications, to the last one."""
    model, attention = tiny(name.removeprefix("tiled "), torch.float32), "tiled" if "tiled" in name else "auto"
    problem = hs.causal_lm(model, [ragged_batches()[0]], dtype=torch.float32, attention=attention)
    space = hs.select(problem)

    def make() -> object:
        return make_engine(engine) if operator == "hessian" else make_output_engine(engine, OutputHessian())

    dry = DryRuns(problem, space).product(make, checked=False, replayed=False)  # type: ignore[arg-type]
    V = space.gaussian(0, ["v"])
    with warnings.catch_warnings(), Meter() as meter:
        warnings.simplefilter("ignore")
        wet = run_product(make(), problem, space, V, meter, checked=False)  # type: ignore[arg-type]
    # GPT-2's composed activation on dual numbers: some of its zeros are seen on shapes that are not seen in numbers.
    assert dry.peak == pytest.approx(
        wet.peak, rel=0.15 if (name, engine, operator) == ("gpt2", "streamed", "ggn") else 0.02
    )
    assert dry.build.flops + dry.product.flops == wet.build.flops + wet.product.flops
    assert dry.kept == wet.kept


def test_the_largest_batch_is_looked_at() -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    assert largest_batch(problem) == 0


def test_the_model_is_left_alone() -> None:
    model = tiny("llama")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    hs.plan(hs.causal_lm(model, ragged_batches()), measure=False)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_a_dry_run_cuts_logits_into_the_chunks_that_there_will_be() -> None:
    """A chunk has more tokens on a GPU; a tensor without data has no device to tell."""
    ids = torch.randint(0, 4096, (2, 512), generator=torch.Generator().manual_seed(0))
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=4096, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    problem = hs.causal_lm(model.eval(), ids, batch_size=2)
    space, make = hs.select(problem), partial(make_engine, "reverse-over-reverse")
    real, V = Meter(), hs.select(problem).zeros()
    with real:
        run_product(make(), problem, space, V, real, checked=False)
    dry = DryRuns(problem, space).product(make, checked=False, replayed=False)
    assert dry.peak == pytest.approx(real.peak, rel=0.02)
    elsewhere = DryRuns(problem, space, torch.device("cuda")).product(make, checked=False, replayed=False)
    assert elsewhere.peak > 1.2 * dry.peak
