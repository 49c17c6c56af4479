"""QED: "QEMU enhanced disk", a simple format that came before qcow2 version 3, read only.

    cluster 0     header of 64 bytes ... | name of the backing file
    L1 table      table_size clusters: offset of an L2 table, or 0
    L2 table      as large: offset of a cluster; 0: the backing file's; 1: zeros
    clusters      data

Written from "QED Image File Format" (docs/interop/qed_spec of QEMU).  All numbers are little-endian.
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
from ferrotype.formats.levels import BAD, Geometry, TwoLevels, Words, read_first_level
from ferrotype.formats.mapped import Kind, MappedSource
from ferrotype.formats.outside import attempt
from ferrotype.formats.related import Related
from ferrotype.records import Record, b4, record, u32, u64
from ferrotype.units import KiB, MiB

__all__ = ["open", "probe"]

_MAGIC: Final = b"QED\0"
_BACKING_FILE, _NEED_CHECK, _BACKING_RAW = 1, 2, 4  # features
_MOST_NAME: Final = 1023  # bytes


@record(endian="<", size=64)
class QedHeader(Record):
    """ "Header"."""

    magic: b4
    cluster_size: u32  # bytes
    table_size: u32  # clusters
    header_size: u32  # clusters
    features: u64
    compat_features: u64
    autoclear_features: u64
    l1_table_offset: u64
    image_size: u64
    backing_filename_offset: u32
    backing_filename_size: u32

    @property
    def header_bytes(self) -> int:
        return self.header_size * self.cluster_size


def probe(file: Source) -> bool:
    return read(file, 0, min(4, file.size)) == _MAGIC


def open(file: Source, related: Related) -> Image:
    """Open the image with its backing chain.  ``missing``: the backing file."""
    header = QedHeader.unpack(read(file, 0, min(QedHeader.SIZE, file.size)))
    _check(header)
    name = _backing_name(file, header)
    format = "raw" if header.features & _BACKING_RAW else None
    dirty = bool(header.features & _NEED_CHECK)
    with ExitStack() as stack:
        layout = _layout(file, header)
        parent, missing = attempt(lambda: open_backing(related, name, format)) if name is not None else (None, None)
        if parent is not None:
            stack.callback(parent.close)
        source = MappedSource(
            file,
            layout,
            header.image_size,
            name="QED image",
            parent=parent.source if parent else None,
            ragged=header.cluster_size - 1,
        )
        stack.callback(file.close)
        warning = "the image was not closed cleanly, or is in use: its tables may be damaged"
        return Image(
            "qed",
            source,
            facts={
                "unit": header.cluster_size,
                "dirty": dirty,
                "encrypted": False,
                "backing": {"name": name, "format": format} if name is not None else None,
            },
            warnings=(*((warning,) if dirty else ()), *(parent.warnings if parent else ())),
            close=stack.pop_all().close,
            missing=missing,
        )


def _check(header: QedHeader) -> None:
    cluster, table = header.cluster_size, header.table_size
    if header.magic != _MAGIC:
        raise InvalidImage("this is no QED image", offset=0, field="magic")
    if not 4 * KiB <= cluster <= 64 * MiB or cluster & (cluster - 1):
        raise InvalidImage(f"clusters of {cluster} bytes", field="cluster_size")
    if not 1 <= table <= 16 or table & (table - 1):
        raise InvalidImage(f"tables of {table} clusters", field="table_size")
    unknown = header.features & ~(_BACKING_FILE | _NEED_CHECK | _BACKING_RAW)
    if unknown:
        raise UnsupportedError(f"the image asks for features that are not known: {unknown:#x}", field="features")
    if header.header_size < 1 or header.l1_table_offset < header.header_bytes or header.l1_table_offset % cluster:
        raise InvalidImage(f"the L1 table at {header.l1_table_offset}", field="l1_table_offset")
    most = (cluster * table // 8) ** 2 * cluster
    if header.image_size > min(most, MAX_SIZE):
        raise InvalidImage(f"a disk of {header.image_size} bytes", field="image_size")


def _backing_name(file: Source, header: QedHeader) -> str | None:
    if not header.features & _BACKING_FILE:
        return None
    start, size = header.backing_filename_offset, header.backing_filename_size
    if start < QedHeader.SIZE or not 0 < size <= _MOST_NAME or start + size > header.header_bytes:
        raise InvalidImage("the backing file name does not lie in the header", field="backing_filename_offset")
    return os.fsdecode(read_exactly(file, start, size, "the backing file name"))


def _layout(file: Source, header: QedHeader) -> TwoLevels:
    cluster = header.cluster_size
    geometry = Geometry(cluster, cluster * header.table_size // 8, order="<u8")
    entries = -(-header.image_size // geometry.reach)
    first = read_first_level(
        file, header.l1_table_offset, entries, geometry, align=cluster, taken=[(0, header.header_bytes)]
    )

    def decode(words: Words) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        places = words[:, 0].view(np.int64)
        kinds = np.full(len(places), Kind.STORED, np.uint8)
        wrong = (places < header.header_bytes) | (places % cluster != 0) | (places >= file.size)
        kinds[wrong] = BAD
        kinds[places == 0] = Kind.HOLE
        kinds[places == 1] = Kind.ZERO
        return kinds, places

    return TwoLevels(file, geometry, first, decode)


def parents_named(file: Source) -> list[str]:
    """The name of the backing file.  Raises InvalidImage and UnsupportedError."""
    header = QedHeader.unpack(read(file, 0, min(QedHeader.SIZE, file.size)))
    _check(header)
    name = _backing_name(file, header)
    return [] if name is None else [name]
