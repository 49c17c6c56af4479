"""The chunks that are left in a damaged image, from every place that says where one is.

    pack tables        of every pack whose table can be read, wherever its record header went
    index segments     for packs whose table is lost; pages that are damaged cost only themselves
    frames             of an image that is not encrypted: found by their heads, named by hashing what is in them

Each says only where to look: a chunk counts once its frame was opened and its content has the id that was asked for.
Memory: 53 bytes for each place where a chunk may stand, and a few times that while they are sorted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import CorruptChunk, CorruptObject, MissingChunk
from ferrotype.job import Job
from ferrotype.objects.layout import BLOCK, RecordHeader, padded
from ferrotype.objects.rescue import Piece, RescueStore
from ferrotype.pipeline import map_ordered
from ferrotype.repository import index as ix
from ferrotype.repository.packs import MAGIC, PackHeader, PackTable, name_of_table, open_table, read_header
from ferrotype.repository.packs import PREFIX as PACKS
from ferrotype.repository.sealing import FRAME_HEAD, ID_SIZE, MAX_PLAIN, ChunkId, Sealer
from ferrotype.units import GiB, KiB, MiB

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_WINDOW: Final = 8 * MiB  # bytes searched at a time
_BATCH: Final = MiB  # bytes of frames a worker proves at a time
_GAP: Final = 64 * KiB
_REACH: Final = GiB  # bytes that one piece of found frames covers: their offsets in it have 32 bits
_TRIES: Final = 5_000_000  # places at which packs without header are looked for
_FOLD: Final = 1 << 22  # needed keys gathered before they are sorted into the rest
_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"

PLACE: Final = np.dtype(
    [("id", f"V{ID_SIZE}"), ("piece", "<u4"), ("offset", "<u4"), ("length", "<u4"), ("good", "i1")]
)
Places = NDArray[np.void]
Ids = NDArray[np.void]
UNKNOWN, GOOD, BAD = 0, 1, -1


class Remains:
    """Where the chunks of a damaged image stand.  One thread owns it."""

    def __init__(self, store: RescueStore, sealer: Sealer, job: Job) -> None:
        """Reads all pack tables, and the index where one of them is lost."""
        self._store = store
        self._sealer = sealer
        self._job = job
        self._pieces: list[Piece] = []
        self._fresh: list[Places] = []
        self._places = np.zeros(0, PLACE)  # ascending by the leading eight bytes of the id
        self._keys = np.zeros(0, np.uint64)
        self._needed = np.zeros(0, np.uint64)
        self._asked: list[NDArray[np.uint64]] = []
        self._gather()
        self._settle()
        self._listed = len(self._pieces)  # behind them come those that only look like chunks

    # ------------------------------------------------------------------ gathering

    def _gather(self) -> None:
        packs = _named(self._store, PACKS)
        self._job.begin("reading the tables of packs", len(packs))
        tables: dict[str, PackTable] = {}
        for name, pieces in packs.items():
            if (table := self._first_table(name, pieces)) is not None:
                tables[name] = table
            self._job.advance(1)
        self._job.begin("looking for packs without a header")
        lacking = packs.keys() - tables.keys()
        segments, listed = self._segments()
        nameless = (listed | lacking) - tables.keys()
        for name, piece, table in self._nameless(nameless, tables, packs):
            tables.setdefault(name, table)
            packs.setdefault(name, []).append(piece)
        for name, table in tables.items():
            entries = np.zeros(len(table), ix.ENTRY)
            entries["id"], entries["offset"], entries["length"] = table.ids, table.offsets, table.lengths
            for piece in packs[name]:
                self._add(piece, entries)
        without = (listed | lacking) - tables.keys()
        if without:
            self._use_index(segments, without, packs)

    def _first_table(self, name: str, pieces: Sequence[Piece]) -> PackTable | None:
        for piece in pieces:
            try:
                header = read_header(name, self._store.read(piece, 0, PackHeader.SIZE), self._sealer)
                sealed = self._store.read(piece, PackHeader.SIZE, header.table_length)
                return open_table(name, header, sealed, self._sealer)
            except CorruptObject:
                continue
        return None

    def _segments(self) -> tuple[list[ix.Segment], set[str]]:
        """The index segments whose directory can be read, and the packs they list."""
        found = []
        for name, pieces in _named(self._store, ix.PREFIX).items():
            for piece in pieces:
                try:
                    found.append(ix.Segment(self._store.over({name: [piece]}), name, self._sealer))
                except CorruptObject:
                    continue
                break
        return found, {pack for segment in found for pack in segment.packs}

    def _nameless(
        self, names: set[str], tables: dict[str, PackTable], packs: dict[str, list[Piece]]
    ) -> Iterator[tuple[str, Piece, PackTable]]:
        """Packs whose record header is lost, found by their own: which they are, their table tells."""
        known = {(piece.volume, piece.start) for name in tables for piece in packs[name]}
        for piece, at in _sought(self._store, MAGIC, self._job):
            if (piece.volume, piece.start + at) in known:
                continue
            try:
                header = read_header("a pack", self._store.read(piece, at, PackHeader.SIZE), self._sealer)
            except CorruptObject:
                continue
            sealed = self._store.read(piece, at + PackHeader.SIZE, header.table_length)
            name = name_of_table(header, sealed, self._sealer)
            for candidate in [name] if name else sorted(names):
                try:
                    table = open_table(candidate, header, sealed, self._sealer)
                except CorruptObject:
                    continue
                yield candidate, Piece(piece.volume, piece.start + at, table.end), table
                break

    def _use_index(self, segments: Iterable[ix.Segment], names: set[str], packs: dict[str, list[Piece]]) -> None:
        """Entries of the index for packs that have no table any more."""
        by_pack: dict[str, list[ix.Entries]] = {}
        for segment in segments:
            wanted = np.array([name in names for name in segment.packs], bool)
            if not wanted.any():
                continue
            for number in range(segment.page_count):
                try:
                    page = segment.page(number)
                except CorruptObject:
                    continue
                for pack in np.unique(page["pack"][wanted[page["pack"]]]).tolist():
                    by_pack.setdefault(segment.packs[pack], []).append(page[page["pack"] == pack])
                segment.release()
        tries = _TRIES
        for name, parts in sorted(by_pack.items()):
            entries = np.concatenate(parts)
            pieces = list(packs.get(name, ()))
            if not any(self._proves(piece, entries) for piece in pieces):
                more, tries = self._placed(entries, tries)
                pieces += more
            for piece in pieces:
                self._add(piece, entries)

    def _proves(self, piece: Piece, entries: ix.Entries) -> bool:
        """Whether one of a few frames of a pack can be opened where the pack would have it."""
        return any(
            self._opens(piece, entries[at].item()) for at in np.linspace(0, len(entries) - 1, 5).astype(int).tolist()
        )

    def _opens(self, piece: Piece, entry: tuple[bytes, int, int, int]) -> bool:
        chunk_id, _, offset, length = entry
        try:
            self._sealer.unseal(bytes(chunk_id), self._store.read(piece, offset, length))
        except CorruptChunk:
            return False
        return True

    def _placed(self, entries: ix.Entries, tries: int) -> tuple[list[Piece], int]:
        """Where a pack stands that nothing but the index knows: at a block, counted from a record that is whole."""
        found: list[Piece] = []
        entries = entries[np.argsort(entries["offset"])]
        size = int((entries["offset"].astype(np.int64) + entries["length"]).max())
        span = padded(RecordHeader.SIZE + size)
        for dark in self._store.dark():
            for end in sorted(self._store.grids(dark)):
                base = end - span
                while base < dark.length:
                    hole = self._store.stored_from(dark, max(base, 0)) - base - span
                    if hole >= BLOCK:  # all of it would be a hole, and so would the next ones
                        base += hole // BLOCK * BLOCK
                        continue
                    tries -= 1
                    if tries < 0:
                        return found, 0
                    self._job.advance(0)
                    piece = Piece(dark.volume, dark.start + base + RecordHeader.SIZE, size)
                    if self._looks_right(piece, dark, entries):
                        found.append(piece)
                    base += BLOCK
        return found, tries

    def _looks_right(self, piece: Piece, dark: Piece, entries: ix.Entries) -> bool:
        """Whether heads of frames stand where they should, and one of the frames can be opened."""
        low, high = dark.start - piece.start, dark.start + dark.length - piece.start
        inside = entries[
            (entries["offset"] >= low) & (entries["offset"] + entries["length"].astype(np.int64) <= high)
        ]
        if not len(inside):
            return False
        for number in np.unique(np.linspace(0, len(inside) - 1, 3).astype(int)).tolist():
            head = self._store.read(piece, int(inside["offset"][number]), FRAME_HEAD)
            if len(head) < FRAME_HEAD or head[0] > 1 or any(head[1:4]) or head[7] > 1:
                continue
            if self._opens(piece, inside[number].item()):
                return True
        return False

    # ------------------------------------------------------------------ frames by their looks

    def look_for_frames(self, lengths: set[int]) -> int:
        """Open whatever looks like a frame where no whole record stands; the number of those that are one.

        Only an image that is not encrypted tells ids by content.  ``lengths`` are those that chunks may have; frames
        that are not compressed have nothing else to know them by.
        """
        if self._sealer.encrypted:
            return 0
        found = 0
        self._job.begin("looking for chunks by their content", sum(piece.length for piece in self._store.dark()))
        for dark in self._store.dark():
            for low in range(0, dark.length, _REACH):
                piece = Piece(dark.volume, dark.start + low, min(_REACH, dark.length - low))
                entries = list(self._frames(piece, dark.length - low, lengths))
                if entries:
                    array = np.zeros(len(entries), ix.ENTRY)
                    array["id"] = np.frombuffer(b"".join(e[0] for e in entries), f"V{ID_SIZE}")
                    array["offset"], array["length"] = [e[1] for e in entries], [e[2] for e in entries]
                    self._add(Piece(piece.volume, piece.start, dark.length - low), array)
                    found += len(entries)
        self._settle()
        return found

    def _frames(self, piece: Piece, room: int, lengths: set[int]) -> Iterator[tuple[bytes, int, int]]:
        at = low = 0
        while low < piece.length:
            low = max(low, min(self._store.stored_from(piece, low), piece.length))
            data = self._store.read(piece, low, min(_WINDOW + MAX_PLAIN + 64, room - low))
            for head in _heads(data[: _WINDOW + FRAME_HEAD + 4], lengths):
                if low + head < at:
                    continue  # inside a frame that was decompressed
                self._job.advance(0)  # there may be millions of them, each as dear as a chunk
                opened = self._opened(memoryview(data)[head:])
                if opened is not None:
                    yield opened[0], low + head, opened[1]
                    if data[head]:  # one that is not compressed may be the beginning of one, and cover others
                        at = low + head + opened[1]
            self._job.advance(min(_WINDOW, piece.length - low))
            low += _WINDOW

    def _opened(self, view: memoryview) -> tuple[bytes, int] | None:
        """Id and length of the frame that begins here."""
        length = int.from_bytes(view[4:8], "little")
        if view[0]:
            decoder = zstd.ZstdDecompressor()
            try:
                plain = decoder.decompress(view[FRAME_HEAD : FRAME_HEAD + length], max_length=length + 1)
            except zstd.ZstdError:
                return None
            if len(plain) != length or not decoder.eof:
                return None
            used = min(length, len(view) - FRAME_HEAD) - len(decoder.unused_data)
            return self._sealer.id_of(plain), FRAME_HEAD + used
        if len(view) < FRAME_HEAD + length:
            return None
        return self._sealer.id_of(view[FRAME_HEAD : FRAME_HEAD + length]), FRAME_HEAD + length

    # ------------------------------------------------------------------ places

    def _add(self, piece: Piece, entries: ix.Entries) -> None:
        places = np.zeros(len(entries), PLACE)
        for column in ("id", "offset", "length"):
            places[column] = entries[column]
        places["piece"], places["good"] = len(self._pieces), UNKNOWN
        self._pieces.append(piece)
        self._fresh.append(places)

    def _settle(self) -> None:
        places = np.concatenate([self._places, *self._fresh])
        self._fresh = []
        keys = ix.keys_of(places["id"])
        order = np.argsort(keys, kind="stable")
        self._places, self._keys = places[order], keys[order]

    def chunk(self, chunk_id: ChunkId) -> bytes:
        """A chunk's proven plaintext, from whichever place has it.  Raises MissingChunk or CorruptChunk."""
        key = np.uint64(int.from_bytes(chunk_id[:8], "big"))
        low, high = np.searchsorted(self._keys, key, "left"), np.searchsorted(self._keys, key, "right")
        error: CorruptChunk | None = None
        for at in range(int(low), int(high)):
            place = self._places[at]
            if place["id"].tobytes() != chunk_id:
                continue
            try:
                plain = self._sealer.unseal(chunk_id, self._frame(at))
            except CorruptChunk as caught:
                error = caught
                self._places["good"][at] = BAD
                continue
            self._places["good"][at] = GOOD
            return plain
        raise error or MissingChunk(chunk_id)

    def _frame(self, at: int) -> bytes:
        _, piece, offset, length, _ = self._places[at].item()
        return self._store.read(self._pieces[piece], offset, length)

    # ------------------------------------------------------------------ what is needed

    def need(self, ids: Ids) -> None:
        """A snapshot refers to these chunks; eight bytes of memory for each."""
        self._asked.append(ix.keys_of(ids))
        if sum(map(len, self._asked)) > _FOLD:
            self._fold()

    def _fold(self) -> None:
        self._needed = np.unique(np.concatenate([self._needed, *self._asked]))
        self._asked = []

    def prove(self, workers: int) -> None:
        """Open every place of every chunk that is needed, once."""
        self._fold()
        wanted = np.flatnonzero((self._places["good"] == UNKNOWN) & _within(self._needed, self._keys))
        pieces = np.array([(p.volume, p.start) for p in self._pieces], np.int64).reshape(-1, 2)
        chosen = self._places[wanted]
        starts = pieces[chosen["piece"], 1] + chosen["offset"]
        order = wanted[np.lexsort((starts, pieces[chosen["piece"], 0]))]
        self._job.begin("proving chunks", int(chosen["length"].astype(np.int64).sum()))
        for batch, states, size in map_ordered(self._proven, self._batches(order), workers=workers):
            self._places["good"][batch] = states
            self._job.advance(size)

    def _batches(self, order: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Places that follow each other in a piece, about a MiB of them together."""
        places = self._places[order]
        first = 0
        for at in range(1, len(order) + 1):
            if at < len(order):
                before, here, begin = places[at - 1], places[at], int(places["offset"][first])
                gap = int(here["offset"]) - int(before["offset"]) - int(before["length"])
                end = int(here["offset"]) + int(here["length"])
                if here["piece"] == before["piece"] and 0 <= gap <= _GAP and end - begin <= _BATCH:
                    continue
            if at > first:
                yield order[first:at]
            first = at

    def _proven(self, batch: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int8], int]:
        places = self._places[batch]
        base = int(places["offset"][0])
        end = int(places["offset"][-1]) + int(places["length"][-1])
        data = memoryview(self._store.read(self._pieces[int(places["piece"][0])], base, end - base))
        states = np.full(len(batch), BAD, np.int8)
        for number, (chunk_id, _, offset, length, _) in enumerate(places.tolist()):
            try:
                self._sealer.unseal(bytes(chunk_id), data[offset - base : offset - base + length])
            except CorruptChunk:
                continue
            states[number] = GOOD
        return batch, states, int(places["length"].astype(np.int64).sum())

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Of the chunks that snapshots need: intact, damaged, missing; and places of others that none needs."""
        good = np.unique(self._keys[self._places["good"] == GOOD])
        intact = _within(good, self._needed)
        known = _within(self._keys, self._needed)
        listed = self._places["piece"] < self._listed
        others = np.unique(self._keys[listed & ~_within(self._needed, self._keys)])
        return int(intact.sum()), int((known & ~intact).sum()), int((~known).sum()), len(others)

    def as_objects(self) -> tuple[dict[str, list[Piece]], dict[str, bytes]]:
        """What a repository over the chunks that were proven needs: packs, and an index of them."""
        good = self._places[self._places["good"] == GOOD]
        entries = np.zeros(len(good), ix.ENTRY)
        entries["id"], entries["pack"] = good["id"], good["piece"]
        entries["offset"], entries["length"] = good["offset"], good["length"]
        names = [f"{PACKS}{number:032x}" for number in range(len(self._pieces))]
        entries, used = ix.only_used(entries, names)
        packs = {name: [self._pieces[int(name.removeprefix(PACKS), 16)]] for name in used}
        name, parts = ix.build_segment(entries, used, self._sealer, bytes(16))
        return packs, {name: b"".join(parts)}


def _named(store: RescueStore, prefix: str) -> dict[str, list[Piece]]:
    """Objects by name, deleted ones too: what they hold proves itself."""
    found = {name: list(pieces) for name, pieces in store.deleted.items() if name.startswith(prefix)}
    return found | {name: list(pieces) for name, pieces in store.pieces.items() if name.startswith(prefix)}


def _sought(store: RescueStore, magic: bytes, job: Job) -> Iterator[tuple[Piece, int]]:
    """Where a magic stands in what no whole record explains."""
    for piece in store.dark():
        low = 0
        while low < piece.length:
            low = max(low, min(store.stored_from(piece, low), piece.length))
            data = store.read(piece, low, min(_WINDOW + len(magic) - 1, piece.length - low))
            at = data.find(magic)
            while at >= 0:
                yield piece, low + at
                at = data.find(magic, at + 1)
            low += _WINDOW
            job.advance(0)


def _heads(data: bytes, lengths: set[int]) -> list[int]:
    """Offsets at which a frame's head may stand."""
    count = len(data) - FRAME_HEAD - len(_ZSTD_MAGIC)
    if count <= 0:
        return []
    raw = np.frombuffer(data, np.uint8)
    likely = (raw[:count] <= 1) & ((raw[1 : count + 1] | raw[2 : count + 2] | raw[3 : count + 3]) == 0)
    likely &= raw[7 : count + 7] <= 1
    likely &= (raw[4 : count + 4] | raw[5 : count + 5] | raw[6 : count + 6] | raw[7 : count + 7]) != 0
    at = np.flatnonzero(likely)
    size = sum(raw[at + 4 + n].astype(np.int64) << 8 * n for n in range(4))
    magic = np.frombuffer(_ZSTD_MAGIC, np.uint8)
    packed = (raw[at[:, None] + np.arange(8, 12)] == magic).all(axis=1) & (raw[at] == 1) & (size > 0)
    bare = (raw[at] == 0) & np.isin(size, np.array(sorted(lengths), np.int64)) & (size > 0)
    hits: list[int] = at[packed | bare].tolist()
    return hits


def _within(sorted_keys: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which of ``keys`` are among keys that ascend."""
    if not len(sorted_keys):
        return np.zeros(len(keys), bool)
    at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    hit: NDArray[np.bool_] = sorted_keys[at] == keys
    return hit
