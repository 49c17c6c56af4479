"""VDI, the disks of VirtualBox.

    0          512                   offset_bmap          offset_data
    +----------+---- ... ------------+-----------+------+---------+---------+ ...
    | header   |                     | block map |      | block 0 | block 1 |
    +----------+---- ... ------------+-----------+------+---------+---------+ ...

    block map: a number for each block of the disk: which block of the file it is; 0xFFFFFFFF free, 0xFFFFFFFE zeros

Each block of the file may have block_extra bytes before its data.  In a differencing disk free blocks are the
parent's, which the file knows by its UUID alone: it is looked for among the .vdi files of the same folder and of
those that the user allows.  All numbers are little-endian.

Oracle publishes no specification; written from the description in the VirtualBox forum ("All about VDIs") and what
VirtualBox makes of it.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Annotated, Final

import numpy as np

from ferrotype.block import Source, read
from ferrotype.errors import DeviceError, FormatError, InvalidImage, UnsupportedError
from ferrotype.formats import MAX_SIZE, Image, plain_room
from ferrotype.formats.mapped import Kind, MappedSource, Mapping, cells
from ferrotype.formats.outside import attempt
from ferrotype.formats.related import Related
from ferrotype.formats.tables import SECTOR, Table
from ferrotype.formats.vdi.writer import (
    DIFFERENCING,
    DYNAMIC,
    FIXED,
    FREE,
    OPTIONS,
    SIGNATURE,
    ZERO,
    Header,
    Preheader,
    create,
)
from ferrotype.records import Record, b16, record, u32, u64
from ferrotype.units import MiB

__all__ = ["OPTIONS", "create", "open", "probe", "room"]

room = plain_room

_UNDO: Final = 3
_NAMES: Final = {DYNAMIC: "dynamic", FIXED: "fixed", DIFFERENCING: "differencing", _UNDO: "undo"}
_MAX_BLOCK: Final = 256 * MiB  # bytes; VirtualBox makes them 1 MiB
_MAX_EXTRA: Final = MiB
_WINDOW: Final = 1 << 18  # blocks mapped at a time
_MOST_SIBLINGS: Final = 1000  # files that may be looked at for the parent


@record(endian="<", size=348)
class OldHeader(Record):
    """VDIHEADER0, behind the preheader; the block map follows at once, and the data that."""

    image_type: u32
    image_flags: u32
    description: Annotated[bytes, "256s"]
    cylinders: u32
    heads: u32
    sectors: u32
    sector_size: u32
    disk_size: u64
    block_size: u32
    blocks_in_image: u32
    blocks_allocated: u32
    uuid_image: b16
    uuid_modify: b16
    uuid_link: b16


@dataclass(frozen=True, slots=True)
class _Disk:
    """What the headers of all versions say."""

    kind: int
    size: int
    block: int
    extra: int
    blocks: int
    map_offset: int
    data_offset: int
    id: bytes
    modified: bytes
    parent: bytes
    parent_modified: bytes
    comment: bytes


def probe(file: Source) -> bool:
    """Whether the signature is there."""
    size = Preheader.SIZE
    return file.size >= size and Preheader.unpack(read(file, 0, size)).signature == SIGNATURE


def open(file: Source, related: Related) -> Image:
    """A dynamic or fixed disk, or a differencing one with its parents.  ``missing``: the parent."""
    disk = _disk(file)
    facts: dict[str, object] = {
        "subformat": _NAMES[disk.kind],
        "unit": disk.block,
        "id": str(uuid.UUID(bytes_le=disk.id)),
        "modification_id": str(uuid.UUID(bytes_le=disk.modified)),
    }
    if comment := disk.comment.split(b"\0", 1)[0].decode("utf-8", "replace"):
        facts["comment"] = comment
    size = -(-disk.size // SECTOR) * SECTOR  # VirtualBox has made disks of odd sizes out of such files
    layout = _Blocks(file, disk)
    if disk.kind in (DYNAMIC, FIXED):
        return Image(
            "vdi", MappedSource(file, layout, size, name="VDI", ragged=disk.block - 1), facts=facts, close=file.close
        )
    wanted = uuid.UUID(bytes_le=disk.parent)
    if not wanted.int:
        raise InvalidImage("a differencing disk without the UUID of its parent", field="uuid_link")
    facts["parent_id"] = str(wanted)
    found, missing = attempt(lambda: _parent(wanted, related))
    if found is None:
        facts["backing"] = {"name": None, "format": "vdi"}
        source = MappedSource(file, layout, size, name="VDI", ragged=disk.block - 1)
        return Image("vdi", source, facts=facts, close=file.close, missing=missing)
    name, parent = found
    warnings = tuple(f"its parent: {warning}" for warning in parent.warnings)
    if parent.facts["modification_id"] != str(uuid.UUID(bytes_le=disk.parent_modified)):
        warnings += (f"its parent {name} was changed after this differencing disk was made",)
    facts["backing"] = {"name": name, "format": "vdi"}

    def close() -> None:
        parent.close()
        file.close()

    source = MappedSource(file, layout, size, name="VDI", parent=parent.source, ragged=disk.block - 1)
    return Image("vdi", source, facts=facts, warnings=warnings, close=close)


# ---------------------------------------------------------------------- headers


def _disk(file: Source) -> _Disk:
    """What the header says, checked.  Raises InvalidImage and UnsupportedError."""
    data = read(file, 0, min(file.size, SECTOR))
    before = Preheader.unpack(data)
    if before.signature != SIGNATURE:
        raise InvalidImage("there is no VDI signature", offset=64, field="signature")
    disk = _new_disk(data) if before.version >> 16 == 1 else _old_disk(data, before.version)
    if disk.kind not in _NAMES:
        raise UnsupportedError(f"VDI image type {disk.kind}", field="image_type")
    if disk.block < SECTOR or disk.block % SECTOR or disk.extra > _MAX_EXTRA:
        raise InvalidImage(f"a block of {disk.block} bytes and {disk.extra} before it", field="block_size")
    if disk.block > _MAX_BLOCK:
        raise UnsupportedError(f"blocks of {disk.block} bytes; at most {_MAX_BLOCK} are read", field="block_size")
    if disk.size > MAX_SIZE or disk.size > disk.blocks * disk.block:
        raise InvalidImage(f"a disk of {disk.size} bytes in {disk.blocks} blocks", field="disk_size")
    if disk.data_offset < disk.map_offset + 4 * disk.blocks:
        raise InvalidImage("the blocks begin inside the block map", offset=disk.data_offset, field="offset_data")
    return disk


def _new_disk(data: bytes) -> _Disk:
    header = Header.unpack(data, Preheader.SIZE)
    if header.header_size < Header.SIZE:
        raise InvalidImage(f"a header of {header.header_size} bytes", offset=Preheader.SIZE, field="header_size")
    if header.offset_bmap < Preheader.SIZE + Header.SIZE:
        raise InvalidImage("the block map overlaps the header", offset=header.offset_bmap, field="offset_bmap")
    if header.sector_size not in (0, SECTOR):  # VirtualBox leaves it 0 where the geometry is not known
        raise UnsupportedError(f"sectors of {header.sector_size} bytes", field="sector_size")
    return _Disk(
        header.image_type,
        header.disk_size,
        header.block_size,
        header.block_extra,
        header.blocks_in_image,
        header.offset_bmap,
        header.offset_data,
        header.uuid_image,
        header.uuid_modify,
        header.uuid_link,
        header.uuid_parent_modify,
        header.description,
    )


def _old_disk(data: bytes, version: int) -> _Disk:
    if version != 2:
        raise UnsupportedError(f"VDI version {version >> 16}.{version & 0xFFFF}", offset=68, field="version")
    header = OldHeader.unpack(data, Preheader.SIZE)
    at = Preheader.SIZE + OldHeader.SIZE
    return _Disk(
        header.image_type,
        header.disk_size,
        header.block_size,
        0,
        header.blocks_in_image,
        at,
        at + 4 * header.blocks_in_image,
        header.uuid_image,
        header.uuid_modify,
        header.uuid_link,
        bytes(16),
        header.description,
    )


# ---------------------------------------------------------------------- parents


def _parent(wanted: uuid.UUID, related: Related) -> tuple[str, Image]:
    """The image with the UUID wanted, and its name."""
    for name in related.siblings(".vdi", "parent", _MOST_SIBLINGS):
        if _id_of(name, related) == wanted.bytes_le:
            return name, related.image(name, "parent", "vdi")
    raise InvalidImage(
        f"the parent of this differencing disk, {wanted}, is not among the .vdi files beside it; "
        f"allow the folder it is in with --allow-related"
    )


def _id_of(name: str, related: Related) -> bytes | None:
    try:
        file = related.file(name, "parent", glance=True)
    except (FormatError, DeviceError):
        return None
    try:
        return _disk(file).id
    except (FormatError, DeviceError):
        return None
    finally:
        file.close()


def own_id(file: Source) -> str:
    """How ``parents_named`` calls the image.  Raises InvalidImage and UnsupportedError."""
    return f"vdi:{_disk(file).id.hex()}"


def parents_named(file: Source) -> list[str]:
    """The id of the parent of a differencing disk, which has no name.  Raises InvalidImage and UnsupportedError."""
    disk = _disk(file)
    return [] if disk.kind in (DYNAMIC, FIXED) or not any(disk.parent) else [f"vdi:{disk.parent.hex()}"]


# ---------------------------------------------------------------------- blocks


class _Blocks:
    """The layout of all kinds."""

    def __init__(self, file: Source, disk: _Disk) -> None:
        self._file, self._disk = file, disk
        self._table = Table(file, disk.map_offset, disk.blocks, "<u4", "block map")

    def mapping(self, offset: int, length: int) -> Mapping:
        disk = self._disk
        first = offset // disk.block
        count = -(-(offset + length) // disk.block) - first
        if gap := self._table.lead(first, count, FREE):
            return Mapping.uniform(offset, min(length, (first + gap) * disk.block - offset), Kind.HOLE)
        entries = self._table.slice(first, min(count, _WINDOW))
        places = disk.data_offset + entries * (disk.block + disk.extra) + disk.extra
        stored = entries < ZERO
        if (np.diff(places[stored]) == 0).any():
            raise InvalidImage("the block map names a block twice", offset=self._table.offset, field="block map")
        outside = stored & (places >= self._file.size)
        if outside.any():
            raise InvalidImage(
                f"block {first + int(outside.argmax())} of the disk lies behind the end of the file",
                offset=int(places[int(outside.argmax())]),
                field="block map",
            )
        kinds = np.where(stored, Kind.STORED, np.where(entries == FREE, Kind.HOLE, Kind.ZERO)).astype(np.uint8)
        mapping = cells(first * disk.block, disk.block, kinds, places)
        return mapping.clip(offset, min(length, mapping.end - offset))

    def unpack(self, place: int) -> bytes:
        raise InvalidImage("VDI has no compressed blocks", offset=place)
