"""The communicator of a process group: one reduction a product, and the same decisions everywhere."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
from torch.utils._pytree import tree_map

from hesscope.communicator import Communicator, Own
from hesscope.errors import HesscopeError, RankLost
from hesscope.exchange import Exchange
from hesscope.models.meshes import group_of
from hesscope.parallel.replicas import replicas
from hesscope.parallel.shares import divide
from hesscope.parallel.watch import Watch

T = TypeVar("T")
#: Tensors travel in pieces of so many bytes: few enough to pack, large enough that a piece's fixed cost is nothing.
_PIECE = 64 * 2**20
_SLICE = 1.0
_OUT_OF_STEP = (
    "The ranks are no longer in step: they have not taken part in the same exchanges; start all of them again."
)
#: Seconds of silence after which a rank counts as lost, where nothing else is said.
TIMEOUT = 60.0
#: How often this process has been one of some ranks: each time in a place of the store of its own, in step with the others.
_TIMES: dict[tuple[int, ...], Iterator[int]] = {}


class Ranks(Communicator):
    """The ranks of a process group.

    A reduction carries, beside the sums, whether a rank has failed and a digest of what every rank worked on. Objects go
    through the group's store.
    """

    def __init__(self, group: dist.ProcessGroup | None, timeout: float, probe_groups: int = 1) -> None:
        self._group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        if probe_groups < 1 or self.ranks % probe_groups:
            raise HesscopeError(
                f"Expected probe_groups to divide the number of ranks, {self.ranks}, into groups of one size, got {probe_groups}."
            )
        self.probe_groups = probe_groups
        self.backend = dist.get_backend(group)
        self._device = (
            torch.device("cuda", torch.cuda.current_device()) if "nccl" in self.backend else torch.device("cpu")
        )
        self.device_type = self._device.type
        members = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        name = f"hesscope/{next(_TIMES.setdefault(members, count()))}/{'-'.join(map(str, members))}"
        self._watch = Watch(PrefixStore(name, _get_default_store()), self.rank, self.ranks, timeout)
        self._store = self._watch.store
        self._sequence, self._attempts = 0, 0
        self._exchange: Exchange | None = None
        #: Bytes given to reductions so far, and how many there were.
        self.reduced_bytes, self.reductions = 0, 0

    def close(self) -> None:
        """Let go of the heartbeat."""
        self._watch.close()

    def join(self, exchange: Exchange | None) -> None:
        of = None if exchange is None else dist.get_process_group_ranks(exchange.group)
        ours = dist.get_process_group_ranks(self._group or dist.group.WORLD)
        alike = replicas(self.gathered(of), ours, self.rank, self.probe_groups)
        if exchange is None:
            return
        exchange.root = None if ours[0] not in (of or ()) else dist.get_group_rank(exchange.group, ours[0])
        if len(alike) == 1:
            exchange.replicas = None
        elif exchange.replicas is None or sorted(dist.get_process_group_ranks(exchange.replicas)) != alike:
            exchange.replicas = group_of(tuple(alike), dist.group.WORLD)
        self._exchange = exchange
        exchange.wait, exchange.failed = self._wait, self._out_of_step

    def _serve(self) -> None:
        if self._exchange is not None:
            self._exchange.serve()

    def _out_of_step(self, error: Exception) -> BaseException:
        """An exception in the middle of what the others take part in ends this rank's part."""
        if isinstance(error, RankLost):
            return error
        self._watch.say(_words(error), self._sequence)
        return RankLost(_words(error))

    # ---- Communicator

    def share(self, weights: Sequence[float]) -> tuple[int, ...]:
        return divide(weights, self.ranks)[self.rank]

    def columns(self, count: int) -> slice:
        if count < self.probe_groups:
            return slice(0, count)
        group = self.rank // (self.ranks // self.probe_groups)
        return slice(group * count // self.probe_groups, (group + 1) * count // self.probe_groups)

    def share_of_columns(self, weights: Sequence[float]) -> tuple[int, ...]:
        size = self.ranks // self.probe_groups
        return divide(weights, size)[self.rank % size]

    @contextmanager
    def summed(
        self, *parts: dict[str, Tensor], of: dict[str, Tensor] | None = None, rows: dict[str, Tensor] | None = None
    ) -> Iterator[Own]:
        own, tensors = Own(), [tensor for part in parts for tensor in part.values()]
        mark = (0, 0) if of is None else _digest(of, self._sequence)
        self._start()  # what was said of an exception that all had is not to be read while this rank does its share
        try:
            self._require_same_rows(rows or {})
            yield own
        except RankLost:
            raise
        except Exception as error:
            self._serve()
            self._sum([torch.zeros_like(x) for x in tensors], [1.0, *mark, 0.0, 0.0])
            raise self._told(error) from error
        self._serve()
        sums = self._sum(tensors, [0.0, *mark, own.amount, own.error])
        if sums is None:
            raise self._told(None)
        if sums[:2] != [self.ranks * word for word in mark]:
            raise self._another_vector()
        own.amount, own.error = sums[2:]

    def on(self, rank: int, find: Callable[[], T]) -> T:
        found, failure = None, None
        if self.rank == rank:
            self._start()
            try:
                found = find()
            except RankLost:
                raise
            except Exception as error:
                failure = error
        self._serve()
        tensors: list[Tensor] = []
        letter = (None if failure is None else _words(failure), tree_map(lambda x: _taken(x, tensors), found))
        reason, found = self._letters(letter, [rank])[0]
        if failure is not None:
            raise _marked(failure)
        if reason is not None:
            raise _marked(HesscopeError(reason if rank == 0 else f"Rank {rank} stopped: {reason}"))
        order = iter(tensors)
        result: T = tree_map(lambda x: self._broadcast(x, order, rank) if isinstance(x, _Empty) else x, found)
        return result

    def give(self, tensor: Tensor) -> None:
        self._give(tensor, 0)

    def gathered(self, value: T) -> list[T]:
        self._serve()
        return self._letters(value, range(self.ranks))

    def any(self, *flags: bool) -> list[bool]:
        self._serve()
        raised = torch.tensor(flags, dtype=torch.float32, device=self._device)
        self._reduce(raised)
        return [count > 0 for count in raised.tolist()]

    @contextmanager
    def watched(self) -> Iterator[None]:
        try:
            with self.connected():
                self._start()
                yield
        except RankLost:
            raise
        except KeyboardInterrupt as interrupt:
            # A launcher that misses one rank interrupts the others.
            if cause := self._watch.missing():
                raise cause from interrupt
            self._watch.say(_words(interrupt), self._sequence)
            raise
        except BaseException as error:
            if not getattr(error, "_hesscope_told", False):
                self._watch.say(_words(error), self._sequence)
            raise

    def attempted(self, work: Callable[[], T]) -> T:
        failure: Exception | None = None
        try:
            with self.watched():
                found = work()
        except Exception as error:
            failure = error
        lost, words = isinstance(failure, RankLost), None if failure is None else _words(failure)
        ends = self._ends((self._sequence, lost, words))
        reason = next(
            (f"Rank {rank} stopped: {said}" for rank, (_, gone, said) in enumerate(ends) if said and not gone), None
        )
        if any(gone for _, gone, _ in ends) or len({met for met, *_ in ends}) > 1:
            raise failure if lost and failure is not None else RankLost(words or reason or _OUT_OF_STEP) from failure
        if failure is not None:
            raise failure
        if reason is not None:
            raise _marked(HesscopeError(reason))
        return found

    def _ends(self, own: T) -> list[T]:
        """How an attempt has ended for every rank, whatever it has said of that meanwhile."""
        self._attempts += 1
        try:
            found = self._exchanged(f"end-{self._attempts}", own, range(self.ranks), heeding=False)
            self._start()
        except RuntimeError as error:
            raise self._watch.lost() from error
        return found

    @contextmanager
    def connected(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
                raise self._watch.lost() from error
            raise

    def describe(self) -> dict[str, Any] | None:
        found: dict[str, Any] = {"layout": "data parallel", "ranks": self.ranks, "backend": self.backend}
        if self._exchange is not None:
            found |= self._exchange.describe()
        return found | ({} if self.probe_groups == 1 else {"probe_groups": self.probe_groups})

    # ---- sums

    def _sum(self, tensors: list[Tensor], control: list[float]) -> list[float] | None:
        """Sum in place; returns the digests' and amounts' sums and the largest error, or None where a rank has failed."""
        *rest, error = control
        slots = [0.0] * self.ranks
        slots[self.rank] = error
        words = torch.tensor([*rest, *slots], dtype=torch.float64)
        packed = _packed(tensors, words, self._device)
        if packed is not None:
            self._reduce(packed)
            words = _unpack(packed, tensors, len(words)).to("cpu", torch.float64)
        else:
            on_device = words.to(self._device)
            self._reduce(on_device)
            words = on_device.cpu()
        if words[0] > 0:
            return None
        if packed is None:
            for tensor in tensors:
                self._reduce_large(tensor)
        return [*words[1:4].tolist(), float(words[4:].max())]

    def _reduce_large(self, tensor: Tensor) -> None:
        """One that is not packed with others: in place, a piece at a time where it has to be moved or converted."""
        flat = tensor.view(-1)
        fits = flat.device == self._device and flat.dtype.itemsize >= 4
        step = flat.numel() if fits else max(1, _PIECE // 4)
        for start in range(0, flat.numel(), max(step, 1)):
            piece = flat[start : start + step]
            moved = piece if fits else piece.to(self._device, torch.promote_types(piece.dtype, torch.float32))
            self._reduce(moved)
            if not fits:
                piece.copy_(moved)

    def _reduce(self, tensor: Tensor) -> None:
        self._sequence += 1
        self.reductions += 1
        self.reduced_bytes += tensor.numel() * tensor.dtype.itemsize
        self._start()
        self._wait(dist.all_reduce(tensor, group=self._group, async_op=True))

    def _told(self, error: Exception | None) -> Exception:
        """Every rank knows that some have failed; now also why. Returns what this one raises."""
        reasons = self.gathered(None if error is None else _words(error))
        if error is not None:
            return _marked(error)
        rank, reason = next((r, reason) for r, reason in enumerate(reasons) if reason is not None)
        return _marked(HesscopeError(f"Rank {rank} stopped: {reason}"))

    def _require_same_rows(self, rows: dict[str, Tensor]) -> None:
        """Raise HesscopeError where a rank that holds the same rows has others in them."""
        replicas = None if self._exchange is None else self._exchange.replicas
        if replicas is None or not rows:
            return
        mark = _digest(rows, self._sequence)
        sums = torch.tensor(mark, dtype=torch.float64, device=self._device)
        self._wait(dist.all_reduce(sums, group=replicas, async_op=True))
        if sums.tolist() != [dist.get_world_size(replicas) * word for word in mark]:
            raise self._another_vector()

    def _another_vector(self) -> HesscopeError:
        return HesscopeError(
            f"Expected the same vector on every rank, but rank {self.rank} has another: the ranks' devices or libraries "
            "round differently, or a seed is not given; use machines of one kind, and give seeds."
        )

    # ---- waiting

    def _start(self) -> None:
        self._watch.unsay()

    def _wait(self, work: Any) -> None:
        """To the end of a collective, or until a rank that takes part is known to be gone."""
        began, ended = time.monotonic(), False
        self._watch.begin()
        while True:
            try:
                if self._device.type == "cuda":
                    _until_completed(work, _SLICE)
                else:
                    work.wait(timedelta(seconds=_SLICE))
                return
            except RuntimeError as error:
                if ended:
                    raise self._watch.lost() from error
            # One that ends just when the time is up has not failed for that: asked again, it says how it ended.
            ended = work.is_completed()
            if not ended:
                self._watch.check(time.monotonic() - began)

    # ---- objects

    def _letters(self, value: Any, senders: Sequence[int]) -> list[Any]:
        """What the senders have to say, on every rank. The store keeps a letter until all have read it."""
        self._sequence += 1
        try:
            self._start()
            return self._exchanged(str(self._sequence), value, senders)
        except RuntimeError as error:
            raise self._watch.lost() from error

    def _exchanged(self, name: str, value: Any, senders: Sequence[int], heeding: bool = True) -> list[Any]:
        """The same under a name; not `heeding` what ranks have said of their exceptions, where the letters are about these."""
        if self.rank in senders:
            self._store.set(f"letter/{name}/{self.rank}", pickle.dumps(value))
        found = [pickle.loads(self._read(f"letter/{name}/{sender}", heeding)) for sender in senders]
        # The last reader clears up.
        if self._store.add(f"read/{name}", 1) == self.ranks:
            for sender in senders:
                self._store.delete_key(f"letter/{name}/{sender}")
            self._store.delete_key(f"read/{name}")
        return found

    def _read(self, key: str, heeding: bool) -> bytes:
        began, pause = time.monotonic(), 1e-4
        self._watch.begin()
        looked = began
        while not self._store.check([key]):
            time.sleep(pause)
            pause = min(1.5 * pause, 0.05)
            if time.monotonic() - looked > _SLICE:
                looked = time.monotonic()
                self._watch.check(looked - began if heeding else 0.0)
        return bytes(self._store.get(key))

    def _broadcast(self, empty: _Empty, own: Iterator[Tensor], source: int) -> Tensor:
        """One of a rank's tensors, on every rank's CPU."""
        tensor = next(own).cpu().contiguous() if self.rank == source else torch.empty(empty.shape, dtype=empty.dtype)
        self._give(tensor, source)
        return tensor

    def _give(self, tensor: Tensor, source: int) -> None:
        """One rank's numbers, in place, on every rank."""
        raw = tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor
        for piece in torch.split(raw, _PIECE) if tensor.numel() else ():
            moved = piece.to(self._device)
            self._start()
            self._wait(dist.broadcast(moved, group=self._group, group_src=source, async_op=True))
            if moved is not piece:
                piece.copy_(moved)


class _Empty:
    """The place of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tuple(tensor.shape), tensor.dtype


def _taken(x: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(x, Tensor):
        return x
    tensors.append(x.detach())
    return _Empty(x)


def _packed(tensors: list[Tensor], words: Tensor, device: torch.device) -> Tensor | None:
    """All tensors and the words in one, in at least float32; None where that would be large."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    if sum(x.numel() for x in tensors) * dtype.itemsize > _PIECE:
        return None
    return torch.cat([words.to(device, dtype), *(x.reshape(-1).to(device, dtype) for x in tensors)])


def _unpack(packed: Tensor, tensors: list[Tensor], words: int) -> Tensor:
    """Copy the tensors back; returns the words."""
    at = words
    for x in tensors:
        x.copy_(packed[at : at + x.numel()].view(x.shape))
        at += x.numel()
    return packed[:words]


def _digest(V: dict[str, Tensor], salt: int) -> tuple[int, int]:
    """Sixteen bits of the vectors' bytes, in halves: exact in a float32 sum over up to 65536 ranks."""
    found = salt % 65521
    for part in V.values():
        bits = (
            part.detach()
            .contiguous()
            .view(-1)
            .view({8: torch.int64, 4: torch.int32, 2: torch.int16}[part.dtype.itemsize])
        )
        found = (31 * found + int(bits.sum(dtype=torch.int64))) % 65521
    return divmod(found, 256)


def _until_completed(work: Any, seconds: float) -> None:
    """Wait without blocking, so that this thread can look after the others; raises RuntimeError where time is up."""
    end, pause = time.monotonic() + seconds, 1e-5
    while not work.is_completed():
        if time.monotonic() > end:
            raise RuntimeError("not completed")
        time.sleep(pause)
        pause = min(1.5 * pause, 1e-3)
    work.wait()


def _marked(error: Exception) -> Exception:
    """An exception that all ranks know of: nobody waits for this one."""
    error._hesscope_told = True  # type: ignore[attr-defined]
    return error


def _words(error: BaseException) -> str:
    """An exception in a line."""
    lines = str(error).strip().splitlines()
    if isinstance(error, HesscopeError):
        return lines[0] if lines else type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted."
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
