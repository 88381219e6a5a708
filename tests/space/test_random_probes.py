"""Random numbers belong to a seed, a stream, a name and a position, and are as random as they claim."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hesscope.space import Coordinates, Space, random

SAMPLES = 40_000
STANDARD_ERRORS = 4.5  # two-sided: seven in a million, at fixed seeds

Draw = Callable[[int, Tensor], Tensor]
both = pytest.mark.parametrize("draw", [random.signs, random.normals])


def one(name: str, shape: tuple[int, ...], index: list[int] | None = None) -> Space:
    positions = None if index is None else torch.tensor(index)
    return Space([Coordinates(name, shape, torch.float64, torch.device("cpu"), positions)])


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_a_coordinate_has_its_value_however_it_was_selected(kind: str) -> None:
    index = [699, 0, 64, 63, 65, 128, 511, 3]
    whole = getattr(one("w", (70, 10)), kind)(5, [0, 1, "x"])["w"].flatten(1)
    part = getattr(one("w", (70, 10), index), kind)(5, [0, 1, "x"])["w"]
    assert torch.equal(part, whole[:, index])
    again = getattr(one("w", (70, 10), index), kind)(5, ["x"])["w"]
    assert torch.equal(again[0], whole[2, index])


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_another_seed_stream_or_name_gives_other_values(kind: str) -> None:
    def drawn(name: str, seed: int, stream: int | str) -> Tensor:
        return getattr(one(name, (300,)), kind)(seed, [stream])[name][0]

    reference = drawn("w", 0, 0)
    assert torch.equal(reference, drawn("w", 0, 0))
    for other in (drawn("v", 0, 0), drawn("w", 1, 0), drawn("w", 0, 1), drawn("w", 0, "0 ")):
        correlation = float(reference @ other / (reference.norm() * other.norm()))
        assert abs(correlation) < STANDARD_ERRORS / math.sqrt(300)


def test_names_and_streams_do_not_run_into_one_another() -> None:
    keys = {
        random.stream_key(1, 2, "w"),
        random.stream_key(12, "w"),
        random.stream_key(1, "2w"),
        random.stream_key(1, "2", "w"),
    }
    assert len(keys) == 3  # an integer and its text are the same stream


def test_words_are_those_of_the_published_generator() -> None:
    """SplitMix64 from state 0 begins so: Steele, Lea and Flood (2014), as in java.util.SplittableRandom and xoshiro's seeding."""
    words = [w % (1 << 64) for w in random._words(0, torch.arange(3)).tolist()]
    assert words == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_an_unset_seed_is_a_fresh_one() -> None:
    assert random.resolve_seed(7) == 7
    assert random.resolve_seed(None) != random.resolve_seed(None)


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    one("w", (100,)).gaussian(0, [0])
    assert torch.equal(torch.get_rng_state(), before)


def drawn(draw: Draw, stream: int, count: int = SAMPLES) -> Tensor:
    return draw(random.stream_key(0, stream, "w"), torch.arange(count)).double()


def test_signs_are_signs() -> None:
    assert set(drawn(random.signs, 0).tolist()) == {-1.0, 1.0}


@both
def test_mean_zero_and_variance_one(draw: Draw) -> None:
    x = drawn(draw, 0)
    assert abs(float(x.mean())) < STANDARD_ERRORS / math.sqrt(SAMPLES)
    assert abs(float(x.square().mean()) - 1) <= STANDARD_ERRORS * math.sqrt(2 / SAMPLES)


def test_normal_numbers_have_the_normal_tails() -> None:
    x = drawn(random.normals, 0)
    assert x.isfinite().all()
    assert abs(float(x.pow(4).mean()) - 3) < STANDARD_ERRORS * math.sqrt(96 / SAMPLES)
    assert abs(float(x.pow(3).mean())) < STANDARD_ERRORS * math.sqrt(15 / SAMPLES)
    for threshold, probability in ((1.0, 0.31731), (2.0, 0.045500), (3.0, 0.0026998)):
        spread = math.sqrt(probability * (1 - probability) / SAMPLES)
        assert abs(float((x.abs() > threshold).double().mean()) - probability) < STANDARD_ERRORS * spread


@both
def test_neighbours_streams_and_products_are_uncorrelated(draw: Draw) -> None:
    """Lags of one word, of the 64 signs that share one, and beyond; also the squares, and another stream."""
    x, y = drawn(draw, 0), drawn(draw, 1)
    bound = STANDARD_ERRORS / math.sqrt(SAMPLES - 1000)
    for lag in (1, 2, 7, 32, 63, 64, 65, 128, 1000):
        assert abs(float((x[lag:] * x[:-lag]).mean())) < bound
    assert abs(float((x * y).mean())) < bound
    # Fourth-order: what the variance of Hutchinson's estimator depends on.
    assert abs(float((x[3:] * x[2:-1] * x[1:-2] * x[:-3]).mean())) < bound
    if draw is random.normals:
        squares = x.square() - 1
        assert abs(float((squares[1:] * squares[:-1]).mean())) < 2 * bound


def test_probes_resolve_the_identity() -> None:
    """E z z^T = I entry by entry, over streams: what makes Hutchinson's estimate unbiased."""
    space, probes = one("w", (6,)), 4000
    for kind in (space.rademacher, space.gaussian):
        Z = kind(3, range(probes))["w"]
        error = Z.T @ Z / probes - torch.eye(6, dtype=torch.float64)
        assert float(error.abs().max()) < STANDARD_ERRORS * math.sqrt(2 / probes)


def test_large_positions_are_addressed() -> None:
    """Flat indices of a parameter with more than 2^31 entries."""
    index = torch.tensor([2**31, 2**33 + 5, 2**33 + 69])
    key = random.stream_key(0, 0, "w")
    assert random.normals(key, index).isfinite().all()
    many = random.normals(key, 2**33 + torch.arange(SAMPLES))
    assert many[5] == random.normals(key, index)[1]
    assert abs(float(many.mean())) < STANDARD_ERRORS / math.sqrt(SAMPLES)


@pytest.mark.parametrize("count", [3, 6])
def test_a_subset_has_every_number_equally_often_and_every_pair(count: int) -> None:
    size, seeds = 9, 4000
    member = torch.zeros(seeds, size, dtype=torch.float64)
    for seed in range(seeds):
        drawn = random.subset(random.stream_key(seed, "subset"), count, size)
        assert len(drawn) == count
        member[seed, drawn] = 1
    pairs = member.T @ member / seeds
    once, twice = count / size, count * (count - 1) / (size * (size - 1))
    expected = torch.full((size, size), twice, dtype=torch.float64).fill_diagonal_(once)
    error = (expected * (1 - expected) / seeds).sqrt()
    assert ((pairs - expected).abs() < STANDARD_ERRORS * error).all()


@pytest.mark.parametrize(
    ("count", "size"), [(0, 7), (1, 7), (3, 7), (4, 7), (7, 7), (1, 1), (1000, 10**12), (900, 1000)]
)
def test_a_subset_is_distinct_ascending_and_in_range(count: int, size: int) -> None:
    drawn = random.subset(5, count, size)
    assert len(drawn) == count
    assert (drawn.diff() > 0).all()
    assert count == 0 or 0 <= int(drawn[0]) <= int(drawn[-1]) < size
    assert torch.equal(drawn, random.subset(5, count, size))


def test_a_smaller_subset_is_part_of_a_larger_one() -> None:
    small, large = random.subset(8, 20, 1000), random.subset(8, 300, 1000)
    assert set(small.tolist()) < set(large.tolist())
