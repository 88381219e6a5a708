"""Two ranks give the numbers of one process, say the same, and stop together."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import run_ranks
from programs import DENSITY, TIMEOUT, _run, commands, in_bfloat16, interrupted
from shared_cases import ARCHITECTURES, QUICK, cases, grouped_cases

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.parallel.ranks import _digest
from oracles import relative

Found = dict[str, dict[str, torch.Tensor]]
PROGRAMS = (
    "numbers",
    "in_groups",
    "kept",
    "wrapped",
    "refusals",
    "failures",
    "counted",
    "rooms",
    "halves",
    "commands",
    "interrupted",
    "vanished",
    "moved",
    "other_options",
    "outlived",
    "alike",
    "called_back",
    "gone",
)


def differences(found: Found, expected: Found) -> list[str]:
    """What is not the same: products to 1e-10, iterations to what they amplify, costs where no graph is built twice."""
    assert list(found) == list(expected)
    wrong = []
    for name, parts in expected.items():
        for what, x in parts.items():
            x, y = (part.double().nan_to_num(nan=-1.0) for part in (x, found[name][what]))
            gap = float((x - y).abs().max() / x.abs().max().clamp(min=1e-300)) if x.shape == y.shape else float("inf")
            limit = 1e-6 if what in ("residuals", "error") else 1e-10
            if not gap < limit:
                wrong.append(f"{name}: {what} differs by {gap:.1e}")
    return wrong


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have run all programs: started once for all workers, for that is what takes the time."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two-ranks"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "0.pt").exists():
            assert interrupted(root)[0] == 130  # a run that one process has begun
            (root / "to-one.partial").rename(root / "from-one.partial")
            run_ranks(2, root, *PROGRAMS)
    return root


@pytest.fixture(scope="session")
def two(folder: Path) -> list[dict[str, Any]]:
    """What the programs returned on either rank."""
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_numbers_are_those_of_one_process_and_the_same_on_every_rank(two: list[dict[str, Any]]) -> None:
    assert differences(two[0]["numbers"], dict(cases(lambda problem: problem, QUICK))) == []
    for name, parts in two[0]["numbers"].items():
        others = two[1]["numbers"][name]
        assert [what for what, x in parts.items() if not torch.equal(x.nan_to_num(), others[what].nan_to_num())] == []


def test_groups_of_ranks_divide_the_vectors(two: list[dict[str, Any]]) -> None:
    expected = dict(grouped_cases(lambda problem: problem))
    assert [differences(rank["in_groups"]["numbers"], expected) for rank in two] == [[], []]
    assert (
        sum(rank["in_groups"]["given"][0] for rank in two) == 5
    )  # the vectors of the first product, on the first batch
    assert all(rank["in_groups"]["given"][0] < 5 for rank in two)
    assert all("probe_groups to divide the number of ranks, 2," in rank["in_groups"]["three"] for rank in two)


def test_groups_of_parameters_keep_one_state_for_all_ranks(two: list[dict[str, Any]]) -> None:
    layout = {"layout": "data parallel", "ranks": 2, "backend": "gloo"}
    assert [rank["kept"] for rank in two] == [{"layout": layout, "files": False}] * 2


def test_a_product_takes_one_reduction_of_all_its_vectors(two: list[dict[str, Any]]) -> None:
    """Beside the vectors: whether a rank has failed, their digest in two words, the cost, and an error for each rank."""
    for rank in two:
        for reductions, moved, own in rank["counted"].values():
            assert (reductions, moved) == (1, own + 8 * (4 + 2))


def test_ranks_that_share_memory_take_what_fits_the_poorest(two: list[dict[str, Any]]) -> None:
    for rank in two:
        chosen, _, gap = rank["rooms"]["plenty"]
        assert (chosen, gap) == ("reverse-over-reverse", 0.0)
        chosen, note, gap = rank["rooms"]["little"]
        assert chosen == "streamed"
        assert "do not fit into" in note
        assert gap < 1e-10
        assert "of memory that are free for each process, but it is predicted to take" in rank["rooms"]["none"]


@pytest.mark.parametrize("layout", ["data", "fsdp"])
def test_weights_in_bfloat16_are_summed_in_float32(two: list[dict[str, Any]], layout: str) -> None:
    for kind, expected in in_bfloat16(lambda problem: problem).items():
        for rank in two:
            found = rank["halves"][layout][kind]
            assert found.dtype == torch.float32
            assert relative(found, expected) < 1e-6


def test_digests_add_up_exactly_over_a_thousand_ranks() -> None:
    words = _digest({"x": torch.arange(9.0)}, 65520 * 7)
    assert max(words) > 2**24 / 1000 or len(words) > 1
    for word in words:
        total = torch.zeros((), dtype=torch.float32)
        for rank in range(1, 1001):
            assert float(total := total + word) == rank * word


def test_a_model_in_distributed_data_parallel_is_taken_out_of_it(two: list[dict[str, Any]]) -> None:
    from architectures import ragged_batches, tiny

    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    expected = hs.block(hs.hessian(problem, hs.select(problem, "*ln_f*"))).matrix
    torch.testing.assert_close(two[0]["wrapped"]["wrapped"], expected, rtol=1e-12, atol=1e-12)


def test_commands_write_the_folders_of_one_process(two: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    statuses = [{name: status for name, (status, _) in rank["commands"].items()} for rank in two]
    assert statuses == [dict.fromkeys(("eigs", "layers", "from-one"), 0)] * 2
    assert {status for status, _ in commands(tmp_path).values()} == {0}
    found = {path.relative_to(folder) for name in statuses[0] for path in (folder / name).rglob("*.*")}
    assert found == {path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")}
    for path in sorted(found):
        if path.name == "manifest.json":
            assert_same_result(folder / path.parent, tmp_path / path.parent)


def assert_same_result(found: Path, expected: Path, layout: str = "data parallel", **sizes: int) -> None:
    one, other = hs.load(found), hs.load(expected)
    for name, tensor in other.tensors().items():
        torch.testing.assert_close(
            one.tensors()[name].abs(), tensor.abs(), rtol=1e-8, atol=1e-9 * float(tensor.abs().max())
        )
    assert one.products == other.products
    provenance = json.loads((found / "manifest.json").read_text())["provenance"]
    assert provenance["processes"] == {"layout": layout, "ranks": 2, "backend": "gloo", **sizes}
    assert provenance["problem"]["fingerprint"] == other.provenance["problem"]["fingerprint"]
    assert "processes" not in other.provenance
    errors = [p["product_error"] for p in (provenance, other.provenance)]
    if layout == "fully sharded":  # there is no copy of the weights in another dtype
        return
    assert errors[0]["on"] == errors[1]["on"]
    assert errors[0]["relative"] == pytest.approx(errors[1]["relative"], rel=0.1, abs=1e-12)


def test_a_run_of_one_process_goes_on_with_two(two: list[dict[str, Any]], folder: Path) -> None:
    assert hs.load(folder / "from-one").provenance["resumed"] == 1
    assert not (folder / "from-one.partial").exists()


def test_a_run_of_two_goes_on_with_one(two: list[dict[str, Any]], folder: Path) -> None:
    (status, said), silent = (rank["interrupted"] for rank in two)
    assert (status, silent) == (130, (130, ""))
    assert "run the same command again to continue from" in said
    assert (folder / "to-one.partial" / "state.safetensors").exists()
    assert _run([*DENSITY, "--output-dir", str(folder / "to-one")])[0] == 0
    resumed, whole = hs.load(folder / "to-one"), hs.load(folder / "from-one")
    assert (resumed.provenance["resumed"], resumed.products) == (1, whole.products)
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(resumed.tensors()[name], tensor, rtol=1e-8, atol=1e-9 * float(tensor.abs().max()))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("model", "Expected the same model on every rank, but rank 1 differs from rank 0;"),
        ("data", "Expected the same data on every rank, but rank 1 differs from rank 0;"),
        (
            "settings",
            "Expected the same loss, objective, dropout and seed on every rank, but rank 1 differs from rank 0 (",
        ),
    ],
)
def test_ranks_that_have_not_the_same_are_told_which(two: list[dict[str, Any]], what: str, said: str) -> None:
    assert [rank["refusals"][what].startswith(said) for rank in two] == [True, True]


def test_a_vector_that_differs_is_refused_and_the_ranks_stay_in_step(two: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(two):
        assert f"Expected the same vector on every rank, but rank {rank} has another" in found["refusals"]["vector"]
        assert found["refusals"]["after"] == "nothing"


@pytest.mark.parametrize("where", ["", ", block"])
def test_what_one_ranks_share_raises_ends_all(two: list[dict[str, Any]], where: str) -> None:
    said = [{rank["failures"][f"{name}{where}"] for rank in two} for name in ("bad", "memory")]
    cause = "CUDA out of memory. Tried to allocate 2 GiB."
    assert said[0] == {"The third batch is bad.", "Rank 1 stopped: The third batch is bad."}
    assert said[1] == {f"itself: {cause}\nmore", f"Rank 1 stopped: OutOfMemoryError: {cause}"}
    assert [rank["failures"]["after"] for rank in two] == ["nothing"] * 2


def test_a_folder_that_vanishes_is_one_sentence_on_every_rank(two: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(two):
        status, said = found["vanished"]
        assert status == 2
        other = "Rank 0 stopped: " if rank else ""
        assert said.startswith(f"hesscope: rank {rank}: {other}Expected a folder that can be written to, got ")
        assert said.count("\n") == 1


def test_a_checkpoint_that_vanishes_ends_all_and_goes_on_when_it_is_back(
    two: list[dict[str, Any]], folder: Path
) -> None:
    for rank, found in enumerate(two):
        status, said = found["moved"]["gone"]
        assert status == 2
        assert said.startswith(f"hesscope: rank {rank}: {'Rank 0 stopped: ' if rank else ''}The folder ")
        assert "of this run's checkpoint is gone (No such file or directory): " in said
        assert said.count("\n") == 1
        assert found["moved"]["back"][0] == 0
    assert hs.load(folder / "moving" / "out").provenance["resumed"] == 1


def test_other_options_on_a_rank_are_refused(two: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(two):
        status, said = found["other_options"]
        assert status == 2
        assert said.startswith(
            f"hesscope: rank {rank}: Expected the same loss, objective, dropout and seed on every rank"
        )


def test_exceptions_that_ranks_outlive(two: list[dict[str, Any]]) -> None:
    """None of them hangs, and what comes after is right: also where one rank has been in a group of its own before."""
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    H = hs.hessian(problem, hs.select(problem, "*ln_f*"))
    expected = H @ torch.ones(H.shape[0], dtype=torch.float64)
    assert two[0]["outlived"]["prepare"] == "Rank 1 stopped: OutOfMemoryError: no memory"
    for rank in two:
        found = rank["outlived"]
        assert "no memory" in found["prepare"]
        assert "no memory" in found["all"]
        for name in ("after", "slow", "rank 0 late", "rank 1 late"):
            assert relative(found[name], expected) < 1e-10
        assert found["caught"] == "nothing"


def test_what_one_rank_cannot_make_is_refused_on_all(two: list[dict[str, Any]]) -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches())
    expected = hs.block(hs.hessian(problem, hs.select(problem, "*ln_f*"))).matrix
    for rank, found in enumerate(two):
        assert "Kronecker factors that fit in memory" in found["alike"]["K-FAC"]
        for name, there in {"EKFAC": 1, "columns, rank 0": 0, "columns, rank 1": 1, "count": 1}.items():
            own = (
                "itself: " if rank == there else "Rank 1 stopped: OutOfMemoryError: " if there else "OutOfMemoryError: "
            )
            assert found["alike"][name] == f"{own}no memory", name
        torch.testing.assert_close(found["alike"]["after"], expected, rtol=1e-10, atol=1e-10)


def test_a_measurement_of_a_callback_fails_on_all_ranks_and_ends_training_where_one_left_others_waiting(
    two: list[dict[str, Any]],
) -> None:
    first, other = (rank["called_back"] for rank in two)
    assert first["one"] == ["No curvature at step 1: Rank 1 stopped: no memory"]
    assert other["one"] == ["No curvature at step 1: no memory"]
    for found in (first, other):
        assert found["all"] == ["No curvature at step 2: no memory"]
        assert (found["none"], found["logged"]) == ([], [3])
        assert found["waits"]["seconds"] < 2 * TIMEOUT
    assert first["waits"]["said"] == "Rank 1 stopped: OutOfMemoryError: no memory"
    assert other["waits"]["said"] == "OutOfMemoryError: no memory"


def test_a_rank_that_leaves_is_named_in_time(two: list[dict[str, Any]]) -> None:
    assert two[0]["gone"]["said"] == "Rank 1 stopped: OSError: No space left on device"
    assert two[0]["gone"]["seconds"] < TIMEOUT


@pytest.mark.slow
def test_two_groups_of_two_ranks(tmp_path: Path) -> None:
    found = run_ranks(4, tmp_path, "all_in_groups")[0]["all_in_groups"]
    expected = dict(cases(lambda problem: problem, ARCHITECTURES)) | dict(grouped_cases(lambda problem: problem))
    # Groups that share a batch build its graph twice.
    wrong = [line for line in differences(found, expected) if ": units differs" not in line]
    assert wrong == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_architecture(ranks: int, tmp_path: Path) -> None:
    found = run_ranks(ranks, tmp_path, "all_numbers")
    assert differences(found[0]["all_numbers"], dict(cases(lambda problem: problem, ARCHITECTURES))) == []
