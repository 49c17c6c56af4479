"""qcow, version 1: the first format of its kind in QEMU, read only.

    byte 0        header of 48 bytes | name of the backing file
    L1 table      offset of an L2 table, or 0
    L2 table      2^l2_bits entries: offset of a cluster, or 0
                  63 compressed: its length from bit 63 - cluster_bits on, its offset below
    clusters      data; the compressed ones lie anywhere

Written from the description of the header in QEMU's documentation and from images.  All numbers are big-endian.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, read, read_exactly
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats import MAX_SIZE, Image
from ferrotype.formats.backing import open_backing
from ferrotype.formats.codecs import inflate
from ferrotype.formats.levels import BAD, Geometry, TwoLevels, Words, read_first_level
from ferrotype.formats.mapped import Kind, MappedSource
from ferrotype.formats.outside import attempt
from ferrotype.formats.related import Related
from ferrotype.records import Record, b4, record, u8, u16, u32, u64

__all__ = ["open", "probe"]

_MAGIC: Final = b"QFI\xfb\0\0\0\1"
_COMPRESSED: Final = 1 << 63
_MOST_NAME: Final = 1023  # bytes
_RAW_DEFLATE: Final = -15


@record(endian=">", size=48)
class QcowHeader(Record):
    magic: b4
    version: u32
    backing_file_offset: u64
    backing_file_size: u32
    mtime: u32
    size: u64
    cluster_bits: u8
    l2_bits: u8
    padding: u16
    crypt_method: u32
    l1_table_offset: u64


def probe(file: Source) -> bool:
    return read(file, 0, min(8, file.size)) == _MAGIC


def open(file: Source, related: Related) -> Image:
    """Open the image with its backing chain.  ``missing``: the backing file, or AES, which is not read."""
    header = QcowHeader.unpack(read(file, 0, min(QcowHeader.SIZE, file.size)))
    _check(header)
    name = _backing_name(file, header)
    with ExitStack() as stack:
        layout = _layout(file, header)
        parent, missing = attempt(lambda: open_backing(related, name, None)) if name is not None else (None, None)
        if parent is not None:
            stack.callback(parent.close)
        if header.crypt_method:
            missing = UnsupportedError(
                "the image is encrypted in the way that QEMU gave up as unsafe (AES in qcow)", field="crypt_method"
            )
        source = MappedSource(
            file,
            layout,
            header.size,
            name="qcow image",
            parent=parent.source if parent else None,
            ragged=(1 << header.cluster_bits) - 1,
        )
        stack.callback(file.close)
        return Image(
            "qcow",
            source,
            facts={
                "unit": 1 << header.cluster_bits,
                "compression": "zlib",
                "encrypted": header.crypt_method != 0,
                "backing": {"name": name, "format": None} if name is not None else None,
            },
            warnings=parent.warnings if parent else (),
            close=stack.pop_all().close,
            missing=missing,
        )


def _check(header: QcowHeader) -> None:
    if header.magic + header.version.to_bytes(4, "big") != _MAGIC:
        raise InvalidImage("this is no qcow image of version 1", offset=0, field="magic")
    if not 9 <= header.cluster_bits <= 16:
        raise InvalidImage(f"clusters of 2^{header.cluster_bits} bytes", field="cluster_bits")
    if not 6 <= header.l2_bits <= 13:
        raise InvalidImage(f"L2 tables of 2^{header.l2_bits} entries", field="l2_bits")
    if header.crypt_method > 1:
        raise InvalidImage(f"encryption method {header.crypt_method}", field="crypt_method")
    if not 1 < header.size <= MAX_SIZE:
        raise InvalidImage(f"a disk of {header.size} bytes", field="size")
    if header.l1_table_offset < QcowHeader.SIZE:
        raise InvalidImage("the L1 table overlaps the header", field="l1_table_offset")


def _backing_name(file: Source, header: QcowHeader) -> str | None:
    if header.backing_file_offset == 0:
        return None
    if header.backing_file_size > _MOST_NAME or header.backing_file_offset < QcowHeader.SIZE:
        raise InvalidImage("the backing file name cannot be where it is said to be", field="backing_file_size")
    raw = read_exactly(file, header.backing_file_offset, header.backing_file_size, "the backing file name")
    return os.fsdecode(raw) or None


def _layout(file: Source, header: QcowHeader) -> TwoLevels:
    geometry = Geometry(1 << header.cluster_bits, 1 << header.l2_bits)
    entries = -(-header.size // geometry.reach)
    taken = [(0, QcowHeader.SIZE)]
    first = read_first_level(file, header.l1_table_offset, entries, geometry, taken=taken)
    offset_bits = 63 - header.cluster_bits

    def decode(words: Words) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        entries = words[:, 0]
        packed = (entries & np.uint64(_COMPRESSED)) != 0
        places = (entries & np.uint64(_COMPRESSED - 1)).view(np.int64)
        kinds = np.where(entries != 0, np.uint8(Kind.STORED), np.uint8(Kind.HOLE))
        kinds[packed] = Kind.PACKED
        start = np.where(packed, places & ((1 << offset_bits) - 1), places)
        kinds[(kinds != Kind.HOLE) & ((start < QcowHeader.SIZE) | (start >= file.size))] = BAD
        return kinds, places

    def unpack(place: int) -> bytes:
        offset, length = place & ((1 << offset_bits) - 1), place >> offset_bits
        data = read_exactly(file, offset, length, "a compressed cluster")
        return inflate(data, geometry.cluster, wbits=_RAW_DEFLATE)

    return TwoLevels(file, geometry, first, decode, unpack)


def parents_named(file: Source) -> list[str]:
    """The name of the backing file.  Raises InvalidImage and UnsupportedError."""
    header = QcowHeader.unpack(read(file, 0, min(QcowHeader.SIZE, file.size)))
    _check(header)
    name = _backing_name(file, header)
    return [] if name is None else [name]
