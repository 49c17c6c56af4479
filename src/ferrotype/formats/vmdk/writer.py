"""Making VMDK disks: sparse or flat, in one file or in parts of two gigabytes, or as a compressed stream.

    disk.vmdk                                          monolithicSparse, streamOptimized
    disk.vmdk  disk-flat.vmdk                          monolithicFlat
    disk.vmdk  disk-s001.vmdk  disk-s002.vmdk ...      twoGbMaxExtentSparse (f001: twoGbMaxExtentFlat)

Written from VMware's "Virtual Disk Format 5.0".
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from ferrotype.block import Traits
from ferrotype.block.file import FileSink, check_write
from ferrotype.block.outputs import Outputs
from ferrotype.errors import FormatError, UsageError
from ferrotype.formats import Option, Options, Room, Spec, WritableSink
from ferrotype.formats.related import is_address
from ferrotype.formats.vmdk.descriptor import ADAPTERS, MAX_DESCRIPTOR, SECTOR, Extent, parse, render
from ferrotype.formats.vmdk.grains import GRAIN, GrainFile, embedded
from ferrotype.formats.vmdk.stream import StreamSink
from ferrotype.units import MiB, TiB

__all__ = ["OPTIONS", "create", "room"]

_PART: Final = 2047 * MiB  # bytes of the disk in each extent of a split one, as VMware cuts them
_MOST_PARTS: Final = 1000  # each is a file that is held open
_MOST: Final = 64 * TiB
_DESCRIPTOR: Final = b"# Disk DescriptorFile"

_SUBFORMATS: Final = (
    "monolithicSparse",
    "monolithicFlat",
    "twoGbMaxExtentSparse",
    "twoGbMaxExtentFlat",
    "streamOptimized",
)


def _one_of(text: str, known: tuple[str, ...]) -> str:
    for name in known:
        if name.lower() == text.lower():
            return name
    raise ValueError(f"one of {', '.join(known)}")


def _number(text: str, low: int, high: int) -> int:
    if not text.isdecimal() or not low <= int(text) <= high:
        raise ValueError(f"a number from {low} to {high}")
    return int(text)


OPTIONS: Final[Options] = {
    "subformat": Option(", ".join(_SUBFORMATS), lambda text: _one_of(text, _SUBFORMATS)),
    "adapter_type": Option(
        f"the disk's controller in a virtual machine: {', '.join(ADAPTERS)}", lambda text: _one_of(text, ADAPTERS)
    ),
    "hardware_version": Option("of the virtual machine that the disk is for", lambda text: _number(text, 3, 99)),
    "level": Option("of compression: 1 (fastest) to 9", lambda text: _number(text, 1, 9)),
}


def room(spec: Spec) -> Room:
    """Grains as they are, or the packed ones of a stream."""
    return Room(unit=0 if _subformat(spec) == "streamOptimized" else GRAIN)


def _subformat(spec: Spec) -> str:
    return spec.get("subformat", "streamOptimized" if spec.compress else "monolithicSparse")


def create(outputs: Outputs, spec: Spec) -> WritableSink:
    """A VMDK disk; the compressed kind is streamOptimized.  The extents of a disk that it replaces go with that."""
    sink = _create(outputs, spec)
    outputs.supersede(lambda: _former_extents(outputs.path))
    return sink


def _former_extents(path: Path) -> Iterator[Path]:
    """The files that a descriptor at ``path`` names as its extents, as far as they are called as ours are."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_DESCRIPTOR)
        extents = parse(data).extents if data.startswith(_DESCRIPTOR) else ()
    except (OSError, FormatError):
        return
    ours = re.compile(re.escape(_stem(path)) + r"-(flat|[fs]\d{3,5})\.vmdk")
    for name in dict.fromkeys(extent.name or "" for extent in extents):
        if ours.fullmatch(name) and os.path.lexists(path.with_name(name)):
            yield path.with_name(name)


def _create(outputs: Outputs, spec: Spec) -> WritableSink:
    subformat = _subformat(spec)
    if spec.compress and subformat != "streamOptimized":
        raise UsageError(f"{subformat} disks are not compressed; streamOptimized ones are")
    if spec.backing is not None:
        raise UsageError("VMDK disks cannot be made over another image")
    if not 0 < spec.size <= _MOST:
        raise UsageError(f"a VMDK disk has from 1 byte to {_MOST // TiB} TiB, not {spec.size} bytes")
    if subformat == "streamOptimized":
        return StreamSink(outputs, spec)
    main = outputs.create()
    if subformat == "monolithicSparse":
        extent = Extent("RW", -(-spec.size // SECTOR), "SPARSE", outputs.path.name, None)
        return _DiskSink(spec, [GrainFile(main, spec.size, embedded(render(subformat, [extent], spec)))], spec.size)
    flat, split = subformat.endswith("Flat"), subformat.startswith("two")
    part = _PART if split else -(-spec.size // SECTOR) * SECTOR
    extents = _part_extents(outputs.path, spec.size, part, flat=flat, split=split)
    text = render(subformat, extents, spec)
    main.resize(len(text))
    main.write(0, memoryview(text))
    parts: list[_Part] = []
    for extent in extents:
        path = outputs.path.with_name(extent.name or "")
        parts.append(
            _FlatFile(outputs.create(path, extent.size))
            if flat
            else GrainFile(outputs.create(path), extent.size, b"")
        )
    return _DiskSink(spec, parts, part)


def _part_extents(path: Path, size: int, part: int, *, flat: bool, split: bool) -> list[Extent]:
    count = -(-size // part)
    if count > _MOST_PARTS:
        raise UsageError(f"{count} parts are too many; a split disk may have {_MOST_PARTS}")
    stem = _stem(path)
    if is_address(stem):
        raise UsageError(f"the parts of {path.name!r} would pass for addresses; choose a name without a colon")
    extents = []
    for number in range(count):
        ending = f"{'f' if flat else 's'}{number + 1:03}" if split else "flat"
        sectors = -(-min(part, size - number * part) // SECTOR)
        kind = "FLAT" if flat else "SPARSE"
        extents.append(Extent("RW", sectors, kind, f"{stem}-{ending}.vmdk", 0 if flat else None))
    return extents


def _stem(path: Path) -> str:
    return path.name[: -len(".vmdk")] if path.name.lower().endswith(".vmdk") else path.name


# ---------------------------------------------------------------------- files


class _Part(Protocol):
    """A stretch of the disk in a file of its own."""

    file: FileSink

    def write(self, offset: int, data: memoryview) -> None: ...

    def finish(self) -> None: ...


class _FlatFile:
    """The disk's bytes as they are."""

    def __init__(self, file: FileSink) -> None:
        self.file = file

    def write(self, offset: int, data: memoryview) -> None:
        self.file.write(offset, data)

    def finish(self) -> None:
        """Nothing: there are no tables."""


class _DiskSink:
    """A new disk in one part or several of one size, the last one shorter."""

    def __init__(self, spec: Spec, parts: list[_Part], part_size: int) -> None:
        self._parts, self._part, self._size = parts, part_size, spec.size
        unit = GRAIN if any(isinstance(part, GrainFile) for part in parts) else 1
        self.traits = Traits(unit=unit, blank=True)

    @property
    def size(self) -> int:
        return self._size

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[_Part, int, int, int]]:
        """The parts under a range: part, offset in it, start and end of the piece in the range."""
        at = offset
        while at < offset + length:
            number, inside = divmod(at, self._part)
            count = min(self._part - inside, offset + length - at)
            yield self._parts[number], inside, at - offset, at - offset + count
            at += count

    def write(self, offset: int, data: memoryview, /) -> None:
        check_write("VMDK disk", self._size, offset, len(data))
        for part, at, start, end in self._pieces(offset, len(data)):
            part.write(at, data[start:end])

    def write_zeros(self, offset: int, length: int, /) -> None:
        """Nothing is stored: what is not written is zeros."""
        check_write("VMDK disk", self._size, offset, length)

    def finish(self) -> None:
        for part in self._parts:
            part.finish()

    def flush(self) -> None:
        for part in self._parts:
            part.file.flush()

    def close(self) -> None:
        """Nothing: the outputs own the files."""
