"""The block tables of a UDIF image, and where they are kept: a property list, or in old ones a resource fork.

    property list     plist / dict / "resource-fork" / dict / "blkx" / array of dict / "Data", "Name"
    resource fork     header | data of each resource | map: types -> resources -> names
    block table       "mish", first sector, sectors, checksum | run | run | ...
    run               kind, first sector (of the table's), sectors, offset and length in the data fork

A property list is read as a stream of which only the block tables are kept: as objects it would take up a hundred
times its size.  Written from the public descriptions of the format, as Apple published none.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Final
from xml.parsers import expat

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, read_exactly
from ferrotype.errors import InvalidImage
from ferrotype.formats import MAX_SIZE
from ferrotype.records import Record, b4, record, u16, u32, u64
from ferrotype.units import MiB

__all__ = ["RUN", "SECTOR", "Checksum", "Table", "from_fork", "from_property_list"]

SECTOR: Final = 512
MOST_TABLES: Final = 10_000
MOST_XML: Final = 64 * MiB  # 1.2 million runs: 300 GB of data in the smallest that are usual, 1.2 TB in others
MOST_FORK: Final = 16 * MiB
_MOST_ELEMENTS: Final = 1_000_000
_MOST_DEPTH: Final = 32

RUN: Final = np.dtype(
    [("kind", ">u4"), ("comment", ">u4"), ("sector", ">u8"), ("count", ">u8"), ("offset", ">u8"), ("length", ">u8")]
)


@record(endian=">", size=136)
class Checksum(Record):
    """A checksum: type 2 is CRC-32, 32 bits."""

    type: u32
    bits: u32
    value: Annotated[bytes, "128s"]

    def crc32(self) -> int | None:
        """The CRC-32, or None where it is another checksum, or none."""
        return int.from_bytes(self.value[:4], "big") if (self.type, self.bits) == (2, 32) else None


@record(endian=">", size=204)
class _Mish(Record):
    """The head of a block table."""

    signature: b4
    version: u32
    first_sector: u64
    sector_count: u64
    data_offset: u64
    buffers_needed: u32
    descriptor: u32
    reserved: Annotated[bytes, "24s"]
    checksum_type: u32
    checksum_bits: u32
    checksum: Annotated[bytes, "128s"]
    run_count: u32


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """One block table, usually a partition's."""

    name: str
    first: int  # sector of the disk
    count: int  # sectors
    data_offset: int  # what the runs' offsets are relative to, in the data fork
    checksum: Checksum
    runs: NDArray[np.void]  # of RUN

    @classmethod
    def unpack(cls, data: bytes, name: str) -> Table:
        """Raises InvalidImage where it is none, or its runs are not all there."""
        head = _Mish.unpack(data)
        if head.signature != b"mish":
            raise InvalidImage(f"the block table {name!r} does not begin like one", field="signature")
        if head.run_count * RUN.itemsize > len(data) - _Mish.SIZE:
            raise InvalidImage(f"the block table {name!r} has less than its {head.run_count} runs", field="run_count")
        last = MAX_SIZE // SECTOR
        if head.first_sector > last or head.sector_count > last or head.data_offset > MAX_SIZE:
            raise InvalidImage(f"the block table {name!r} lies outside any disk", field="first_sector")
        checksum = Checksum(head.checksum_type, head.checksum_bits, head.checksum)
        runs = np.frombuffer(data, RUN, head.run_count, _Mish.SIZE)
        return cls(name, head.first_sector, head.sector_count, head.data_offset, checksum, runs)


# ---------------------------------------------------------------------- the property list


def from_property_list(source: Source, offset: int, length: int) -> list[Table]:
    """The block tables of a property list.  Raises InvalidImage."""
    if length > MOST_XML:
        raise InvalidImage(f"a property list of {length} bytes is too long", field="XMLLength")
    if offset + length > source.size:
        raise InvalidImage("the property list lies outside the file", offset=offset, field="XMLOffset")
    reader = _PropertyList()
    for at in range(offset, offset + length, MiB):
        reader.feed(read_exactly(source, at, min(MiB, offset + length - at), "the property list"))
    reader.feed(b"", last=True)
    return reader.tables


class _PropertyList:
    """Follows the elements, and keeps what stands where the block tables do."""

    def __init__(self) -> None:
        self.tables: list[Table] = []
        self._keys: list[str] = [""]  # for each dict that is open the key read last; of an array the one it is under
        self._elements = 0
        self._text: list[str] | None = None  # of the element that is open, where it is wanted
        self._found: dict[str, str] = {}
        self._parser = expat.ParserCreate()
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._characters
        self._parser.StartDoctypeDeclHandler = self._doctype

    def feed(self, piece: bytes, *, last: bool = False) -> None:
        try:
            self._parser.Parse(piece, last)
        except (expat.ExpatError, ValueError, LookupError) as error:  # the last: encodings that nobody knows
            raise InvalidImage(f"the property list is no XML: {error}", field="XML") from None

    def _start(self, tag: str, _: dict[str, str]) -> None:
        self._elements += 1
        if self._elements > _MOST_ELEMENTS or len(self._keys) > _MOST_DEPTH:
            raise InvalidImage("the property list has too many elements", field="XML")
        if tag in ("dict", "array"):
            self._keys.append("" if tag == "dict" else self._keys[-1])
        elif tag == "key" or (tag in ("data", "string") and self._in_table()):
            self._text = []

    def _end(self, tag: str) -> None:
        text, self._text = self._text, None
        if tag in ("dict", "array"):
            if tag == "dict" and self._in_table():
                self._keep()
            self._keys.pop()
        elif text is not None and tag == "key":
            self._keys[-1] = "".join(text)[:64]
        elif text is not None:
            self._found[self._keys[-1]] = "".join(text)

    def _characters(self, text: str) -> None:
        if self._text is not None:
            self._text.append(text)

    def _in_table(self) -> bool:
        """Whether what is open is a dictionary in resource-fork / blkx."""
        return len(self._keys) == 5 and self._keys[1] == "resource-fork" and self._keys[2:4] == ["blkx", "blkx"]

    def _keep(self) -> None:
        found, self._found = self._found, {}
        name = found.get("Name") or found.get("CFName") or ""
        try:
            data = binascii.a2b_base64(found.get("Data", ""))
        except ValueError as error:
            raise InvalidImage(f"the block table {name!r} is no base 64: {error}", field="Data") from None
        if len(self.tables) >= MOST_TABLES:
            raise InvalidImage("the property list has too many block tables", field="blkx")
        self.tables.append(Table.unpack(data, name[:256]))

    @staticmethod
    def _doctype(name: str, system: str | None, public: str | None, has_subset: int) -> None:  # noqa: ARG004
        if has_subset:  # entities, and attributes of each element, would make much of little
            raise InvalidImage("the property list declares entities or attributes", field="XML")


# ---------------------------------------------------------------------- the resource fork


@record(endian=">", size=16)
class _ForkHeader(Record):
    """Inside Macintosh, "More Macintosh Toolbox", chapter 1: the header of a resource fork."""

    data_offset: u32
    map_offset: u32
    data_length: u32
    map_length: u32


@record(endian=">", size=30)
class _ForkMap(Record):
    """The same: the resource map, up to the number of types."""

    copy: Annotated[bytes, "24s"]
    types_offset: u16
    names_offset: u16
    types: u16  # less one


@record(endian=">", size=8)
class _ForkType(Record):
    """The same: a type, and where its resources are listed."""

    type: b4
    count: u16  # less one
    offset: u16


@record(endian=">", size=12)
class _ForkResource(Record):
    """The same: a resource."""

    id: u16
    name_offset: u16
    data_offset: u32  # the low 24 bits
    handle: u32


def from_fork(source: Source, offset: int, length: int) -> list[Table]:
    """The block tables of a resource fork.  Raises InvalidImage."""
    if length > MOST_FORK:
        raise InvalidImage(f"a resource fork of {length} bytes is too long", field="RsrcForkLength")
    fork = read_exactly(source, offset, length, "the resource fork")
    head = _ForkHeader.unpack(fork)
    tables: list[Table] = []
    total = 0  # a resource may be listed many times
    for resource, name in _resources(fork, head.map_offset):
        at = head.data_offset + (resource.data_offset & 0xFFFFFF)
        size = int.from_bytes(fork[at : at + 4], "big")
        if at + 4 + size > length:
            raise InvalidImage("a resource lies outside the resource fork", offset=offset + at)
        total += size
        if len(tables) >= MOST_TABLES or total > length:
            raise InvalidImage("the resource fork has too many block tables", field="blkx")
        tables.append(Table.unpack(fork[at + 4 : at + 4 + size], name))
    return tables


def _resources(fork: bytes, start: int) -> Iterator[tuple[_ForkResource, str]]:
    """The resources of the type ``blkx``, and their names."""
    head = _ForkMap.unpack(fork, start)
    types = start + head.types_offset
    for number in range((head.types + 1) & 0xFFFF):
        kind = _ForkType.unpack(fork, types + 2 + number * _ForkType.SIZE)
        wanted = kind.count + 1 if kind.type == b"blkx" else 0
        for item in range(wanted):
            resource = _ForkResource.unpack(fork, types + kind.offset + item * _ForkResource.SIZE)
            at = start + head.names_offset + resource.name_offset
            named = resource.name_offset != 0xFFFF and at < len(fork)
            name = fork[at + 1 : at + 1 + fork[at]].decode("mac_roman") if named else ""
            yield resource, name
