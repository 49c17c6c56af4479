"""A volume of which ranges cannot be read, and ranges to lose."""

from __future__ import annotations

import json
import random
import unicodedata

import numpy as np

from ferrotype.block import Traits
from ferrotype.errors import ReadError
from ferrotype.extents import ExtentMap, Offsets
from ferrotype.filesystems import FileSystem

Range = tuple[int, int]  # (start, end) in bytes


class Torn:
    """Bytes that fail wherever a read meets one of the ranges, after it has spoilt the buffer."""

    def __init__(self, content: bytes | bytearray, lost: list[Range] | None = None) -> None:
        self._content, self._lost = memoryview(content), lost or []
        self.size, self.traits = len(content), Traits()

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        if offset < 0 or offset + len(buf) > self.size:
            raise ReadError("torn", offset, len(buf), "outside")
        if any(offset < end and start < offset + len(buf) for start, end in self._lost):
            buf[:] = b"\x05" * len(buf)
            raise ReadError("torn", offset, len(buf), "lost")
        buf[:] = self._content[offset : offset + len(buf)]

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return ExtentMap.uniform(offset, length)

    def close(self) -> None:
        pass


def columns(ranges: list[Range]) -> tuple[Offsets, Offsets]:
    """Ranges as ``files_at`` takes them."""
    table = np.array(ranges, np.int64).reshape(-1, 2)
    return table[:, 0].copy(), table[:, 1].copy()


def at(volume: FileSystem, *ranges: Range) -> set[str]:
    """What stands in the ranges; told sorted, and each name once."""
    found = volume.files_at(*columns(list(ranges)))
    assert list(found) == sorted(set(found))
    json.dumps(found, ensure_ascii=False).encode()  # no half characters
    assert not [name for name in found if any(unicodedata.category(c) in ("Cc", "Zl", "Zp") for c in name)]
    return set(found)


def some_ranges(rng: random.Random, size: int, most: int) -> list[Range]:
    """A few ranges, ascending and apart, some no longer than a byte."""
    edges = sorted(rng.sample(range(size), 2 * rng.randint(1, 4)))
    pairs = list(zip(edges[::2], edges[1::2], strict=True))
    return [(start, min(end, start + rng.choice([1, 600, most // 8, most]))) for start, end in pairs]


def garbled(rng: random.Random, content: bytes, ranges: list[Range], how: str) -> bytearray:
    """The content with zeros, noise or a few changed bytes in the ranges."""
    out = bytearray(content)
    for start, end in ranges:
        if how == "zeros":
            out[start:end] = bytes(end - start)
        elif how == "noise":
            out[start:end] = rng.randbytes(end - start)
        else:
            for _ in range(8):
                out[rng.randrange(start, end)] = rng.randrange(256)
    return out
