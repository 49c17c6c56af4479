"""Which disks of snapshots are the same disk: what ``forget`` judges together, and where a backup finds its parent.

Cloned machines have the same ids in their partition tables and file systems, so more is asked for.  Two records are
of one disk where their ``identity`` is the same, one of these is, too, and nothing speaks against it:

    serial number, model and size     wherever the disk was plugged in, whatever the machine was called
    host, and the device's path       a device without a serial number of its own; its size, too
    host, and the file's path         a disk image; it may have grown
    host, and the file itself         a disk image that was renamed or moved: inode and time of birth

What speaks against it: another serial number, model or machine; no UUID of a file system in common; and that both
were in one snapshot.  What two disks of any snapshot have in common proves nothing.  In doubt they are two disks:
what is judged apart is kept too long, never lost.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from ferrotype.repository.snapshots import DiskRecord, Snapshot

_TRIED: Final = 16  # groups that are looked at for one piece of evidence; a made-up image may have thousands

# What virtual machines, and adapters that make do without, give every disk.
_NO_SERIAL: Final = re.compile(
    r"qm\d+|drive-.*|vmware.*|(.)\1*|0*\d{0,3}|0?1234567.*|(0123456789)?abcdef.*|n/?a|none|unknown|default.*",
    re.IGNORECASE,
)
_LEAST_SERIAL: Final = 4  # characters

Key = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Looks:
    """What one disk shows of which disk it is."""

    host: str
    name: str
    identity: str
    size: int
    serial: str = ""  # empty where it is not the disk's own
    model: str = ""
    machine: str = ""
    path: str = ""  # absolute; of a device, a file, or the address it is served at
    file: str = ""  # of a disk image: which file it is, whatever its name
    source: str = ""  # what was named
    uuids: frozenset[str] = frozenset()

    @classmethod
    def of(cls, host: str, disk: DiskRecord) -> Looks:
        """Those that a snapshot recorded."""
        named = os.path.normpath(disk.source) if disk.source else ""
        return cls(
            host=host,
            name=disk.name,
            identity=disk.identity,
            size=disk.size,
            serial=own_serial(disk.serial),
            model=disk.model,
            machine=disk.machine,
            path=disk.path or (named if named.startswith("/") else ""),
            file=disk.file,
            source=named,
            uuids=frozenset(str(volume["uuid"]) for volume in disk.volumes if volume.get("uuid")),
        )

    @property
    def evidence(self) -> list[Key]:
        """Keys; who has one in common with another may be the same disk."""
        found: list[Key] = []
        if self.serial:
            found.append(("serial", self.identity or self.path, self.serial, self.model, self.size))
        if self.file:
            found.append(("file", self.identity, self.host, self.file))
        if self.path:
            size = self.size if self._is_device else 0
            found.append(("path", self.identity, self.host, self.path, size))
        return found

    @property
    def _is_device(self) -> bool:
        return self.path.startswith("/dev/") and not self.file

    @property
    def named(self) -> Key:
        """Evidence of a record that has no path: the same words, for a disk of the same name."""
        return ("named", self.identity, self.host, self.name, self.source)


def own_serial(serial: str) -> str:
    """The serial number, or nothing where it is one that many disks have."""
    word = serial.strip()
    return "" if len(word) < _LEAST_SERIAL or _NO_SERIAL.fullmatch(word) else word


@dataclass(slots=True)
class Group:
    """All that is known of one disk, oldest first."""

    number: int
    members: list[tuple[Snapshot, DiskRecord]] = field(default_factory=list)
    serials: set[str] = field(default_factory=set)
    models: set[str] = field(default_factory=set)
    machines: set[str] = field(default_factory=set)
    uuids: set[str] = field(default_factory=set)
    paths: set[str] = field(default_factory=set)

    def contradicts(self, looks: Looks, key: Key) -> bool:
        """Whether something speaks against it, though they have ``key`` in common."""
        pairs = [(self.serials, {looks.serial}), (self.models, {looks.model})]
        if key[0] != "serial":  # a disk with one may be put into another machine
            pairs.append((self.machines, {looks.machine}))
        strong = key[0] == "serial" and looks.identity.split(":")[0] in ("gpt", "mbr", "apm")
        if not strong:  # the same disk, formatted anew, has other UUIDs
            pairs.append((self.uuids, set(looks.uuids)))
        return any(mine - {""} and theirs - {""} and not mine & theirs for mine, theirs in pairs)

    def add(self, snapshot: Snapshot, disk: DiskRecord, looks: Looks) -> None:
        self.members.append((snapshot, disk))
        for mine, one in ((self.serials, looks.serial), (self.models, looks.model), (self.machines, looks.machine)):
            if one:
                mine.add(one)
        self.uuids |= looks.uuids
        self.paths.add(looks.path)


class Disks:
    """The disks of snapshots, told apart."""

    def __init__(self, known: Iterable[Snapshot]) -> None:
        """``known`` are in the order of their commits."""
        self.groups: list[Group] = []
        self._by_key: dict[Key, list[Group]] = {}
        self._of: dict[tuple[str, str], Group] = {}  # by snapshot and name of the disk
        known = list(known)
        self._vague = {key for snapshot in known for key in _shared(snapshot)}
        for snapshot in known:
            self._enter(snapshot)

    def _enter(self, snapshot: Snapshot) -> None:
        placed: list[tuple[Group, DiskRecord, Looks]] = []
        for disk in snapshot.disks:
            looks = Looks.of(snapshot.host, disk)
            taken = {group.number for group, _, _ in placed}  # two disks of one snapshot are two
            group = self._find(looks, taken)
            if group is None:
                group = Group(len(self.groups) + 1)
                self.groups.append(group)
            placed.append((group, disk, looks))
        for group, disk, looks in placed:
            group.add(snapshot, disk, looks)
            self._of[snapshot.id, disk.name] = group
            for key in self._keys(looks, mine=True):
                there = self._by_key.setdefault(key, [])
                if group in there[-_TRIED:]:
                    there.remove(group)
                there.append(group)

    def find(self, looks: Looks) -> Group | None:
        """The disk that looks like this; None where it is a new one, or in doubt."""
        return self._find(looks, set())

    def _find(self, looks: Looks, taken: set[int]) -> Group | None:
        for key in self._keys(looks, mine=False):
            found = [
                group
                for group in self._by_key.get(key, [])[-_TRIED:]
                if group.number not in taken and not group.contradicts(looks, key)
            ]
            if len(found) == 1:
                return found[0]
            if found:  # they were told apart, so it is the one that stood here before, if any of them did
                return next((group for group in reversed(found) if looks.path and looks.path in group.paths), None)
        return None

    def _keys(self, looks: Looks, *, mine: bool) -> list[Key]:
        """The evidence a group is found by (``mine``), or that a disk is looked for with; what says most first."""
        return [key for key in looks.evidence if key not in self._vague] + _words(looks, mine=mine)

    def of(self, snapshot: Snapshot) -> tuple[int, ...]:
        """Numbers of the disks that a snapshot holds, ascending: who has the same ones is judged together."""
        return tuple(sorted(self._of[snapshot.id, disk.name].number for disk in snapshot.disks))


def _shared(snapshot: Snapshot) -> set[Key]:
    """Evidence that two disks of one snapshot have in common."""
    if len(snapshot.disks) < 2:
        return set()
    counted = Counter(key for disk in snapshot.disks for key in Looks.of(snapshot.host, disk).evidence)
    return {key for key, count in counted.items() if count > 1}


def _words(looks: Looks, *, mine: bool) -> list[Key]:
    """Evidence by words, of which one side at least has no path to hold against the other's."""
    if not looks.path:
        return [("without path", *looks.named)] + ([] if mine else [("with path", *looks.named)])
    return [("with path" if mine else "without path", *looks.named)]


@dataclass(frozen=True, slots=True)
class Together:
    """Snapshots that hold the same disks, oldest first."""

    number: int
    snapshots: tuple[Snapshot, ...]

    @property
    def title(self) -> str:
        """What a person knows them by: the disks of the newest snapshot, and where they were."""
        newest = self.snapshots[-1]
        return f"{', '.join(disk.name for disk in newest.disks)} of {newest.host or 'an unknown host'}"

    def as_json(self) -> dict[str, object]:
        newest = self.snapshots[-1]
        return {
            "group": self.number,
            "host": newest.host,
            "disks": [
                {
                    "name": disk.name,
                    "identity": disk.identity,
                    "serial": disk.serial,
                    "model": disk.model,
                    "path": disk.path or disk.source,
                    "size": disk.size,
                }
                for disk in newest.disks
            ],
            "snapshots": [snapshot.id for snapshot in self.snapshots],
        }


def together(known: Sequence[Snapshot]) -> list[Together]:
    """Snapshots, in the order of their commits, by the disks that they hold; groups by their oldest one."""
    told_apart = Disks(known)
    groups: dict[tuple[int, ...], list[Snapshot]] = {}
    for snapshot in known:
        groups.setdefault(told_apart.of(snapshot), []).append(snapshot)
    return [Together(number, tuple(group)) for number, group in enumerate(groups.values(), 1)]


def number_of(groups: Iterable[Together]) -> dict[str, int]:
    """The number of its group, by the id of a snapshot."""
    return {snapshot.id: number for number, snapshot in _pairs(groups)}


def _pairs(groups: Iterable[Together]) -> Iterator[tuple[int, Snapshot]]:
    for group in groups:
        for snapshot in group.snapshots:
            yield group.number, snapshot
