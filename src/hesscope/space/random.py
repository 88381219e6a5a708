"""Random numbers addressed by seed, name and position.

The value at a coordinate depends only on (seed, stream, parameter name, flat index), never on the order or the place in
which it is drawn, so that a shard, a selection of rows and a whole parameter agree entry by entry. The generator is
SplitMix64 (Steele, Lea and Flood, 2014): word i of a stream is the finaliser applied to key + (i + 1) * golden gamma.
"""

from __future__ import annotations

import hashlib
import math
import secrets

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def resolve_seed(seed: int | None) -> int:
    """The seed itself, or a fresh one from the operating system where none was given."""
    return secrets.randbits(32) if seed is None else int(seed)


def stream_key(seed: int, *names: str | int) -> int:
    """The 64-bit key of one stream of words."""
    text = "\0".join(map(str, (seed, *names))).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def signs(key: int, indices: Tensor) -> Tensor:
    """Independent +1 and -1 (float32) for the given positions (int64, any shape)."""
    words, inverse = torch.unique_consecutive(indices >> 6, return_inverse=True)
    bits = _words(key, words)[inverse] >> (indices & 63)
    return (1 - 2 * (bits & 1)).to(torch.float32)


def normals(key: int, indices: Tensor) -> Tensor:
    """Independent standard normal numbers (float64) for the given positions, by Box and Muller's transform."""
    radius = torch.sqrt(-2.0 * torch.log(_uniform(_words(key, 2 * indices))))
    return radius * torch.cos(2.0 * math.pi * _uniform(_words(key, 2 * indices + 1)))


def subset(key: int, count: int, size: int) -> Tensor:
    """`count` different whole numbers below `size` in ascending order, every such subset equally likely.

    They are the first different ones of a stream of numbers, or where that is shorter those left out of one; so a
    smaller subset of at most half of the numbers is a part of a larger one. Costs O(min(count, size - count)) draws.
    """
    if 2 * count > size:
        keep = torch.ones(size, dtype=torch.bool)
        keep[subset(key, size - count, size)] = False
        return keep.nonzero()[:, 0]
    drawn, start = torch.empty(0, dtype=torch.int64), 0
    while len(drawn) < count:
        more = torch.arange(start, start := start + 2 * count)
        drawn = _first_occurrences(torch.cat([drawn, (_uniform(_words(key, more)) * size).to(torch.int64)]))
    return drawn[:count].sort().values


def _first_occurrences(numbers: Tensor) -> Tensor:
    """The different numbers, in the order in which they come first."""
    different: Tensor
    different, group = torch.unique(numbers, return_inverse=True)
    first = torch.full_like(different, len(numbers)).scatter_reduce_(0, group, torch.arange(len(numbers)), "amin")
    return different[first.argsort()]


def uniforms(key: int, indices: Tensor) -> Tensor:
    """Independent uniform numbers in (0, 1) (float64) for the given positions."""
    return _uniform(_words(key, indices))


def _uniform(words: Tensor) -> Tensor:
    """Numbers in (0, 1) from the upper 53 bits of each word; never exactly zero, for the logarithm's sake."""
    return (_shift_right(words, 11).to(torch.float64) + 0.5) * 2.0**-53


def _words(key: int, counters: Tensor) -> Tensor:
    """SplitMix64 words; int64 arithmetic wraps as the unsigned original does."""
    z = (counters + 1) * _signed(_GAMMA) + _signed(key)
    z = (z ^ _shift_right(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(_MIX_2)
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """The logical shift; torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """The int64 with the same 64 bits."""
    return word - (1 << 64) if word >= 1 << 63 else word
