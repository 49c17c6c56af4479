"""Finding a container's newest state: what was flushed last, whatever happened since.

    newest whole anchor -> its catalog, and those it adds to -> the records behind it
    other anchor        -> the same, where the first leads nowhere
    neither             -> every record of the image

Records behind the last flush count only for a writer, and only up to the first one that is missing: they were put in
that order, so what refers to others is never taken up without them.  Records that a flush is known to have covered
count in any case, even where its catalog is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from ferrotype.errors import CorruptObject, DeviceError, FerrotypeError, InvalidImage, UnsupportedError
from ferrotype.objects.heads import read_settled
from ferrotype.objects.layout import (
    ANCHORS_AT,
    BLOCK,
    RECORDS_AT,
    Anchor,
    Catalog,
    CatalogEntry,
    Kind,
    Place,
    checksum,
    decode_catalog,
    padded,
)
from ferrotype.objects.reading import Records, VolumeMissing
from ferrotype.units import MiB

_MAX_CATALOG: Final = 256 * MiB  # a catalog of two million objects stays under this
MAX_ENTRIES: Final = 4 << 20  # objects that one catalog adds: as many as fit, with the names that are in use
_MAX_ENTRY: Final = 160  # bytes that an object takes in a catalog, as one added and one removed
_SPACE: Final = 4096  # bytes, and objects, that a catalog may have in the smallest file
MAX_CHAIN: Final = 24  # catalogs read at an opening before everything is written down afresh

_EMPTY: Final = Place(0, RECORDS_AT)  # where the first record of an image goes

_DAMAGE: Final = (InvalidImage, CorruptObject)

Errors = tuple[type[FerrotypeError], ...]
Warn = Callable[[str], None]


@dataclass(slots=True)
class State:
    """What an opening found."""

    entries: dict[str, CatalogEntry] = field(default_factory=dict)
    chain: list[CatalogEntry] = field(default_factory=list)  # catalog records the state needs, oldest first
    chain_entries: int = 0  # additions and removals in all of them but the first
    sequence: int = -1  # of the newest catalog; then of the newest record seen
    generation: int = 0
    added: dict[str, CatalogEntry] = field(default_factory=dict)  # taken up from behind the newest catalog
    tail: Place = field(default=_EMPTY)  # where the next record goes
    sound: bool = True  # the newest anchor led to its catalog
    unanchored: bool = False  # records stand behind the catalog that an anchor led to


def load(records: Records, *, writable: bool, warn: Warn) -> State:
    """The newest state that can be proven.

    Raises VolumeMissing where a part of it stands in a file that is not there, UnsupportedError for records that must
    be known and are not.
    """
    anchors = _anchors(records, warn)
    # What cannot be read now may be read later on: a writer going on from an older state would lose what is newer.
    bearable = _DAMAGE if writable else (*_DAMAGE, DeviceError)
    state = _anchored(records, anchors, bearable, warn)
    start = state.tail if state.chain else Place(0, RECORDS_AT)
    durable = max((a.sequence for a in anchors), default=-1)
    _take_up(records, state, start, durable, bearable, writable=writable, warn=warn)
    state.generation = anchors[0].generation if anchors else 0
    return state


def _anchors(records: Records, warn: Warn) -> list[Anchor]:
    """The whole anchors, newest first."""
    found, blank = [], []
    for at in ANCHORS_AT:
        block = read_settled(records.files[0], at, lambda block: _is_clean(block, records.uuid))
        anchor = Anchor.read(block, records.uuid)
        if anchor:
            found.append(anchor)
        elif not any(block):
            blank.append(at)
        if not _is_clean(block, records.uuid):
            warn(f"{records.path}: the anchor at byte {at} is damaged; the other one is used where it is not enough")
    # In one file each anchor was durable before the next one was written, so from the second on none can be missing.
    if blank and found and found[0].generation > 1 and len(records.files) == 1:
        warn(f"{records.path}: the anchor at byte {blank[0]} is lost; the other one leads to everything")
    return sorted(found, key=lambda a: a.generation, reverse=True)


def _is_clean(block: bytes, uuid: bytes) -> bool:
    """Whether nothing stands in the block but an anchor; one that was never written is all zeros."""
    used = Anchor.SIZE if Anchor.read(block, uuid) else 0
    return block.count(0, used) == BLOCK - used


def anchor_blocks(records: Records) -> tuple[bytes, ...]:
    """The bytes that change with every newer state."""
    return tuple(records.files[0].read(at, BLOCK) for at in ANCHORS_AT)


def _anchored(records: Records, anchors: list[Anchor], bearable: Errors, warn: Warn) -> State:
    for number, anchor in enumerate(anchors):
        try:
            state = _chained(records, Place(anchor.volume, anchor.offset), anchor.sequence, warn)
        except VolumeMissing:
            raise
        except bearable as error:
            warn(f"{records.path}: {error}; an older state is used")
            continue
        state.sound = number == 0
        if not state.sound:
            _drop_overwritten(records, state, (), warn)
        return state
    warn(f"{records.path}: no anchor leads to a catalog; the whole image was searched instead")
    return State(sound=False)


def _chained(records: Records, place: Place, sequence: int, warn: Warn) -> State:
    """What a catalog and those it adds to say together.  Raises where any of them is not whole."""
    chain: list[tuple[CatalogEntry, Catalog]] = []
    named = 0
    wanted: tuple[int, int, int] | None = (place.volume, place.offset, sequence)
    while wanted is not None:
        if len(chain) > 4 * MAX_CHAIN or named > 2 * MAX_ENTRIES:
            raise InvalidImage("more catalogs than any image needs", offset=wanted[1])
        entry, catalog = _catalog(records, Place(wanted[0], wanted[1]), wanted[2], warn)
        chain.append((entry, catalog))
        named += len(catalog.added) + len(catalog.removed)
        if catalog.previous is not None and catalog.previous[2] >= entry.sequence:
            raise InvalidImage("the catalogs refer to each other in a circle", offset=wanted[1])
        wanted = catalog.previous
    entries: dict[str, CatalogEntry] = {}
    for _, catalog in reversed(chain):
        for name in catalog.removed:
            entries.pop(name, None)
        entries.update((entry.name, entry) for entry in catalog.added)
    sizes = records.sizes()
    for entry in entries.values():
        if not records.inside(entry, sizes):
            raise InvalidImage(f"the image is cut short: {entry.name} lies behind its end", offset=entry.offset)
    newest = chain[0][0]
    return State(
        entries=entries,
        chain=[entry for entry, _ in reversed(chain)],
        chain_entries=sum(len(c.added) + len(c.removed) for _, c in chain[:-1]),
        sequence=sequence,
        tail=Place(newest.volume, newest.offset + newest.span),
    )


def _catalog(records: Records, place: Place, sequence: int, warn: Warn) -> tuple[CatalogEntry, Catalog]:
    if place.volume >= len(records.files):
        records.inside(CatalogEntry("", place.volume, place.offset, 0, sequence), ())  # says which
    header = records.header(place)
    if header is None or header.kind != Kind.CATALOG or header.sequence != sequence:
        raise InvalidImage("a catalog record is missing", offset=place.offset)
    entry = CatalogEntry("", place.volume, place.offset, header.length, header.sequence)
    sizes = records.sizes()
    blocks = sum(sizes) // BLOCK  # an object takes one of them at least
    if header.length > min(_MAX_CATALOG, _SPACE + blocks * _MAX_ENTRY) or not records.inside(entry, sizes):
        raise InvalidImage("a catalog is larger than any image needs, or cut short", offset=place.offset)
    payload = records.payload(entry, 0, entry.length)
    if checksum(payload) != header.payload_check:
        raise CorruptObject("catalog", "its checksum is wrong")
    if not records.padding_is_zero(entry):
        warn(f"{records.path}: the bytes behind the catalog at {place.offset} are damaged; they hold nothing")
    return entry, decode_catalog(payload, min(MAX_ENTRIES, _SPACE + blocks))


def _drop_overwritten(records: Records, state: State, met: Sequence[CatalogEntry], warn: Warn) -> None:
    """In an older state: leave out what has been deleted since, and its space used for something else.

    A record that was moved since is one of those that a scan has ``met``.
    """
    gone = {name for name, entry in state.entries.items() if not records.is_at(entry)}
    for entry in met:
        if entry.name in gone and _same_record(entry, state.entries[entry.name]):
            state.entries[entry.name] = entry
            gone.remove(entry.name)
    for name in gone:
        del state.entries[name]
    if gone:
        warn(f"{records.path}: {len(gone)} objects of the older state are no longer stored, {min(gone)} among them")


def _same_record(one: CatalogEntry, other: CatalogEntry) -> bool:
    return (one.name, one.length, one.sequence) == (other.name, other.length, other.sequence)


def _take_up(
    records: Records, state: State, start: Place, durable: int, bearable: Errors, *, writable: bool, warn: Warn
) -> None:
    """Add what stands behind the newest catalog; ``durable`` is the newest sequence number known to be flushed."""
    found: list[tuple[CatalogEntry, int]] = []
    for entry, header in records.scan(start, prove=writable):
        if Kind.FILLER < header.kind < Kind.PARITY:
            raise UnsupportedError(f"a record of kind {header.kind} is not known; use a newer ferrotype")
        found.append((entry, header.kind))
    state.unanchored = bool(found)
    catalogs = [entry for entry, kind in found if kind == Kind.CATALOG]
    _adopt_newest(records, state, [e for e, kind in found if kind == Kind.OBJECT], catalogs, bearable, warn)
    durable = max([durable, state.sequence, *(entry.sequence for entry in catalogs)])
    counted = durable
    for entry, kind in sorted(found, key=lambda item: item[0].sequence):
        if kind == Kind.FILLER or entry.sequence <= state.sequence:
            continue
        if state.chain and entry.sequence > durable:
            if not writable or entry.sequence != counted + 1:
                break
            counted = entry.sequence
        if kind == Kind.OBJECT:
            state.entries[entry.name] = state.added[entry.name] = entry
    state.tail = _tail(records, state, start, [e for e, _ in found if not state.chain or e.sequence <= counted])
    state.sequence = max([durable, *(entry.sequence for entry, _ in found)])


def _adopt_newest(
    records: Records,
    state: State,
    met: Sequence[CatalogEntry],
    catalogs: list[CatalogEntry],
    bearable: Errors,
    warn: Warn,
) -> None:
    """Go on to the newest whole catalog that the scan found, where it is newer than the one in use."""
    for entry in sorted(catalogs, key=lambda e: e.sequence, reverse=True):
        if entry.sequence <= state.sequence:
            return
        try:
            newer = _chained(records, entry.place, entry.sequence, warn)
        except VolumeMissing:
            raise
        except bearable as error:
            warn(f"{records.path}: {error}; an older state is used")
            state.sound = False
            continue
        state.entries, state.chain, state.chain_entries = newer.entries, newer.chain, newer.chain_entries
        state.sequence = newer.sequence
        if not state.sound:
            _drop_overwritten(records, state, met, warn)
        return


def _tail(records: Records, state: State, start: Place, counted: list[CatalogEntry]) -> Place:
    """Where the next record goes: behind the last one that counts; in a damaged image behind everything."""
    last = len(records.files) - 1
    if not state.sound:
        return Place(last, max(RECORDS_AT, padded(records.files[last].size())))
    end = max((Place(e.volume, e.offset + e.span) for e in counted), default=start)
    return end if end.volume == last else Place(last, RECORDS_AT)
