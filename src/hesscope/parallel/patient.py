"""A store that is asked through a thread, so that a host that falls silent holds nobody up for ever."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any

from torch.distributed import DistNetworkError
from torch.distributed.distributed_c10d import Store


class Patient:
    """A store whose methods wait for an answer no longer than `timeout` seconds, and then raise DistNetworkError.

    Once an answer has failed to come, none is waited for any more.
    """

    def __init__(self, store: Store, timeout: float) -> None:
        self._store, self._timeout = store, timeout
        self._silent = False
        self._asked: SimpleQueue[tuple[Any, Future[Any]] | None] = SimpleQueue()
        threading.Thread(target=_answer, args=(self._asked,), daemon=True, name="hesscope-store").start()

    def __getattr__(self, method: str) -> Any:
        return partial(self._ask, getattr(self._store, method))

    def close(self) -> None:
        """No more questions."""
        self._asked.put(None)

    def _ask(self, method: Any, *arguments: Any) -> Any:
        answer: Future[Any] = Future()
        if not self._silent:
            self._asked.put((partial(method, *arguments), answer))
        try:
            return answer.result(0 if self._silent else self._timeout)
        except TimeoutError as error:
            self._silent = True
            raise DistNetworkError(f"The store has not answered for {self._timeout:g} seconds.") from error


def _answer(asked: SimpleQueue[tuple[Any, Future[Any]] | None]) -> None:
    while (question := asked.get()) is not None:
        call, answer = question
        try:
            answer.set_result(call())
        except Exception as error:
            answer.set_exception(error)
