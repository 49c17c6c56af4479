"""partclone images: the used blocks of one file system, one behind the other.

    version 1 (0001)  | header, 4160 bytes | a byte for each block | "BiTmAgIc" | block sum | block sum | ...
    version 2 (0002)  | header, 110 | a bit for each block | CRC-32 | strip sum | strip sum | ... | last strip sum |
                                                                      a strip: ``blocks per checksum`` used blocks

Layout: partclone's IMAGE_FORMATS.md.  The image knows nothing of the blocks that the file system does not use, nor of
the bytes behind its last block: they read as zeros here, as after a restore onto a disk of zeros.  Images without a
bitmap (``partclone.imager``) hold every block.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Annotated, Final

from ferrotype.block import Source, read, read_exactly
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats import MAX_SIZE, Image
from ferrotype.formats.mapped import MappedSource
from ferrotype.formats.partclone.blocks import Bitmap, Blocks, Strips
from ferrotype.formats.partclone.sums import Sums, damages
from ferrotype.formats.related import Related
from ferrotype.records import Record, b2, b4, record, s32, u8, u16, u32, u64
from ferrotype.units import MiB

__all__ = ["open", "probe"]

MAGIC: Final = b"partclone-image"
SIGNATURE: Final = b"BiTmAgIc"  # behind a bitmap of bytes
REST1: Final = 4096  # bytes behind the header of version 1, without a meaning
MAX_BLOCK: Final = 64 * MiB  # bytes; partclone's own limit
EAGER: Final = 256 * MiB  # bytes of bitmap that are counted, and proven, when the image is opened: 8 TiB at 4 KiB
BIT, BYTE, NONE = 1, 8, 0  # kinds of bitmap: bitmap_mode_t in partclone.h

Text15 = Annotated[bytes, "15s"]
Text16 = Annotated[bytes, "16s"]
Text14 = Annotated[bytes, "14s"]


@record(endian="<", size=64)
class Header1(Record):
    """Image header of version 0001, up to its unused rest.  IMAGE_FORMATS.md, "Format 0001"."""

    magic: Text15
    file_system: Text15
    version: b4
    padding: b2
    block_size: s32
    device_size: u64
    total_blocks: u64
    used_blocks: u64


@record(endian="<", size=110)
class Header2(Record):
    """Image header of version 0002.  IMAGE_FORMATS.md, "Format 0002"."""

    magic: Text16
    program: Text14
    version: b4
    endianness: u16
    file_system: Text16
    device_size: u64
    total_blocks: u64
    used_by_superblock: u64
    used_blocks: u64
    block_size: u32
    feature_size: u32
    image_version: u16
    cpu_bits: u16
    checksum_mode: u16
    checksum_size: u16
    blocks_per_checksum: u32
    reseed: u8
    bitmap_mode: u8
    crc: u32


@dataclass(frozen=True, slots=True)
class Shape:
    """What the two headers say, in one form."""

    version: int
    file_system: str
    program: str
    block_size: int  # bytes
    blocks: int  # of the file system
    used: int  # as the header says
    device_size: int  # bytes
    bitmap_at: int
    bitmap_mode: int
    sums: Sums


def probe(file: Source) -> bool:
    """Whether the file begins as a partclone image."""
    return read(file, 0, len(MAGIC)) == MAGIC


def open(file: Source, related: Related) -> Image:  # noqa: ARG001
    """The partition that was imaged.

    Bitmaps up to ``EAGER`` are read once, proven and counted; a larger one is when a block far behind is asked for.
    """
    shape = _shape(file)
    bitmap = _bitmap(file, shape)
    strips = Strips(
        file, bitmap.end, shape.block_size, shape.sums.blocks, _sum_room(file, shape, bitmap), shape.device_size
    )
    warnings = []
    covered = shape.blocks * shape.block_size
    size = max(shape.device_size, covered)
    if shape.device_size < covered:
        warnings.append(f"the header gives the device {shape.device_size} bytes, and its blocks have {covered}")
    if bitmap.size <= EAGER:
        used = bitmap.total()
        if used != shape.used and shape.version > 1:
            warnings.append(
                f"the header counts {shape.used} used blocks and the bitmap {used}; the bitmap is followed"
            )
        missing = used - strips.size // shape.block_size
        if missing > 0:
            warnings.append(f"the file ends early: {missing} of its {used} blocks are missing and cannot be read")
    source = MappedSource(strips, Blocks(bitmap, shape.block_size, size), size, name="partclone image", placed=False)
    return Image(
        "partclone",
        source,
        facts=_facts(shape, size, bitmap),
        warnings=tuple(warnings),
        check=lambda job: damages(strips, bitmap, shape.sums, job),
        close=file.close,
    )


def stored_size(head: Source) -> tuple[int, bool]:
    """Bytes of an image that begins with ``head``, and whether that is exact; if not, it has at most as many."""
    shape = _shape(head)
    bitmap = {BIT: -(-shape.blocks // 8) + 4, BYTE: shape.blocks + len(SIGNATURE), NONE: 0}[shape.bitmap_mode]
    sums, per_sum = shape.sums.size, shape.sums.blocks or 1
    if shape.version == 1:
        return shape.bitmap_at + bitmap + shape.used * (shape.block_size + 2 * sums), False
    return shape.bitmap_at + bitmap + shape.used * shape.block_size + -(-shape.used // per_sum) * sums, True


def _facts(shape: Shape, size: int, bitmap: Bitmap) -> dict[str, object]:
    facts: dict[str, object] = {
        "subformat": f"version {shape.version}",
        "unit": shape.block_size,
        "file_system": shape.file_system,
        "program": shape.program or None,
        "blocks": shape.blocks,
        "used_blocks": shape.used,
        "checksum": shape.sums.name,
        "blocks_per_checksum": shape.sums.blocks or None,
    }
    if bitmap.size <= EAGER:
        facts["used_blocks"] = bitmap.total()
        # not in the image: they read as zeros, and were whatever was on the disk
        facts["unknown_bytes"] = size - bitmap.total() * shape.block_size
    return facts


# ---------------------------------------------------------------------- headers


def _shape(file: Source) -> Shape:
    head = read_exactly(file, 0, Header2.SIZE, "the header of the partclone image")
    version = head[30:34]
    if head[: len(MAGIC)] != MAGIC:
        raise InvalidImage("this is no partclone image", offset=0, field="magic")
    if version == b"0001":
        shape = _shape1(Header1.unpack(head))
    elif version == b"0002":
        shape = _shape2(Header2.unpack(head), head)
    else:
        raise UnsupportedError(f"partclone images of version {_text(version)!r} are not read", offset=30)
    offset = 36 if shape.version == 1 else 84
    if not 512 <= shape.block_size <= MAX_BLOCK or shape.block_size % 512:
        raise InvalidImage(f"a block of {shape.block_size} bytes", offset=offset, field="block_size")
    if not shape.blocks:
        raise InvalidImage("it has no blocks", field="totalblock")
    if shape.blocks > MAX_SIZE // shape.block_size or shape.device_size > MAX_SIZE:
        raise InvalidImage(f"{shape.blocks} blocks are too many", field="totalblock")
    if shape.used > shape.blocks:
        raise InvalidImage(f"{shape.used} of {shape.blocks} blocks in use", field="usedblocks")
    return shape


def _shape1(header: Header1) -> Shape:
    return Shape(
        1,
        _text(header.file_system),
        "",
        header.block_size,
        header.total_blocks,
        header.used_blocks,
        header.device_size,
        Header1.SIZE + REST1,
        BYTE,
        Sums("crc32 of first bytes", 4, 1, reseed=False),
    )


def _shape2(header: Header2, head: bytes) -> Shape:
    if header.endianness == 0xDEC0:
        raise UnsupportedError("the image was made on a big-endian computer", offset=34, field="endianess")
    if header.endianness != 0xC0DE:
        raise InvalidImage("no byte order is marked", offset=34, field="endianess")
    if ~zlib.crc32(head[:106]) & 0xFFFFFFFF != header.crc:
        raise InvalidImage("the header does not match its checksum", offset=106, field="crc")
    if header.bitmap_mode not in (BIT, BYTE, NONE):
        raise UnsupportedError(f"bitmap mode {header.bitmap_mode} is unknown", offset=105, field="bitmap_mode")
    known = {
        0: ("none", 0),
        0x20: ("crc32", 4),
        0x30: ("xxh64", 8),
    }  # checksum.h; the text of the format is wrong here
    if header.checksum_mode not in known:
        raise UnsupportedError(f"checksum mode {header.checksum_mode} is unknown", offset=96, field="checksum_mode")
    name, size = known[header.checksum_mode]
    if header.checksum_size != size:
        raise InvalidImage(f"{name} sums of {header.checksum_size} bytes", offset=98, field="checksum_size")
    if size and not header.blocks_per_checksum:
        raise InvalidImage("checksums of no blocks", offset=100, field="blocks_per_checksum")
    return Shape(
        2,
        _text(header.file_system),
        _text(header.program),
        header.block_size,
        header.total_blocks,
        header.used_blocks,
        header.device_size,
        Header2.SIZE,
        header.bitmap_mode,
        Sums(name, size, header.blocks_per_checksum if size else 0, reseed=bool(header.reseed)),
    )


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("ascii", "replace").strip()


def _bitmap(file: Source, shape: Shape) -> Bitmap:
    """The bitmap and where the blocks begin behind it.  Raises InvalidImage where the file ends before that."""
    mode, at = shape.bitmap_mode, shape.bitmap_at
    size = {BIT: -(-shape.blocks // 8), BYTE: shape.blocks, NONE: 0}[mode]
    behind = {BIT: 4, BYTE: len(SIGNATURE), NONE: 0}[mode]
    if at + size + behind > file.size:
        raise InvalidImage(f"the file ends before its bitmap of {size} bytes does", offset=at, field="totalblock")
    tail = read(file, at + size, behind)
    if mode == BYTE and tail != SIGNATURE:
        raise InvalidImage("the bitmap does not end with its signature", offset=at + size)
    crc = int.from_bytes(tail, "little") if mode == BIT else None
    return Bitmap(file, at, size, shape.blocks, at + size + behind, crc, octets=mode == BYTE)


def _sum_room(file: Source, shape: Shape, bitmap: Bitmap) -> int:
    """Bytes that each checksum takes.

    Early 64-bit programs wrote those of version 1 with four more bytes; nothing says so but the size of the file.
    """
    used = bitmap.total() if shape.version == 1 and bitmap.size <= EAGER else shape.used
    if shape.version > 1 or not used:
        return shape.sums.size
    step, odd = divmod(file.size - bitmap.end, used)
    return 8 if step == shape.block_size + 8 and not odd else 4
