"""What a plan says, what it refuses, and how the commands and engine="auto" heed it."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
import torch

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.assets import model_path
from hesscope.memory import parse_bytes
from hesscope.planning.speed import Rates

MB = 10**6


def wide(sequences: int = 8) -> hs.Problem:
    """The embedded model, with a graph of some hundred megabytes."""
    ids = torch.randint(0, 256, (sequences, 128), generator=torch.Generator().manual_seed(0))
    return hs.causal_lm(model_path(), ids, batch_size=sequences)


@pytest.fixture
def rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans without the largest shapes that would fit, each of which takes a run."""
    monkeypatch.setattr(sys.modules["hesscope.planning.plan"], "_would_fit", lambda *_: {})


def room(extra: int) -> int:
    """A limit that leaves so much beside what the process has taken."""
    return int(psutil.Process().memory_info().rss) + extra


def test_every_engine_has_a_row_and_what_would_fit_is_named(tmp_path: Path) -> None:
    found = hs.plan(hs.causal_lm(tiny("llama"), ragged_batches()), what="block", measure=False)
    assert list(found.engines) == [
        "reverse-over-reverse",
        "forward-over-reverse",
        "reverse-over-forward",
        "streamed",
        "finite-difference",
    ]
    assert found.chosen == "reverse-over-reverse"
    assert found.wanted_products == found.vector_bytes // 8
    row = found.engines["reverse-over-reverse"]
    assert row["fits"]
    assert 0 < row["tensor_bytes"] <= row["least_bytes"] <= row["peak_bytes"]
    assert 0 < row["further_seconds"] <= row["first_seconds"] <= row["total_seconds"]
    assert set(found.would_fit) == {"length", "batch_size", "vectors", "basis"}
    found.save(tmp_path / "plan")
    assert hs.load(tmp_path / "plan").summary() == found.summary()


def test_a_plan_is_of_the_precision_that_products_will_have(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, kept = hs.causal_lm(tiny("llama", torch.float32), ragged_batches()[:1]), "reverse-over-reverse"
    monkeypatch.setattr(sys.modules["hesscope.planning.plan"], "measure_rates", lambda *_: Rates(1e10, 1e10, 1e-6))
    monkeypatch.setattr(sys.modules["hesscope.planning.plan"], "_would_fit", lambda *_: {})
    plain, summed = (hs.plan(problem, measure=False, engines=[kept], precision=p) for p in (None, "float32"))
    # The sum over batches takes eight bytes a coordinate instead of four.
    more = summed.engines[kept]["tensor_bytes"] - plain.engines[kept]["tensor_bytes"]
    assert more >= 0.99 * plain.vector_bytes
    with hs.precision("bfloat16"):
        rounded = hs.plan(problem, measure=False)
    assert list(rounded.engines) == ["reverse-over-reverse", "streamed"]
    assert rounded.what == "eigs of the hessian, precision bfloat16"
    assert rounded.provenance["operator"] == {"operator": "hessian", "precision": "bfloat16"}
    # Factors are copied to bfloat16 before they are multiplied: work that a plan without it does not know.
    assert plain.engines[kept]["further_seconds"] < rounded.engines[kept]["further_seconds"]
    with pytest.raises(hs.HesscopeError, match="precision='bfloat16', got 'forward-over-reverse'"):
        hs.plan(problem, measure=False, engines=["streamed", "forward-over-reverse"], precision="bfloat16")


def test_a_graph_grows_with_the_batch_and_streamed_takes_less(rows_alone: None) -> None:
    one, two = (
        hs.plan(problem, measure=False, engines=["reverse-over-reverse", "streamed"])
        for problem in (wide(sequences=4), wide())
    )
    peaks = [
        [plan.engines[name]["tensor_bytes"] for name in ("reverse-over-reverse", "streamed")] for plan in (one, two)
    ]
    assert peaks[0][0] < peaks[1][0] < 2.2 * peaks[0][0]
    assert peaks[1][1] < 0.7 * peaks[1][0]


def test_less_memory_fits_less() -> None:
    problem = wide()
    much, little = (
        hs.plan(problem, measure=False, engines=["streamed"], memory=room(size * MB)) for size in (500, 200)
    )
    assert little.would_fit["batch_size"] < much.would_fit["batch_size"]
    assert little.would_fit["basis"] < much.would_fit["basis"]


def test_next_to_no_memory_fits_nothing(rows_alone: None) -> None:
    assert not hs.plan(wide(), measure=False, engines=["streamed"], memory=MB).engines["streamed"]["fits"]


def test_auto_takes_the_streamed_engine_where_the_graph_does_not_fit(rows_alone: None) -> None:
    problem = wide()
    v = torch.randn(hs.select(problem).size, generator=torch.Generator().manual_seed(1))
    usual = hs.hessian(problem) @ v
    rows = hs.plan(problem, measure=False).engines
    between = (rows["reverse-over-reverse"]["least_bytes"] + rows["streamed"]["least_bytes"]) // 2
    H = hs.hessian(problem)
    with hs.memory_limit(room(between)):
        found = H @ v
    assert H.describe()["engine_choice"].startswith("streamed: ")
    assert "do not fit" in H.describe()["engine_choice"]
    torch.testing.assert_close(found, usual, rtol=1e-3, atol=1e-5 * float(usual.abs().max()))


def test_an_engine_that_was_asked_for_is_refused_where_it_does_not_fit() -> None:
    H = hs.hessian(wide(), engine="reverse-over-reverse")
    v = torch.ones(H.shape[0])
    with hs.memory_limit(room(60 * MB)), pytest.raises(hs.HesscopeError, match=r"predicted to take .*batch-size"):
        H @ v
    with hs.memory_limit(None):
        assert bool(torch.isfinite(hs.hessian(wide(), engine="reverse-over-reverse") @ v).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operator": "fisher"}, "operator to be one of hessian, ggn"),
        ({"what": "everything"}, "what to be one of"),
        ({"products": 0}, "products to be a whole number"),
        ({"engines": ["fastest"]}, "engine"),
        ({"memory": "much"}, "amount of memory"),
    ],
)
def test_impossible_requests_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(hs.HesscopeError, match=message):
        hs.plan(hs.causal_lm(tiny("gpt2"), ragged_batches()), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "size"), [("8GB", 8 * 10**9), ("1.5 GiB", 3 * 2**29), ("512", 512), (7, 7)])
def test_amounts_of_memory(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "-1", "0", "8 apples", True, 0])
def test_what_is_no_amount_of_memory(text: object) -> None:
    with pytest.raises(hs.HesscopeError, match="amount of memory"):
        parse_bytes(text)  # type: ignore[arg-type]


def test_a_plan_has_the_memory_of_all_devices_of_a_spread_model(
    rows_alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, module = wide(1), sys.modules["hesscope.planning.plan"]
    spread = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
    monkeypatch.setattr(type(problem), "devices", property(lambda self: spread))
    monkeypatch.setattr(module, "available_together", lambda devices: 10 * MB * len(devices))
    assert hs.plan(problem, measure=False, engines=["streamed"]).memory == 30 * MB
