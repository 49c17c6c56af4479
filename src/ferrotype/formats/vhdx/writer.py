"""VHDX files made anew, fixed or dynamic.

    0         1M        2M          3M           3M + BAT, whole MiB
    +---------+---------+-----------+------------+---------+---------+-----
    | headers | log,    | metadata  | BAT        | block   | block   | ...    in the order they were first written to
    |         | empty   |           |            |         |         |
    +---------+---------+-----------+------------+---------+---------+-----

The headers come last: a file that was not finished is none.  Blocks are whole in the file, the last one too, and
what is not written of them is a hole of the file.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from threading import Lock
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Traits
from ferrotype.block.file import FileSink, check_write
from ferrotype.block.outputs import Outputs
from ferrotype.errors import UsageError
from ferrotype.formats import Option, Options, Spec, one_of
from ferrotype.formats.vhdx.metadata import (
    DISK_ID,
    FILE_PARAMETERS,
    IS_REQUIRED,
    IS_VIRTUAL_DISK,
    LEAVE_BLOCK_ALLOCATED,
    LOGICAL_SECTOR_SIZE,
    MAX_DISK,
    PHYSICAL_SECTOR_SIZE,
    VIRTUAL_DISK_SIZE,
    FileParameters,
    Metadata,
    MetadataEntry,
    MetadataTable,
)
from ferrotype.formats.vhdx.records import (
    BAT,
    HEADER_SIZE,
    HEADERS,
    METADATA,
    REGION_TABLES,
    TABLE_SIZE,
    FileIdentifier,
    Header,
    RegionEntry,
    RegionTable,
    sealed,
)
from ferrotype.units import MiB, parse_size

__all__ = ["OPTIONS", "VhdxSink", "create"]

_LOG, _METADATA, _BAT = 1 * MiB, 2 * MiB, 3 * MiB
_USUAL_BLOCKS: Final = 1 << 20  # of a disk, at most, where the block size is not said: a BAT of 8 MiB
_STEP: Final = 64 * MiB  # that the file grows by
_PAGE: Final = 1 << 20  # BAT entries made at a time
_FULLY_PRESENT: Final = np.uint64(6)


def _sector_size(text: str) -> int:
    size = parse_size(text)
    if size not in (512, 4096):
        raise ValueError("512 or 4096")
    return size


OPTIONS: Final[Options] = {
    "subformat": Option(
        "dynamic: blocks are added as they are written; fixed: all are there", one_of("dynamic", "fixed")
    ),
    "block_size": Option("1MiB to 256MiB, a power of two", parse_size),
    "physical_sector_size": Option("that the disk states: 512 or 4096 (4096 if not said)", _sector_size),
}


def create(outputs: Outputs, spec: Spec) -> VhdxSink:
    """A new VHDX file whose logical sectors are of 4096 bytes where the disk's are, else of 512."""
    if spec.compress or spec.backing:
        raise UsageError("a VHDX image is neither compressed nor made on a backing file here")
    sector = 4096 if spec.sector_size == 4096 else 512
    if spec.size % sector or not spec.size:
        raise UsageError(
            f"a VHDX disk has whole sectors of {sector} bytes, at least one; this one has {spec.size} bytes"
        )
    if spec.size > MAX_DISK:
        raise UsageError(f"a VHDX disk has at most 64 TiB, and this one {spec.size} bytes")
    block = spec.get("block_size", 0) or _usual_block(spec.size)
    if block & (block - 1) or not MiB <= block <= 256 * MiB:
        raise UsageError(f"VHDX blocks have 1, 2, 4 ... 256 MiB, not {block} bytes")
    physical = spec.get("physical_sector_size", 4096)
    if physical < sector:
        raise UsageError(f"physical sectors of {physical} bytes cannot hold logical ones of {sector}")
    metadata = Metadata(
        size=spec.size,
        block_size=block,
        fixed=spec.get("subformat", "dynamic") == "fixed",
        logical_sector=sector,
        physical_sector=physical,
        disk_id=uuid.uuid4().bytes_le,
        parent=None,
    )
    return VhdxSink(outputs.create(), metadata)


def _usual_block(size: int) -> int:
    block = 2 * MiB
    while block * _USUAL_BLOCKS < size:
        block *= 2
    return block


class VhdxSink:
    """A disk that becomes a VHDX file."""

    def __init__(self, file: FileSink, metadata: Metadata) -> None:
        self._file, self._metadata = file, metadata
        self._bat_length = max(MiB, -(-metadata.bat_entries * 8 // MiB) * MiB)
        self._end = _BAT + self._bat_length  # of what is allocated in the file
        self._places = np.zeros(metadata.blocks, np.int64)  # of the blocks, 0: none; untouched pages take no memory
        self._lock = Lock()
        self.traits = Traits(sector_size=metadata.logical_sector, blank=True)
        if metadata.fixed:
            self._places += self._end + np.arange(metadata.blocks, dtype=np.int64) * metadata.block_size
            self._end += metadata.blocks * metadata.block_size
        file.resize(self._end)

    @property
    def size(self) -> int:
        return self._metadata.size

    def write(self, offset: int, data: memoryview, /) -> None:
        check_write("VHDX disk", self.size, offset, len(data))
        for at, start, end in self._runs(offset, len(data)):
            self._file.write(at, data[start:end])

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """Where a range stands in the file, run by run: offset there, start and end in the range."""
        if not length:
            return
        size = self._metadata.block_size
        first, last = offset // size, (offset + length - 1) // size
        places = self._allocated(first, last + 1)
        ends = [*(np.flatnonzero(np.diff(places) != size) + 1).tolist(), len(places)]
        low = 0
        for high in ends:
            start = max((first + low) * size, offset)
            stop = min((first + high) * size, offset + length)
            yield int(places[low]) + start - (first + low) * size, start - offset, stop - offset
            low = high

    def _allocated(self, first: int, end: int) -> NDArray[np.int64]:
        """The places of blocks, which are given one where they have none."""
        places = self._places[first:end]
        if places.all():  # once there, a place stays
            return places
        with self._lock:
            fresh = np.flatnonzero(places == 0)
            size = self._metadata.block_size
            start, self._end = self._end, self._end + len(fresh) * size
            if self._end > self._file.size:
                self._file.resize(max(self._end, self._file.size + _STEP))
            places[fresh] = start + np.arange(len(fresh)) * size
        return places

    def write_zeros(self, offset: int, length: int, /) -> None:
        """What was never written is zeros, in blocks of the file and without."""
        check_write("VHDX disk", self.size, offset, length)

    def finish(self) -> None:
        self._file.resize(self._end)
        self._write_bat()
        for at, part in _heads(self._metadata, self._bat_length):
            self._file.write(at, memoryview(part))

    def _write_bat(self) -> None:
        blocks, ratio = self._metadata.blocks, self._metadata.chunk_ratio
        for low in range(0, blocks, _PAGE):
            numbers = low + np.flatnonzero(self._places[low : low + _PAGE])
            if not len(numbers):
                continue
            indexes = numbers + numbers // ratio  # sector bitmap blocks have entries between, and stay not present
            table = np.zeros(int(indexes[-1] - indexes[0]) + 1, "<u8")
            table[indexes - indexes[0]] = self._places[numbers].astype(np.uint64) | _FULLY_PRESENT
            self._file.write(_BAT + int(indexes[0]) * 8, memoryview(table.tobytes()))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Nothing: the outputs own the file."""


# ---------------------------------------------------------------------- what stands before the blocks


def _heads(metadata: Metadata, bat_length: int) -> Iterator[tuple[int, bytes]]:
    """The structures and their places, the headers last."""
    yield 0, FileIdentifier(b"vhdxfile", "ferrotype".encode("utf-16-le").ljust(512, b"\0")).pack()
    table = _region_table(bat_length)
    for at in REGION_TABLES:
        yield at, table
    yield _METADATA, _metadata_region(metadata)
    written, data = uuid.uuid4().bytes_le, uuid.uuid4().bytes_le
    for number, at in enumerate(HEADERS):
        header = Header(
            Signature=b"head",
            Checksum=0,
            SequenceNumber=number,
            FileWriteGuid=written,
            DataWriteGuid=data,
            LogGuid=bytes(16),  # there is nothing in the log
            LogVersion=0,
            Version=1,
            LogLength=MiB,
            LogOffset=_LOG,
        )
        yield at, sealed(header.pack().ljust(HEADER_SIZE, b"\0"))


def _region_table(bat_length: int) -> bytes:
    entries = [RegionEntry(BAT, _BAT, bat_length, 1), RegionEntry(METADATA, _METADATA, MiB, 1)]
    head = RegionTable(b"regi", 0, len(entries), 0)
    table = head.pack() + b"".join(entry.pack() for entry in entries)
    return sealed(table.ljust(TABLE_SIZE, b"\0"))


def _metadata_region(metadata: Metadata) -> bytes:
    parameters = FileParameters(metadata.block_size, LEAVE_BLOCK_ALLOCATED if metadata.fixed else 0)
    items = [
        (FILE_PARAMETERS, IS_REQUIRED, parameters.pack()),
        (VIRTUAL_DISK_SIZE, IS_REQUIRED | IS_VIRTUAL_DISK, metadata.size.to_bytes(8, "little")),
        (DISK_ID, IS_REQUIRED | IS_VIRTUAL_DISK, metadata.disk_id),
        (LOGICAL_SECTOR_SIZE, IS_REQUIRED | IS_VIRTUAL_DISK, metadata.logical_sector.to_bytes(4, "little")),
        (PHYSICAL_SECTOR_SIZE, IS_REQUIRED | IS_VIRTUAL_DISK, metadata.physical_sector.to_bytes(4, "little")),
    ]
    table = MetadataTable(b"metadata", 0, len(items), bytes(20)).pack()
    content = b""
    for name, flags, item in items:
        table += MetadataEntry(name, TABLE_SIZE + len(content), len(item), flags, 0).pack()
        content += item
    return table.ljust(TABLE_SIZE, b"\0") + content
