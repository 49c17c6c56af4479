"""Parallels hard disks: expandable images, and the folders they come in.

    0        64                 data_off
    +--------+---------+--------+-----------+-----------+ ...
    | header | BAT     |        | cluster   | cluster   |
    +--------+---------+--------+-----------+-----------+ ...

    BAT: where each cluster of the disk is, 0 nowhere; in sectors, or in clusters where the magic is WithouFreSpacExt

    disk.hdd/DiskDescriptor.xml          the disk's size, its storages side by side, its snapshots
    disk.hdd/disk.hdd.0.{GUID}.hds       an image of one storage at one snapshot; what it lacks is its parent's

All numbers are little-endian.  Written from "Parallels Expandable Image File Format" (docs/interop/parallels.txt of
QEMU).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from ferrotype.block import Source, read
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats import MAX_SIZE, Image
from ferrotype.formats.mapped import Kind, MappedSource, Mapping, cells
from ferrotype.formats.related import Related
from ferrotype.formats.tables import SECTOR, Table
from ferrotype.records import Record, b16, record, u32, u64
from ferrotype.units import MiB

__all__ = ["Expandable", "open", "open_folder", "probe", "probe_folder"]

DESCRIPTOR: Final = "DiskDescriptor.xml"

_OLD, _EXT = b"WithoutFreeSpace", b"WithouFreSpacExt"
_IN_USE: Final = 0x746F6E59
_MAX_CLUSTER: Final = 256 * MiB  # bytes; clusters have 32 KiB to 1 MiB
_WINDOW: Final = 1 << 18  # clusters mapped at a time


@record(endian="<", size=64)
class Header(Record):
    """Section "Header"."""

    magic: b16
    version: u32
    heads: u32
    cylinders: u32
    tracks: u32  # sectors of a cluster
    nb_bat_entries: u32
    nb_sectors: u64
    in_use: u32
    data_off: u32  # sectors
    flags: u32  # "empty image" says no more than the BAT does
    ext_off: u64


def probe(file: Source) -> bool:
    """Whether the file begins with one of the two magics."""
    return read(file, 0, min(file.size, 16)) in (_OLD, _EXT)


def open(file: Source, related: Related) -> Image:
    """One expandable image alone; with the others of its disk where it is one of several, open the folder."""
    image = Expandable(file)
    warnings = image.warnings
    besides: tuple[str, ...] = ()
    if (beside := related.sibling(DESCRIPTOR, "descriptor")) is not None:
        from ferrotype.formats.parallels.folder import has_parent, is_older

        name = related.path.name if related.path else ""
        with_parent = has_parent(beside, name)
        if is_older(beside, name):
            besides = (
                "the file is that of a snapshot, and the disk is newer: open its folder for the disk as it is now",
            )
        beside.close()
        if with_parent:
            warnings += ("the file holds only what changed since a snapshot; open its folder for the whole disk",)
    source = image.source(None)
    return Image("parallels", source, facts=image.facts, warnings=warnings, besides=besides, close=file.close)


def probe_folder(path: Path) -> bool:
    """Whether there is a descriptor."""
    return (path / DESCRIPTOR).is_file()


def open_folder(path: Path, related: Related) -> Image:  # noqa: ARG001
    """The disk as its descriptor says, at its latest state; ``disks`` has the states of its snapshots."""
    from ferrotype.formats.parallels.folder import open_disk

    return open_disk(related.inside())


class Expandable:
    """An expandable image, whose header was checked."""

    def __init__(self, file: Source) -> None:
        """Raises InvalidImage and UnsupportedError."""
        self._file = file
        header = Header.unpack(read(file, 0, min(file.size, Header.SIZE)))
        if header.magic not in (_OLD, _EXT):
            raise InvalidImage("this is no Parallels image", offset=0, field="magic")
        if header.version != 2:
            raise UnsupportedError(f"Parallels image version {header.version}", offset=16, field="version")
        self._cluster = header.tracks * SECTOR
        if header.tracks == 0:
            raise InvalidImage("a cluster of no sectors", offset=28, field="tracks")
        if self._cluster > _MAX_CLUSTER:
            raise UnsupportedError(
                f"clusters of {self._cluster} bytes; at most {_MAX_CLUSTER} are read", offset=28, field="tracks"
            )
        sectors = header.nb_sectors if header.magic == _EXT else header.nb_sectors & 0xFFFFFFFF
        self.size = sectors * SECTOR
        if self.size > MAX_SIZE or header.nb_bat_entries * self._cluster < self.size:
            raise InvalidImage(
                f"{header.nb_bat_entries} clusters are too few for a disk of {sectors} sectors",
                offset=32,
                field="nb_bat_entries",
            )
        self._scale = self._cluster if header.magic == _EXT else SECTOR
        self._table = Table(file, Header.SIZE, header.nb_bat_entries, "<u4", "BAT")
        self.facts: dict[str, object] = {
            "subformat": "expandable",
            "unit": self._cluster,
            "dirty": header.in_use == _IN_USE,
        }
        self.warnings: tuple[str, ...] = ()
        if header.in_use == _IN_USE:
            self.warnings = ("the image is marked as in use: it was not closed, or is being written",)

    def source(self, parent: Source | None) -> MappedSource:
        """The disk, or part of one, over what is below it."""
        return MappedSource(self._file, self, self.size, name="Parallels", parent=parent, ragged=self._cluster - 1)

    def mapping(self, offset: int, length: int) -> Mapping:
        first = offset // self._cluster
        count = -(-(offset + length) // self._cluster) - first
        if gap := self._table.lead(first, count, 0):
            return Mapping.uniform(offset, min(length, (first + gap) * self._cluster - offset), Kind.HOLE)
        entries = self._table.slice(first, min(count, _WINDOW))
        places = entries * self._scale
        stored = entries != 0
        bad = stored & ((places < self._table.end) | (places >= self._file.size))
        if bad.any():
            number = int(bad.argmax())
            raise InvalidImage(
                f"cluster {first + number} of the disk is outside the file or over its BAT",
                offset=int(places[number]),
                field="BAT",
            )
        kinds = np.where(stored, Kind.STORED, Kind.HOLE).astype(np.uint8)
        mapping = cells(first * self._cluster, self._cluster, kinds, places)
        return mapping.clip(offset, min(length, mapping.end - offset))

    def unpack(self, place: int) -> bytes:
        raise InvalidImage("Parallels images have no compressed clusters", offset=place)
