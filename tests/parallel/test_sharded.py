"""Weights, vectors and bases divided by fully_shard: the numbers of one process, and each rank's share of memory and bytes."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from divided_runs import ELSEWHERE, FEW, LAYOUTS, MULTIPLY, STOPPED, continued, stopped
from launching import run_ranks
from programs import (
    DENSITY,
    STREAMED,
    TIMEOUT,
    _run,
    all_divided,
    described,
    fully_sharded,
    in_parallel,
    interrupted,
    sharded_commands,
)
from shared_cases import few_cases, more_diagonals, tensor_cases
from test_data_parallel import Found, assert_same_result, differences
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

import hesscope as hs
from architectures import ragged_batches, tiny
from hesscope.algorithms import state_file
from hesscope.algorithms.checkpoint import STATE, Checkpoint
from hesscope.cli.main import run
from hesscope.exchange import Boxes, ByRows, Exchange, Table, _code, _decoded
from hesscope.models import sharded
from oracles import relative

PROGRAMS = (
    "sharded",
    "sharded_facts",
    "sharded_commands",
    "sharded_interrupted",
    "divided_runs",
    "given_out",
    "in_pieces",
    "no_room_to_collect",
)
#: Where the streamed engine, which divided weights choose, leads to another way or to other costs than double backward.
OTHER_WAYS = ("block, positions: products", "diagonal, auto", ": units")
#: Cases of models without casts to float32.
NO_CASTS = ("gpt2", "gpt-neox", "diagonal")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have run all programs, once for all workers."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two-sharded-ranks"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "0.pt").exists():
            assert interrupted(root, "sharded-from-one", *STREAMED)[0] == 130
            stopped(lambda problem: problem, root / "by-one")
            shutil.copytree(root / "by-one", root / "by-one-kept")
            run_ranks(2, root, *PROGRAMS)
    return root


@pytest.fixture(scope="session")
def two(folder: Path) -> list[dict[str, Any]]:
    """What the programs returned on either rank."""
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def far_apart(found: Found, expected: Found, casts: bool = False) -> list[str]:
    """Differences beyond what models' own casts to float32 make of another engine: where they have some, or with `casts` all do."""
    wrong = [line for line in differences(found, expected) if not any(way in line for way in OTHER_WAYS)]
    return [
        line for line in wrong if (line.startswith(NO_CASTS) and not casts) or not float(line.rsplit(" ", 1)[1]) < 1e-6
    ]


def test_numbers_are_those_of_one_rank_and_of_a_model_that_is_whole(two: list[dict[str, Any]], alone: None) -> None:
    expected = dict(few_cases(lambda problem: problem))
    assert [differences(rank["sharded"], expected) for rank in two] == [[], []]
    assert differences(dict(few_cases(fully_sharded)), expected) == []


def test_a_rank_holds_its_rows_of_a_vector(two: list[dict[str, Any]]) -> None:
    model = tiny("gpt2")
    n = sum(p.numel() for p in model.parameters())
    numbers = [rank["sharded_facts"]["numbers"] for rank in two]
    assert sum(numbers) == n
    # Every first axis but the vocabulary's, 37, and that of positions is even.
    assert max(numbers) <= n / 2 + 8


def test_a_product_moves_little_more_than_the_least(two: list[dict[str, Any]]) -> None:
    """Blocks and their part of the vector twice, what is outside them once, and one sum of the product."""
    model = tiny("gpt2")
    blocks = sum(p.numel() for name, p in model.named_parameters() if name.startswith("transformer.h."))
    n = sum(p.numel() for p in model.parameters())
    least = 8 * (2 * 2 * blocks + 2 * (n - blocks) + n) // 2
    for rank in two:
        assert least <= rank["sharded_facts"]["moved"] <= 1.1 * least
        # Each of these is one collective; two for what is outside, before and after the blocks.
        assert rank["sharded_facts"]["rounds"] == len(model.transformer.h) * (2 + 2 + 1) + 2 * 3


def test_tensors_travel_together_where_they_follow_one_another_and_are_small(
    alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchange = Exchange(dist.group.WORLD)
    parts = [torch.full((2, 3), float(i), dtype=torch.float64 if i == 5 else torch.float32) for i in range(8)]
    number = exchange.register(Table(parts, [ByRows(2)] * 8))
    assert list(exchange._runs(number, [2, 0, 1, 4, 5, 6, 7])) == [range(3), range(4, 5), range(5, 6), range(6, 8)]
    assert [x[0, 0] for x in exchange.gather(number, [6, 0, 5])] == [6.0, 0.0, 5.0]
    monkeypatch.setattr("hesscope.exchange._PACKED", 50)
    assert list(exchange._runs(number, range(5))) == [range(2), range(2, 4), range(4, 5)]
    assert list(exchange._runs(number, [])) == []
    for some in (range(3, 4), range(7, 1031)):
        assert _decoded(_code(number, some, 2)) == (number, some, 2)


def test_boxes_make_the_whole() -> None:
    """Two copies of one column each, an uneven cut of the other, and one that is empty."""
    whole = torch.arange(10.0).view(5, 2)
    first, second = slice(0, 1), slice(1, 2)
    boxes = [
        (slice(0, 5), first),
        (slice(0, 3), second),
        (slice(3, 5), second),
        (slice(5, 5), second),
        (slice(0, 5), first),
    ]
    form = Boxes((5, 2), tuple(boxes))
    sent = [form.sent(whole[box], len(boxes)) for box in boxes]
    assert [len(numbers) for numbers in sent] == [5] * 5
    assert torch.equal(form.whole(torch.stack(sent), whole[boxes[3]], len(boxes)), whole)
    assert form.shape(whole[boxes[3]]) == (5, 2)


def test_weights_that_are_partial_sums_are_refused(alone: None) -> None:
    model = nn.Linear(2, 2)
    partial = DTensor.from_local(torch.ones(2, 2), init_device_mesh("cpu", (1,)), [Partial()])
    model.weight = nn.Parameter(partial, requires_grad=False)
    with pytest.raises(hs.HesscopeError, match="divided or replicated among processes, got weight with placements"):
        sharded(model)


def test_a_plan_needs_to_know_the_other_dimension(alone: None) -> None:
    with pytest.raises(hs.HesscopeError, match="Expected mesh= with a model that a tensor-parallel plan has divided"):
        hs.fully_shard_model(in_parallel(tiny("qwen2")))


def test_a_vector_of_dtensors_gives_its_like(two: list[dict[str, Any]]) -> None:
    problem = hs.causal_lm(tiny("gpt2"), ragged_batches()[:2])
    given = {name: p.detach() + 1.0 for name, p in problem.model.named_parameters()}
    expected = hs.hessian(problem) @ given
    for rank in two:
        facts = rank["sharded_facts"]
        assert facts["placed"]
        for name, part in expected.items():
            assert relative(facts["as DTensors"][name], part) < 1e-10
            assert relative(facts["as whole"][name], part) < 1e-10


def test_a_digest_is_that_of_whole_vectors(two: list[dict[str, Any]]) -> None:
    expected = described(hs.hessian(hs.causal_lm(tiny("gpt2"), ragged_batches()[:2])))
    assert [rank["sharded_facts"]["digests"] for rank in two] == [expected, expected]


def test_what_cannot_be_is_said_on_every_rank(two: list[dict[str, Any]]) -> None:
    for rank in two:
        facts = rank["sharded_facts"]
        assert facts["undivided"].endswith("pass it through hs.data_parallel(problem) on every process.")
        assert "this one is, so leave fully_shard_model out" in facts["twice"]
        assert (
            "Expected probe_groups to be the replicas of the divided weights, got 2 groups and 1 replica:"
            in facts["groups"]
        )


def test_what_one_ranks_share_raises_ends_all_and_they_stay_in_step(two: list[dict[str, Any]]) -> None:
    said = {rank["sharded_facts"]["bad"] for rank in two}
    assert said == {"The third batch is bad.", "Rank 1 stopped: The third batch is bad."}
    assert [rank["sharded_facts"]["after"] for rank in two] == ["nothing"] * 2


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_rank_0_gives_out_what_it_alone_has_loaded(two: list[dict[str, Any]], name: str) -> None:
    whole = tiny(name)
    H = hs.hessian(hs.causal_lm(whole, ragged_batches()))
    expected = H @ torch.ones(H.shape[0], dtype=torch.float64)
    for rank in two:
        found = rank["given_out"]
        assert list(found[name]) == list(whole.state_dict())
        assert all(torch.equal(found[name][key], x) for key, x in whole.state_dict().items())
        assert found[f"{name}, buffers"].keys() == dict(whole.named_buffers()).keys()
        assert all(torch.equal(found[f"{name}, buffers"][key], x) for key, x in whole.named_buffers())
        assert found[f"{name}, names"] == [key for key, _ in whole.named_parameters()]
        assert relative(found[f"{name}, product"], expected) < 1e-6  # its own casts to float32


def test_no_other_rank_has_more_than_a_block_at_a_time(two: list[dict[str, Any]]) -> None:
    model = tiny("llama")
    block = sum(x.numel() for x in model.model.layers[0].parameters())
    rest = sum(x.numel() for x in [*model.parameters(), *model.buffers()]) - len(model.model.layers) * block
    assert [rank["given_out"]["most"] for rank in two] == [max(block, rest)] * 2


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_rank_0_gives_out_what_is_on_disk_and_has_a_block_at_a_time(two: list[dict[str, Any]], name: str) -> None:
    for rank in two:
        found, whole = rank["given_out"], rank["given_out"][name]
        assert list(found[f"{name} from disk"]) == list(whole)
        assert all(torch.equal(found[f"{name} from disk"][key], x) for key, x in whole.items())
        assert (
            relative(found[f"{name} from disk, product"], found[f"{name}, product"]) < 1e-6
        )  # its frequencies are float32
    model = tiny(name)
    trunk = model.model.layers if name == "qwen2" else model.transformer.h
    block = sum(x.numel() for x in trunk[0].parameters())
    rest = sum(x.numel() for x in model.parameters()) - len(trunk) * block
    most = [rank["given_out"][f"{name} from disk, most"] for rank in two]
    assert max(block, rest) <= most[0] < block + rest
    assert most[1] == 0


def test_empty_models_that_rank_0_cannot_fill_are_refused_everywhere(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert "Expected rank 0 to have loaded the model" in rank["given_out"]["all empty"]
        assert "but rank 1 has others than rank 0" in rank["given_out"]["another dtype"]


def test_commands_write_the_folders_of_one_process(two: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    assert [status for rank in two for status, _ in rank["sharded_commands"].values()] == [0] * 6
    assert {status for status, _ in sharded_commands(tmp_path).values()} == {0}
    for name in two[0]["sharded_commands"]:
        assert_same_result(folder / name, tmp_path / name, "fully sharded", shards=2)
    assert hs.load(folder / "sharded-from-one").provenance["resumed"] == 1


def test_a_run_with_weights_divided_goes_on_with_one_process(two: list[dict[str, Any]], folder: Path) -> None:
    assert [rank["sharded_interrupted"][0] for rank in two] == [130, 130]
    assert _run([*DENSITY, *STREAMED, "--output-dir", str(folder / "sharded-to-one")])[0] == 0
    resumed, whole = hs.load(folder / "sharded-to-one"), hs.load(folder / "sharded-from-one")
    assert (resumed.provenance["resumed"], resumed.products) == (1, whole.products)
    for name, tensor in whole.tensors().items():
        torch.testing.assert_close(resumed.tensors()[name], tensor, rtol=1e-8, atol=1e-9 * float(tensor.abs().max()))


def assert_little_of_a_vector(most: dict[str, Any], methods: list[str]) -> None:
    """An operator is given the rows of a rank, and nothing is gathered but a diagonal and its errors, once."""
    for method in (*methods, "groups", "verify"):
        assert most[method]["held"] == most["own"] < most["size"], method
    assert {method: most[method]["gathered"] for method in methods} == dict.fromkeys(methods, 2 * most["size"])
    assert most["groups"]["gathered"] == 0


def test_diagonals_and_groups_have_a_ranks_rows_of_vectors(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert_little_of_a_vector(rank["divided_runs"]["most"], list(MULTIPLY)[:FEW])


def assert_alike(found: Any, expected: Any, where: str) -> None:
    """Two states: the same dictionaries and lists, and tensors of one dtype to rounding."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10 * float(expected.double().norm()), msg=where)
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key, value in expected.items():
            assert_alike(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, (own, value) in enumerate(zip(found, expected, strict=True)):
            assert_alike(own, value, f"{where}/{i}")
    elif not where.endswith("/seconds"):
        assert found == pytest.approx(expected, rel=1e-8) if isinstance(expected, float) else found == expected, where


@pytest.mark.parametrize("name", list(STOPPED))
def test_a_diagonal_or_groups_under_way_are_kept_as_one_process_keeps_them(
    two: list[dict[str, Any]], folder: Path, name: str
) -> None:
    found, expected = (state_file.read(folder / by / name / STATE) for by in ("by-two", "by-one-kept"))
    assert_alike(found, expected, name)


def test_they_go_on_with_another_number_of_ranks(two: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "by-two", tmp_path / "by-two")
    expected = continued(lambda problem: problem, None)
    to_one = continued(lambda problem: problem, tmp_path / "by-two")
    for found in (to_one, *(rank["divided_runs"]["from one"] for rank in two)):
        assert differences(found, expected) == []


def test_rank_0_has_one_vectors_largest_part_at_most_while_files_are_written_and_read(
    two: list[dict[str, Any]],
) -> None:
    """Gathered to write, with its padding to even shares, and given out to resume; the others receive nothing of what is written."""
    part = max((p.numel() + p.numel() // len(p)) * p.itemsize for p in tiny("gpt2").parameters())
    first, other = (rank["in_pieces"]["most"] for rank in two)
    for phase in ("writing", "saving"):
        assert part // 2 < first[phase] <= part
        assert other.get(phase, 0) == 0
    assert part // 2 < first["resuming"] == other["resuming"] <= part


def test_what_is_kept_and_saved_in_pieces_is_whole(two: list[dict[str, Any]], folder: Path) -> None:
    model = tiny("gpt2")
    H = hs.hessian(hs.causal_lm(model, ragged_batches()))
    expected, saved = hs.lanczos(H, 6, keep_basis=True), hs.load(folder / "pieces")
    assert relative(saved.basis, expected.basis) < 1e-8
    assert relative(saved.T, expected.T) < 1e-10
    assert torch.equal(torch.load(folder / "pieces" / "result.pt")["T"], saved.T)
    assert [rank["in_pieces"]["resumed"] for rank in two] == [1, 1]
    assert all(rank["in_pieces"]["stopped"] for rank in two)
    pairs = hs.eigs(H, k=2, max_products=6, tol=1e9)
    again = hs.eigs(H, k=2, max_products=6, tol=1e9, start=pairs)
    for rank in two:
        assert relative(rank["in_pieces"]["started"].abs(), again.eigenvectors.abs()) < 1e-8
        assert "each process has its rows of transformer.wte.weight" in rank["in_pieces"]["whole"]
    for name, part in pairs.vectors.items():
        own = torch.cat([rank["in_pieces"]["own"][name] for rank in two], 1)
        assert relative(own.abs(), part.abs()) < 1e-8


def test_a_full_disk_of_rank_0_leaves_the_ranks_in_step(two: list[dict[str, Any]]) -> None:
    first, other = (rank["in_pieces"]["said"] for rank in two)
    assert [sentence.partition(" (")[0].startswith("No checkpoint could be written") for sentence in first] == [True]
    assert other == []


def test_a_rank_without_memory_for_the_rows_of_others_is_named_in_time(two: list[dict[str, Any]]) -> None:
    found = [rank["no_room_to_collect"] for rank in two]
    cause = "OutOfMemoryError: no memory"
    assert [rank["said"] for rank in found] == [cause, f"Rank 0 stopped: {cause}"]
    assert max(rank["seconds"] for rank in found) < 2 * TIMEOUT


def test_a_damaged_checkpoint_of_divided_vectors_is_refused(tmp_path: Path, alone: None) -> None:
    H = hs.hessian(fully_sharded(hs.causal_lm(tiny("gpt2"), ragged_batches())))
    kept = Checkpoint(tmp_path / "kept", every=0.0, keep_finished=True)
    whole = hs.lanczos(H, 2, checkpoint=kept)
    assert torch.equal(hs.lanczos(H, 2, checkpoint=kept).T, whole.T)
    raw = bytearray((tmp_path / "kept" / STATE).read_bytes())
    raw[-9] ^= 1
    (tmp_path / "kept" / STATE).write_bytes(raw)
    with pytest.raises(hs.HesscopeError, match="is damaged: the bytes of state"):
        hs.lanczos(H, 2, checkpoint=kept)


@pytest.mark.slow
def test_a_run_with_weights_divided_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, "sharded_interrupted")
    partial = tmp_path / "sharded-to-one.partial"
    shutil.copytree(partial, tmp_path / "sharded-to-three.partial")
    assert [rank["sharded_continued"][0] for rank in run_ranks(3, tmp_path, "sharded_continued")] == [0, 0, 0]
    assert _run([*DENSITY, *STREAMED, "--output-dir", str(tmp_path / "sharded-to-one")])[0] == 0
    assert _run([*DENSITY, *STREAMED, "--output-dir", str(tmp_path / "whole")])[0] == 0
    whole = hs.load(tmp_path / "whole")
    for name in ("sharded-to-three", "sharded-to-one"):
        found = hs.load(tmp_path / name)
        assert (found.provenance["resumed"], found.products) == (1, whole.products)
        for key, tensor in whole.tensors().items():
            torch.testing.assert_close(found.tensors()[key], tensor, rtol=1e-8, atol=1e-9 * float(tensor.abs().max()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::hesscope.errors.HesscopeWarning")  # short runs miss their tolerance
def test_every_algorithm_goes_on_where_another_layout_has_stopped(tmp_path: Path) -> None:
    stopped(lambda problem: problem, tmp_path / "one", ELSEWHERE)
    expected = continued(lambda problem: problem, None, ELSEWHERE)
    for found in run_ranks(2, tmp_path, "gone_on_elsewhere"):
        for pair, own in found["gone_on_elsewhere"].items():
            assert differences(own, expected) == [], pair
    for name in LAYOUTS[1:]:
        found = continued(lambda problem: problem, tmp_path / name, ELSEWHERE)
        assert differences(found, expected) == [], name


def test_a_layout_needs_ranks(capfd: pytest.CaptureFixture[str]) -> None:
    assert run([*DENSITY, "--layout", "fsdp"]) == 2
    assert "put torchrun before the command" in capfd.readouterr().err
    assert run([*DENSITY, "--layout", "ring"]) == 2
    assert "Expected --layout to be data, fsdp or hsdp, got 'ring'." in capfd.readouterr().err


@pytest.mark.slow
def test_every_architecture_on_four_ranks(tmp_path: Path, alone: None) -> None:
    one = all_divided(fully_sharded)
    assert far_apart(one, all_divided(lambda problem: problem)) == []
    for found in run_ranks(4, tmp_path, "all_sharded"):
        assert differences(found["all_sharded"], one) == []


@pytest.mark.slow
def test_uneven_rows_on_three_ranks(tmp_path: Path) -> None:
    expected, more = (dict(cases(lambda problem: problem)) for cases in (few_cases, more_diagonals))
    for found in run_ranks(3, tmp_path, "sharded", "diagonals_divided"):
        assert differences(found["sharded"], expected) == []
        assert differences(found["diagonals_divided"]["numbers"], more) == []
        assert_little_of_a_vector(found["diagonals_divided"]["most"], list(MULTIPLY))


@pytest.mark.slow
def test_twice_among_two_ranks_and_the_replicas_as_groups(tmp_path: Path) -> None:
    one = dict(few_cases(lambda problem: problem))
    model, name = tiny("gpt2"), "transformer.h.1.mlp.c_fc.weight"
    H = hs.hessian(hs.causal_lm(model, ragged_batches()), hs.select(model, name))
    product, of_ones = H @ dict(model.named_parameters())[name].detach().flatten(), H @ torch.ones(H.shape[0]).double()
    for rank, found in enumerate(run_ranks(4, tmp_path, "hybrid", "hybrid_groups", "layouts", "otherwise_placed")):
        placed = found["otherwise_placed"]
        assert relative(placed["product"].flatten(), product) < 1e-10
        assert placed["placed"]
        own = f"Expected the same vector on every rank, but rank {rank} has another"  # of ranks 1 and 3
        assert placed["differs"].startswith(own if rank % 2 else "Rank 1 stopped: Expected the same vector")
        assert relative(placed["after"], of_ones) < 1e-10
        assert differences(found["hybrid"], one) == []
        assert differences(found["hybrid_groups"], one) == []
        assert found["layouts"] == {
            name: {"ranks": 4, "backend": "gloo", **own}
            for name, own in {
                "fsdp": {"layout": "fully sharded", "shards": 4},
                "hsdp": {"layout": "hybrid sharded", "shards": 2, "replicas": 2},
                "plan": {"layout": "tensor parallel", "shards": 4},
                "twice": {"layout": "tensor parallel", "shards": 2, "replicas": 2},
                "two axes": {"layout": "fully sharded and tensor parallel", "shards": 4, "axes": [2, 2]},
            }.items()
        }


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "programs"), [(2, ["tensor"]), (4, ["two_axes", "plan_and_replicas"])])
def test_a_tensor_parallel_model_has_the_numbers_of_one_that_is_whole_and_comes_back_as_it_was(
    tmp_path: Path, ranks: int, programs: list[str]
) -> None:
    numbers = dict(tensor_cases(lambda problem: problem, "qwen2"))
    model, batch = tiny("qwen2"), ragged_batches()[2]
    expected = hs.hessian(hs.causal_lm(model, [batch])) @ {n: p.detach() + 1.0 for n, p in model.named_parameters()}
    for facts in (rank[program] for rank in run_ranks(ranks, tmp_path, *programs) for program in programs):
        assert far_apart(facts["qwen2"], numbers, casts=True) == []
        assert far_apart(facts.get("in groups", numbers), numbers, casts=True) == []
        assert torch.equal(facts["before"], facts["after"])
        torch.testing.assert_close(facts["before"], model(**batch).logits.detach(), rtol=1e-6, atol=1e-6)
        assert len(facts["placed"]) > 10
        assert all(facts["placed"])
        for name, part in expected.items():
            assert relative(facts["as DTensors"][name], part) < 1e-6  # the model casts to float32


@pytest.mark.slow
def test_a_tensor_parallel_model_with_biases_on_four_ranks(tmp_path: Path) -> None:
    expected = dict(tensor_cases(lambda problem: problem, "phi", more=True))
    for found in run_ranks(4, tmp_path, "all_tensor"):
        assert far_apart(found["all_tensor"], expected, casts=True) == []
