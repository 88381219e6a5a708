"""What ranks hear of one another's exceptions, and how they wait."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hesscope.errors import RankLost
from hesscope.parallel.ranks import Ranks
from hesscope.parallel.watch import Watch

#: Seconds of silence that make a rank lost, and as many as a rank has waited.
TIMEOUT = 60.0


@pytest.fixture
def three() -> Iterator[list[Watch]]:
    store = dist.HashStore()
    watches = [Watch(store, rank, 3, TIMEOUT) for rank in range(3)]
    yield watches
    for watch in watches:
        watch.close()


def hears(watch: Watch) -> str:
    """Why a rank stops that has waited for long, or nothing."""
    try:
        watch.check(TIMEOUT)
    except RankLost as error:
        return str(error)
    return ""


def test_an_exception_stops_those_that_have_not_had_it(three: list[Watch]) -> None:
    three[0].say("No space left.", 4)
    assert [hears(watch) for watch in three] == ["", *["Rank 0 stopped: No space left."] * 2]
    three[0].unsay()
    assert [hears(watch) for watch in three] == ["", "", ""]


def test_an_exception_of_everybodys_stops_nobody_for_as_long_as_it_stands_there(three: list[Watch]) -> None:
    for watch in three:
        watch.say("The product is not finite.", 4)
    assert [hears(watch) for watch in three] == ["", "", ""]


def test_the_next_exception_at_the_same_place_is_another_one(three: list[Watch]) -> None:
    for watch in three:
        watch.say("The product is not finite.", 4)
    three[1].say("No space left.", 4)
    assert [hears(watch) for watch in three] == ["Rank 1 stopped: No space left.", "", "Rank 1 stopped: No space left."]


def test_one_that_stands_there_makes_way_for_the_next(three: list[Watch]) -> None:
    for watch in three:
        watch.say("The product is not finite.", 4)
    three[1].say("No space left.", 9)
    assert [hears(watch) for watch in three] == ["Rank 1 stopped: No space left.", "", "Rank 1 stopped: No space left."]
    three[0].unsay()  # its own, which is no longer there
    assert hears(three[2]) == "Rank 1 stopped: No space left."


def test_the_first_of_two_is_what_all_hear(three: list[Watch]) -> None:
    three[1].say("No space left.", 4)
    three[0].say("Another one.", 5)
    assert [hears(watch) for watch in three] == ["Rank 1 stopped: No space left.", "", "Rank 1 stopped: No space left."]


class Ending:
    """A collective that ends just when the time that it was waited for is up."""

    def __init__(self, well: bool) -> None:
        self.well, self.asked = well, 0

    def wait(self, _: Any) -> None:
        self.asked += 1
        if self.asked == 1 or not self.well:
            raise RuntimeError("timed out" if self.asked == 1 else "connection closed")

    def is_completed(self) -> bool:
        return True


def test_a_collective_that_ends_when_the_time_is_up_has_not_failed() -> None:
    ranks: Any = Ranks.__new__(Ranks)
    ranks._device = torch.device("cpu")
    ranks._watch = SimpleNamespace(
        begin=lambda: None, check=lambda waited: None, lost=lambda: RankLost("A rank is gone.")
    )
    ranks._wait(Ending(well=True))
    with pytest.raises(RankLost, match="gone"):
        ranks._wait(Ending(well=False))
