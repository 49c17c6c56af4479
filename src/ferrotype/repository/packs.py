"""Packs: many sealed frames in one object, with a table of what they are.

    | PackHeader 32 | sealed table | frame | frame | frame ...

The table lists (chunk id, frame length) in order.  It stands in front and is sealed like a chunk; the pack's name is
the keyed hash of salt and table, so a pack cannot be passed off as another, and each frame proves itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Annotated, Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import CorruptChunk, CorruptObject
from ferrotype.objects import ObjectStore
from ferrotype.records import Record, b4, b16, record, u32
from ferrotype.repository.sealing import ID_SIZE, MAX_PLAIN, ChunkId, Sealer

PREFIX: Final = "pack/"
MAGIC: Final = b"FPCK"
_KIND: Final = "pack"
MAX_FRAMES: Final = 1 << 18  # a table stays well under the largest plaintext

TABLE: Final = np.dtype([("id", f"V{ID_SIZE}"), ("length", "<u4")])


@record(endian="<", size=32)
class PackHeader(Record):
    """In front of a pack's table."""

    magic: b4
    version: u32
    table_length: u32  # bytes of the sealed table
    count: u32  # frames
    salt: b16


@dataclass(slots=True)
class PackBuilder:
    """Frames gathered for the next pack."""

    ids: list[bytes] = field(default_factory=list)
    frames: list[bytes] = field(default_factory=list)
    size: int = 0  # bytes of the frames

    def add(self, chunk_id: bytes, frame: bytes) -> int:
        """Append a frame; its offset among the pack's frames."""
        offset = self.size
        self.ids.append(chunk_id)
        self.frames.append(frame)
        self.size += len(frame)
        return offset

    def build(self, sealer: Sealer) -> tuple[str, list[bytes], int]:
        """Name, parts, and the offset at which the frames begin.  Copies no frame."""
        table = np.zeros(len(self.ids), TABLE)
        table["id"] = np.frombuffer(b"".join(self.ids), f"V{ID_SIZE}")
        table["length"] = [len(frame) for frame in self.frames]
        salt = os.urandom(16)
        plain = table.tobytes()
        pack_id = sealer.object_id(_KIND, salt + plain)
        sealed = sealer.seal(pack_id, plain, compress=False)
        header = PackHeader(MAGIC, 1, len(sealed), len(self.ids), salt).pack()
        return PREFIX + pack_id.hex(), [header, sealed, *self.frames], len(header) + len(sealed)


@dataclass(frozen=True, slots=True)
class PackTable:
    """What a pack holds: ids, and where each frame stands in the object."""

    ids: Annotated[NDArray[np.void], "n x 32 bytes"]
    offsets: NDArray[np.int64]
    lengths: NDArray[np.int64]
    end: int  # bytes of the object

    def __len__(self) -> int:
        return len(self.ids)

    def id(self, index: int) -> ChunkId:
        return ChunkId(self.ids[index].tobytes())


def read_table(store: ObjectStore, name: str, sealer: Sealer) -> PackTable:
    """The proven table of a pack.  Raises CorruptObject."""
    size = store.size(name)
    head = store.get(name, 0, min(size, PackHeader.SIZE))
    header = read_header(name, head, sealer)
    if PackHeader.SIZE + header.table_length > size:
        raise CorruptObject(name, "its header is wrong")
    table = open_table(name, header, store.get(name, PackHeader.SIZE, header.table_length), sealer)
    if table.end != size:
        raise CorruptObject(name, "its table does not match its length")
    return table


def read_header(name: str, head: bytes, sealer: Sealer) -> PackHeader:
    """Raises CorruptObject."""
    if len(head) < PackHeader.SIZE:
        raise CorruptObject(name, "it is cut short")
    header = PackHeader.unpack(head)
    if (
        header.magic != MAGIC
        or header.version != 1
        or header.count > MAX_FRAMES
        or header.table_length != header.count * TABLE.itemsize + sealer.overhead
    ):
        raise CorruptObject(name, "its header is wrong")
    return header


def open_table(name: str, header: PackHeader, sealed: bytes, sealer: Sealer) -> PackTable:
    """A sealed table, proven to be that of the pack ``name``.  Raises CorruptObject."""
    try:
        pack_id = bytes.fromhex(name.removeprefix(PREFIX))
        plain = sealer.open(pack_id, sealed)
    except (ValueError, CorruptChunk) as error:
        raise CorruptObject(name, "its table cannot be opened") from error
    if sealer.object_id(_KIND, header.salt + plain) != pack_id or len(plain) != header.count * TABLE.itemsize:
        raise CorruptObject(name, "its table does not match its name")
    table = np.frombuffer(plain, TABLE)
    lengths = table["length"].astype(np.int64)
    if lengths.max(initial=0) > MAX_PLAIN + sealer.overhead:
        raise CorruptObject(name, "its table names a frame that is longer than any")
    start = PackHeader.SIZE + header.table_length
    return PackTable(table["id"], start + np.cumsum(lengths) - lengths, lengths, start + int(lengths.sum()))


def name_of_table(header: PackHeader, sealed: bytes, sealer: Sealer) -> str | None:
    """What the pack is called, if anybody without its name can tell: in an image that is not encrypted."""
    if sealer.encrypted:
        return None
    try:
        return PREFIX + sealer.object_id(_KIND, header.salt + sealer.open(bytes(16), sealed)).hex()
    except CorruptChunk:
        return None
