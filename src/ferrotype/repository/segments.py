"""A segment of the index: entries for many chunks, one immutable object.

    | SegmentHeader 48 | sealed directory | page | page | page ...

    directory   the packs the segment refers to, and of each page: first key, keyed hash, offset, length
    page        up to 1,024 entries of 44 bytes, ascending by id, sealed on its own

Opening one reads its directory; a lookup reads one page, and proves it.  Pages that were used last stay in memory, as
many as a cache that all segments share has room for.  Many ids at once are looked up with whole pages, by numpy.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock
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
KIND: Final = "index"
MAGIC: Final = b"FIDX"
_MAX_DIRECTORY: Final = 1 << 30
_MOST_ALIKE: Final = (
    1024  # entries that share the leading bytes of their ids: made-up ones could make lookups endless
)
_KEPT: Final = 64 << 20  # bytes of pages that stay in memory: 1,450 pages, 1.5 million chunks
_SWEEP: Final = 256  # pages read at once where all are: 11 MiB

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


# ---------------------------------------------------------------------- directories

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


class PageCache:
    """Proven pages of any number of segments; the least recently used ones go first."""

    def __init__(self, room: int = _KEPT) -> None:
        """``room`` in bytes."""
        self._room = room
        self._pages: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = Lock()

    def get(self, segment: str, number: int) -> bytes | None:
        with self._lock:
            page = self._pages.get((segment, number))
            if page is not None:
                self._pages.move_to_end((segment, number))
            return page

    def keep(self, segment: str, number: int, page: bytes) -> None:
        with self._lock:
            if (segment, number) not in self._pages:
                self._pages[segment, number] = page
                self._room -= len(page)
            while self._room < 0:
                self._room += len(self._pages.popitem(last=False)[1])


class Segment:
    """One opened segment."""

    def __init__(self, store: ObjectStore, name: str, sealer: Sealer, cache: PageCache | None = None) -> None:
        """Reads and proves the directory.  Raises CorruptObject."""
        self.name = name
        self._store = store
        self._sealer = sealer
        self._cache = cache or PageCache()
        header, directory, start = _open_directory(store, name, sealer)
        self.count = header.count
        self.packs = directory.packs
        self.firsts: Keys = np.frombuffer(directory.first_keys, ">u8").astype(np.uint64)
        self._first_list: list[int] | None = None
        self._hashes = directory.page_hashes
        self._lengths = np.array(directory.frame_lengths, np.int64)
        self._offsets = start + np.cumsum(self._lengths) - self._lengths
        self._misses = 0  # lookups whose page was not in memory
        self._prefixes = b""  # which leading bits of ids there are, once that has paid
        self._counting = Lock()

    @property
    def page_count(self) -> int:
        return len(self.firsts)

    def page(self, number: int) -> Entries:
        """The proven entries of one page."""
        return np.frombuffer(self._page(number), ENTRY)

    def _page(self, number: int) -> bytes:
        known = self._cache.get(self.name, number)
        if known is None:
            self._misses += 1
            frame = self._store.get(self.name, int(self._offsets[number]), int(self._lengths[number]))
            known = self._prove(number, frame)
            self._cache.keep(self.name, number, known)
        return known

    def pages(self, first: int, end: int) -> Entries:
        """The proven entries of neighbouring pages, read at once and not kept."""
        if first >= end:
            return np.zeros(0, ENTRY)
        base = int(self._offsets[first])
        data = memoryview(
            self._store.get(self.name, base, int(self._offsets[end - 1] + self._lengths[end - 1]) - base)
        )
        plains = []
        for number in range(first, end):
            at = int(self._offsets[number]) - base
            plains.append(self._prove(number, data[at : at + int(self._lengths[number])]))
        return np.frombuffer(b"".join(plains), ENTRY)

    def sweep(self) -> Iterator[Entries]:
        """All entries in order, a bounded number at a time; none of them is kept."""
        for first in range(0, self.page_count, _SWEEP):
            yield self.pages(first, min(first + _SWEEP, self.page_count))

    def entries(self) -> Entries:
        """All entries: 44 bytes for each chunk of the segment.  ``sweep`` needs no more than a few MiB."""
        return np.concatenate([np.zeros(0, ENTRY), *self.sweep()])

    def find(self, chunk_id: bytes) -> Location | None:
        """Where one chunk stands."""
        entry = self._entry(chunk_id)
        if entry is None:
            return None
        _, pack, offset, length = entry.item()
        return Location(self.packs[pack], offset, length)

    def _entry(self, chunk_id: bytes) -> np.void | None:
        if self._first_list is None:
            self._first_list = self.firsts.tolist()
        start = chunk_id[:8]
        key = int.from_bytes(start, "big")
        if not self._may_have(key):
            return None
        number = bisect.bisect_right(self._first_list, key) - 1
        alike = 0
        while number >= 0:
            page = self._page(number)
            at = _first_at(page, start)
            while page[at : at + 8] == start:
                if page[at : at + ID_SIZE] == chunk_id:
                    entry: np.void = np.frombuffer(page, ENTRY)[at // ENTRY.itemsize]
                    return entry
                at += ENTRY.itemsize
                alike += 1
                if alike > _MOST_ALIKE:
                    raise CorruptObject(self.name, "more of its entries look alike than can be by chance")
            if self._first_list[number] != key:
                return None
            number -= 1  # the same leading bytes may begin on the page before
        return None

    def _may_have(self, key: int) -> bool:
        """False where no entry has such a key.

        Most lookups of a backup are for chunks that are new, and each reads and proves a page where the cache does
        not hold them all.  Once as many were read as there are, all are gone through, and from then on one to two
        bytes for each entry answer seven of eight such lookups.
        """
        if not self._prefixes:
            if self._misses <= self.page_count or not self._counting.acquire(blocking=False):
                return True
            try:
                self._prefixes = self._found_prefixes()
            finally:
                self._counting.release()
        bit = key >> (64 - self._prefix_bits)
        return bool(self._prefixes[bit >> 3] >> (bit & 7) & 1)

    def _found_prefixes(self) -> bytes:
        found = np.zeros(1 << (self._prefix_bits - 3), np.uint8)
        for entries in self.sweep():
            bits = keys_of(entries["id"]) >> np.uint64(64 - self._prefix_bits)
            np.bitwise_or.at(
                found, (bits >> np.uint64(3)).astype(np.int64), np.left_shift(1, bits & np.uint64(7)).astype(np.uint8)
            )
        return found.tobytes()

    @property
    def _prefix_bits(self) -> int:
        return max(3, (8 * self.count - 1).bit_length())

    def find_many(self, ids: NDArray[np.void]) -> tuple[NDArray[np.int64], Entries]:
        """Positions in ``ids`` that were found, and their entries (``pack`` indexes ``packs``)."""
        if self.page_count == 0 or len(ids) == 0:
            return np.zeros(0, np.int64), np.zeros(0, ENTRY)
        keys = keys_of(ids)
        order = np.argsort(keys, kind="stable")
        numbers = np.searchsorted(self.firsts, keys[order], "right") - 1
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

    def _prove(self, number: int, frame: bytes | memoryview) -> bytes:
        page_hash = self._hashes[number * OBJECT_ID_SIZE : (number + 1) * OBJECT_ID_SIZE]
        try:
            plain = self._sealer.open(page_hash, frame)
        except CorruptChunk as error:
            raise CorruptObject(self.name, f"page {number} cannot be opened") from error
        entries = min(PAGE_ENTRIES, self.count - number * PAGE_ENTRIES)
        if self._sealer.object_id(KIND, plain) != page_hash or len(plain) != entries * ENTRY.itemsize:
            raise CorruptObject(self.name, f"page {number} does not match its hash")
        page = np.frombuffer(plain, ENTRY)
        if int(page["pack"].max()) >= len(self.packs):
            raise CorruptObject(self.name, f"page {number} refers to a pack that is not listed")
        if int(page["length"].max()) > MAX_PLAIN + self._sealer.overhead:
            raise CorruptObject(self.name, f"page {number} names a frame that is longer than any")
        return plain


def _first_at(page: bytes, start: bytes) -> int:
    """Where on a page the first entry stands whose id is not below ``start``; its end if there is none."""
    low, high = 0, len(page) // ENTRY.itemsize
    while low < high:
        middle = (low + high) // 2
        at = middle * ENTRY.itemsize
        if page[at : at + 8] < start:
            low = middle + 1
        else:
            high = middle
    return low * ENTRY.itemsize


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
        header.magic != MAGIC
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
        sealer.object_id(KIND, unsized.pack() + plain) != segment_id
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
