"""What a run takes of the system, by hand for blocks that are mapped one by one, and for ones that find the gaps of others."""

from __future__ import annotations

import platform
from array import array

import pytest
import torch

from hesscope.dryrun.allocator import _ONCE, Resident, resident
from hesscope.dryrun.meter import MAPPED

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
LARGE, SMALL = 2**27, 2**17
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the replay is through glibc's allocator")


@glibc
def test_large_blocks_come_anew_each_time() -> None:
    # Two sections: one block that stays; two that come and go.
    trace = array("q", [LARGE, 0, LARGE, -2, LARGE, -3, 0])
    found = resident(trace, 2 * LARGE, CPU, again=1)
    assert found.peak - _ONCE == pytest.approx(2 * LARGE, rel=0.01)
    assert found.fresh == pytest.approx((LARGE, 2 * LARGE, 2 * LARGE), rel=0.01)


@glibc
def test_a_mapping_counts_as_it_is_written_to() -> None:
    trace = array("q", [LARGE + MAPPED, LARGE, -2, LARGE + MAPPED, -1, -3, 0])
    found = resident(trace, 2 * LARGE, CPU)
    assert found.peak - _ONCE == pytest.approx(2 * LARGE, rel=0.01)
    assert found.fresh == pytest.approx((3 * LARGE,), rel=0.01)


@glibc
def test_small_blocks_find_a_gap_that_a_larger_one_has_left() -> None:
    section = [*([SMALL] * 4), *(-k for k in range(3, 7)), 0]
    found = resident(array("q", [96 * SMALL, SMALL, -1, 0, *section]), 97 * SMALL, CPU, again=1)
    first, *others = found.fresh
    assert first == pytest.approx(97 * SMALL, rel=0.1)
    assert max(others) < SMALL / 2


@glibc
def test_a_heap_that_is_given_back_is_not_in_further_products() -> None:
    size, count = 12 * 2**20, 30
    trace = array("q", [*([size] * count), *range(-1, -count - 1, -1), 0])
    found = resident(trace, size * count, CPU, again=1)
    assert found.fresh[0] == pytest.approx(size * count, rel=0.01)
    # A block more where one finds no gap; all of them where the heap is given back.
    assert found.fresh[1] < 2.5 * size


@glibc
def test_what_comes_after_the_last_section_is_left_out_and_nothing_is_repeated_unasked() -> None:
    found = resident(array("q", [LARGE, 0, LARGE, LARGE]), 3 * LARGE, CPU)
    assert found.peak - _ONCE == pytest.approx(LARGE, rel=0.01)
    assert len(found.fresh) == 1


def test_on_a_gpu_tensors_alone_count() -> None:
    assert resident(array("q", [1000, 2000, 0]), 3000, GPU, again=1) == Resident(3000)
