"""The list of this machine's disks: what the kernel tells of each of them, and of their partitions."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ferrotype.block import sysfs

__all__ = ["Disk", "Partition", "disks", "hardware_of"]

_UNIT: Final = 512  # bytes; sysfs counts in it whatever the sector size


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition as the kernel knows it; ``start`` (on its disk) and ``size`` in bytes."""

    path: Path
    number: int
    start: int
    size: int
    mounts: tuple[str, ...]
    holders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Disk:
    """A whole block device; sizes in bytes.  What it does not tell is None."""

    path: Path
    size: int
    sector_size: int
    physical_sector_size: int
    model: str | None
    serial: str | None
    removable: bool
    rotational: bool
    read_only: bool
    partitions: tuple[Partition, ...]
    mounts: tuple[str, ...]  # of the whole device; those of partitions stand there
    holders: tuple[str, ...]  # devices made of it: dm-0, md127
    backing_file: str | None  # of a loop device


def disks() -> tuple[Disk, ...]:
    """The machine's disks: no RAM disks, no empty drives, loop devices only where something is attached."""
    mounted: dict[sysfs.Number, list[str]] = {}
    for mount in sysfs.mounts():
        number = mount.device if sysfs.folder_of(mount.device) else sysfs.rdev(mount.source)
        if number is not None:
            mounted.setdefault(number, []).append(mount.where)
    folders = [Path(os.path.realpath(sysfs.SYS / "block" / name)) for name in sysfs.names(sysfs.SYS / "block")]
    return tuple(_disk(folder, mounted) for folder in folders if _is_disk(folder))


def hardware_of(path: Path) -> tuple[Disk, int] | None:
    """The disk that a device is, or is a partition of, and the partition's number, or 0."""
    real = path.resolve()
    for disk in disks():
        if disk.path.resolve() == real:
            return disk, 0
        for partition in disk.partitions:
            if partition.path.resolve() == real:
                return disk, partition.number
    return None


def _is_disk(folder: Path) -> bool:
    if not sysfs.count(folder / "size") or sysfs.count(folder / "hidden") or re.fullmatch(r"z?ram\d+", folder.name):
        return False
    return not folder.name.startswith("loop") or sysfs.text(folder / "loop" / "backing_file") is not None


def _disk(folder: Path, mounted: dict[sysfs.Number, list[str]]) -> Disk:
    return Disk(
        path=sysfs.device_path(folder),
        size=sysfs.count(folder / "size") * _UNIT,
        sector_size=sysfs.count(folder / "queue" / "logical_block_size") or _UNIT,
        physical_sector_size=sysfs.count(folder / "queue" / "physical_block_size") or _UNIT,
        model=_word(folder / "device" / "model") or _word(folder / "dm" / "name") or _word(folder / "md" / "level"),
        serial=_serial(folder),
        removable=sysfs.count(folder / "removable") != 0,
        rotational=sysfs.count(folder / "queue" / "rotational") != 0,
        read_only=sysfs.count(folder / "ro") != 0,
        partitions=_partitions(folder, mounted),
        mounts=_mounts_on(folder, mounted),
        holders=tuple(sysfs.names(folder / "holders")),
        backing_file=sysfs.text(folder / "loop" / "backing_file"),
    )


def _partitions(folder: Path, mounted: dict[sysfs.Number, list[str]]) -> tuple[Partition, ...]:
    parts = [folder / name for name in sysfs.names(folder) if (folder / name / "partition").exists()]
    found = [
        Partition(
            path=sysfs.device_path(part),
            number=sysfs.count(part / "partition"),
            start=sysfs.count(part / "start") * _UNIT,
            size=sysfs.count(part / "size") * _UNIT,
            mounts=_mounts_on(part, mounted),
            holders=tuple(sysfs.names(part / "holders")),
        )
        for part in parts
    ]
    return tuple(sorted(found, key=lambda part: part.number))


def _mounts_on(folder: Path, mounted: dict[sysfs.Number, list[str]]) -> tuple[str, ...]:
    number = sysfs.number_of(folder)
    return tuple(mounted.get(number, ())) if number else ()


def _serial(folder: Path) -> str | None:
    """Virtio, NVMe and MMC tell it as text, SCSI in the vital product data page 80h (SPC-4, 7.8.15)."""
    told = _word(folder / "serial") or _word(folder / "device" / "serial")
    if told is not None:
        return told
    try:
        page = (folder / "device" / "vpd_pg80").read_bytes()
    except OSError:
        return None
    return page[4:].decode("ascii", "replace").strip("\0").strip() or None


def _word(attribute: Path) -> str | None:
    """An attribute for people, without the padding; None where it is empty."""
    return (sysfs.text(attribute) or "").strip() or None
