"""VHD, the disks of Virtual PC, Hyper-V and Azure.

fixed      | the disk | footer |           zeros behind the footer are padding of who copied the file
dynamic    | copy of the footer | dynamic disk header | BAT | block | block | ... | footer |
block      | sector bitmap | data |            the BAT holds the sector where a block begins, or 0xFFFFFFFF

In a differencing disk, which is a dynamic one with a parent, the bitmap says which sectors of a block it has; the
rest is the parent's.  In a dynamic disk a block has all its sectors whatever the bitmap says: what was never written
is zeros in the file as well.  All numbers are big-endian.

The size of the disk depends on who made it.  Virtual PC goes by the geometry, which comes to a little less than
Current Size; nearly everybody else goes by Current Size.

Written from Microsoft's "Virtual Hard Disk Image Format Specification", version 1.0 (October 2006).
"""

from __future__ import annotations

import uuid
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, read, read_exactly
from ferrotype.block.views import Slice
from ferrotype.errors import InvalidImage, ReadError, UnsupportedError
from ferrotype.extents import State
from ferrotype.formats import MAX_SIZE, Image, plain_room
from ferrotype.formats.mapped import Kept, Kind, MappedSource, Mapping, cells
from ferrotype.formats.outside import attempt
from ferrotype.formats.related import Related
from ferrotype.formats.tables import SECTOR, Table, sector_cells
from ferrotype.formats.vhd.parents import open_parent, parent_names
from ferrotype.formats.vhd.records import (
    DIFFERENCING,
    EPOCH,
    FIXED,
    MAX_GEOMETRY,
    UNUSED,
    DynamicHeader,
    Footer,
    FoundFooter,
    checksum,
    find_footer,
    has_footer,
)
from ferrotype.formats.vhd.writer import OPTIONS, create
from ferrotype.units import MiB

__all__ = ["OPTIONS", "create", "open", "probe", "room"]

room = plain_room

_BY_GEOMETRY: Final = (b"vpc ", b"vs  ", b"qemu")  # creators whose disks have the size of their geometry
_MOST_BEHIND: Final = 64 * MiB  # bytes behind the geometry that are looked at; a cylinder has 8 MiB at most
_MAX_BLOCK: Final = 256 * MiB  # bytes; blocks have 512 KiB to a few MiB
_WINDOW: Final = 1 << 18  # blocks mapped at a time
_CELLS: Final = 1 << 18  # sectors mapped at a time where they have to be looked at one by one
_MOST_LAYERED: Final = 1 << 22  # blocks of a differencing disk: 2 TiB of the smallest that Windows makes
_BITMAPS_KEPT: Final = 4 * MiB
_SUBFORMATS: Final = {FIXED: "fixed", 3: "dynamic", DIFFERENCING: "differencing"}


def probe(file: Source) -> bool:
    """Whether something like a footer is there, be it damaged."""
    return has_footer(file)


def open(file: Source, related: Related) -> Image:
    """A fixed or dynamic disk, or a differencing one with its parents.  ``missing``: the parent."""
    found = find_footer(file)
    footer = found.footer
    facts: dict[str, object] = {
        "subformat": _SUBFORMATS[footer.DiskType],
        "id": str(uuid.UUID(bytes=footer.UniqueId)),
        "creator": footer.CreatorApplication.decode("latin-1").rstrip(" \0"),
        "created": datetime.fromtimestamp(EPOCH + footer.TimeStamp, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    warnings = found.warnings
    if footer.SavedState:
        warnings += ("the disk belongs to a virtual machine in saved state: its file systems were in use",)
    if footer.DiskType == FIXED:
        size = _fixed_size(found)
        besides = _behind_fixed(file, found, size)
        return Image("vhd", Slice(file, 0, size), facts=facts, warnings=warnings, besides=besides, close=file.close)
    header, header_warnings = _dynamic_header(file, footer)
    warnings += header_warnings
    size = _disk_size(footer)
    layout = _Blocks(file, footer, header, size)
    facts["unit"] = header.BlockSize
    if footer.DiskType != DIFFERENCING:
        source = MappedSource(file, layout, size, name="VHD", ragged=header.BlockSize - 1)
        besides = _behind_blocks(file, footer, header, size)
        return Image("vhd", source, facts=facts, warnings=warnings, besides=besides, close=file.close)
    facts["backing"] = {"name": layout.parent_name, "format": "vhd"}
    wanted, names = uuid.UUID(bytes=header.ParentUniqueId), parent_names(file, header)
    facts["parent_id"] = str(wanted)
    parent, missing = attempt(lambda: open_parent(wanted, names, related))
    if parent is None:
        source = MappedSource(file, layout, size, name="VHD", ragged=header.BlockSize - 1)
        return Image("vhd", source, facts=facts, warnings=warnings, close=file.close, missing=missing)

    def close() -> None:
        parent.close()
        file.close()

    warnings += tuple(f"its parent: {warning}" for warning in parent.warnings)
    source = MappedSource(file, layout, size, name="VHD", parent=parent.source, ragged=header.BlockSize - 1)
    return Image("vhd", source, facts=facts, warnings=warnings, close=close)


def _told_size(footer: Footer) -> int:
    """Bytes that the footer says outright, without a look at the geometry."""
    return footer.CurrentSize // SECTOR * SECTOR


def _behind(whole: Source, size: int) -> tuple[str, ...]:
    """A sentence where there is data behind the ``size`` bytes that the geometry gives to the disk."""
    starts, ends = whole.extents(size, whole.size - size).runs(State.ZERO, present=False)
    left = _MOST_BEHIND
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        for at in range(start, min(end, start + left), MiB):
            piece = read(whole, at, min(MiB, end - at))
            if piece.count(0) < len(piece):
                said = (
                    f"its geometry ends the disk at byte {size}, as QEMU and Virtual PC read it; data stand behind "
                    f"that, up to byte {whole.size}, and are not taken; of a fixed disk, --format raw takes all"
                )
                return (said,)
        left -= min(end - start, left)
    return ()


def _behind_fixed(file: Source, found: FoundFooter, size: int) -> tuple[str, ...]:
    """The same for a fixed disk."""
    with suppress(ReadError):  # it is not the disk's
        return _behind(Slice(file, 0, max(size, min(_told_size(found.footer), found.place))), size)
    return ()


def _behind_blocks(file: Source, footer: Footer, header: DynamicHeader, size: int) -> tuple[str, ...]:
    """The same for a dynamic disk."""
    whole = _told_size(footer)
    if whole == size:
        return ()
    with suppress(InvalidImage, ReadError):  # nothing that can be read
        layout = _Blocks(file, footer, header, whole)
        return _behind(MappedSource(file, layout, whole, name="VHD", ragged=header.BlockSize - 1), size)
    return ()


def _disk_size(footer: Footer) -> int:
    """Bytes of the disk.  Raises InvalidImage where there is no such disk."""
    size = _told_size(footer)
    if size > MAX_SIZE:
        raise InvalidImage(f"a disk of {size} bytes", field="CurrentSize")
    geometry = footer.geometry
    # Virtual PC rounds down; where the geometry gives more than Current Size, older programs have rounded it up.
    if footer.CreatorApplication in _BY_GEOMETRY and 0 < geometry < MAX_GEOMETRY:
        size = min(size, geometry * SECTOR)
    return size


def _fixed_size(found: FoundFooter) -> int:
    size = _disk_size(found.footer)
    if size > found.place:
        raise InvalidImage(
            f"the disk has {size} bytes, and the file ends after {found.place} of them",
            offset=found.place,
            field="CurrentSize",
        )
    return size


def _dynamic_header(file: Source, footer: Footer) -> tuple[DynamicHeader, tuple[str, ...]]:
    start = footer.DataOffset
    if start < Footer.SIZE or start % SECTOR:
        raise InvalidImage("the dynamic disk header cannot be there", offset=start, field="DataOffset")
    data = read_exactly(file, start, DynamicHeader.SIZE, "the dynamic disk header")
    header = DynamicHeader.unpack(data)
    if header.Cookie != b"cxsparse":
        raise InvalidImage("there is no dynamic disk header", offset=start, field="Cookie")
    if header.HeaderVersion >> 16 != 1:
        raise UnsupportedError(f"dynamic disk header version {header.HeaderVersion:#x}", field="HeaderVersion")
    block = header.BlockSize
    if block < SECTOR or block & (block - 1):
        raise InvalidImage(f"a block of {block} bytes", offset=start + 32, field="BlockSize")
    if block > _MAX_BLOCK:
        raise UnsupportedError(f"blocks of {block} bytes; at most {_MAX_BLOCK} are read", field="BlockSize")
    if header.Checksum != checksum(data, 36):
        return header, ("the checksum of the dynamic disk header is wrong",)
    return header, ()


def parents_named(file: Source) -> list[str]:
    """The names that the parent of a differencing disk may have.  Raises InvalidImage and UnsupportedError."""
    footer = find_footer(file).footer
    return parent_names(file, _dynamic_header(file, footer)[0]) if footer.DiskType == DIFFERENCING else []


class _Blocks:
    """The layout of a dynamic or differencing disk."""

    def __init__(self, file: Source, footer: Footer, header: DynamicHeader, size: int) -> None:
        self._file = file
        self._block = header.BlockSize
        self._sectors = self._block // SECTOR
        self._bitmap = -(-self._sectors // (8 * SECTOR)) * SECTOR  # bytes, whole sectors
        self._layered = footer.DiskType == DIFFERENCING
        self.parent_name = header.ParentUnicodeName.decode("utf-16-be", "replace").split("\0", 1)[0]
        if header.MaxTableEntries * self._block < size:
            raise InvalidImage(
                f"the BAT has {header.MaxTableEntries} entries, too few for a disk of {size} bytes",
                field="MaxTableEntries",
            )
        at = footer.DataOffset
        if header.TableOffset < Footer.SIZE or at - 4 * header.MaxTableEntries < header.TableOffset < at + 1024:
            raise InvalidImage("the BAT overlaps a header", offset=header.TableOffset, field="TableOffset")
        self._table = Table(file, header.TableOffset, header.MaxTableEntries, ">u4", "BAT")
        if self._layered:
            self._table.check_distinct(UNUSED, _MOST_LAYERED)
        self._taken = ((0, Footer.SIZE), (at, at + DynamicHeader.SIZE), (self._table.offset, self._table.end))
        self._bitmaps: Kept[int, bytes] = Kept(_BITMAPS_KEPT, len)

    def mapping(self, offset: int, length: int) -> Mapping:
        first = offset // self._block
        count = -(-(offset + length) // self._block) - first
        if gap := self._table.lead(first, count, UNUSED):
            return Mapping.uniform(offset, min(length, (first + gap) * self._block - offset), Kind.HOLE)
        count = min(count, max(_CELLS // self._sectors, 1) if self._layered else _WINDOW)
        entries = self._table.slice(first, count)
        stored = entries != UNUSED
        starts = entries * SECTOR
        self._check(first, starts[stored])
        start = first * self._block
        if self._layered:
            mapping = sector_cells(start, self._bits(starts, stored), starts + self._bitmap)
        else:
            kinds = np.where(stored, Kind.STORED, Kind.HOLE).astype(np.uint8)
            mapping = cells(start, self._block, kinds, starts + self._bitmap)
        return mapping.clip(offset, min(length, mapping.end - offset))

    def _check(self, first: int, starts: NDArray[np.int64]) -> None:
        """Whether blocks, which begin with their bitmaps, keep clear of all else."""
        ends = starts + self._bitmap + self._block
        bad = starts + self._bitmap >= self._file.size
        for low, high in self._taken:
            bad |= (starts < high) & (ends > low)
        if bad.any():
            where = int(starts[int(bad.argmax())])
            raise InvalidImage(
                f"the BAT, from entry {first} on, has a block outside the file or over a header",
                offset=where,
                field="BAT",
            )

    def _bits(self, starts: NDArray[np.int64], stored: NDArray[np.bool_]) -> NDArray[np.bool_]:
        bits = np.zeros((len(starts), self._sectors), bool)
        for number in np.flatnonzero(stored).tolist():
            bitmap = self._bitmaps.of(int(starts[number]), self._read_bitmap)
            bits[number] = np.unpackbits(np.frombuffer(bitmap, np.uint8), count=self._sectors)
        return bits

    def _read_bitmap(self, start: int) -> bytes:
        return read_exactly(self._file, start, self._bitmap, "the sector bitmap of a block")

    def unpack(self, place: int) -> bytes:
        raise InvalidImage("VHD has no compressed blocks", offset=place)
