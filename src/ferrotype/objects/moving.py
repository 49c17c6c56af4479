"""Moving a container's records, and giving back the space of those that are gone.

    move      a record into a gap nearer the start; its old place stays as it is
    settle    records durable -> catalog with the new places -> durable -> the old places become gaps
    forward   records that everything else depends on come before the rest, where something gives way to them
    cut       the catalog comes down behind the last record, empty volumes go, the file ends there
    punch     a hole into each gap, behind a filler's header that tells a scan where the next record stands

Wherever this is cut, a durable catalog names only records that are whole.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Final

from ferrotype.errors import DeviceError, WriteError
from ferrotype.objects import SpaceReport
from ferrotype.objects.appending import Log
from ferrotype.objects.compaction import gaps_between
from ferrotype.objects.layout import (
    BLOCK,
    RECORDS_AT,
    Catalog,
    CatalogEntry,
    Kind,
    Place,
    RecordHeader,
    encode_catalog,
    padded,
)
from ferrotype.objects.reading import READ_SIZE, Files
from ferrotype.units import KiB

_SMALL_GAP: Final = 64 * KiB  # bytes of dead space that are overwritten where no hole can be punched


class Moves:
    """The places of a container's records, which compaction changes."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._vacated: list[tuple[Place, int]] = []  # where records stood that were moved since the last catalog
        self._dropped: list[CatalogEntry] = []  # small ones that were deleted since dead space was last given back

    def live(self) -> Sequence[CatalogEntry]:
        return tuple(self._log.entries.values())

    def catalogs(self) -> Sequence[CatalogEntry]:
        return tuple(self._log.chain)

    def volume_sizes(self) -> Sequence[int]:
        return tuple(file.size() for file in self._log.files)

    def move(self, entry: CatalogEntry, place: Place, gap: int, /) -> None:
        """Copy a record to the start of a gap of ``gap`` bytes; it counts there once ``settle`` has returned."""
        log = self._log
        log.moved = True
        source, target = log.files[entry.volume], log.files[place.volume]
        moved = CatalogEntry(entry.name, place.volume, place.offset, entry.length, entry.sequence)
        for at in range(0, entry.span, READ_SIZE):
            piece = source.read(entry.offset + at, min(READ_SIZE, entry.span - at))
            target.write(place.offset + at, [piece])
            if at == 0:
                log.written.note(moved, [piece])
        if rest := gap - entry.span:
            self._fill(Place(place.volume, place.offset + entry.span), rest)
        log.entries[entry.name] = moved
        self._vacated.append((entry.place, entry.span))

    def _fill(self, place: Place, gap: int) -> None:
        self._log.files[place.volume].write(place.offset, [self._filler(gap)])

    def _filler(self, gap: int) -> bytes:
        """The first block of a gap."""
        filler = RecordHeader.make(Kind.FILLER, self._log.records.uuid, 0, gap - RecordHeader.SIZE, bytes(16), "")
        return filler.pack().ljust(BLOCK, b"\0")  # a whole key slot goes

    def settle(self) -> None:
        """Make moves durable: the records first, then a catalog that names their new places."""
        log = self._log
        log.moved = True
        for file in log.files:
            file.sync()
        log.write_catalog()
        log.files[0].sync()
        log.moved = False
        vacated, self._vacated = self._vacated, []
        for place, span in vacated:  # or each batch would need room of its own until the file is cut
            self._fill(place, span)  # a key slot that was moved is in the file once
            if span > BLOCK:
                log.files[place.volume].punch(place.offset + BLOCK, span - BLOCK)

    def behind(self, names: Collection[str], others: str) -> list[CatalogEntry]:
        """Those of the named records that stand behind the first one whose name starts with ``others``."""
        first = self._first(others)
        entries = self._log.entries
        found = [entries[name] for name in names if name in entries]
        return [] if first is None else sorted((e for e in found if e.place > first.place), key=lambda e: e.place)

    def bring_forward(self, names: Collection[str], others: str) -> bool:
        """Move the named records into gaps before all ``others``, the first of which goes to the end where there is
        none; False where it cannot be read, or does not fit there.
        """
        self.settle()  # nothing durable may still lead to the gaps that are filled now
        for entry in self.behind(names, others):
            while (gap := self._gap_before(others, entry.span)) is None:
                first = self._first(others)
                if first is None or not self._give_way(first):
                    return False
            self.move(entry, *gap)  # also where what gave way is behind it by now: what stood beside it still does
            self.settle()  # its old place may be the next gap
        self.settle()  # then both anchors lead to a catalog that knows the new places: either may be lost
        return True

    def _gap_before(self, others: str, span: int) -> tuple[Place, int] | None:
        """The first gap for ``span`` bytes, where it is before all records whose names start with ``others``."""
        first = self._first(others)
        gaps = gaps_between([*self.live(), *self._log.chain], self.volume_sizes())
        fitting = (
            (place, room) for place, room in gaps if room >= span and first is not None and place < first.place
        )
        return next(fitting, None)

    def _first(self, prefix: str) -> CatalogEntry | None:
        named = (entry for entry in self._log.entries.values() if entry.name.startswith(prefix))
        return min(named, key=lambda entry: entry.place, default=None)

    def _give_way(self, entry: CatalogEntry) -> bool:
        """Move a record to the end, durably, so that there is a gap in its place."""
        log = self._log
        log.make_room(entry.span)
        at, size = log.tail, log.files[-1].size()
        try:
            self.move(entry, Place(len(log.files) - 1, at), entry.span)
        except (DeviceError, WriteError):
            with suppress(WriteError):  # a full disk gets the torn record's space back
                if at >= size:
                    log.files[-1].truncate(at)
            return False
        log.tail = at + entry.span
        self.settle()
        return True

    def drop(self, entry: CatalogEntry) -> None:
        """A record was deleted; a small one may be a key slot, or a copy of one, and is overwritten in the end."""
        if entry.span <= _SMALL_GAP:
            self._dropped.append(entry)

    def cut(self) -> None:
        """Bring the catalog down behind the last record, drop empty volumes and cut the file."""
        log = self._log
        if len(log.chain) != 1:
            self.settle()
        used = log.chain[0]
        last = max(log.entries.values(), key=lambda e: e.place, default=None)
        volume, end = (last.volume, last.offset + last.span) if last else (0, RECORDS_AT)
        span = padded(RecordHeader.SIZE + len(encode_catalog(Catalog(None, list(log.entries.values()), []))))
        room = used.offset if volume == used.volume else log.split
        if end + span > room:  # it would not get clear of the catalog in use
            return
        dropped = self._bring_down(volume, end, used)
        try:
            log.files[-1].truncate(log.tail)
            log.files[-1].sync()
            while dropped:
                dropped[-1].remove()
                dropped.pop().close()
        except BaseException:
            if dropped:  # they are there, so what is put next goes behind them
                log.records.files = log.files + dropped
                log.tail = padded(dropped[-1].size())
            raise

    def _bring_down(self, volume: int, end: int, used: CatalogEntry) -> Files:
        """Write the catalog to ``end`` of a volume, durably; the volumes that are not needed any more."""
        log = self._log
        files, tail = log.files, log.tail
        log.records.files, log.tail = files[: volume + 1], end
        try:
            self.settle()
        except BaseException:
            log.records.files, log.tail = files, tail
            log.chain, log.chain_entries = [used], 0  # an anchor may lead to either
            raise
        return files[volume + 1 :]

    def punch(self) -> SpaceReport:
        """A hole into each gap; where none can be punched, small ones are overwritten."""
        log = self._log
        before = sum(file.allocated() for file in log.files)
        dead = 0
        for place, gap in gaps_between([*self.live(), *log.chain], self.volume_sizes()):
            if self._is_hole(place, gap):
                continue
            self._fill(place, gap)
            if gap > BLOCK and not log.files[place.volume].punch(place.offset + BLOCK, gap - BLOCK):
                dead += gap
                self._overwrite(place, gap)
        self._dropped = []
        return SpaceReport(max(0, before - sum(file.allocated() for file in log.files)), dead)

    def _overwrite(self, place: Place, gap: int) -> None:
        """Where no hole can be punched: small gaps, and small records in larger ones, behind the filler's block."""
        file, start, end = self._log.files[place.volume], place.offset + BLOCK, place.offset + gap
        if gap <= _SMALL_GAP:  # spare copies of a key slot that was removed, perhaps
            file.write(start, [bytes(gap - BLOCK)])
            return
        for entry in self._dropped:
            low, high = max(entry.offset, start), min(entry.offset + entry.span, end)
            if entry.volume == place.volume and low < high:
                file.write(low, [bytes(high - low)])

    def _is_hole(self, place: Place, gap: int) -> bool:
        """Whether a gap was given back already: old ones cost a look each, and are not written again."""
        file = self._log.files[place.volume]
        try:
            stored = file.data_from(place.offset + BLOCK) < place.offset + gap
            return not stored and file.read(place.offset, BLOCK) == self._filler(gap)
        except DeviceError:
            return False
