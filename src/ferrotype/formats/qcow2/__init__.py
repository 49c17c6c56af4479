"""qcow2, versions 2 and 3: QEMU's own format, with every feature that its images may have.

    cluster 0     header, extensions, name of the backing file            (qcow2_header)
    L1 table      offset of an L2 table, or 0                             one entry for cluster / 8 clusters
    L2 table      an entry a cluster, or two words where it has subclusters
                  63 copied | 62 compressed | 61..56 reserved | 55..9 host cluster | 8..1 reserved | 0 zeros
                  compressed: sectors beyond the first, then the offset of the first byte
                  subclusters: bit i of the second word: stored; bit 32 + i: zeros
    clusters      data; the compressed ones lie anywhere, and share sectors

Reference counts are not needed for reading.  An image marked dirty has wrong ones and right tables; one marked
corrupt is read with a warning, as QEMU does.  Clusters of an encrypted image (LUKS) are
decrypted by where they stand.
Written from "Qcow2 Image File Format" (docs/interop/qcow2 of QEMU).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.block import Source, read, read_exactly
from ferrotype.block.views import Slice
from ferrotype.errors import FerrotypeError, InvalidImage, KeyRefused, UnsupportedError
from ferrotype.formats import Image, left_out
from ferrotype.formats.backing import format_told, open_backing
from ferrotype.formats.codecs import inflate, unzstd
from ferrotype.formats.levels import BAD, Geometry, TwoLevels, Words, read_first_level
from ferrotype.formats.mapped import Kind, MappedSource
from ferrotype.formats.outside import attempt
from ferrotype.formats.qcow2.header import (
    AES,
    CORRUPT,
    DATA_FILE,
    DIRTY,
    EXT_BACKING_FORMAT,
    EXT_DATA_FILE,
    EXT_ENCRYPTION,
    LAZY_REFCOUNTS,
    LUKS,
    MAGIC,
    RAW_DATA_FILE,
    ZSTD,
    Bitmap,
    Header,
    Snapshot,
    bitmaps,
    own_places,
    read_header,
    snapshots,
)
from ferrotype.formats.qcow2.writer import OPTIONS, create, room
from ferrotype.formats.related import Related

__all__ = ["OPTIONS", "create", "open", "probe", "room"]

_COPIED, _COMPRESSED, _ZERO = 1 << 63, 1 << 62, 1
_OFFSET: Final = 0x00FF_FFFF_FFFF_FE00  # bits of a host cluster or an L2 table
_RESERVED: Final = 0x3F00_0000_0000_01FE  # of a standard L2 entry
_RESERVED_L1: Final = 0x7F00_0000_0000_01FF
_SECTOR: Final = 512  # bytes; the unit of the length of compressed data
_PARTS: Final = 32  # subclusters of a cluster
_RAW_DEFLATE: Final = -15  # a larger window than QEMU's own 4 KiB reads all that QEMU writes


def probe(file: Source) -> bool:
    return read(file, 0, min(8, file.size)) in (MAGIC + b"\0\0\0\2", MAGIC + b"\0\0\0\3")


def open(file: Source, related: Related) -> Image:
    """Open the image with its backing chain and its data file.

    Raises InvalidImage and UnsupportedError.  ``missing``: the data file, the passphrase or the backing file, or AES.
    """
    header = read_header(file)
    with ExitStack() as stack:
        data, no_data = _data_file(header, related, stack)
        data = data or file
        stored, encryption, no_key = _decrypted(file, data, header, related)
        tables = _Tables(file, data, header)
        layout = tables.layout(header.base.l1_table_offset, header.base.l1_size)
        taken, listed = snapshots(file, header), bitmaps(file, header)
        parent, no_parent = _parent(header, related, stack)
        source = partial(_disk, stored, parent.source if parent else None, header)
        stack.callback(file.close)
        return Image(
            "qcow2",
            source(layout, header.base.size),
            facts={
                **_facts(header),
                "encryption": encryption,
                "snapshots": [_snapshot_facts(one) for one in taken],
                "bitmaps": [
                    {"name": one.name, "granularity": one.granularity, "flags": list(one.flags)} for one in listed
                ],
            },
            disks=(disks := _disks(taken, tables, source)),
            warnings=_warnings(header, parent),
            besides=_besides(taken, list(disks)),
            remarks=_remarks(listed),
            close=stack.pop_all().close,
            missing=no_data or no_key or no_parent,
        )


def _disk(stored: Source, parent: Source | None, header: Header, layout: TwoLevels, size: int) -> Source:
    # QEMU writes clusters, or with extended L2 entries subclusters, whole: what is behind the end was cut off.
    return MappedSource(stored, layout, size, name="qcow2 image", parent=parent, ragged=header.cluster - 1)


def _data_file(header: Header, related: Related, stack: ExitStack) -> tuple[Source | None, FerrotypeError | None]:
    """The data file, where there is one, or why it cannot be had."""
    if not header.further.incompatible_features & DATA_FILE:
        return None, None
    name = header.text(EXT_DATA_FILE)
    if name is None:
        raise InvalidImage("the image keeps its data in another file, and does not say in which", field="data file")
    data, missing = attempt(lambda: related.file(name, "data file"))
    if data is not None:
        stack.callback(data.close)
    return data, missing


def _decrypted(
    file: Source, data: Source, header: Header, related: Related
) -> tuple[Source, dict[str, object] | None, FerrotypeError | None]:
    """What clusters are read from, the facts about the encryption, and why they cannot be decrypted."""
    method = header.base.crypt_method
    if method == AES:
        refused = UnsupportedError(
            "the image is encrypted in the way that QEMU gave up as unsafe (AES in qcow2)", field="crypt_method"
        )
        return data, {"format": "aes"}, refused
    if method != LUKS:
        return data, None, None
    from ferrotype.formats.luks import Decrypted, read_phdr, unlock  # cryptography takes its time to load

    value = header.extensions.get(EXT_ENCRYPTION)
    if value is None or len(value) != 16:
        raise InvalidImage("the image is encrypted, and does not say where its LUKS header is", field="crypt_method")
    phdr = Slice(file, int.from_bytes(value[:8], "big"), int.from_bytes(value[8:], "big"))
    told = read_phdr(phdr)
    facts: dict[str, object] = {"format": "luks", "cipher": told.cipher, "hash": told.hash}
    try:
        return Decrypted(data, unlock(phdr, related.passphrase())), facts, None
    except KeyRefused as error:
        return data, facts, error


def _parent(header: Header, related: Related, stack: ExitStack) -> tuple[Image | None, FerrotypeError | None]:
    """The backing file, where there is one, or why it cannot be had."""
    name, told = header.backing, header.text(EXT_BACKING_FORMAT)
    if name is None:
        return None, None
    parent, missing = attempt(lambda: open_backing(related, name, format_told(told) if told else None))
    if parent is not None:
        stack.callback(parent.close)
    return parent, missing


def _warnings(header: Header, parent: Image | None) -> tuple[str, ...]:
    warnings = []
    if header.further.incompatible_features & CORRUPT:
        warnings.append("the image is marked corrupt: a program found its tables damaged, so what is read may be")
    if header.further.incompatible_features & DIRTY:
        warnings.append("the image was not closed cleanly, or is in use: its reference counts are not up to date")
    if parent is not None and header.text(EXT_BACKING_FORMAT) is None:
        warnings.append(f"the image does not say in which format its backing file is; it looks like {parent.format}")
    return (*warnings, *(parent.warnings if parent else ()))


def _besides(taken: list[Snapshot], names: list[str]) -> tuple[str, ...]:
    running = sum(one.vm_state_size > 0 for one in taken)
    memory = f"{running} of its internal snapshots hold the memory of a running machine, which is not taken"
    return (*left_out("internal snapshot", names), *((memory,) if running else ()))


def _remarks(listed: list[Bitmap]) -> tuple[str, ...]:
    if not listed:
        return ()
    named = ", ".join(one.name for one in listed[:5]) + (" ..." if len(listed) > 5 else "")
    return (f"its persistent bitmaps ({named}) are not taken: whoever backs up by them begins with a full backup",)


# ---------------------------------------------------------------------- where clusters stand


class _Tables:
    """How the tables of one image are read, whichever of its disks they describe."""

    def __init__(self, file: Source, data: Source, header: Header) -> None:
        self._file, self._data, self._header = file, data, header
        self._external = data is not file
        words, parts = (2, _PARTS) if header.extended else (1, 1)
        self._geometry = Geometry(header.cluster, header.l2_entries, words, parts)
        self._offset_bits = 62 - (header.base.cluster_bits - 8)  # of a compressed cluster's descriptor

    def layout(self, offset: int, entries: int) -> TwoLevels:
        """The layout of a disk from its L1 table.  Raises InvalidImage."""
        first = read_first_level(
            self._file,
            offset if entries else 0,
            entries,
            self._geometry,
            mask=_OFFSET,
            reserved=_RESERVED_L1,
            align=self._header.cluster,
        )
        decode = self._decode_parts if self._header.extended else self._decode

        def taken() -> list[tuple[int, int]]:
            return [] if self._external else [*own_places(self._file, self._header), (offset, offset + entries * 8)]

        return TwoLevels(self._file, self._geometry, first, decode, self._unpack, taken)

    def _decode(self, words: Words) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Standard entries: one cell a cluster."""
        entries = words[:, 0]
        kinds, places, wrong = self._hosts(entries)
        zero = (entries & np.uint64(_ZERO)) != 0
        kinds[zero & (kinds != Kind.PACKED)] = Kind.ZERO
        wrong |= (kinds == Kind.STORED) & (places >= self._data.size)
        if self._header.base.version == 2:
            wrong |= kinds == Kind.ZERO
        kinds[wrong] = BAD
        return kinds, places

    def _decode_parts(self, words: Words) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Extended entries: 32 cells a cluster."""
        entries, bitmap = words[:, 0], words[:, 1]
        kinds, places, wrong = self._hosts(entries)
        hosted, packed = kinds == Kind.STORED, kinds == Kind.PACKED
        wrong |= ~packed & ((entries & np.uint64(_ZERO)) != 0)
        stored, zero = bitmap & np.uint64(0xFFFF_FFFF), bitmap >> np.uint64(32)
        wrong |= ~packed & (((stored & zero) != 0) | ((stored != 0) & (~hosted | (places >= self._data.size))))
        bits = np.arange(_PARTS, dtype=np.uint64)
        cells = np.where(stored[:, None] >> bits & np.uint64(1) != 0, np.uint8(Kind.STORED), np.uint8(Kind.HOLE))
        cells[zero[:, None] >> bits & np.uint64(1) != 0] = Kind.ZERO
        cells[packed] = Kind.PACKED
        cells[wrong] = BAD
        inside = np.arange(_PARTS, dtype=np.int64) * (self._header.cluster // _PARTS)
        return cells.ravel(), (places[:, None] + np.where(packed[:, None], 0, inside)).ravel()

    def _hosts(self, entries: NDArray[np.uint64]) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.bool_]]:
        """Kinds (HOLE, STORED, PACKED) and places by the first words alone, and which of them may not be."""
        packed = (entries & np.uint64(_COMPRESSED)) != 0
        offsets = (entries & np.uint64(_OFFSET)).view(np.int64)
        hosted = offsets != 0
        if self._external:  # byte 0 of a data file may be a cluster
            hosted |= (entries & np.uint64(_COPIED)) != 0
        kinds = np.where(hosted, np.uint8(Kind.STORED), np.uint8(Kind.HOLE))
        wrong = (offsets % self._header.cluster != 0) | ((entries & np.uint64(_RESERVED)) != 0)
        descriptor = (entries & np.uint64(_COMPRESSED - 1)).view(np.int64)
        beyond = (descriptor & ((1 << self._offset_bits) - 1)) >= self._file.size
        wrong = np.where(packed, beyond | self._external, wrong)
        kinds[packed] = Kind.PACKED
        return kinds, np.where(packed, descriptor, offsets), wrong

    def _unpack(self, place: int) -> bytes:
        """A compressed cluster from its descriptor ("Compressed Clusters Descriptor")."""
        offset, sectors = place & ((1 << self._offset_bits) - 1), place >> self._offset_bits
        length = min((sectors + 1) * _SECTOR - offset % _SECTOR, self._file.size - offset)
        data = read_exactly(self._file, offset, length, "a compressed cluster")
        if self._header.further.compression_type == ZSTD:
            return unzstd(data, self._header.cluster)
        return inflate(data, self._header.cluster, wbits=_RAW_DEFLATE)


# ---------------------------------------------------------------------- internal snapshots, and what is told


def _disks(
    taken: list[Snapshot], tables: _Tables, source: Callable[[TwoLevels, int], Source]
) -> dict[str, Callable[[], Source]]:
    """The internal snapshots by name; by id where they have no name, or one that another has."""
    disks: dict[str, Callable[[], Source]] = {}
    for one in taken:
        name = one.name if one.name and one.name not in disks else one.id
        disks.setdefault(name, lambda one=one: source(tables.layout(one.l1_offset, one.l1_size), one.disk_size))  # type: ignore[misc]
    return disks


def _snapshot_facts(one: Snapshot) -> dict[str, object]:
    return {
        "id": one.id,
        "name": one.name,
        "created": datetime.fromtimestamp(one.seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "disk_size": one.disk_size,
        "vm_state_size": one.vm_state_size,
        "vm_clock": one.vm_clock,
    }


def _facts(header: Header) -> dict[str, object]:
    further, told = header.further, header.text(EXT_BACKING_FORMAT)
    data_file = header.text(EXT_DATA_FILE) if further.incompatible_features & DATA_FILE else None
    return {
        "compat": "0.10" if header.base.version == 2 else "1.1",
        "unit": header.cluster,
        "compression": "zstd" if further.compression_type == ZSTD else "zlib",
        "refcount_bits": 1 << further.refcount_order,
        "lazy_refcounts": bool(further.compatible_features & LAZY_REFCOUNTS),
        "extended_l2": header.extended,
        "dirty": bool(further.incompatible_features & DIRTY),
        "corrupt": bool(further.incompatible_features & CORRUPT),
        "encrypted": header.base.crypt_method != 0,
        "backing": {"name": header.backing, "format": told} if header.backing else None,
        "data_file": data_file,
        "data_file_raw": bool(data_file and further.autoclear_features & RAW_DATA_FILE),
        "files": [data_file] if data_file else [],
    }
