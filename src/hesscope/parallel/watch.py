"""Who is still there: heartbeats and last words in a store that all ranks can read.

A rank that fails says why before it goes, and whoever waits for it says the same. A rank that is killed says nothing: its
connections break, which ends waiting at once, or its heartbeat stops, or never begins.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from torch.distributed.distributed_c10d import Store

from hesscope.errors import RankLost
from hesscope.parallel.patient import Patient

#: A rank that has not come is lost after so many times the seconds of silence: it may be loading.
PATIENCE = 10
#: What a collective may take in all: it is the watch that ends waiting for ranks that are gone, and slow ones are waited for.
LONGEST = timedelta(days=1)
_BEAT = 1.0
_LOST, _RAISED = "lost", "raised"


class Watch:
    """One rank's view of the others, through a store; `timeout` is how many seconds of silence make a rank lost."""

    def __init__(self, store: Store, rank: int, ranks: int, timeout: float) -> None:
        self.store, self._rank, self.timeout = Patient(store, timeout), rank, timeout
        self._others = [other for other in range(ranks) if other != rank]
        self._awaited, self._came = set(self._others), time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}
        self._said = ""
        self._raised = Counter[int]()
        self._stop = threading.Event()
        try:
            store.set(f"beat/{rank}", "0")
            own = _own(store)
        except RuntimeError as error:
            raise RankLost(_NO_ANSWER) from error
        self._thread = threading.Thread(target=self._beat, args=(own,), daemon=True, name="hesscope-heartbeat")
        self._thread.start()

    def close(self) -> None:
        """Stop the heartbeat; a rank that leaves in peace is not missed."""
        self._stop.set()
        self._thread.join(2 * _BEAT)
        self.store.close()

    def _beat(self, store: Store) -> None:
        count = 0
        while not self._stop.wait(_BEAT):
            count += 1
            try:
                store.set(f"beat/{self._rank}", str(count))
            except (RuntimeError, ValueError):  # the store went with its host
                return

    # ---- last words

    def say(self, cause: str, met: int) -> None:
        """Leave word of an exception that ends this rank's part, after so many meetings with the others.

        Where another rank ends there as often, the exception was everybody's: neither stops for the other's word.
        """
        self._raised[met] += 1
        self._said = self._post(_RAISED, cause, met, self._raised[met])

    def unsay(self) -> None:
        """Take it back: this rank goes on."""
        if self._said:
            word, self._said = self._said, ""
            self.store.compare_set("failed", word, "")

    def _post(self, kind: str, cause: str, met: int = 0, times: int = 0) -> str:
        """Leave word unless somebody was first whom this rank would hear; the word, if it is ours."""
        word = f"{kind}\n{self._rank}\n{met}\n{times}\n{cause}"
        try:
            there = self._there()
            expected = there if self._heard(there) is None else ""
            return word if self.store.compare_set("failed", expected, word).decode() == word else ""
        except RuntimeError:
            return ""

    def _word(self) -> tuple[str, str] | None:
        """Kind and sentence of what another rank left."""
        return self._heard(self._there())

    def _there(self) -> str:
        return str(self.store.get("failed").decode()) if self.store.check(["failed"]) else ""

    def _heard(self, word: str) -> tuple[str, str] | None:
        """What a word says to this rank; nothing where it is its own, or of an exception that it had as well."""
        if not word:
            return None
        kind, rank, met, times, cause = word.split("\n", 4)
        if kind == _RAISED and (int(rank) == self._rank or int(times) <= self._raised[int(met)]):
            return None
        return kind, cause if kind == _LOST else f"Rank {rank} stopped: {cause}"

    # ---- looking after the others

    def begin(self) -> None:
        """A wait begins: silence counts from now."""
        self._seen = {}

    def check(self, waited: float) -> None:
        """Raise RankLost where a rank has failed, has been silent for `timeout` seconds, or has not come in ten times that."""
        try:
            word = self._word()
            beats = self._beats()
        except RuntimeError as error:
            raise RankLost(_NO_ANSWER) from error
        # An exception that is everybody's, such as bad input, is raised here as well in a moment.
        if word and (word[0] == _LOST or waited >= min(10.0, self.timeout / 4)):
            raise RankLost(word[1])
        now = time.monotonic()
        for rank, count in beats.items():
            before = self._seen.get(rank)
            if before is None or before[0] != count:
                self._seen[rank] = (count, now)
            elif now - before[1] > self.timeout:
                raise self._lost([rank])
        if self._awaited and now - self._came > PATIENCE * self.timeout:
            raise self._lost(sorted(self._awaited), came=False)

    def lost(self) -> RankLost:
        """Why a connection broke: what a rank said, or which one is gone, or has not come."""
        return self.missing() or self._lost(sorted(self._awaited), came=not self._awaited)

    def missing(self) -> RankLost | None:
        """What a rank that failed has said, or which one has fallen silent, after three beats; None where all are there."""
        with _undisturbed():
            try:
                before = self._beats()
                for _ in range(6):
                    if word := self._word():
                        return RankLost(word[1])
                    time.sleep(_BEAT / 2)
                now = self._beats()
            except RuntimeError:
                return RankLost(_NO_ANSWER)
            silent = [rank for rank, count in now.items() if before.get(rank) == count]
            return self._lost(silent) if silent else None

    def _lost(self, ranks: list[int], came: bool = True) -> RankLost:
        named = f"Rank {', '.join(map(str, ranks))}" if ranks else "A rank"
        how = "stopped without a word" if came else "has not come"
        why = "killed (often for want of memory), or its machine is gone" if came else "not started, or stopped before"
        self._post(
            _LOST,
            f"{named} {how}: {why}; the others stop too, and the same command continues from the last checkpoint.",
        )
        try:
            word = self._word()
        except RuntimeError:
            return RankLost(_NO_ANSWER)
        return RankLost(word[1] if word else f"{named} {how}.")

    def _beats(self) -> dict[int, int]:
        """Of the others, those that have come."""
        if self._awaited:
            self._awaited = {rank for rank in self._awaited if not self.store.check([f"beat/{rank}"])}
        here = [rank for rank in self._others if rank not in self._awaited]
        found = self.store.multi_get([f"beat/{rank}" for rank in here]) if here else []
        return {rank: int(count) for rank, count in zip(here, found, strict=True)}


def _own(store: Store) -> Store:
    """The same store through a connection of its own, for another thread."""
    own: Store = store.clone()  # type: ignore[attr-defined]
    return own


_NO_ANSWER = (
    "The rank or launcher that keeps the ranks' store does not answer: it has stopped or was killed (often for want of memory), or "
    "its machine is gone; the same command continues from the last checkpoint."
)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """A launcher that ends all ranks because one is gone does so after this one has found out why."""
    kinds = [signal.SIGTERM, signal.SIGINT] if threading.current_thread() is threading.main_thread() else []
    before = {kind: signal.signal(kind, signal.SIG_IGN) for kind in kinds}
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
