"""What of a disk could not be read, now or when its image was made: one sentence and one shape in JSON for all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from ferrotype.errors import DeviceError
from ferrotype.job import Job

if TYPE_CHECKING:
    from ferrotype.engine.references import OpenDisk
    from ferrotype.repository.snapshots import Snapshot

__all__ = ["BEFORE", "NOW", "as_json", "of_snapshots", "refuse_nothing", "tell", "tell_of_disk", "tell_of_snapshots"]

Range = tuple[int, int]  # start and length in bytes

_NAMED: Final = 20  # ranges that are told one by one

NOW: Final = "could not be read and are zeros"
EITHER: Final = "could not be read, now or when the source was made"
BEFORE: Final = "are zeros: they could not be read when the backup was made"


def tell(
    name: str, ranges: Sequence[Range], job: Job, *, sector: int = 512, what: str = NOW, reason: str = ""
) -> None:
    """Warn of each range, or of the first of them and how much there is beyond; ``reason`` is that of the first."""
    for start, length in ranges[:_NAMED]:
        first, last = start // sector, (start + length - 1) // sector
        sectors = f"sector {first}" if first == last else f"sectors {first} to {last}"
        job.warn(f"{name}: {length} bytes at {start} ({sectors}) {what}" + (f": {reason}" if reason else ""))
        reason = ""
    if len(ranges) > _NAMED:
        rest = sum(length for _, length in ranges[_NAMED:])
        job.warn(f"{name}: so are {rest} bytes in {len(ranges) - _NAMED} more places")


def refuse_nothing(name: str, found: Sequence[Range], wanted: int, reason: str) -> None:
    """Raise DeviceError where of the ``wanted`` bytes that hold data not one could be read: zeros are no disk."""
    if wanted and sum(length for _, length in found) >= wanted:
        raise DeviceError(f"{name}: nothing of it could be read: {reason}")


def tell_of_disk(disk: OpenDisk, found: Sequence[Range], job: Job, reason: str = "") -> None:
    """Warn of what could not be read now (``found``, for a ``reason``) and of what could not when it was backed up.

    What a disk image of another program says of that was said when it was opened.
    """
    from ferrotype.block.lenient import known_unreadable  # a list of snapshots needs no columns

    name, sector = disk.reference.text, disk.source.traits.sector_size
    if disk.record is not None:
        tell(name, known_unreadable(disk.source), job, sector=sector, what=BEFORE)
    tell(name, found, job, sector=sector, reason=reason)


def as_json(ranges: Iterable[Range], disk: str | None = None) -> list[dict[str, object]]:
    """``disk`` is its name, where there may be several."""
    named: dict[str, object] = {} if disk is None else {"disk": disk}
    return [{**named, "start": start, "length": length} for start, length in ranges]


def of_snapshots(snapshots: Iterable[Snapshot]) -> list[dict[str, object]]:
    """All ranges of the disks of snapshots, with the names of both."""
    return [
        {"snapshot": snapshot.id, **row}
        for snapshot in snapshots
        for disk in snapshot.disks
        for row in as_json(disk.unreadable, disk.name)
    ]


def tell_of_snapshots(snapshots: Iterable[Snapshot], job: Job) -> None:
    """Warn of each disk of a snapshot that is not whole, in one sentence."""
    for snapshot in snapshots:
        for disk in snapshot.disks:
            if disk.unreadable:
                lost = sum(length for _, length in disk.unreadable)
                places = len(disk.unreadable)
                job.warn(
                    f"snapshot {snapshot.id[:8]}, disk {disk.name}: {lost} bytes in {places} "
                    f"place{'' if places == 1 else 's'} {BEFORE}"
                )
