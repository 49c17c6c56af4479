"""What is on a disk: its partition table, its volumes, and which of its bytes are known without reading them.

A survey never fails on content.  What cannot be understood is kept whole, and said so.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ferrotype.block import Source, read
from ferrotype.block.views import Slice
from ferrotype.engine.owners import doubt, owner_of_disk
from ferrotype.engine.within import inner_volumes
from ferrotype.errors import FormatError, ReadError
from ferrotype.extents import ExtentMap, State, merge
from ferrotype.filesystems import FileSystem
from ferrotype.filesystems.registry import identify
from ferrotype.units import KiB, format_size
from ferrotype.volumes import Partition, Table
from ferrotype.volumes.scan import scan


@dataclass(frozen=True, slots=True)
class Volume:
    """A partition, or a whole disk without a table, and what it holds."""

    index: int  # partition number; 0: the disk has no table and is one volume
    start: int  # bytes
    size: int
    type: str | None  # of the table's entry
    label: str | None  # the file system's, else the partition's
    partition_label: str | None
    uuid: str | None  # the file system's
    filesystem: str | None  # blkid's name
    block_size: int | None  # bytes of the file system's allocation unit
    used_bytes: int | None
    clean: bool | None
    note: str | None = None  # why the volume is kept whole, where it is

    def as_json(self) -> dict[str, object]:
        return {
            "index": self.index,
            "start": self.start,
            "size": self.size,
            "type": self.type,
            "label": self.label,
            "partition_label": self.partition_label,
            "uuid": self.uuid,
            "filesystem": self.filesystem,
            "block_size": self.block_size,
            "used_bytes": self.used_bytes,
            "clean": self.clean,
            "kept": self.note,
        }

    @property
    def title(self) -> str:
        """How messages call it."""
        what = f"partition {self.index}" if self.index else "the volume"
        return f"{what} ({self.label})" if self.label else what


@dataclass(slots=True)
class Told:
    """Sentences for the user, by how much they matter."""

    damage: list[str] = field(default_factory=list)  # tables and file systems that contradict themselves
    unclean: list[str] = field(default_factory=list)  # file systems that were not unmounted
    notes: list[str] = field(default_factory=list)  # what is kept whole for lack of a map, and what is left out


@dataclass(frozen=True, slots=True)
class Survey:
    """A surveyed disk."""

    size: int
    sector_size: int
    table: Table | None
    volumes: tuple[Volume, ...]
    extents: ExtentMap  # of the whole disk: ZERO and HOLE as the source knows, FREE as the file systems say
    told: Told  # what the user should know

    @property
    def regions(self) -> tuple[tuple[int, int], ...]:
        """(start, length) of the stretches with a chunk grid of their own: each volume, and what lies between."""
        out = []
        at = 0
        for volume in self.volumes:
            if volume.start > at:
                out.append((at, volume.start - at))
            out.append((volume.start, volume.size))
            at = volume.start + volume.size
        if at < self.size:
            out.append((at, self.size - at))
        return tuple(out)


def survey(
    source: Source, *, sector_size: int | None = None, exclude_swap_files: bool = False, allocation: bool = True
) -> Survey:
    """Look at a disk.  ``allocation=False`` leaves out the extents, for callers that need the layout only."""
    told = Told()
    table = None
    parts: tuple[Partition, ...] = (Partition(0, 0, source.size, ""),) if source.size else ()
    try:
        table = scan(source, sector_size=sector_size)
    except (FormatError, ReadError) as error:
        told.damage.append(f"the partition table cannot be read, so the whole disk is kept: {error}")
        parts = ()
    if table is not None:
        told.damage += table.warnings
        parts = table.partitions
    known = source.extents(0, source.size) if allocation else ExtentMap.uniform(0, source.size)
    look = _Look(source, table, told, exclude_swap_files, known if allocation else None)
    volumes, free = look.volumes(parts)
    extents = merge(known, free)
    if table is not None:  # a partition may lie over the table itself, whose sectors it would call free
        extents = extents.cleared(State.FREE, table.metadata)
    return Survey(
        source.size,
        sector_size or (table.sector_size if table else source.traits.sector_size),
        table,
        volumes,
        extents,
        told,
    )


@dataclass(frozen=True, slots=True)
class _Look:
    """One look at the volumes of a disk."""

    source: Source
    table: Table | None
    told: Told
    exclude_swap_files: bool
    known: ExtentMap | None  # what the source knows without reading; None: no map is wanted

    def volumes(self, parts: tuple[Partition, ...]) -> tuple[tuple[Volume, ...], ExtentMap]:
        """All volumes, and what they leave free of the whole disk."""
        owner = self._owner()
        volumes, maps, at = [], [], 0
        for partition in parts:
            volume, free = self._volume(partition, owner)
            volumes.append(volume)
            maps += [ExtentMap.uniform(at, partition.start - at), free]
            at = partition.end
        maps.append(ExtentMap.uniform(at, self.source.size - at))
        return tuple(volumes), ExtentMap.concat([m for m in maps if m.length])

    def _owner(self) -> str | None:
        """What claims all of the disk besides its table; then no file system may give anything away."""
        if self.table is None:
            return None
        owner = owner_of_disk(self.source, self.table)
        if owner is not None:
            self.told.notes.append(f"all of the disk is kept: {owner}")
        return owner

    def _volume(self, partition: Partition, owner: str | None) -> tuple[Volume, ExtentMap]:
        """One volume, and its map in offsets of the disk."""
        told, known = self.told, self.known
        whole = ExtentMap.uniform(partition.start, partition.size)
        place = (partition.index, partition.start, partition.size)
        names = (partition.type or None, partition.label, partition.label)
        volume = Volume(*place, *names, None, None, None, None, None)
        view = Slice(self.source, partition.start, partition.size)
        try:
            found = identify(view)
        except ReadError as error:
            told.damage.append(f"{volume.title} is kept whole: {error}")
            return replace(volume, note=str(error)), whole
        if found is None:
            if (problem := _unreadable(view)) is not None:
                told.damage.append(f"{volume.title} is kept whole: {problem}")
            elif known is not None and not _blank(known.clip(partition.start, partition.size)):
                told.notes.append(f"{volume.title} holds nothing known and is kept whole")
            return volume, whole
        volume = replace(volume, filesystem=found.kind, label=found.label or volume.label, uuid=found.uuid)
        if found.filesystem is None:
            note = found.problem or "ferrotype has no allocation map for it"
            (told.damage if found.damaged else told.notes).append(
                f"{volume.title}, {found.kind}, {'is damaged and' if found.damaged else 'is'} kept whole: {note}"
            )
            return replace(volume, note=note), whole
        facts = found.filesystem.facts
        volume = replace(volume, block_size=facts.block_size, clean=facts.unclean is None)
        why = owner or doubt(self.table, partition, view, facts.size)
        if why is not None:
            if owner is None:  # said once for the whole disk
                told.notes.append(f"{volume.title}, {found.kind}, is kept whole: {why}")
            volume = replace(volume, note=why)
        if known is None:
            return volume, whole
        volume, free = self._mapped(volume, found.filesystem, view)
        return volume, whole if why is not None else free

    def _mapped(self, volume: Volume, filesystem: FileSystem, view: Source) -> tuple[Volume, ExtentMap]:
        told = self.told
        whole = ExtentMap.uniform(volume.start, volume.size)
        unclean = filesystem.facts.unclean
        try:
            free = filesystem.allocation()
            used = free.clip(0, min(filesystem.facts.size, view.size))
            volume = replace(volume, used_bytes=used.length - used.total(State.FREE))
            if self.exclude_swap_files and not unclean and volume.note is None:
                swap = filesystem.swap_files()
                free = merge(free, swap)
                if left_out := swap.total(State.FREE):
                    told.notes.append(
                        f"{volume.title}: {format_size(left_out)} of paging and hibernation files are left out"
                    )
        except (FormatError, ReadError) as error:
            told.damage.append(f"{volume.title}, {volume.filesystem}, is damaged and kept whole: {error}")
            return replace(volume, note=str(error), clean=False), whole
        if unclean:
            told.unclean.append(f"{volume.title}, {volume.filesystem}, is kept whole: {unclean}")
            return replace(volume, note=volume.note or unclean), whole
        if volume.note is None:
            free = self._without_inner(volume, filesystem, view, free)
        if filesystem.facts.besides and volume.note is None:
            told.notes.append(
                f"{volume.title}, {volume.filesystem}, has {filesystem.facts.besides}: say --all-sectors to keep them"
            )
        return volume, free.shift(volume.start)

    def _without_inner(self, volume: Volume, filesystem: FileSystem, view: Source, free: ExtentMap) -> ExtentMap:
        """The map without what volumes in the free space span, but for older ones; all are told."""
        assert self.known is not None  # noqa: S101  a map is wanted
        known = self.known.clip(volume.start, volume.size).shift(-volume.start)
        for inner in inner_volumes(view, volume.start, free, known):
            what = f"in the free space of {volume.title}, {volume.filesystem}, there is {inner.words}"
            if (order := inner.order(filesystem.facts)) is not None:
                free = free.cleared(State.FREE, [(inner.start, inner.size)])
                self.told.notes.append(f"{what}, which {order} and is kept")
            else:
                self.told.notes.append(
                    f"{what}, a remain of an earlier partitioning that is left out; --all-sectors keeps it"
                )
        return free


def _blank(known: ExtentMap) -> bool:
    """Whether all of it is known to read as zeros."""
    return bool(np.all(known.states & np.uint8(State.ZERO)))


def _unreadable(view: Source) -> ReadError | None:
    """Why the place where file systems have their first structures cannot be read, if it cannot."""
    try:
        read(view, 0, min(view.size, 64 * KiB))
    except ReadError as error:
        return error
    return None
