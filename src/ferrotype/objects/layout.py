"""The container's bytes: volume headers, anchors, records, catalogs.  ``docs/format.md`` is the specification.

    a volume    | header 4 KiB | anchor A 4 KiB | anchor B 4 KiB | record | record | ...

    a record    | RecordHeader 128 | payload ...... | zeros to the next multiple of 4 KiB |

Everything is little-endian.  Every structure carries a checksum (XXH3-128), so that damage is told apart from absence
without a key; authenticity is the business of the layer above.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from typing import Annotated, Final, TypeVar

import msgspec
import xxhash

from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.records import Record, b8, b16, record, u16, u32, u64
from ferrotype.units import KiB

BLOCK: Final = 4 * KiB  # alignment of records: the unit in which host file systems punch holes
ANCHORS_AT: Final = (BLOCK, 2 * BLOCK)
RECORDS_AT: Final = 3 * BLOCK
VERSION: Final = 1

VOLUME_MAGIC: Final = b"\x89FERRO\r\n"  # high bit and line ends: a transfer in text mode shows at once
ANCHOR_MAGIC: Final = b"FERROANC"
RECORD_MAGIC: Final = b"FERROREC"

b48 = Annotated[bytes, "48s"]

S = TypeVar("S", "VolumeHeader", "Anchor", "RecordHeader")


def checksum(*parts: bytes | bytearray | memoryview) -> bytes:
    """XXH3-128 of the parts, 16 bytes."""
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.digest()


def padded(length: int) -> int:
    """``length`` rounded up to whole blocks."""
    return -(-length // BLOCK) * BLOCK


@record(endian="<", size=80)
class VolumeHeader(Record):
    """First block of each volume."""

    magic: b8
    version: u16
    reader_flags: u16  # a reader that does not know a set bit must refuse
    volume: u32  # 0, 1, 2 ...
    uuid: b16  # the same in all volumes of a container
    split: u64  # bytes a volume may grow to, 0: no limit
    reserved: Annotated[bytes, "24s"]
    check: b16  # of the 64 bytes before

    @classmethod
    def make(cls, uuid: bytes, volume: int, split: int) -> VolumeHeader:
        return _sealed(cls(VOLUME_MAGIC, VERSION, 0, volume, uuid, split, bytes(24), bytes(16)))

    @classmethod
    def read(cls, data: bytes) -> VolumeHeader:
        """Raises InvalidImage or UnsupportedError."""
        header = cls.unpack(data)
        if header.magic != VOLUME_MAGIC:
            raise InvalidImage("this is not a ferrotype image", offset=0, field="magic")
        if header.check != checksum(data[: cls.SIZE - 16]):
            raise InvalidImage("the volume header is damaged", offset=0, field="check")
        if header.version != VERSION or header.reader_flags:
            raise UnsupportedError(
                f"the image is of format version {header.version} with flags {header.reader_flags:#x}; "
                f"this program reads version {VERSION}: use a newer ferrotype"
            )
        return header


@record(endian="<", size=80)
class Anchor(Record):
    """Where the newest catalog stands.  Two of them are written in turn, so one is whole at any time."""

    magic: b8
    generation: u64
    uuid: b16
    sequence: u64  # of the catalog record
    offset: u64
    volume: u32
    reserved: u32
    spare: u64
    check: b16

    @classmethod
    def make(cls, uuid: bytes, generation: int, sequence: int, place: Place) -> Anchor:
        return _sealed(cls(ANCHOR_MAGIC, generation, uuid, sequence, place.offset, place.volume, 0, 0, bytes(16)))

    @classmethod
    def read(cls, data: bytes, uuid: bytes) -> Anchor | None:
        if len(data) < cls.SIZE:
            return None
        anchor = cls.unpack(data)
        whole = anchor.magic == ANCHOR_MAGIC and anchor.check == checksum(data[: cls.SIZE - 16])
        return anchor if whole and anchor.uuid == uuid else None


class Kind(enum.IntEnum):
    """What a record holds.  Kinds from 0x80 on may be skipped by a reader that does not know them; others not."""

    OBJECT = 1
    CATALOG = 2
    FILLER = 3  # dead space inside a volume, so that a forward scan finds the next record
    PARITY = 0x80  # reserved
    SEALED_KEY = 0x81  # reserved


@record(endian="<", size=128)
class RecordHeader(Record):
    """Stands before each payload and describes it, so that a forward scan finds everything without a catalog."""

    magic: b8
    kind: u16
    flags: u16
    reserved: u32
    uuid: b16
    sequence: u64  # ascends over the life of the container
    length: u64  # of the payload, bytes
    payload_check: b16
    name: b48  # ASCII, padded with NUL
    check: b16  # of the 112 bytes before

    @classmethod
    def make(
        cls, kind: Kind, uuid: bytes, sequence: int, length: int, payload_check: bytes, name: str
    ) -> RecordHeader:
        raw = name.encode("ascii")
        if not 0 <= len(raw) <= 48:
            raise ValueError(f"object name too long: {name}")
        return _sealed(cls(RECORD_MAGIC, kind, 0, 0, uuid, sequence, length, payload_check, raw, bytes(16)))

    @classmethod
    def read(cls, data: bytes | memoryview, uuid: bytes) -> RecordHeader | None:
        """None where there is no whole record header of this container."""
        if len(data) < cls.SIZE or data[:8] != RECORD_MAGIC:
            return None
        header = cls.unpack(data)
        if header.uuid != uuid or header.check != checksum(data[: cls.SIZE - 16]):
            return None
        return header

    @property
    def text(self) -> str:
        return self.name.rstrip(b"\0").decode("ascii", "replace")

    @property
    def span(self) -> int:
        """Bytes the record occupies, padding included."""
        return padded(self.SIZE + self.length)


def _sealed(structure: S) -> S:
    """The structure with its own checksum filled in."""
    return replace(structure, check=checksum(structure.pack()[:-16]))


# ---------------------------------------------------------------------- catalog


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a record header stands."""

    volume: int
    offset: int


class CatalogEntry(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One live object: [name, volume, offset, payload length, sequence]."""

    name: str
    volume: int
    offset: int
    length: int
    sequence: int

    @property
    def place(self) -> Place:
        return Place(self.volume, self.offset)

    @property
    def span(self) -> int:
        return padded(RecordHeader.SIZE + self.length)


class Catalog(msgspec.Struct, array_like=True, frozen=True):
    """Payload of a catalog record, as MessagePack: what changed since the catalog before it, or everything.

    ``previous`` is [volume, offset, sequence] of the record this one adds to, or None where it stands alone.
    """

    previous: tuple[int, int, int] | None
    added: list[CatalogEntry]
    removed: list[str]


class _Counted(msgspec.Struct, array_like=True, frozen=True):
    """A catalog whose arrays are not decoded yet."""

    previous: tuple[int, int, int] | None
    added: msgspec.Raw
    removed: msgspec.Raw


_catalog_decoder = msgspec.msgpack.Decoder(Catalog)
_counting_decoder = msgspec.msgpack.Decoder(_Counted)


def encode_catalog(catalog: Catalog) -> bytes:
    return msgspec.msgpack.encode(catalog)


def decode_catalog(payload: bytes, most: int = 1 << 22) -> Catalog:
    """Raises InvalidImage, also where it adds or removes more than ``most`` objects: before they take any memory."""
    try:
        counted = _counting_decoder.decode(payload)
        if max(_count(bytes(memoryview(raw)[:5])) for raw in (counted.added, counted.removed)) > most:
            raise InvalidImage("a catalog names more objects than the image has room for")
        return _catalog_decoder.decode(payload)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidImage(f"a catalog record cannot be read: {error}") from error


def _count(head: bytes) -> int:
    """Items of a MessagePack array, from its first bytes; 0 for anything else."""
    if head[0] & 0xF0 == 0x90:
        return head[0] & 0x0F
    return int.from_bytes(head[1 : {0xDC: 3, 0xDD: 5}.get(head[0], 1)], "big")
