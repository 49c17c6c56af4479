"""The structures of EWF on disk, as reader and writer share them.  All numbers are little-endian.

Source: "Expert Witness Compression Format specification" (libyal); the heading each stands under is named.
"""

from __future__ import annotations

from typing import Annotated, Final
from zlib import adler32

from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats.ewf.metadata import Media
from ferrotype.records import Record, b4, b16, record, u8, u16, u32, u64
from ferrotype.units import MiB

__all__ = [
    "LARGEST_CHUNK",
    "SIGNATURE",
    "Descriptor",
    "SegmentHeader",
    "SmartVolume",
    "TableHeader",
    "Volume",
    "check_media",
    "sealed",
    "with_checksum",
]

SIGNATURE: Final = b"EVF\x09\x0d\x0a\xff\x00"
LARGEST_CHUNK: Final = 32 * MiB  # bytes; EnCase takes up to 32768 sectors


@record(endian="<", size=13)
class SegmentHeader(Record):
    """File header."""

    signature: Annotated[bytes, "8s"]
    fields_start: u8
    number: u16  # of the segment, from 1
    fields_end: u16


@record(endian="<", size=76)
class Descriptor(Record):
    """Section descriptor."""

    kind: b16
    next: u64  # offset of the next section; its own in the last one
    size: u64  # with the descriptor; some programs leave it 0
    padding: Annotated[bytes, "40s"]
    checksum: u32  # Adler-32 of what is before


@record(endian="<", size=1052)
class Volume(Record):
    """Volume, disk and data section of EnCase, FTK Imager and linen."""

    media_type: u8
    unknown1: Annotated[bytes, "3s"]
    chunks: u32
    chunk_sectors: u32
    sector_size: u32
    sectors: u64
    cylinders: u32
    heads: u32
    track_sectors: u32
    media_flags: u8
    unknown2: Annotated[bytes, "3s"]
    palm_start: u32
    unknown3: b4
    smart_logs_start: u32
    level: u8  # of compression
    unknown4: Annotated[bytes, "3s"]
    error_granularity: u32  # sectors
    unknown5: b4
    set_identifier: b16
    unknown6: Annotated[bytes, "963s"]
    signature: Annotated[bytes, "5s"]
    checksum: u32


@record(endian="<", size=94)
class SmartVolume(Record):
    """Volume section of the original format and of SMART."""

    reserved: u32
    chunks: u32
    chunk_sectors: u32
    sector_size: u32
    sectors: u32
    padding: Annotated[bytes, "65s"]
    signature: Annotated[bytes, "5s"]  # SMART, or of the file
    checksum: u32


@record(endian="<", size=24)
class TableHeader(Record):
    """Header of a table section."""

    count: u32
    padding1: u32
    base: u64  # from EnCase 6 on; padding before
    padding2: u32
    checksum: u32


def sealed(data: bytes) -> bool:
    """Whether the last four bytes are the Adler-32 of those before."""
    return adler32(memoryview(data)[:-4]) == int.from_bytes(data[-4:], "little")


def with_checksum(structure: Record) -> bytes:
    """The bytes of a structure whose last field is the Adler-32 of those before."""
    data = structure.pack()[:-4]
    return data + adler32(data).to_bytes(4, "little")


def check_media(media: Media) -> None:
    """Raise where a disk like this cannot be."""
    size = media.sector_size
    if size & (size - 1) or not 512 <= size <= 1 << 16:
        raise UnsupportedError(f"sectors of {size} bytes are not read", field="bytes per sector")
    if not media.chunk_sectors or media.chunk_size > LARGEST_CHUNK or media.chunk_sectors & (media.chunk_sectors - 1):
        raise InvalidImage(f"chunks of {media.chunk_sectors} sectors cannot be", field="sectors per chunk")
    if media.sectors >= 1 << 50:
        raise InvalidImage(f"a disk of {media.sectors} sectors cannot be", field="sectors count")
