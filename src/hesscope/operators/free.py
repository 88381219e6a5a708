"""What of the free memory a rank may take: ranks that share a machine's, or a GPU, divide it, and all reckon with the poorest."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from hesscope.communicator import Communicator
from hesscope.memory import UNLIMITED, available_bytes, free_disk_bytes, is_limited
from hesscope.space import Space


def free_on(comm: Communicator, devices: Collection[torch.device]) -> tuple[int, int]:
    """Bytes that every rank may take on its devices in all, and on the one of them with least. Called by all ranks."""
    own = _fair(comm, _free_in(comm, devices)).values()
    told = comm.gathered((sum(own), min(own)))
    return min(together for together, _ in told), min(least for _, least in told)


def short_of(comm: Communicator, needed: Mapping[torch.device, int]) -> tuple[str, int, int] | None:
    """Where a rank has to refuse: the device, the bytes that it needs and those that it may take, of the first rank that lacks them.

    None where every rank may take what it needs on each of its devices. Called by all ranks, which all get the same.
    """
    wanted, own = _by_place(comm, needed), _fair(comm, _free_in(comm, needed))
    names = {_place(comm, device): str(device) for device in reversed(list(needed))}
    lacking = next(((names[place], size, own[place]) for place, size in wanted.items() if size > own[place]), None)
    return next((found for found in comm.gathered(lacking) if found is not None), None)


def vectors_that_fit(
    comm: Communicator, space: Space, itemsize: int, device: torch.device | None = None, folder: Path | None = None
) -> int:
    """How many vectors of a space all ranks can keep at once. Called by all of them.

    They are kept in files of a folder, or on one device, or, where neither is given, each part on its parameter's.
    """
    if folder is not None:
        sizes, free = {str(folder): space.own_size}, {str(folder): free_disk_bytes(folder)}
    else:
        own = space.sizes(device)
        sizes, free = _by_place(comm, own), _free_in(comm, own)
    left = _fair(comm, free)
    fits = min((left[place] // (size * itemsize) for place, size in sizes.items() if size), default=UNLIMITED)
    return min(comm.gathered(fits))


def _fair(comm: Communicator, free: Mapping[str, int]) -> dict[str, int]:
    """This rank's part of what is free in some places, of which each is divided among the machine's ranks that name it."""
    here = platform.node()
    users = Counter((node, place) for node, places in comm.gathered((here, list(free))) for place in places)
    return {place: size // users[here, place] for place, size in free.items()}


def _free_in(comm: Communicator, devices: Collection[torch.device]) -> dict[str, int]:
    return {_place(comm, device): available_bytes(_home(device)) for device in devices}


def _by_place(comm: Communicator, sizes: Mapping[torch.device, int]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for device, size in sizes.items():
        found[_place(comm, device)] += size
    return dict(found)


def _home(device: torch.device) -> torch.device:
    """Whatever is not a GPU of CUDA has the memory of the machine."""
    return device if device.type == "cuda" else torch.device("cpu")


def _place(comm: Communicator, device: torch.device) -> str:
    """What memory is called by all who have it; a limit is each process's own."""
    home = _home(device)
    name = "memory" if home.type == "cpu" else _name_of_gpu(home)
    return f"{name} of rank {comm.rank}" if is_limited() else name


def _name_of_gpu(device: torch.device) -> str:
    """The same for all processes, whatever number each has for it."""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", device))
