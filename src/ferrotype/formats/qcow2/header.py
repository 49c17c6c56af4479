"""What a qcow2 file says of itself: header, extensions, internal snapshots, persistent bitmaps.

    cluster 0   header (72 bytes, version 3: 104 or more) | extensions ... | end | name of the backing file
    elsewhere   snapshot table, bitmap directory, encryption header, each found through an offset in the above

Written from "Qcow2 Image File Format" (docs/interop/qcow2 of QEMU).  All numbers are big-endian.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Final

import numpy as np

from ferrotype.block import Source, read, read_exactly
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats import MAX_SIZE
from ferrotype.records import Record, b4, record, u8, u16, u32, u64
from ferrotype.units import MiB

__all__ = ["Bitmap", "Header", "Snapshot", "bitmaps", "read_header", "snapshots"]

MAGIC: Final = b"QFI\xfb"
DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = 1, 2, 4, 8, 16  # incompatible features
LAZY_REFCOUNTS: Final = 1  # compatible features
BITMAPS, RAW_DATA_FILE = 1, 2  # autoclear features
EXT_BACKING_FORMAT, EXT_DATA_FILE, EXT_FEATURE_NAMES = 0xE2792ACA, 0x44415441, 0x6803F857
EXT_BITMAPS, EXT_ENCRYPTION = 0x23852875, 0x0537BE77
ZLIB, ZSTD = 0, 1
AES, LUKS = 1, 2  # crypt_method

_SMALLEST, _LARGEST = 9, 21  # cluster_bits
_SMALLEST_EXTENDED: Final = 14
MOST_L1: Final = 32 * MiB  # bytes; QEMU's limit, as the next ones are
MOST_REFCOUNT_TABLE: Final = 8 * MiB  # bytes
_MOST_SNAPSHOTS: Final = 65536
_MOST_SNAPSHOT_EXTRA: Final = 1024  # bytes
_MOST_BITMAPS: Final = 65535
_REFCOUNT_BLOCK: Final = 0x7FFF_FFFF_FFFF_FE00  # bits of the place of a block; the top one is kept clear here
_MOST_DIRECTORY: Final = 64 * MiB  # bytes
MOST_NAME: Final = 1023  # bytes


@record(endian=">", size=72)
class Base(Record):
    """ "Header", as far as version 2 has it."""

    magic: b4
    version: u32
    backing_file_offset: u64
    backing_file_size: u32
    cluster_bits: u32
    size: u64
    crypt_method: u32
    l1_size: u32
    l1_table_offset: u64
    refcount_table_offset: u64
    refcount_table_clusters: u32
    nb_snapshots: u32
    snapshots_offset: u64


@record(endian=">", size=40)
class Further(Record):
    """ "Header", from byte 72 on in version 3; the last two fields are there where header_length says so."""

    incompatible_features: u64
    compatible_features: u64
    autoclear_features: u64
    refcount_order: u32
    header_length: u32
    compression_type: u8
    padding: Annotated[bytes, "7s"]


@record(endian=">", size=8)
class ExtensionHead(Record):
    """ "Header extensions"."""

    type: u32
    length: u32


@record(endian=">", size=40)
class SnapshotHead(Record):
    """ "Snapshots", up to the extra data."""

    l1_table_offset: u64
    l1_size: u32
    id_size: u16
    name_size: u16
    seconds: u32
    nanoseconds: u32
    vm_clock: u64
    vm_state_size: u32
    extra_size: u32


@record(endian=">", size=16)
class SnapshotExtra(Record):
    """ "Snapshots", the part of the extra data that version 3 always has."""

    vm_state_size: u64
    disk_size: u64


@record(endian=">", size=24)
class BitmapsExtension(Record):
    """ "Bitmaps extension"."""

    count: u32
    reserved: u32
    directory_size: u64
    directory_offset: u64


@record(endian=">", size=24)
class BitmapEntry(Record):
    """ "Bitmap directory", up to the extra data."""

    table_offset: u64
    table_size: u32
    flags: u32
    type: u8
    granularity_bits: u8
    name_size: u16
    extra_size: u32


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An internal snapshot."""

    id: str
    name: str
    l1_offset: int
    l1_size: int  # entries
    disk_size: int  # bytes
    seconds: int  # since 1970
    nanoseconds: int
    vm_clock: int  # nanoseconds
    vm_state_size: int  # bytes


@dataclass(frozen=True, slots=True)
class Bitmap:
    """A persistent bitmap."""

    name: str
    granularity: int  # bytes
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """The header of either version, checked, and the extensions."""

    base: Base
    further: Further
    extensions: dict[int, bytes]
    backing: str | None

    @property
    def cluster(self) -> int:
        """Bytes."""
        return 1 << self.base.cluster_bits

    @property
    def extended(self) -> bool:
        """Whether L2 entries have subclusters."""
        return bool(self.further.incompatible_features & EXTENDED_L2)

    @property
    def l2_entries(self) -> int:
        """Of an L2 table, which fills a cluster."""
        return self.cluster // (16 if self.extended else 8)

    def text(self, extension: int) -> str | None:
        """The value of an extension that is a string."""
        value = self.extensions.get(extension)
        return os.fsdecode(value) if value else None


def _wrong(message: str, field: str) -> InvalidImage:
    return InvalidImage(message, field=field)


def read_header(file: Source) -> Header:
    """Read and check the header.  Raises InvalidImage, and UnsupportedError at features that are not known."""
    base = Base.unpack(read(file, 0, min(Base.SIZE, file.size)))
    if base.magic != MAGIC:
        raise InvalidImage("this is no qcow2 image", offset=0, field="magic")
    if base.version not in (2, 3):
        raise UnsupportedError(f"version {base.version} of qcow2", field="version")
    if not _SMALLEST <= base.cluster_bits <= _LARGEST:
        raise _wrong(f"clusters of 2^{base.cluster_bits} bytes", "cluster_bits")
    cluster = 1 << base.cluster_bits
    head = read(file, 0, min(cluster, file.size))
    further, length = _further(base, head)
    end = base.backing_file_offset or cluster
    extensions = dict(_extensions(head, length, min(end, cluster)))
    _check_features(further, extensions)
    header = Header(base, further, extensions, _backing_name(base, head, length))
    _check_tables(header)
    return header


def _further(base: Base, head: bytes) -> tuple[Further, int]:
    """The fields of version 3 and the length of the header; those of version 2 as they are implied."""
    if base.version == 2:
        return Further(0, 0, 0, 4, Base.SIZE, 0, bytes(7)), Base.SIZE
    known = head[Base.SIZE : Base.SIZE + Further.SIZE]
    length = int.from_bytes(known[28:32], "big")
    if not 104 <= length <= len(head) or length % 8:
        raise _wrong(f"a header of {length} bytes", "header_length")
    return Further.unpack(known[: length - Base.SIZE].ljust(Further.SIZE, b"\0")), length


def _extensions(head: bytes, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    end = min(end, len(head))
    while at + ExtensionHead.SIZE <= end:
        extension = ExtensionHead.unpack(head, at)
        at += ExtensionHead.SIZE
        if extension.type == 0:
            return
        if extension.length > end - at:
            raise InvalidImage("a header extension does not fit in", offset=at - ExtensionHead.SIZE, field="length")
        yield extension.type, head[at : at + extension.length]
        at += -(-extension.length // 8) * 8


def _check_features(further: Further, extensions: dict[int, bytes]) -> None:
    unknown = further.incompatible_features & ~(DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2)
    if unknown:
        table = extensions.get(EXT_FEATURE_NAMES, b"")
        names = {
            table[at + 1]: table[at + 2 : at + 48].rstrip(b"\0").decode("ascii", "replace")
            for at in range(0, len(table) - 47, 48)
            if table[at] == 0
        }
        bits = [names.get(bit, f"bit {bit}") for bit in range(64) if unknown >> bit & 1]
        raise UnsupportedError(
            f"the image asks for features that are not known: {', '.join(bits)}", field="incompatible_features"
        )
    if further.refcount_order > 6:
        raise _wrong(f"reference counts of 2^{further.refcount_order} bits", "refcount_order")
    if further.compression_type not in (ZLIB, ZSTD):
        raise UnsupportedError(f"compression type {further.compression_type}", field="compression_type")
    if bool(further.compression_type) != bool(further.incompatible_features & COMPRESSION):
        raise _wrong("the compression type and the feature bit for it contradict each other", "compression_type")


def _check_tables(header: Header) -> None:
    base, cluster = header.base, header.cluster
    if header.extended and base.cluster_bits < _SMALLEST_EXTENDED:
        raise _wrong(f"subclusters in clusters of {cluster} bytes", "cluster_bits")
    if base.size > MAX_SIZE:
        raise _wrong(f"a disk of {base.size} bytes", "size")
    if base.l1_size * 8 > MOST_L1:
        raise _wrong(f"an L1 table of {base.l1_size} entries", "l1_size")
    if base.l1_size < -(-base.size // (header.l2_entries * cluster)):
        raise _wrong(f"an L1 table of {base.l1_size} entries is too small for the disk", "l1_size")
    if base.l1_size and (base.l1_table_offset % cluster or not base.l1_table_offset):
        raise _wrong(f"the L1 table at {base.l1_table_offset}", "l1_table_offset")
    if base.refcount_table_offset % cluster or not base.refcount_table_offset:
        raise _wrong(f"the reference count table at {base.refcount_table_offset}", "refcount_table_offset")
    if not 0 < base.refcount_table_clusters * cluster <= max(MOST_REFCOUNT_TABLE, cluster):
        raise _wrong(f"a reference count table of {base.refcount_table_clusters} clusters", "refcount_table_clusters")
    if base.nb_snapshots > _MOST_SNAPSHOTS:
        raise _wrong(f"{base.nb_snapshots} snapshots", "nb_snapshots")
    if base.nb_snapshots and (base.snapshots_offset % cluster or not base.snapshots_offset):
        raise _wrong(f"the snapshot table at {base.snapshots_offset}", "snapshots_offset")
    if base.crypt_method > LUKS:
        raise UnsupportedError(f"encryption method {base.crypt_method}", field="crypt_method")


def _backing_name(base: Base, head: bytes, length: int) -> str | None:
    if base.backing_file_offset == 0:
        return None
    end = base.backing_file_offset + base.backing_file_size
    if base.backing_file_size > MOST_NAME:
        raise _wrong(f"a backing file name of {base.backing_file_size} bytes", "backing_file_size")
    if base.backing_file_offset < length or end > len(head):
        raise _wrong("the backing file name does not lie in the first cluster", "backing_file_offset")
    return os.fsdecode(head[base.backing_file_offset : end]) or None


def own_places(file: Source, header: Header) -> list[tuple[int, int]]:
    """(start, end) of the header, and of the reference counts as far as their table makes sense."""
    base, cluster = header.base, header.cluster
    start, size = base.refcount_table_offset, base.refcount_table_clusters * cluster
    found = [(0, cluster), (start, start + size)]
    table = np.frombuffer(read(file, start, max(min(size, file.size - start), 0) // 8 * 8), ">u8")
    blocks = (table & np.uint64(_REFCOUNT_BLOCK)).astype(np.int64)
    blocks = blocks[(blocks > 0) & (blocks % cluster == 0) & (blocks < file.size)]
    return found + [(block, block + cluster) for block in blocks.tolist()]


# ---------------------------------------------------------------------- internal snapshots and bitmaps


def snapshots(file: Source, header: Header) -> list[Snapshot]:
    """The internal snapshots.  Raises InvalidImage."""
    found = []
    at = header.base.snapshots_offset
    for number in range(header.base.nb_snapshots):
        what = f"snapshot {number}"
        head = SnapshotHead.unpack(read_exactly(file, at, SnapshotHead.SIZE, what))
        if head.extra_size > _MOST_SNAPSHOT_EXTRA:
            raise InvalidImage(f"{head.extra_size} bytes of extra data", offset=at, field="extra_data_size")
        size = head.extra_size + head.id_size + head.name_size
        data = read_exactly(file, at + SnapshotHead.SIZE, size, what)
        extra = SnapshotExtra(head.vm_state_size, header.base.size)
        if head.extra_size >= SnapshotExtra.SIZE:
            extra = SnapshotExtra.unpack(data)
        _check_snapshot(header, head, extra, at)
        names = head.extra_size + head.id_size
        found.append(
            Snapshot(
                data[head.extra_size : names].decode("utf-8", "replace"),
                data[names:].decode("utf-8", "replace"),
                head.l1_table_offset,
                head.l1_size,
                extra.disk_size,
                head.seconds,
                head.nanoseconds,
                head.vm_clock,
                extra.vm_state_size,
            )
        )
        at += -(-(SnapshotHead.SIZE + size) // 8) * 8
    return found


def _check_snapshot(header: Header, head: SnapshotHead, extra: SnapshotExtra, at: int) -> None:
    needed = -(-extra.disk_size // (header.l2_entries * header.cluster))
    if extra.disk_size > MAX_SIZE:
        raise InvalidImage(f"a snapshot of {extra.disk_size} bytes", offset=at, field="disk_size")
    if head.l1_size * 8 > MOST_L1 or head.l1_size < needed:
        raise InvalidImage(f"an L1 table of {head.l1_size} entries", offset=at, field="l1_size")
    if head.l1_table_offset % header.cluster or (head.l1_size and not head.l1_table_offset):
        raise InvalidImage(f"an L1 table at {head.l1_table_offset}", offset=at, field="l1_table_offset")


_BITMAP_FLAGS: Final = ("in-use", "auto", "extra-data-compatible")


def bitmaps(file: Source, header: Header) -> list[Bitmap]:
    """The persistent bitmaps; none where a program that does not know them wrote to the image.

    Raises InvalidImage.
    """
    value = header.extensions.get(EXT_BITMAPS)
    if value is None or not header.further.autoclear_features & BITMAPS:
        return []
    told = BitmapsExtension.unpack(value)
    if told.count > _MOST_BITMAPS or told.directory_size > _MOST_DIRECTORY or told.directory_offset % header.cluster:
        raise InvalidImage("the bitmap directory cannot be as is said", field="bitmap_directory_offset")
    directory = read_exactly(file, told.directory_offset, told.directory_size, "the bitmap directory")
    found, at = [], 0
    for _ in range(told.count):
        entry = BitmapEntry.unpack(directory, at)
        start = at + BitmapEntry.SIZE + entry.extra_size
        at = start + entry.name_size
        if at > len(directory) or not 9 <= entry.granularity_bits <= 31 or entry.name_size > MOST_NAME:
            raise InvalidImage("the bitmap directory is damaged", offset=told.directory_offset + start)
        flags = tuple(name for bit, name in enumerate(_BITMAP_FLAGS) if entry.flags >> bit & 1)
        name = directory[start:at].decode("utf-8", "replace")
        found.append(Bitmap(name, 1 << entry.granularity_bits, flags))
        at = -(-at // 8) * 8
    return found


def parents_named(file: Source) -> list[str]:
    """The name of the backing file.  Raises InvalidImage and UnsupportedError."""
    name = read_header(file).backing
    return [] if name is None else [name]
