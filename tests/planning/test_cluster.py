"""A plan for a cluster: counts made by hand on a tiny model, limits, and refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hesscope as hs
from architectures import tiny
from hesscope.cli.main import run
from hesscope.engines import make_engine
from hesscope.engines.dry import DryRuns
from hesscope.models import load_skeleton
from hesscope.planning import ClusterPlan, skeleton_problem

#: The tiny GPT-2 of the tests: width 8, vocabulary 37, 16 positions, two blocks, tied, float32 here.
BLOCK = (8 * 24 + 24) + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8) + 4 * 8
OUTSIDE = 37 * 8 + 16 * 8 + 2 * 8
WEIGHTS = 2 * BLOCK + OUTSIDE


@pytest.fixture(scope="module")
def problem(tmp_path_factory: pytest.TempPathFactory) -> hs.Problem:
    folder = tmp_path_factory.mktemp("shape")
    tiny("gpt2").config.save_pretrained(folder)  # type: ignore[operator,union-attr]
    return skeleton_problem(load_skeleton(str(folder)), 12, 2)


def plan(problem: hs.Problem, **more: Any) -> ClusterPlan:
    return hs.plan_cluster(problem, **more)


def test_weights_are_counted_by_hand(problem: hs.Problem) -> None:
    shape = plan(problem).shape
    assert (shape.weights, shape.largest_block, shape.outside) == (WEIGHTS, BLOCK, OUTSIDE)
    assert (shape.coordinates, shape.largest_block_coordinates, shape.outside_coordinates) == (WEIGHTS, BLOCK, OUTSIDE)
    part = plan(problem, space=hs.select(problem, "transformer.h.1.mlp.*")).shape
    assert part.coordinates == part.largest_block_coordinates == 8 * 32 + 32 + 32 * 8 + 8
    assert part.outside_coordinates == 0


def test_what_runs_is_that_of_the_whole_model(problem: hs.Problem) -> None:
    """One block and two, extrapolated, against all of the dry run: here there are two."""
    space = hs.select(problem)
    whole = DryRuns(problem, space).product(
        lambda: make_engine("streamed"), checked=False, replayed=False, result=False
    )
    shape = plan(problem).shape
    assert shape.running_bytes == whole.peak
    assert shape.flops == (whole.build + whole.product).flops > 0


def test_bytes_by_layout(problem: hs.Problem) -> None:
    blocks, n = 2 * BLOCK, WEIGHTS
    one_round = 4 * (2 * blocks + 3 * blocks + OUTSIDE + 2 * OUTSIDE)
    assert plan(problem, layout="data", ranks=4).sent == 2 * 3 / 4 * 4 * n
    assert plan(problem, layout="fsdp", ranks=4).sent == 3 / 4 * one_round
    two_rounds = 4 * (2 * 5 * blocks + 3 * OUTSIDE)
    assert plan(problem, layout="fsdp", ranks=4, batches=5).sent == 3 / 4 * two_rounds
    hybrid = plan(problem, layout="hsdp", ranks=8, ranks_per_node=4).sent
    assert hybrid == 3 / 4 * one_round + 2 * 1 / 2 * 4 * n / 4


@pytest.mark.parametrize("layout", ["data", "fsdp"])
def test_one_rank_sends_nothing_and_has_everything(problem: hs.Problem, layout: str) -> None:
    alone = plan(problem, layout=layout, ranks=1, basis=5)
    assert alone.sent == alone.sending_seconds == 0
    assert alone.memory["weights"] == 4 * WEIGHTS
    assert alone.memory["vectors"] == 8 * 4 * WEIGHTS
    assert alone.memory["gathered"] == 0


def test_what_is_divided_falls_with_the_ranks(problem: hs.Problem) -> None:
    two, eight = (plan(problem, ranks=ranks).memory for ranks in (2, 8))
    for name in ("weights", "vectors"):
        assert two[name] == 4 * eight[name]
    assert two["gathered"] == eight["gathered"] == 4 * (4 * BLOCK + 4 * OUTSIDE)
    assert two["running"] == eight["running"]


def test_it_says_what_would_fit(problem: hs.Problem) -> None:
    found = plan(problem, ranks=2, device_memory="1GB")
    assert found.fits
    assert "fits into 1 GB" in found.summary()
    room = int((found.memory["gathered"] + found.memory["running"] + 2e4) / 0.9)
    tight = replace(found, device_memory=room)
    assert not tight.fits
    assert "ranks (" in tight.advice()
    assert "does not fit" in tight.summary()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"layout": "ring"}, "Expected layout to be data, fsdp or hsdp, got 'ring'."),
        ({"ranks": 0}, "Expected ranks to be 1 or more, got 0."),
        ({"layout": "hsdp", "ranks": 6, "ranks_per_node": 4}, "Expected ranks to be a multiple of ranks_per_node"),
        ({"device_memory": "much"}, "Expected an amount of memory"),
    ],
)
def test_refusals(problem: hs.Problem, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(hs.HesscopeError, match=said.replace("(", r"\(")):
        plan(problem, **wrong)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny("gpt2").config.save_pretrained(tmp_path)  # type: ignore[operator,union-attr]
    common = ["plan", "--model", str(tmp_path), "--length", "12", "--ranks", "4"]
    assert run([*common, "--layout", "fsdp", "--batches", "8", "--basis", "10"]) == 0
    said = capsys.readouterr().out
    assert f"{WEIGHTS:,} weights, {WEIGHTS:,} selected; 4 ranks, --layout fsdp" in said
    assert "a prediction from the model's shape: nothing was run" in said
    assert run([*common, "--output-dir", str(tmp_path / "out")]) == 2
    assert "the plan is of a configuration, and printed" in capsys.readouterr().err
