"""A segment of the index: entries for many chunks, one immutable object.

    | SegmentHeader 48 | sealed directory | page | page | page ...

    directory   the packs the segment refers to, and of each page: first key, keyed hash, offset, length
    page        up to 1,024 entries of 44 bytes, ascending by id, sealed on its own

Opening one reads its directory; a lookup reads one page, and pages stay in memory as they are needed.  Many ids at
once are looked up with whole pages at a time, by numpy.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import CorruptChunk, CorruptObject
from ferrotype.objects import ObjectStore
from ferrotype.records import Record, b4, b16, record, u32, u64
from ferrotype.repository.sealing import ID_SIZE, MAX_PLAIN, OBJECT_ID_SIZE, Sealer

PREFIX: Final = "index/"
PAGE_ENTRIES: Final = 1024
_KIND: Final = "index"
_MAGIC: Final = b"FIDX"
_MAX_DIRECTORY: Final = 1 << 30
_MOST_ALIKE: Final = (
    1024  # entries that share the leading bytes of their ids: made-up ones could make lookups endless
)

ENTRY: Final = np.dtype([("id", f"V{ID_SIZE}"), ("pack", "<u4"), ("offset", "<u4"), ("length", "<u4")])
Entries = NDArray[np.void]
Keys = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Location:
    """Where a frame stands: pack name, offset in the pack object, length; bytes."""

    pack: str
    offset: int
    length: int


@record(endian="<", size=48)
class SegmentHeader(Record):
    """In front of a segment."""

    magic: b4
    version: u32
    count: u64
    directory_length: u64
    salt: b16
    spare: u64


class Directory(msgspec.Struct, array_like=True, frozen=True):
    """What a segment's pages are, without their entries."""

    packs: list[str]
    first_keys: bytes  # u64 big-endian, the first eight bytes of each page's first id
    page_hashes: bytes  # 16 bytes a page
    frame_lengths: list[int]


def keys_of(ids: NDArray[np.void]) -> Keys:
    """The first eight bytes of each id as a number that sorts like the id."""
    raw = np.ascontiguousarray(ids).view(np.uint8).reshape(-1, ids.dtype.itemsize)
    return np.ascontiguousarray(raw[:, :8]).view(">u8").ravel().astype(np.uint64)


def sorted_entries(entries: Entries) -> Entries:
    """By id: the order of a segment.  Only the leading eight bytes count: lookups expect ids that share them."""
    return entries[np.argsort(keys_of(entries["id"]), kind="stable")]


def only_used(entries: Entries, packs: Sequence[str]) -> tuple[Entries, list[str]]:
    """The entries, and only those packs they refer to.

    A segment that listed a pack without its chunks would make it look empty, or known, to whoever asks for packs.
    """
    used, numbers = np.unique(entries["pack"], return_inverse=True)
    entries = entries.copy()
    entries["pack"] = numbers
    return entries, [packs[number] for number in used.tolist()]


# ---------------------------------------------------------------------- writing


def build_segment(entries: Entries, packs: Sequence[str], sealer: Sealer, salt: bytes) -> tuple[str, list[bytes]]:
    """Name and parts of a segment holding ``entries``, whose ``pack`` numbers index ``packs``."""
    entries = sorted_entries(entries)
    pages = [entries[at : at + PAGE_ENTRIES].tobytes() for at in range(0, len(entries), PAGE_ENTRIES)]
    hashes = [sealer.object_id(_KIND, page) for page in pages]
    frames = [sealer.seal(h, page, compress=False) for h, page in zip(hashes, pages, strict=True)]
    firsts = keys_of(entries["id"][::PAGE_ENTRIES]).astype(">u8").tobytes()
    directory = msgspec.msgpack.encode(Directory(list(packs), firsts, b"".join(hashes), [len(f) for f in frames]))
    header = SegmentHeader(_MAGIC, 1, len(entries), 0, salt, 0)
    segment_id = sealer.object_id(_KIND, header.pack() + directory)
    sealed = seal_long(sealer, segment_id, directory)
    final = SegmentHeader(_MAGIC, 1, len(entries), len(sealed), salt, 0)
    return PREFIX + segment_id.hex(), [final.pack(), sealed, *frames]


_PIECE: Final = 8 << 20
_MOST_RATIO: Final = 8  # bytes of plaintext for one that is stored; hashes do not compress, names of packs do by half
_LEAST_ROOM: Final = 64 << 10


def seal_long(sealer: Sealer, object_id: bytes, plain: bytes) -> bytes:
    """Frames of pieces of a plaintext of any length, each behind its own length as u32."""
    out = []
    for number, at in enumerate(range(0, max(len(plain), 1), _PIECE)):
        frame = sealer.seal(object_id + number.to_bytes(4, "little"), plain[at : at + _PIECE])
        out += [len(frame).to_bytes(4, "little"), frame]
    return b"".join(out)


def open_long(sealer: Sealer, object_id: bytes, read: Callable[[int, int], bytes], length: int) -> bytes:
    """What ``seal_long`` sealed into ``length`` bytes, ``read`` (offset, length) piece by piece.

    Raises CorruptChunk, also where it unpacks to far more than a directory does: before that takes any memory.
    """
    out: list[bytes] = []
    at = number = 0
    room = _LEAST_ROOM + _MOST_RATIO * length
    while at < length:
        size = int.from_bytes(read(at, min(4, length - at)), "little")
        at += 4
        if size > min(length - at, MAX_PLAIN + sealer.overhead):
            raise CorruptChunk(object_id, "a piece is cut short, or longer than any")
        out.append(sealer.open(object_id + number.to_bytes(4, "little"), read(at, size)))
        room -= len(out[-1])
        if room < 0:
            raise CorruptChunk(object_id, "it unpacks to more than it can hold")
        at, number = at + size, number + 1
    return b"".join(out)


# ---------------------------------------------------------------------- reading


class Segment:
    """One opened segment."""

    def __init__(self, store: ObjectStore, name: str, sealer: Sealer) -> None:
        """Reads and proves the directory.  Raises CorruptObject."""
        self.name = name
        self._store = store
        self._sealer = sealer
        self._pages: dict[int, Entries] = {}
        header, directory, start = _open_directory(store, name, sealer)
        self.count = header.count
        self.packs = directory.packs
        self._firsts = np.frombuffer(directory.first_keys, ">u8").astype(np.uint64)
        self._first_list: list[int] | None = None
        self._hashes = directory.page_hashes
        self._lengths = np.array(directory.frame_lengths, np.int64)
        self._offsets = start + np.cumsum(self._lengths) - self._lengths

    @property
    def page_count(self) -> int:
        return len(self._firsts)

    def page(self, number: int) -> Entries:
        """The proven entries of one page."""
        known = self._pages.get(number)
        if known is None:
            frame = self._store.get(self.name, int(self._offsets[number]), int(self._lengths[number]))
            known = self._pages[number] = self._prove(number, frame)
        return known

    def entries(self) -> Entries:
        """All entries, read in one sweep."""
        if self.page_count == 0:
            return np.zeros(0, ENTRY)
        step = 256
        for first in range(0, self.page_count, step):
            last = min(first + step, self.page_count)
            if all(n in self._pages for n in range(first, last)):
                continue
            base = int(self._offsets[first])
            data = memoryview(
                self._store.get(self.name, base, int(self._offsets[last - 1] + self._lengths[last - 1]) - base)
            )
            for n in range(first, last):
                at = int(self._offsets[n]) - base
                self._pages[n] = self._prove(n, data[at : at + int(self._lengths[n])])
        return np.concatenate([self._pages[n] for n in range(self.page_count)])

    def release(self) -> None:
        """Let go of the pages held in memory."""
        self._pages.clear()

    def find(self, chunk_id: bytes) -> Location | None:
        """Where one chunk stands."""
        entry = self._entry(chunk_id)
        if entry is None:
            return None
        _, pack, offset, length = entry.item()
        return Location(self.packs[pack], offset, length)

    def _entry(self, chunk_id: bytes) -> np.void | None:
        if self._first_list is None:
            self._first_list = self._firsts.tolist()
        key = int.from_bytes(chunk_id[:8], "big")
        number = bisect.bisect_right(self._first_list, key) - 1
        alike = 0
        while number >= 0:
            page = self.page(number)
            at = int(np.searchsorted(_page_keys(page), key))
            while at < len(page) and page["id"][at].tobytes()[:8] == chunk_id[:8]:
                if page["id"][at].tobytes() == chunk_id:
                    entry: np.void = page[at]
                    return entry
                at += 1
                alike += 1
                if alike > _MOST_ALIKE:
                    raise CorruptObject(self.name, "more of its entries look alike than can be by chance")
            if self._first_list[number] != key:
                return None
            number -= 1  # the same leading bytes may begin on the page before
        return None

    def find_many(self, ids: NDArray[np.void]) -> tuple[NDArray[np.int64], Entries]:
        """Positions in ``ids`` that were found, and their entries (``pack`` indexes ``packs``)."""
        if self.page_count == 0 or len(ids) == 0:
            return np.zeros(0, np.int64), np.zeros(0, ENTRY)
        keys = keys_of(ids)
        order = np.argsort(keys, kind="stable")
        numbers = np.searchsorted(self._firsts, keys[order], "right") - 1
        positions, entries = [], []
        edges = np.flatnonzero(np.diff(numbers, prepend=-2, append=self.page_count + 1))
        for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            number = int(numbers[start])
            if number < 0:
                continue
            page = self.page(number)
            wanted = order[start:end]
            page_keys = _page_keys(page)
            at = np.minimum(np.searchsorted(page_keys, keys[wanted]), len(page) - 1)
            hit = page["id"][at] == ids[wanted]
            positions.append(wanted[hit])
            entries.append(page[at[hit]])
            # Another id with the same leading bytes may stand before the one that is meant.
            for position in wanted[~hit & (page_keys[at] == keys[wanted])].tolist():
                if (entry := self._entry(ids[position].tobytes())) is not None:
                    positions.append(np.array([position], np.int64))
                    entries.append(np.array([entry], ENTRY))
        if not positions:
            return np.zeros(0, np.int64), np.zeros(0, ENTRY)
        return np.concatenate(positions), np.concatenate(entries)

    def _prove(self, number: int, frame: bytes | memoryview) -> Entries:
        page_hash = self._hashes[number * OBJECT_ID_SIZE : (number + 1) * OBJECT_ID_SIZE]
        try:
            plain = self._sealer.open(page_hash, frame)
        except CorruptChunk as error:
            raise CorruptObject(self.name, f"page {number} cannot be opened") from error
        entries = min(PAGE_ENTRIES, self.count - number * PAGE_ENTRIES)
        if self._sealer.object_id(_KIND, plain) != page_hash or len(plain) != entries * ENTRY.itemsize:
            raise CorruptObject(self.name, f"page {number} does not match its hash")
        page = np.frombuffer(plain, ENTRY)
        if int(page["pack"].max()) >= len(self.packs):
            raise CorruptObject(self.name, f"page {number} refers to a pack that is not listed")
        if int(page["length"].max()) > MAX_PLAIN + self._sealer.overhead:
            raise CorruptObject(self.name, f"page {number} names a frame that is longer than any")
        return page


def _page_keys(page: Entries) -> Keys:
    return keys_of(page["id"])


def _open_directory(store: ObjectStore, name: str, sealer: Sealer) -> tuple[SegmentHeader, Directory, int]:
    size = store.size(name)
    if size < SegmentHeader.SIZE:
        raise CorruptObject(name, "it is cut short")
    header = SegmentHeader.unpack(store.get(name, 0, SegmentHeader.SIZE))
    start = SegmentHeader.SIZE + header.directory_length
    pages = -(-header.count // PAGE_ENTRIES)
    if (
        header.magic != _MAGIC
        or header.version != 1
        or header.directory_length > _MAX_DIRECTORY
        or start + header.count * ENTRY.itemsize + pages * sealer.overhead != size
    ):
        raise CorruptObject(name, "its header is wrong")

    def read(offset: int, length: int) -> bytes:
        return store.get(name, SegmentHeader.SIZE + offset, length)

    try:
        segment_id = bytes.fromhex(name.removeprefix(PREFIX))
        plain = open_long(sealer, segment_id, read, header.directory_length)
        directory = msgspec.msgpack.decode(plain, type=Directory)
    except (ValueError, CorruptChunk, msgspec.DecodeError, RecursionError) as error:
        raise CorruptObject(name, "its directory cannot be read") from error
    unsized = SegmentHeader(header.magic, header.version, header.count, 0, header.salt, header.spare)
    if (
        sealer.object_id(_KIND, unsized.pack() + plain) != segment_id
        or len(directory.first_keys) != 8 * pages
        or len(directory.page_hashes) != OBJECT_ID_SIZE * pages
        or len(directory.frame_lengths) != pages
        or any(
            length != sealer.overhead + ENTRY.itemsize * min(PAGE_ENTRIES, header.count - PAGE_ENTRIES * page)
            for page, length in enumerate(directory.frame_lengths)
        )
    ):
        raise CorruptObject(name, "its directory does not match its name")
    return header, directory, start


def merged(segments: Iterable[Segment]) -> tuple[Entries, list[str]]:
    """The entries of several segments with one list of packs."""
    packs: dict[str, int] = {}
    parts = []
    for segment in segments:
        renumbered = np.array([packs.setdefault(name, len(packs)) for name in segment.packs], np.uint32)
        entries = segment.entries().copy()
        entries["pack"] = renumbered[entries["pack"]]
        parts.append(entries)
    return (np.concatenate(parts) if parts else np.zeros(0, ENTRY)), list(packs)
