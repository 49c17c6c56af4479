"""Bytes in memory as a Source and a Sink: for tests, and for small tables built before they are written."""

from __future__ import annotations

from ferrotype.block import Traits
from ferrotype.errors import ReadError, WriteError
from ferrotype.extents import ExtentMap


class MemoryDisk:
    """A disk of ``size`` bytes in memory; both Source and Sink."""

    def __init__(self, content: int | bytes | bytearray, sector_size: int = 512) -> None:
        self.data = bytearray(content)
        self.traits = Traits(sector_size=sector_size, sector_known=True)

    @property
    def size(self) -> int:
        return len(self.data)

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        if offset < 0 or offset + len(buf) > len(self.data):
            raise ReadError("memory", offset, len(buf), "outside the disk")
        buf[:] = memoryview(self.data)[offset : offset + len(buf)]

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return ExtentMap.uniform(offset, length)

    def write(self, offset: int, data: memoryview, /) -> None:
        if offset < 0 or offset + len(data) > len(self.data):
            raise WriteError(f"writing {len(data)} bytes at {offset} is outside the disk")
        self.data[offset : offset + len(data)] = data

    def write_zeros(self, offset: int, length: int, /) -> None:
        self.write(offset, memoryview(bytes(length)))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass
