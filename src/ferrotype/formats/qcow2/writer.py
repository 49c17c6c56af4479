"""Writing qcow2, version 3: plain, compressed on all cores, over a backing file.

    cluster 0   header, extensions, name of the backing file                    written last
    data        whole clusters as they come; compressed ones one behind the other, whatever cluster they end in
    L2 tables, L1 table, reference count blocks, reference count table          written by ``finish``

Written from "Qcow2 Image File Format" (docs/interop/qcow2 of QEMU).  Only the tables are held in memory: eight bytes
for each cluster of the parts of the disk that have data.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from threading import Lock
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Traits
from ferrotype.block.file import FileSink, check_write
from ferrotype.block.outputs import Outputs
from ferrotype.block.zeros import zero_cells
from ferrotype.errors import UsageError, WriteError
from ferrotype.formats import Backing, Option, Options, Room, Spec, WritableSink, one_of
from ferrotype.formats.backing import qemu_name
from ferrotype.formats.codecs import deflate, zstd_frame
from ferrotype.formats.qcow2.header import (
    COMPRESSION,
    EXT_BACKING_FORMAT,
    MAGIC,
    MOST_L1,
    MOST_NAME,
    MOST_REFCOUNT_TABLE,
    ZLIB,
    ZSTD,
    Base,
    ExtensionHead,
    Further,
)
from ferrotype.units import GiB, KiB, MiB, parse_size

__all__ = ["OPTIONS", "create", "room"]

_COPIED, _COMPRESSED, _ZERO = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1)
_OFFSET: Final = np.uint64(0x00FF_FFFF_FFFF_FE00)
_CLUSTER: Final = 64 * KiB
_SECTOR: Final = 512  # bytes; the unit of the length of compressed data, and of a disk's size in QEMU
_PAGE: Final = 8192  # L2 entries held together at least
_REFCOUNT_BITS: Final = 16
_WINDOW: Final = -12  # of bare deflate streams: what QEMU can open
_GROWTH: Final = GiB  # bytes that the file grows by at most at a time

Entries = NDArray[np.uint64]
Counts = NDArray[np.uint16]
Packed = Sequence[bytes | None]
"""A cluster each: compressed, or as it is where it has its full length; None: zeros."""


def _cluster_size(text: str) -> int:
    size = parse_size(text)
    if not 512 <= size <= 2 * MiB or size & (size - 1):
        raise ValueError("a power of two from 512 bytes to 2 MiB")
    return size


def _compat(text: str) -> str:
    if text not in ("1.1", "v3"):
        raise ValueError("only version 3 (1.1) is written")
    return text


def _level(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 19:
        raise ValueError("from 1 to 9 for zlib, to 19 for zstd")
    return int(text)


OPTIONS: Final[Options] = {
    "cluster_size": Option("bytes of a cluster, a power of two from 512 to 2MiB; 64KiB if not said", _cluster_size),
    "compression_type": Option("zlib: every program can read it; zstd: smaller and faster", one_of("zlib", "zstd")),
    "level": Option("of the compression: 1, the fastest, to 9 for zlib and 19 for zstd", _level),
    "compat": Option("1.1: version 3 of the format, the only one written", _compat),
}


def create(outputs: Outputs, spec: Spec) -> WritableSink:
    """A new image.  A disk that is not whole sectors of 512 bytes is given zeros up to the next one.

    Raises UsageError where the disk is too large for clusters of the size chosen.
    """
    cluster = spec.get("cluster_size", _CLUSTER)
    kind, level = spec.get("compression_type", "zlib"), spec.get("level", 1)
    if level > 9 and kind == "zlib":
        raise UsageError("the levels of zlib are 1 to 9")
    if _l1_entries(spec.size, cluster) * 8 > MOST_L1:
        raise UsageError(f"a disk of {spec.size} bytes needs larger clusters; say cluster_size=2MiB or the like")
    head = _head(cluster, kind, spec.backing)
    file = outputs.create(sector_size=spec.sector_size)
    if spec.compress:
        return _PackedSink(file, spec, cluster, head, kind, level)
    return _PlainSink(file, spec, cluster, head)


def room(spec: Spec) -> Room:
    """Whole clusters, or packed ones."""
    return Room(unit=0 if spec.compress else spec.get("cluster_size", _CLUSTER))


def _l1_entries(size: int, cluster: int) -> int:
    return max(1, -(-size // (cluster // 8 * cluster)))


def _head(cluster: int, kind: str, backing: Backing | None) -> tuple[bytes, int, int]:
    """All of the first cluster behind version 2's header; offset and length of the backing file's name in it."""
    zstd = kind == "zstd"
    length = Base.SIZE + Further.SIZE
    order = _REFCOUNT_BITS.bit_length() - 1
    raw = Further(COMPRESSION if zstd else 0, 0, 0, order, length, ZSTD if zstd else ZLIB, bytes(7)).pack()
    name = b""
    if backing is not None:
        name, format = os.fsencode(backing.name), qemu_name(backing.format).encode()
        raw += ExtensionHead(EXT_BACKING_FORMAT, len(format)).pack() + format.ljust(-(-len(format) // 8) * 8, b"\0")
    raw += ExtensionHead(0, 0).pack()
    at = Base.SIZE + len(raw)
    if len(name) > MOST_NAME or at + len(name) > cluster:
        raise UsageError("the name of the backing file is too long for the header of the image")
    return raw + name, at if name else 0, len(name)


class _PlainSink:
    """An image of whole clusters."""

    def __init__(self, file: FileSink, spec: Spec, cluster: int, head: tuple[bytes, int, int]) -> None:
        self._file, self._size, self._cluster, self._head = file, spec.size, cluster, head
        self._bits = cluster.bit_length() - 1
        self._lock = Lock()
        self._next = cluster  # bytes; the first cluster of the file that nothing has
        self._per_table = cluster // 8
        self._page = max(self._per_table, _PAGE)  # entries
        self._pages: dict[int, Entries] = {}
        self._backed = spec.backing is not None
        self.traits = Traits(sector_size=spec.sector_size, unit=cluster, blank=not self._backed)

    @property
    def size(self) -> int:
        return self._size

    def write(self, offset: int, data: memoryview, /) -> None:
        check_write("qcow2 image", self._size, offset, len(data))
        if not len(data):
            return
        with self._lock:
            at = self._take(-(-len(data) // self._cluster))
            self._enter(offset, self._whole(at, -(-len(data) // self._cluster)))
        self._file.write(at, data)

    def write_zeros(self, offset: int, length: int, /) -> None:
        check_write("qcow2 image", self._size, offset, length)
        if self._backed and length:
            with self._lock:
                self._enter(offset, np.full(-(-length // self._cluster), _ZERO))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Nothing: the outputs own the file."""

    def _take(self, clusters: int) -> int:
        """Clusters of the file in a row; the caller holds the lock."""
        at = self._next
        self._next += clusters * self._cluster
        if self._next > self._file.size:
            self._file.resize(max(self._next, min(2 * self._file.size, self._file.size + _GROWTH)))
        return at

    def _whole(self, at: int, clusters: int) -> Entries:
        """The entries of clusters in a row."""
        return np.arange(at, at + clusters * self._cluster, self._cluster, dtype=np.uint64) | _COPIED

    def _enter(self, offset: int, entries: Entries) -> None:
        """Note where the clusters from ``offset`` on stand; the caller holds the lock."""
        if offset % self._cluster:
            raise WriteError(f"a write at {offset} is not at the start of a cluster of {self._cluster} bytes")
        first, at = offset // self._cluster, 0
        while at < len(entries):
            number, inside = divmod(first + at, self._page)
            page = self._pages.get(number)
            if page is None:
                page = self._pages[number] = np.zeros(self._page, np.uint64)
            count = min(self._page - inside, len(entries) - at)
            page[inside : inside + count] = entries[at : at + count]
            at += count

    # ------------------------------------------------------------------ tables

    def finish(self) -> None:
        """Write the tables, the reference counts and the header; the file has its exact size then."""
        l1 = np.zeros(_l1_entries(self._size, self._cluster), ">u8")
        data_end = self._next
        for number, page in sorted(self._pages.items()):
            tables = page.reshape(-1, self._per_table)
            used = np.flatnonzero(tables.any(axis=1))
            at = self._take(len(used))
            l1[number * len(tables) + used] = self._whole(at, len(used))
            self._file.write(at, memoryview(tables[used].astype(">u8").tobytes()))
        l1_at = self._take(-(-l1.nbytes // self._cluster))
        self._file.write(l1_at, memoryview(l1.tobytes()))
        blocks, table = self._refcount_clusters()
        blocks_at, table_at = self._take(blocks), self._take(table)
        if table * self._cluster > max(MOST_REFCOUNT_TABLE, self._cluster):
            raise WriteError("the image is too large for its reference counts; choose larger clusters")
        counts = np.zeros(blocks * (self._cluster * 8 // _REFCOUNT_BITS), ">u2")
        counts[: self._next // self._cluster] = self._counts(data_end)
        self._file.write(blocks_at, memoryview(counts.tobytes()))
        places = np.arange(blocks_at, table_at, self._cluster, dtype=np.uint64)
        self._file.write(table_at, memoryview(places.astype(">u8").tobytes()))
        rest, name_at, name_length = self._head
        size = -(-self._size // _SECTOR) * _SECTOR
        header = Base(
            MAGIC, 3, name_at, name_length, self._bits, size, 0, len(l1), l1_at, table_at, table, 0, 0
        ).pack()
        self._file.write(0, memoryview(header + rest))
        self._file.resize(self._next)

    def _refcount_clusters(self) -> tuple[int, int]:
        """How many blocks and clusters of the table it takes to count all clusters, these among them."""
        clusters, blocks, table = self._next // self._cluster, 0, 0
        while True:
            needed = -(-(clusters + blocks + table) // (self._cluster * 8 // _REFCOUNT_BITS))
            if (needed, -(-needed * 8 // self._cluster)) == (blocks, table):
                return blocks, table
            blocks, table = needed, -(-needed * 8 // self._cluster)

    def _counts(self, data_end: int) -> Counts:  # noqa: ARG002  of use to those who share clusters
        """How often each cluster of the file is used."""
        return np.ones(self._next // self._cluster, np.uint16)


class _PackedSink(_PlainSink):
    """An image of compressed clusters."""

    def __init__(
        self, file: FileSink, spec: Spec, cluster: int, head: tuple[bytes, int, int], kind: str, level: int
    ) -> None:
        super().__init__(file, spec, cluster, head)
        self._zstd, self._level = kind == "zstd", level
        self._at = 0  # bytes; where the next compressed cluster goes, if its cluster of the file has begun
        self._worth = cluster - cluster // 16  # bytes; what gets no smaller is quicker to read as it is

    def pack(self, offset: int, data: memoryview, /) -> Packed:
        check_write("qcow2 image", self._size, offset, len(data))
        zero = zero_cells(data, self._cluster)
        return [
            None if zero[number] else self._pack(data[at : at + self._cluster])
            for number, at in enumerate(range(0, len(data), self._cluster))
        ]

    def _pack(self, plain: memoryview) -> bytes:
        whole = plain if len(plain) == self._cluster else bytes(plain).ljust(self._cluster, b"\0")
        if self._zstd:
            packed = zstd_frame(whole, level=self._level)
        else:
            packed = deflate(whole, level=self._level, wbits=_WINDOW)
        return packed if len(packed) < self._worth else bytes(whole)

    def put(self, offset: int, packed: object, /) -> None:
        units: Packed = packed  # type: ignore[assignment]  # what ``pack`` made
        entries = np.zeros(len(units), np.uint64)
        small = [number for number, unit in enumerate(units) if unit is not None and len(unit) < self._cluster]
        whole = [number for number, unit in enumerate(units) if unit is not None and len(unit) == self._cluster]
        with self._lock:
            runs = self._place(entries, small, units)
            if whole:
                at = self._take(len(whole))
                entries[whole] = self._whole(at, len(whole))
                runs.append((at, [units[number] or b"" for number in whole]))
            if self._backed:
                entries[[number for number, unit in enumerate(units) if unit is None]] = _ZERO
            self._enter(offset, entries)
        for at, parts in runs:
            self._file.write_many(at, parts)

    def _place(self, entries: Entries, small: list[int], units: Packed) -> list[tuple[int, list[bytes]]]:
        """Give compressed clusters their places; what is to be written where.  The caller holds the lock."""
        runs: list[tuple[int, list[bytes]]] = []
        end = -1  # of the last run
        bits = 62 - (self._bits - 8)
        for number in small:
            unit = units[number] or b""
            room = -self._at % self._cluster  # left in the cluster of the file that has begun
            if not room or (len(unit) > room and self._at + room != self._next):
                self._at = self._next  # what would be its next cluster has another use
                room = 0
            if len(unit) > room:
                self._take(1)
            if self._at != end:
                runs.append((self._at, []))
            runs[-1][1].append(unit)
            if self._at >> bits:
                raise WriteError("the image is too large for compressed clusters of this size")
            sectors = (self._at + len(unit) - 1) // _SECTOR - self._at // _SECTOR
            entries[number] = int(_COMPRESSED) | sectors << bits | self._at
            self._at = end = self._at + len(unit)
        return runs

    def write(self, offset: int, data: memoryview, /) -> None:
        if len(data):
            self.put(offset, self.pack(offset, data))

    def _counts(self, data_end: int) -> Counts:
        """As above; a compressed cluster uses every cluster of the file that it has a sector of."""
        counts = super()._counts(data_end)
        counts[1 : data_end // self._cluster] = 0
        bits, sectors = np.uint64(62 - (self._bits - 8)), np.uint64(self._bits - 9)
        for page in self._pages.values():
            packed = page[(page & _COMPRESSED) != 0] ^ _COMPRESSED
            start = packed & ((np.uint64(1) << bits) - np.uint64(1))
            first = start >> np.uint64(self._bits)
            last = ((start >> np.uint64(9)) + (packed >> bits)) >> sectors
            whole = (page[(page & _COPIED) != 0] & _OFFSET) >> np.uint64(self._bits)
            users = np.concatenate([first, last[last != first], whole]).astype(np.int64)
            if len(users):
                low = int(users.min())
                found = np.bincount(users - low)
                counts[low : low + len(found)] += found.astype(np.uint16)
        return counts
