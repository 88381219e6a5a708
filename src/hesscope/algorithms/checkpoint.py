"""A folder in which a run keeps its state, so that it survives being killed."""

from __future__ import annotations

import errno
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from hesscope.algorithms import state_file
from hesscope.algorithms.identity import differences
from hesscope.communicator import Communicator
from hesscope.errors import HesscopeError, HesscopeWarning
from hesscope.space.random import resolve_seed

#: How a system says that there is no such folder any more, removed or with its disk.
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN}
STATE, LOCK = "state.safetensors", "lock"
#: Changes with the meaning of what is in a state.
_FORMAT = 1
#: A checkpoint that takes w seconds to write waits for 20 w: at most a twentieth of the time goes to them.
_SHARE = 20.0
#: Less work than so many seconds is not worth a last checkpoint.
_WORTH_KEEPING = 10.0


class Checkpoint:
    """Where one run's state is kept: written at most every `every` seconds, and no more than 5% of the time.

    Args:
        folder: holds `state.safetensors` while there is something to resume.
        restart: discard what is there when the run begins.
        keep_finished: also keep the finished state, so that a run of several parts does not repeat the ones it has done.
        say: is told in one line that a run was resumed.

    Whoever makes one calls `discard` once the result is safe; an algorithm that was given a path does so itself.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every: float = 60.0,
        restart: bool = False,
        keep_finished: bool = False,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if not every >= 0:
            raise HesscopeError(f"Expected seconds between checkpoints, 0 or more, got {every}.")
        self.folder = Path(folder)
        self.every, self.keep_finished, self.say = every, keep_finished, say
        self._restart = restart
        self._identity: dict[str, str] = {}
        self._since, self._cost, self._complained = time.monotonic(), 0.0, False

    def part(self, name: str) -> Checkpoint:
        """The checkpoint of one part of a run that has several; `discard` of the whole discards it too."""
        return Checkpoint(self.folder / name, every=self.every, restart=self._restart, keep_finished=True, say=self.say)

    @property
    def exists(self) -> bool:
        """Whether there is something to resume, here or in a part."""
        return any(self.folder.rglob(STATE))

    def discard(self) -> None:
        """Remove the state, those of all parts, and the folders where nothing else is in them."""
        for folder in sorted({path.parent for path in self.folder.rglob("*")}, reverse=True):
            (folder / STATE).unlink(missing_ok=True)
            _tidy(folder)

    def seed(self) -> int | None:
        """The seed of the run that is kept here."""
        seed = self.known("seed")
        return None if seed is None else int(seed)

    def known(self, name: str) -> str | None:
        """What the identity of the run that is kept here says under a name."""
        path = self.folder / STATE
        if self._restart or not path.exists():
            return None
        found: str | None = self._facts(path)["identity"].get(name)
        return found

    # ---- for `drive`

    @contextmanager
    def held(self) -> Iterator[None]:
        """No other process may use the folder meanwhile; a folder in which nothing was kept goes when the run ends."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / LOCK).open("w")
        except OSError as error:
            raise HesscopeError(
                f"Expected a folder for the checkpoint that can be written to, got {str(self.folder)!r} "
                f"({error.strerror}); choose another."
            ) from error
        with lock:
            self._lock(lock)
            try:
                yield
            finally:
                if not (self.folder / STATE).exists():
                    _tidy(self.folder)

    def begin(self, identity: dict[str, str], read: Callable[[Path], Any] = state_file.read) -> Any:
        """What was kept of this very run, as `read` reads the file, or None.

        Raises HesscopeError where another run's state, or one that cannot be read, is in the folder.
        """
        self._identity, self._since = identity, time.monotonic()
        path = self.folder / STATE
        for leftover in self.folder.glob(f".{STATE}.*"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        if self._restart:
            path.unlink(missing_ok=True)
        if not path.exists():
            return None
        changed = differences(self._facts(path)["identity"], identity)
        if changed:
            raise HesscopeError(
                f"The checkpoint in {str(self.folder)!r} is of another run: {'; '.join(changed)}. {_ADVICE}"
            )
        saved = self._readable(read, path)
        self._since = time.monotonic()
        return saved

    def checked(self, file: state_file.Stored) -> None:
        """Raise HesscopeError where a file that has been read, piece by piece, proves damaged."""
        self._readable(lambda _: file.finish(), self.folder / STATE)
        self._since = time.monotonic()

    def is_due(self, last: bool = False) -> bool:
        """Whether it is time to write; with `last`, before the run stops, whether there is work that is worth keeping."""
        waited = time.monotonic() - self._since
        worth = min(self.every, max(_WORTH_KEEPING, self._cost))
        return waited >= (worth if last else pause(self.every, self._cost))

    def write(self, saved: dict[str, Any]) -> None:
        """Write the state now. A disk that is full does not end the run; it is a warning.

        Raises HesscopeError where the folder is gone.
        """
        began = time.monotonic()
        try:
            state_file.write(self.folder / STATE, {"format": _FORMAT, "identity": self._identity, **saved})
        except OSError as error:
            if error.errno in _GONE:
                raise HesscopeError(
                    f"The folder {str(self.folder)!r} of this run's checkpoint is gone ({error.strerror}): it was removed or moved, or "
                    "its disk is no longer there; bring it back, and the same command continues from the last checkpoint."
                ) from error
            if not self._complained:
                self._complained = True
                warnings.warn(
                    f"No checkpoint could be written to {str(self.folder)!r} ({error.strerror or error}); the run goes "
                    "on and will try again.",
                    HesscopeWarning,
                    stacklevel=2,
                )
        self._since = time.monotonic()
        self._cost = self._since - began

    def _facts(self, path: Path) -> dict[str, Any]:
        facts: dict[str, Any] = self._readable(state_file.read_facts, path)
        if facts.get("format") != _FORMAT:
            raise HesscopeError(
                f"The checkpoint in {str(self.folder)!r} is of another version of hesscope (format "
                f"{facts.get('format')}, expected {_FORMAT}). {_ADVICE}"
            )
        return facts

    def _readable(self, read: Callable[[Path], Any], path: Path) -> Any:
        try:
            return read(path)
        except HesscopeError as error:
            raise HesscopeError(f"The checkpoint in {str(self.folder)!r} is damaged: {error}. {_ADVICE}") from error

    def _lock(self, file: IO[str]) -> None:
        try:
            import fcntl
        except ImportError:  # where the system has no such locks
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HesscopeError(
                f"Another process is at work on the run in {str(self.folder)!r}; wait for it, or choose another folder."
            ) from error
        except OSError:
            return  # a file system without locks


_ADVICE = "Choose another folder, or start anew by deleting this one (on the command line: --restart)."


def pause(every: float, cost: float) -> float:
    """Seconds between checkpoints that take `cost` seconds to write."""
    return max(every, _SHARE * cost)


def run_seed(seed: int | None, checkpoint: str | Path | Checkpoint | None, comm: Communicator) -> int:
    """The seed given; where none was, that of the run to be resumed, or a fresh one: rank 0's on all ranks."""
    if seed is not None:
        return resolve_seed(seed)
    return comm.on_first(lambda: resolve_seed(None if checkpoint is None else opened(checkpoint).seed()))


def opened(checkpoint: str | Path | Checkpoint) -> Checkpoint:
    """The checkpoint itself, or that in a folder."""
    return checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)


@contextmanager
def postponed_interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and its like wait until the step has ended, so that its state is whole; a second one stops at once.

    Only signals that would raise KeyboardInterrupt, and only in the main thread; yields whether one has come.
    """
    asked: list[int] = []

    def later(number: int, frame: Any) -> None:
        if asked:
            signal.default_int_handler(number, frame)
        asked.append(number)
        print("\nhesscope: stopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    kinds = [signal.SIGINT, signal.SIGTERM] if threading.current_thread() is threading.main_thread() else []
    taken = [kind for kind in kinds if signal.getsignal(kind) is signal.default_int_handler]
    for kind in taken:
        signal.signal(kind, later)
    try:
        yield lambda: bool(asked)
    finally:
        for kind in taken:
            signal.signal(kind, signal.default_int_handler)


def _tidy(folder: Path) -> None:
    """Remove what this module put into a folder beside the state, and the folder if it is empty then."""
    try:
        for leftover in [folder / LOCK, *folder.glob(f".{STATE}.*")]:
            leftover.unlink(missing_ok=True)
        folder.rmdir()
    except OSError:
        return  # something of somebody else is in it, or it is gone
