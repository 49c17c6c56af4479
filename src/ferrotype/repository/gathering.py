"""Where pack tables and index segments of a damaged image say that frames stand.

    pack tables        of every pack whose table can be read, wherever its record header went
    index segments     for packs whose table is lost; pages that are damaged cost only themselves

A pack that nothing but the index knows is looked for at every block that no whole record explains.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import numpy as np

from ferrotype.errors import CorruptChunk, CorruptObject
from ferrotype.job import Job
from ferrotype.objects.layout import BLOCK, RecordHeader, padded
from ferrotype.objects.rescue import Piece, RescueStore
from ferrotype.repository.packs import MAGIC, PackHeader, PackTable, name_of_table, open_table, read_header
from ferrotype.repository.packs import PREFIX as PACKS
from ferrotype.repository.sealing import FRAME_HEAD, Sealer
from ferrotype.repository.segments import ENTRY, Entries, Segment
from ferrotype.repository.segments import PREFIX as INDEXES
from ferrotype.units import MiB

_WINDOW: Final = 8 * MiB  # bytes searched at a time
_TRIES: Final = 5_000_000  # places at which packs without header are looked for


def gather(store: RescueStore, sealer: Sealer, job: Job) -> Iterator[tuple[Piece, Entries]]:
    """Pieces in which packs stand or may stand, and entries with offsets in them.  None of them is proven.

    Reads all pack tables, and the index where one of them is lost.
    """
    return _Gathering(store, sealer, job).entries()


class _Gathering:
    def __init__(self, store: RescueStore, sealer: Sealer, job: Job) -> None:
        self._store = store
        self._sealer = sealer
        self._job = job

    def entries(self) -> Iterator[tuple[Piece, Entries]]:
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
            entries = np.zeros(len(table), ENTRY)
            entries["id"], entries["offset"], entries["length"] = table.ids, table.offsets, table.lengths
            for piece in packs[name]:
                yield piece, entries
        without = (listed | lacking) - tables.keys()
        if without:
            yield from self._by_index(segments, without, packs)

    def _first_table(self, name: str, pieces: Sequence[Piece]) -> PackTable | None:
        for piece in pieces:
            try:
                header = read_header(name, self._store.read(piece, 0, PackHeader.SIZE), self._sealer)
                sealed = self._store.read(piece, PackHeader.SIZE, header.table_length)
                return open_table(name, header, sealed, self._sealer)
            except CorruptObject:
                continue
        return None

    def _segments(self) -> tuple[list[Segment], set[str]]:
        """The index segments whose directory can be read, and the packs they list."""
        found = []
        for name, pieces in _named(self._store, INDEXES).items():
            for piece in pieces:
                try:
                    found.append(Segment(self._store.over({name: [piece]}), name, self._sealer))
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

    def _by_index(
        self, segments: Iterable[Segment], names: set[str], packs: dict[str, list[Piece]]
    ) -> Iterator[tuple[Piece, Entries]]:
        """Entries of the index for packs that have no table any more."""
        by_pack: dict[str, list[Entries]] = {}
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
                yield piece, entries

    def _proves(self, piece: Piece, entries: Entries) -> bool:
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

    def _placed(self, entries: Entries, tries: int) -> tuple[list[Piece], int]:
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

    def _looks_right(self, piece: Piece, dark: Piece, entries: Entries) -> bool:
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
