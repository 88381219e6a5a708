"""What a loss is: its code and all values it holds, as one hash that is the same in every process."""

from __future__ import annotations

import contextlib
import dis
import functools
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hesscope.digest import update_with_outline, update_with_tensor
from hesscope.losses.protocol import Loss

#: Their functions and classes count by name: their versions stand in every record.
_LIBRARIES = frozenset({"hesscope", "torch", "numpy", "scipy", "transformers", "tokenizers", "accelerate", "triton", "safetensors"})  # fmt: skip
_PLAIN = (type(None), type(Ellipsis), type(NotImplemented), bool, int, float, complex, str, bytes, range)
#: Every module of torch's has these; hooks among them are numbered in the order of the process.
_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_modules", "training"}
#: Hexadecimal digits that are kept.
_DIGITS = 16
#: Where Python's own modules and installed packages are.
_INSTALLED = tuple(sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib"))
#: What lies deeper counts by its type.
_DEEPEST = 100


@dataclass(frozen=True)
class KnownLoss:
    """A loss that was read before, and what it was then."""

    loss: Loss
    fingerprint: str


def loss_fingerprint(loss: Any, model: nn.Module) -> str:
    """The name of a loss's class and, unless it is one of this library's without values of its own, a SHA-256 of what it is.

    That is, followed from one to the next: a function's name, compiled code, constants, defaults, closure and the globals it
    reads; an object's class with the code of its methods, and its attributes; numbers, texts, containers and tensors by
    value. Functions and classes of Python and of installed packages count by name, the model and its parts by their places in it, a device by
    its kind, and what shows no state by its type. No address, hash or line number enters, so that processes agree; another
    version of Python compiles otherwise, and gives another hash.

    A loss that holds what changes from run to run, or more than can be read, may say which it is by an attribute
    `fingerprint`, a string, and is taken at its word.
    """
    kind = type(loss)
    said = getattr(loss, "fingerprint", None)
    if isinstance(said, str):
        return f"{kind.__name__} {hashlib.sha256(said.encode()).hexdigest()[:_DIGITS]}"
    if kind.__module__.startswith("hesscope.") and not vars(loss):
        return kind.__name__
    what = [f for f in vars(loss).values() if isinstance(f, FunctionType)] if isinstance(loss, ModuleType) else loss
    return f"{kind.__name__} {Reader(model).digest(what).hex()[:_DIGITS]}"


class Reader:
    """Digests of values: of a header and of the values that one is made of."""

    def __init__(self, model: nn.Module) -> None:
        places = [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]
        self._places = {id(part): name for name, part in places}
        #: With the values themselves, so that no other takes the id.
        self._done: dict[int, tuple[Any, bytes]] = {}
        self._open: dict[int, int] = {}

    def digest(self, value: Any) -> bytes:
        """The same for equal values of one kind."""
        if type(value) in _PLAIN:
            return _hash(type(value).__name__, repr(value))
        key = id(value)
        if key in self._places:
            return _hash("of the model", self._places[key])
        if key in self._open:
            return _hash("again", len(self._open) - self._open[key])
        if key not in self._done:
            if len(self._open) > _DEEPEST:
                return _hash("deep", _name(type(value)))
            self._open[key] = len(self._open)
            try:
                self._done[key] = value, self._read(value)
            finally:
                del self._open[key]
        return self._done[key][1]

    def _of(self, header: str, *parts: Any) -> bytes:
        return _hash(header, *map(self.digest, parts))

    def _read(self, value: Any) -> bytes:
        if isinstance(value, Enum):
            return _hash("enum", _name(type(value)), value.name)
        if isinstance(value, (Tensor, np.ndarray, np.generic)):
            return self._numbers(value)
        if isinstance(value, torch.device):
            return _hash("device", value.type)
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return _hash("torch", str(value))
        if isinstance(value, (ModuleType, BuiltinFunctionType)):
            return _hash("named", str(getattr(value, "__module__", "")), value.__name__)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, CodeType):
            shape = (value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount, value.co_flags)
            names = (value.co_name, value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars)
            return self._of("code", *shape, *names, value.co_code, value.co_exceptiontable, value.co_consts)
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            return self._of("method", value.__func__, value.__self__)
        if isinstance(value, (staticmethod, classmethod)):
            return self._of(type(value).__name__, value.__func__)
        if isinstance(value, property):
            return self._of("property", value.fget, value.fset)
        if isinstance(value, functools.partial):
            return self._of("partial", value.func, value.args, value.keywords)
        if isinstance(value, (set, frozenset)):
            return _hash(type(value).__name__, *sorted(map(self.digest, value)))
        return self._object(value)

    def _numbers(self, value: Any) -> bytes:
        if not isinstance(value, Tensor):
            if value.dtype.hasobject:
                return self._of("array", value.shape, value.tolist())
            return self._of("array", value.dtype.str, value.shape, value.tobytes())
        value = value.detach()
        if hasattr(value, "full_tensor"):
            value = value.full_tensor()
        found = hashlib.sha256(b"tensor")
        if value.device.type == "meta":
            update_with_outline(found, value.dtype, value.shape)
        else:
            update_with_tensor(found, value if value.layout == torch.strided else value.to_dense())
        return found.digest()

    def _function(self, f: FunctionType) -> bytes:
        original = getattr(f, "_torchdynamo_orig_callable", None)
        if original is not None:
            return self._of("compiled", original)
        cells = [_content(cell) for cell in f.__closure__ or ()]
        if is_foreign(f.__globals__.get("__name__")):
            return self._of("function", f.__module__, f.__qualname__, cells)
        values = (f.__code__, f.__defaults__, f.__kwdefaults__, cells, vars(f))
        return self._of("function", f.__qualname__, *values, *self._globals(f))

    def _globals(self, f: FunctionType) -> Iterator[Any]:
        """The globals that the function reads, by name; of modules that are no library's, what it may take from them."""
        codes = list(_codes(f.__code__))
        steps = [(i.opname, i.argval) for code in codes for i in dis.get_instructions(code)]
        read = {name for step, name in steps if step in ("LOAD_GLOBAL", "LOAD_NAME")}
        mentioned = {name for code in codes for name in code.co_names}
        for name in sorted(read & f.__globals__.keys()):
            value = f.__globals__[name]
            yield name, value
            if isinstance(value, ModuleType):
                yield _taken(value, mentioned)
        for name in sorted({name for step, name in steps if step == "IMPORT_NAME" and name}):
            if (module := _imported(name, f.__globals__.get("__package__"))) is not None:
                yield _taken(module, mentioned)

    def _class(self, kind: type) -> bytes:
        if is_foreign(kind.__module__):
            return _hash("class", _name(kind))
        own = {
            name: value
            for name, value in sorted(vars(kind).items())
            if isinstance(value, (FunctionType, staticmethod, classmethod)) or not name.startswith(("__", "_abc_"))
        }
        return self._of("class", kind.__qualname__, kind.__bases__, list(own.items()))

    def _object(self, value: Any) -> bytes:
        """Its class, what it contains, and its attributes; of a library's class what pickling keeps: a logger's name alone, say."""
        original = getattr(value, "_orig_mod", None) if isinstance(value, nn.Module) else None
        if original is not None:  # what torch.compile wraps around a module is not the module's
            return self._of("compiled", original)
        parts: list[Any] = [type(value)]
        if isinstance(value, Mapping):
            parts.append([item for pair in value.items() for item in pair])
        elif isinstance(value, (list, tuple)):
            parts.extend(value)
        elif not isinstance(value, nn.Module) and is_foreign(type(value).__module__):
            return self._of("object", *parts, _reduced(value), getattr(value, "__wrapped__", None))
        state = dict(_attributes(value))
        if isinstance(value, nn.Module):
            state = {name: part for name, part in state.items() if name not in _OF_EVERY_MODULE}
        if not state and len(parts) == 1:
            parts.append(_reduced(value))
        for name in sorted(state):
            parts += [name, state[name]]
        return self._of("object", *parts)


def _hash(header: str, *parts: Any) -> bytes:
    """Of a header and further texts and digests, with their lengths."""
    found = hashlib.sha256()
    for part in (header, *parts):
        raw = part if isinstance(part, bytes) else str(part).encode(errors="surrogatepass")
        found.update(f"{len(raw)} ".encode() + raw)
    return found.digest()


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if is_foreign(kind.__module__) else kind.__qualname__


@functools.cache
def is_foreign(module: str | None) -> bool:
    """Whether a module belongs to Python or to an installed package, whose code is not read."""
    top = (module or "").partition(".")[0]
    found = sys.modules.get(top)
    file = getattr(found, "__file__", None) or next(iter(getattr(found, "__path__", ())), None)
    if file is None:  # built in, or not imported
        return top in _LIBRARIES or top in sys.stdlib_module_names
    # A file of the caller's may have the name of one of Python's.
    return top in _LIBRARIES or str(file).startswith(_INSTALLED)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of those inside it."""
    yield code
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _codes(value)


def _taken(module: ModuleType, mentioned: set[str]) -> list[Any]:
    """What code that mentions these names may take from a module and from those inside it; nothing of a library's."""
    if is_foreign(module.__name__):
        return []
    found = [(name, vars(module)[name]) for name in sorted(mentioned & vars(module).keys())]
    inside = f"{module.__name__}."
    return [
        *found,
        *(_taken(x, mentioned) for _, x in found if isinstance(x, ModuleType) and x.__name__.startswith(inside)),
    ]


def _imported(name: str, package: str | None) -> ModuleType | None:
    """The caller's own module that an import inside a function names, imported as the function would; None for a library's."""
    if name.partition(".")[0] in _LIBRARIES | sys.stdlib_module_names:
        return None
    for full in (name, f"{package}.{name}") if package else (name,):
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(full)
            if spec is not None:
                return None if str(spec.origin).startswith(_INSTALLED) else importlib.import_module(full)
    return None


def _attributes(value: Any) -> Iterable[tuple[str, Any]]:
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                yield name, getattr(value, name)


def _reduced(value: Any) -> Any:
    """What pickling would keep of an object without attributes; nothing where it cannot be pickled."""
    try:
        found = value.__reduce_ex__(2)
    except Exception:  # whatever it raises, it shows no state
        return None
    return found if isinstance(found, str) else [list(x) if isinstance(x, Iterator) else x for x in found]
