"""What a snapshot records: JSON, sealed, one object each.  The roots of its chunk maps lead to everything else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final

import msgspec

from ferrotype.errors import CorruptObject, ObjectMissing, UsageError
from ferrotype.objects import ObjectStore
from ferrotype.repository.sealing import ID_SIZE, MAX_PLAIN, ChunkId, Sealer

KIND: Final = "snapshot"
PREFIX: Final = KIND + "/"
_MAX_DISK: Final = 1 << 62
# All records together may unpack to this many bytes, and to so many times what is stored of them.  Honest ones shrink
# to a fifth, and to a fortieth at most, where a disk has a hundred empty partitions of one size.  A made-up one can
# shrink to a thousandth, and takes twenty times its JSON in memory.
_LEAST_ROOM: Final = 16 << 20
_MOST_RATIO: Final = 64
_MAX_SECTOR: Final = 64 << 10  # bytes
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_LAST_ORDER: Final = (1 << 62) - 1
_SHORTEST_PREFIX: Final = 4  # characters of a snapshot's id that a user must give


class Region(msgspec.Struct, frozen=True):
    """A stretch of a disk with a chunk grid and a chunk map of its own: a partition, or what lies between."""

    start: int  # bytes
    length: int  # bytes
    map: str  # hex id of the map's root page; all zeros: the region is zeros

    @property
    def root(self) -> ChunkId:
        return ChunkId(bytes.fromhex(self.map))


class DiskRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One disk (or partition) of a snapshot."""

    name: str
    size: int  # bytes
    sector_size: int  # bytes
    chunk_size: int  # bytes
    regions: tuple[Region, ...]  # ascending, touching, from 0 to size
    identity: str = ""  # what recognises the same disk next time: GPT disk GUID, MBR signature, serial number
    source: str = ""  # what was named when it was backed up
    table: str | None = None  # "gpt", "mbr", "apm"
    all_sectors: bool = False
    volumes: tuple[dict[str, Any], ...] = ()  # as `info` shows them
    unreadable: tuple[tuple[int, int], ...] = ()  # (start, length) that could not be read, kept as zeros
    model: str = ""
    serial: str = ""  # of the device; that of a partition has #NUMBER behind it
    machine: str = ""  # the hardware's own id
    path: str = ""  # absolute, of what was named
    file: str = ""  # of a disk image: which file it is, whatever its name

    def cells(self, region: Region) -> int:
        return -(-region.length // self.chunk_size)


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a backup did, in bytes of the source unless it says otherwise."""

    disk_bytes: int = 0
    read_bytes: int = 0
    free_bytes: int = 0  # left out because no file system uses it
    zero_bytes: int = 0  # left out because it is zeros, known to be or found to be
    deduplicated_bytes: int = 0  # read, and found stored already
    new_bytes: int = 0  # read, and stored now
    stored_bytes: int = 0  # bytes put into the image, but for the snapshot's own record
    chunks: int = 0  # chunks the snapshot refers to
    new_chunks: int = 0
    seconds: float = 0.0


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One committed backup.  ``id`` is not stored: it is the object's name."""

    created: Annotated[datetime, msgspec.Meta(tz=True)]
    host: str
    name: str
    disks: tuple[DiskRecord, ...]
    tags: tuple[str, ...] = ()
    parent: str | None = None
    program: str = ""
    statistics: Statistics = Statistics()
    unique: str = ""  # makes two otherwise equal snapshots different objects
    version: int = 1
    order: Annotated[int, msgspec.Meta(ge=-_LAST_ORDER, le=_LAST_ORDER)] | None = None  # see ``ordered``
    id: str = ""

    @property
    def local_time(self) -> datetime:
        """When it was taken, in this machine's zone; as it stands where that is beyond what a calendar holds."""
        try:
            return self.created.astimezone()
        except (OverflowError, ValueError, OSError):
            return self.created

    def disk(self, name: str | None = None) -> DiskRecord:
        """The disk of that name; with None, the only one.  Raises UsageError."""
        if name is None:
            if len(self.disks) != 1:
                names = ", ".join(disk.name for disk in self.disks)
                raise UsageError(f"snapshot {self.id[:8]} holds several disks ({names}): add /DISK")
            return self.disks[0]
        for disk in self.disks:
            if disk.name == name:
                return disk
        names = ", ".join(disk.name for disk in self.disks)
        raise UsageError(f"snapshot {self.id[:8]} holds no disk {name!r}; there is: {names}")


def ordered(found: Iterable[Snapshot]) -> list[Snapshot]:
    """Snapshots in the order in which they were committed, oldest first, each with its ``order``.

    That is a time in microseconds since 1970 that never goes back: the clock's, or, where the clock was behind, one
    more than that of the newest snapshot the image had.  So it holds after copies, and snapshots of two images that
    are brought together stand as their clocks say.  One of an older version has none: it stands where its clock
    says, and always behind its parent.
    """
    known = {snapshot.id: snapshot for snapshot in found}
    orders: dict[str, int] = {}
    for snapshot in known.values():
        line = [snapshot]  # of snapshots whose order is not known before that of their parents
        while (one := line[-1]).order is None and one.parent in known and one.parent not in orders:
            if len(line) > len(known):
                break  # parents in a circle; ids are hashes, so nobody can make one
            line.append(known[one.parent])
        for one in reversed(line):
            behind = orders.get(one.parent or "", -_LAST_ORDER)
            orders[one.id] = max(clock_order(one.created), behind + 1) if one.order is None else one.order
    placed = [msgspec.structs.replace(one, order=orders[one.id]) for one in known.values()]
    return sorted(placed, key=lambda s: (s.order, s.created, s.id))


def next_order(known: Sequence[Snapshot], created: datetime) -> int:
    """The order of a snapshot that is committed behind all ``known`` ones, which ``ordered`` gave."""
    behind = known[-1].order if known else None
    own = clock_order(created)
    return own if behind is None else min(max(own, behind + 1), _LAST_ORDER)


def clock_order(created: datetime) -> int:
    """Microseconds since 1970."""
    return (created - _EPOCH) // timedelta(microseconds=1)


class Room:
    """What records may still unpack to, all that are read together."""

    def __init__(self) -> None:
        self._left = _LEAST_ROOM

    def take(self, name: str, stored: int, plain: int) -> None:
        """Account for one record of so many bytes.  Raises CorruptObject where it goes too far."""
        self._left += _MOST_RATIO * stored - plain
        if self._left < 0:
            raise CorruptObject(name, "it unpacks to more than snapshots hold")


def encode(snapshot: Snapshot) -> bytes:
    return msgspec.json.encode(msgspec.structs.replace(snapshot, id=""))


def decode(name: str, data: bytes) -> Snapshot:
    """Raises CorruptObject for what cannot be a snapshot's record."""
    try:
        snapshot = msgspec.json.decode(data, type=Snapshot)
        for disk in snapshot.disks:
            _check(disk)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise CorruptObject(name, f"its record is wrong: {error}") from error
    if snapshot.version != 1:
        raise CorruptObject(name, f"its record is of version {snapshot.version}; use a newer ferrotype")
    return msgspec.structs.replace(snapshot, id=name.removeprefix(PREFIX))


def _check(disk: DiskRecord) -> None:
    power_of_two = disk.chunk_size & (disk.chunk_size - 1) == 0
    if not (
        0 <= disk.size < _MAX_DISK
        and 0 < disk.sector_size <= _MAX_SECTOR
        and 4096 <= disk.chunk_size <= 16 << 20
        and power_of_two
    ):
        raise ValueError(f"disk {disk.name!r} has impossible sizes")
    at = 0
    for region in disk.regions:
        if region.start != at or region.length <= 0 or len(region.root) != ID_SIZE:
            raise ValueError(f"disk {disk.name!r} has regions that do not touch")
        at += region.length
    if at != disk.size:
        raise ValueError(f"disk {disk.name!r} is not covered by its regions")


def read_snapshots(store: ObjectStore, sealer: Sealer) -> tuple[list[Snapshot], list[str]]:
    """All that can be read, oldest first by ``ordered``; and what is wrong with the others."""
    found: list[Snapshot] = []
    damaged: list[str] = []
    room = Room()
    for info in store.list(PREFIX):
        try:
            if info.size > MAX_PLAIN + sealer.overhead:
                raise CorruptObject(info.name, "it is larger than a snapshot's record can be")
            frame = store.get(info.name)
            plain = sealer.unseal_object(info.name, frame)
            room.take(info.name, len(frame), len(plain))
            found.append(decode(info.name, plain))
        except (CorruptObject, ObjectMissing) as error:
            damaged.append(str(error))
    return ordered(found), damaged


def find_snapshot(known: Iterable[Snapshot], wanted: str) -> Snapshot:
    """What a reference means: ``latest``, ``latest~N``, an id's prefix, a name, or a tag (the newest wins)."""
    known = list(known)
    if not known:
        raise UsageError("the image holds no snapshot")
    head, tilde, back = wanted.partition("~")
    if head == "latest":
        if tilde and not back.isdecimal():
            raise UsageError(f"{wanted!r} is no snapshot; write latest~2 for the third newest")
        age = int(back) if tilde else 0
        if age >= len(known):
            raise UsageError(f"{wanted}: the image holds only {len(known)} snapshots")
        return known[-1 - age]
    by_id = [s for s in known if len(wanted) >= _SHORTEST_PREFIX and s.id.startswith(wanted.lower())]
    if len(by_id) == 1:
        return by_id[0]
    if len(by_id) > 1:
        raise UsageError(f"{wanted!r} begins the ids of {len(by_id)} snapshots; give more of it")
    named = [s for s in known if s.name == wanted or wanted in s.tags]
    if not named:
        raise UsageError(f"no snapshot is called {wanted!r}; `ferrotype list` shows what there is")
    return named[-1]
