"""Where pack tables and index segments of a damaged image say that frames stand.

    pack tables        of every pack whose table can be read, wherever its record header went
    index segments     for packs whose table is lost; pages that are damaged cost only themselves

A pack that nothing but the index knows is looked for at every block that no whole record explains.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Final

import numpy as np

from ferrotype.errors import CorruptObject
from ferrotype.job import Job
from ferrotype.objects.layout import BLOCK, checksum
from ferrotype.objects.rescue import Piece, RescueStore
from ferrotype.repository.packs import MAGIC, PackHeader, PackTable, name_of_table, open_table, read_header
from ferrotype.repository.packs import PREFIX as PACKS
from ferrotype.repository.placing import open_entry, place
from ferrotype.repository.sealing import ZERO_ID, Sealer
from ferrotype.repository.segments import ENTRY, Entries, Segment
from ferrotype.repository.segments import PREFIX as INDEXES
from ferrotype.units import MiB

_WINDOW: Final = 8 * MiB  # bytes searched at a time
_TRIES: Final = 4_000_000  # names that tables without one are tried with, and blocks of them
_MOST_PLACES: Final = 16  # of one pack


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
        tables: dict[str, Entries] = {}
        for name, pieces in packs.items():
            if (table := self._first_table(name, pieces)) is not None:
                tables[name] = _entries(table)
            self._job.advance(1)
        self._job.begin("looking for packs without a header")
        lacking = packs.keys() - tables.keys()
        segments, listed = self._segments()
        nameless = (listed | lacking) - tables.keys()
        for name, piece, table in self._nameless(nameless, tables, packs):
            if name not in tables:
                tables[name] = _entries(table)
            places = packs.setdefault(name, [])
            places.insert(0, piece)
            del places[_MOST_PLACES:]
        for name, entries in tables.items():
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
                return self._opened(name, header, sealed)
            except CorruptObject:
                continue
        return None

    def _opened(self, name: str, header: PackHeader, sealed: bytes) -> PackTable:
        if sealed[:1] != b"\0":  # of codec 0, as the format has it: a few bytes could unpack to a large one
            raise CorruptObject(name, "its table is compressed")
        return open_table(name, header, sealed, self._sealer)

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
        self, names: set[str], tables: Container[str], packs: dict[str, list[Piece]]
    ) -> Iterator[tuple[str, Piece, PackTable]]:
        """Packs whose record header is lost, found by their own: which they are, their table tells."""
        tries, ordered = _TRIES, sorted(names)
        known = {(piece.volume, piece.start) for name in packs if name in tables for piece in packs[name]}
        for piece, at in _sought(self._store, MAGIC, self._job):
            if (piece.volume, piece.start + at) in known:
                continue
            try:
                header = read_header("a pack", self._store.read(piece, at, PackHeader.SIZE), self._sealer)
            except CorruptObject:
                continue
            sealed = self._store.read(piece, at + PackHeader.SIZE, header.table_length)
            name = name_of_table(header, sealed, self._sealer)
            for candidate in [name] if name else ordered:
                tries -= 1 + len(sealed) // BLOCK
                if tries < 0:
                    return
                try:
                    table = self._opened(candidate, header, sealed)
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
            seen: set[bytes] = set()  # a directory may name one page a million times
            wanted = np.array([name in names for name in segment.packs], bool)
            if not wanted.any():
                continue
            for number in range(segment.page_count):
                try:
                    page = segment.pages(number, number + 1)
                except CorruptObject:
                    continue
                if (check := checksum(page.tobytes())) in seen:
                    continue
                seen.add(check)
                for pack in np.unique(page["pack"][wanted[page["pack"]]]).tolist():
                    by_pack.setdefault(segment.packs[pack], []).append(page[page["pack"] == pack])
        entries = {name: np.concatenate(parts) for name, parts in sorted(by_pack.items())}
        lost = {
            name: some
            for name, some in entries.items()
            if not any(self._proves(piece, some) for piece in packs.get(name, ()))
        }
        placed = place(self._store, self._sealer, self._job, lost)
        for name, some in entries.items():
            for piece in (*packs.get(name, ()), *placed.get(name, ())):
                yield piece, some

    def _proves(self, piece: Piece, entries: Entries) -> bool:
        """Whether one of a few frames of a pack can be opened where the pack would have it."""
        return any(
            open_entry(self._store, self._sealer, piece, entries[at])
            for at in np.linspace(0, len(entries) - 1, 5).astype(int).tolist()
        )


def _entries(table: PackTable) -> Entries:
    """Of those that may be chunks: the id of zeros is never stored, and a hole is full of it."""
    entries = np.zeros(len(table), ENTRY)
    entries["id"], entries["offset"], entries["length"] = table.ids, table.offsets, table.lengths
    some: Entries = entries[entries["id"] != np.void(ZERO_ID)]
    return some


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
