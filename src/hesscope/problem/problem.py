"""A model, a loss and a frozen list of batches: the risk R(theta) and how to differentiate it twice."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from hesscope.communicator import ALONE, Communicator
from hesscope.errors import HesscopeError
from hesscope.losses import KnownLoss, Loss, SplitLoss, as_loss, loss_fingerprint
from hesscope.models import (
    borrowed,
    class_name,
    devices_of,
    elsewhere,
    find_trunk,
    first_nonfinite_module,
    named_parameters,
    parameters,
    require_one_device,
    sharded,
    unwrapped,
    values_of,
)
from hesscope.models.attention.choice import Choice, choose
from hesscope.models.dropout import require_no_dropout
from hesscope.problem.architecture import architecture
from hesscope.problem.batches import a_few_tokens, content_hash, freeze, longest, sequences_in
from hesscope.resting import require_place

OBJECTIVES = ("nll", "perplexity")
DROPOUTS = ("off", "frozen")


class Problem:
    """The risk R(theta) = (1/N) sum over batches of loss.total(model, batch), with N the sum of their counts.

    Args:
        model: any `torch.nn.Module` on one device, or spread or offloaded by accelerate. It is never changed: parameters are read through aliases, and
            whatever is switched for the duration of a pass is switched back.
        loss: an object with `total(model, batch) -> (sum, count)`, or a function `(model, batch) -> mean`, which needs
            `count`. Code and values are read here, for the fingerprint; make another problem for a loss that was changed since.
        batches: any iterable of batches (nested dictionaries, lists and tuples of tensors), of any sizes; read once,
            copied and kept on the CPU.
        count: for a function that returns a mean: the number of terms in a batch's mean, as `count(batch)`; with none, it is not read.
        objective: "nll" for R itself (nats, where the loss is a log-likelihood), "perplexity" for exp(R).
        dropout: "off" refuses a model that would drop; "frozen" keeps one mask a batch, drawn from `seed`.
        attention: "sdpa", "eager" or "tiled" (exact, in memory linear in the length) for a model of transformers; "auto" takes
            tiles from 1024 positions on, where the model runs them, and otherwise the model's own or what stands for it.
        borders: where hidden states between blocks rest with engine="streamed" while another block's turn is: "device", "cpu",
            "disk" (a temporary folder) or a folder; files go when they are no longer needed.
        vectors: where products' vectors over a selection of this problem rest: likewise; on disk they are mapped into memory. Where
            that is not the model's device, products are the streamed engine's.

    Raises:
        HesscopeError: no batches, a mean without `count`, parameters on several devices without hooks, active dropout, an attention that
            was asked for and that the model does not run.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | Callable[[nn.Module, Any], Tensor] | KnownLoss,
        batches: Iterable[Any],
        *,
        count: Callable[[Any], int] | None = None,
        objective: str = "nll",
        dropout: str = "off",
        seed: int = 0,
        source: dict[str, Any] | None = None,
        attention: str | Choice = "auto",
        borders: str | Path = "device",
        vectors: str | Path = "device",
    ) -> None:
        _require_choice("objective", objective, OBJECTIVES)
        _require_choice("dropout", dropout, DROPOUTS)
        model = unwrapped(model)
        self.device = require_one_device(model)
        if dropout == "off":
            require_no_dropout(model)
        self.model = model
        self.loss: Loss = loss.loss if isinstance(loss, KnownLoss) else as_loss(loss, count)
        #: What the loss is, as it was when the problem was made: a loss that counts its calls stays the same.
        self.loss_fingerprint = loss.fingerprint if isinstance(loss, KnownLoss) else loss_fingerprint(self.loss, model)
        #: What the model is beside its weights, as it was then.
        self.architecture = architecture(model)
        self.batches = freeze(batches)
        require_place("borders", borders)
        require_place("vectors", vectors)
        self.objective, self.borders, self.vectors = objective, borders, vectors
        self.dropout = dropout
        self.seed = seed
        self.source = dict(source or {})
        #: Which mask each batch has under frozen dropout: its place in the problem that it was first part of.
        self.places: tuple[int, ...] = tuple(range(len(self.batches)))
        #: The processes that share its batches; `hesscope.data_parallel` gives it more than this one.
        self.comm: Communicator = ALONE
        self._mine: dict[bool, tuple[Communicator, tuple[int, ...]]] = {}
        self._hashed: tuple[object, str] | None = None
        self.attention = attention if isinstance(attention, Choice) else self._choose_attention(attention)

    def __repr__(self) -> str:
        return f"Problem({class_name(self.model)}, {type(self.loss).__name__}, {len(self.batches)} batches)"

    @cached_property
    def devices(self) -> tuple[torch.device, ...]:
        """Where parameters are used: `device`, and further ones of a model that is spread over several."""
        return self.device, *sorted(devices_of(self.model) - {self.device}, key=str)

    # ---- counting

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The number of loss terms of each batch (for a language model: valid target tokens)."""
        if hasattr(self.loss, "count"):
            counts = tuple(self.loss.count(batch) for batch in self.batches)
        else:
            with torch.no_grad():
                counts = tuple(self.total(b)[1] for b in range(len(self.batches)))
        counts = tuple(count.item() if isinstance(count, Tensor) else count for count in counts)
        if sum(counts) == 0:
            raise HesscopeError(
                "Expected at least one loss term, found none: every label is ignored or the sequences have one token."
            )
        return counts

    @property
    def N(self) -> int:
        """The number of loss terms over all batches, the one divisor of the risk."""
        return sum(self.counts)

    @property
    def mine(self) -> tuple[int, ...]:
        """The batches whose sums this process finds; all of them, where it works alone."""
        return self._share(self.comm.share, False)

    def mine_of_columns(self, count: int) -> tuple[int, ...]:
        """The same for a product with `count` vectors, where this process may have only some of the vectors."""
        divided = count >= self.comm.probe_groups > 1
        return self._share(self.comm.share_of_columns, True) if divided else self.mine

    def _share(self, share: Callable[[list[float]], tuple[int, ...]], of_columns: bool) -> tuple[int, ...]:
        comm, found = self._mine.get(of_columns, (None, ()))
        if comm is not self.comm:
            found = share([max(count, 1) for count in self.counts])
            self._mine[of_columns] = self.comm, found
        return found

    # ---- running

    @contextmanager
    def running(self, b: int) -> Iterator[None]:
        """The state in which batch b is run: attention with a second derivative, dropout off or frozen."""
        seed = None if self.dropout == "off" else _batch_seed(self.seed, self.places[b])
        with borrowed(self.model, dropout_seed=seed, attention=self.attention.target):
            yield

    def _choose_attention(self, asked: str) -> Choice:
        def trial(implementation: str | None) -> float:
            few = tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) else x, a_few_tokens(self.batches[0]))
            with torch.no_grad(), borrowed(self.model, attention=implementation):
                return float(self.loss.total(self.model, few)[0])

        return choose(self.model, asked, max(map(longest, self.batches)), self.dropout == "frozen", trial)

    def total(
        self, b: int, replaced: dict[str, Tensor] | None = None, *, loss: Loss | None = None, copies: int = 1
    ) -> tuple[Tensor, int]:
        """The sum of the losses of batch b and its count, with some parameters replaced by other tensors.

        Parameters that are not replaced are constants. `loss` stands in for the problem's own, and `copies` repeats the
        batch's sequences. Raises HesscopeError where the sum is not finite.
        """
        total, count = self._run((loss or self.loss).total, b, replaced, copies)
        return self.checked(b, total), count

    def outputs(self, b: int, replaced: dict[str, Tensor] | None = None, *, copies: int = 1) -> Tensor:
        """The model's outputs for batch b, with some parameters replaced; for a loss that passes through them."""
        outputs = self._run(self.require_split_loss().outputs, b, replaced, copies)
        if not isinstance(outputs, Tensor):
            raise HesscopeError(
                f"Expected the loss's outputs(model, batch) to be a tensor, got {type(outputs).__name__}."
            )
        return outputs

    def run(self, function: Callable[[nn.Module, Any], Any], b: int, replaced: dict[str, Tensor] | None = None) -> Any:
        """function(model, batch b) in the state in which the batch is run, with some parameters replaced."""
        return self._run(function, b, replaced)

    def total_of_outputs(self, b: int, outputs: Tensor) -> Tensor:
        """The sum of the losses of batch b from the model's outputs. Raises HesscopeError where it is not finite."""
        return self.checked(b, self.require_split_loss().total_of_outputs(outputs, self.on_device(b))[0])

    def require_split_loss(self) -> SplitLoss:
        """The loss, known to pass through the model's outputs."""
        if isinstance(self.loss, SplitLoss):
            return self.loss
        raise HesscopeError(
            "Expected a loss with outputs(model, batch) and total_of_outputs(outputs, batch), for this operator looks at "
            f"the model's outputs; {type(self.loss).__name__} lacks them, so add them (hs.hessian takes any loss)."
        )

    def _run(
        self, function: Callable[[nn.Module, Any], Any], b: int, replaced: dict[str, Tensor] | None, copies: int = 1
    ) -> Any:
        """function(model, batch b) in the state in which the batch is run; parameters not replaced are constants."""
        fixed = {name: p.detach() for name, p in named_parameters(self.model).items()}
        wanted = sorted(self.outside - (replaced or {}).keys())
        store = elsewhere(self.model) if wanted else None
        if store is not None:
            fixed |= store.load_several(wanted)
        state = {f"model.{name}": p for name, p in (fixed | (replaced or {})).items()}
        batch = self.on_device(b)
        if copies > 1:
            batch = tree_map(lambda x: x.repeat(copies, *[1] * (x.dim() - 1)) if isinstance(x, Tensor) else x, batch)
        with self.running(b):
            return functional_call(_Applied(self.model, function), state, (batch,))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, weights outside the blocks that are divided among processes are gathered once."""
        store = sharded(self.model)
        with nullcontext() if store is None else store.holding(self.outside):
            yield

    @cached_property
    def outside(self) -> frozenset[str]:
        """Weights that rest elsewhere and that no block of the trunk owns: a loss may look at them past their module."""
        store, trunk = elsewhere(self.model), find_trunk(self.model)
        inside = f"{trunk.prefix}." if trunk is not None else " "
        return frozenset(name for name in (store.names if store else ()) if not name.startswith(inside))

    def on_device(self, b: int) -> Any:
        """Batch b on the model's device."""
        return tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) else x, self.batches[b])

    def risk(self) -> float:
        """R: the mean loss over all valid terms (nats for a log-likelihood). One forward pass."""
        total = torch.zeros(1, dtype=torch.float64)
        with torch.no_grad(), self.comm.summed({"total": total}):
            total += math.fsum(float(self.total(b)[0]) for b in self.mine)
        return float(total) / self.N

    # ---- relatives

    def subset(self, batches: Iterable[int]) -> Problem:
        """The same model and loss on some of the batches, in the order given; each keeps its frozen dropout mask.

        Raises:
            HesscopeError: no batches, or numbers that are not those of batches.

        Example:
            >>> import torch, hesscope as hs
            >>> problem = hs.supervised(torch.nn.Linear(2, 3), [(torch.ones(b, 2), torch.zeros(b).long()) for b in (2, 5)])
            >>> problem.subset([1]).N
            5
        """
        chosen = list(batches)
        wrong = [b for b in chosen if not (isinstance(b, int) and 0 <= b < len(self.batches))]
        if wrong or not chosen:
            raise HesscopeError(
                f"Expected numbers of batches from 0 to {len(self.batches) - 1}, got {wrong[0] if wrong else 'none'}."
            )
        part = self.related(batches=[self.batches[b] for b in chosen])
        part.places = tuple(self.places[b] for b in chosen)
        return part

    def by_sequence(self) -> Problem:
        """The same sequences (or examples), one a batch: every tensor of a batch is cut along its first axis.

        Padding stays. The sequences' losses have to add up to the batches' losses: where they do not, the model or the
        loss mixes the sequences of a batch, and there is no curvature of a single one.

        Raises:
            HesscopeError: a batch whose first axes differ, frozen dropout (a mask belongs to a whole batch), or losses
                that do not add up.
        """
        parts = [sequences_in(b, batch) for b, batch in enumerate(self.batches)]
        if all(len(singles) == 1 for singles in parts):
            return self
        if self.dropout == "frozen":
            raise HesscopeError(
                "Expected dropout='off', or batches of one sequence, to split batches into sequences: a frozen mask belongs "
                "to its whole batch; make the problem with batch_size=1."
            )
        split = self.related(batches=[single for singles in parts for single in singles])
        self._require_same_loss(split)
        return split

    def related(
        self, *, model: nn.Module | None = None, batches: Iterable[Any] | None = None, objective: str | None = None
    ) -> Problem:
        """This problem with another model, other batches or another objective."""
        other = Problem(
            self.model if model is None else model,
            KnownLoss(self.loss, self.loss_fingerprint),
            self.batches if batches is None else batches,
            objective=objective or self.objective,
            dropout=self.dropout,
            seed=self.seed,
            source=self.source,
            borders=self.borders,
            vectors=self.vectors,
            attention=self.attention if model is None or type(model) is type(self.model) else self.attention.asked,
        )
        other.comm = self.comm
        if batches is None:
            other.places = self.places
        if model is None:
            other._hashed, other.architecture = self._hashed, self.architecture
        return other

    def _require_same_loss(self, split: Problem) -> None:
        """Raise HesscopeError unless the split problem has this one's count and, up to rounding, its risk."""
        eps = max(torch.finfo(p.dtype).eps for p in self.model.parameters() if p.is_floating_point())
        whole, parts = self.risk(), split.risk()
        # Models that are float64 may cast to float32 inside; another batch shape rounds differently.
        if split.N != self.N or abs(whole - parts) > max(10 * math.sqrt(eps), 1e-5) * max(abs(whole), 1e-30):
            raise HesscopeError(
                f"Expected the losses of single sequences to add up to those of the batches, but the mean loss is {whole:.6g} "
                f"over {self.N} terms in batches and {parts:.6g} over {split.N} one by one: the model or the loss mixes the "
                "sequences of a batch."
            )

    # ---- identity

    @cached_property
    def data_fingerprint(self) -> str:
        """SHA-256 of the frozen batches, in their order."""
        return content_hash(self.batches)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the numbers: architecture, weights, batches, loss, objective, dropout.

        A loss of one's own is told by its code and all values that it holds when the problem is made: `loss_fingerprint`; a
        model by its modules, their code and settings: `architecture`.
        """
        parts = [
            self.architecture,
            self._model_fingerprint(),
            self.data_fingerprint,
            self.loss_fingerprint,
            self.objective,
        ]
        parts += [self.dropout, str(self.seed) if self.dropout == "frozen" else ""]
        if self.dropout == "frozen" and self.places != tuple(range(len(self.batches))):
            parts.append(str(self.places))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _model_fingerprint(self) -> str:
        """Hash the weights anew only when they changed."""
        key = parameters.state_key(self.model)
        if self._hashed is None or self._hashed[0] != key:
            self._hashed = (key, parameters.fingerprint(self.model, partial(values_of, self.model)))
        return self._hashed[1]

    def describe(self) -> dict[str, Any]:
        """What a result keeps about its problem."""
        return {
            "fingerprint": self.fingerprint,
            "data_fingerprint": self.data_fingerprint,
            "weights_fingerprint": self._model_fingerprint(),
            "model": class_name(self.model),
            "architecture": self.architecture,
            "loss": type(self.loss).__name__,
            "loss_fingerprint": self.loss_fingerprint,
            "objective": self.objective,
            "dropout": self.dropout,
            "batches": len(self.batches),
            "terms": self.N,
            "attention": self.attention.note,
            **self.source,
        }

    # ---- complaints

    def checked(self, b: int, total: Tensor) -> Tensor:
        """The summed loss of batch b, known to be one finite number; raises HesscopeError where it is not."""
        if total.numel() != 1:
            raise HesscopeError(
                f"Expected the loss of a batch to be one number, its sum, got a tensor of shape {list(total.shape)}; "
                "sum it."
            )
        if not torch.isfinite(total.detach()).all():
            raise HesscopeError(self._nonfinite(b, total, self.on_device(b)))
        return total

    def _nonfinite(self, b: int, total: Tensor, batch: Any) -> str:
        def run() -> None:
            with torch.no_grad(), self.running(b):
                self.loss.total(self.model, batch)

        module = first_nonfinite_module(self.model, run)
        where = f"; the first output that is not finite is that of {module!r}" if module else ""
        return f"The loss of batch {b} is {float(total.detach())}, expected a finite number{where}."


class _Applied(nn.Module):
    """A function of the model and a batch as one module, so that `functional_call` can replace parameters for any."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self._function = function

    def forward(self, batch: Any) -> Any:
        return self._function(self.model, batch)


def _batch_seed(seed: int, b: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{b}".encode(), digest_size=7).digest(), "little")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise HesscopeError(f"Expected {name} to be {' or '.join(map(repr, choices))}, got {value!r}.")
