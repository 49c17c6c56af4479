"""Where a volume's boot sector says that it begins on its disk, and where it does now.

Windows starts from NTFS and FAT through a boot sector that names the partition's first sector ("hidden sectors").  A
restore gives back all bytes as they were, so in a partition that begins elsewhere the name is wrong.
"""

from __future__ import annotations

from pathlib import Path

from ferrotype.block import Source, read, sysfs
from ferrotype.block.device import DeviceSource
from ferrotype.errors import ReadError
from ferrotype.job import Job

__all__ = ["tell_of_start"]

_BOOT_SECTOR = 512  # bytes


def tell_of_start(target: Source, job: Job) -> None:
    """Note where a device, read after it was written, is a partition that begins elsewhere than its volume says."""
    if not isinstance(target, DeviceSource) or target.size < _BOOT_SECTOR:
        return
    start = _start_of(target.path)
    if start is None:
        return
    try:
        said = _said_start(read(target, 0, _BOOT_SECTOR))
    except ReadError:  # what cannot be read back is told by others
        return
    if said is None or said[1] == start:
        return
    kind, place = said
    job.note(
        f"the {kind} volume says that its partition begins at byte {place}, and {target.path} begins at {start}: its "
        "data are whole, but a BIOS cannot start Windows from it; correct its hidden "
        "sectors there, or restore it to a partition that begins where it was"
    )


def _said_start(boot: bytes) -> tuple[str, int] | None:
    """The kind of a volume, and the byte of its disk at which it says that it begins; None: it says none.

    BPB_HiddSec of "FAT: General Overview of On-Disk Format", and PartitionOffset of the exFAT specification.
    """
    if boot[510:512] != b"\x55\xaa":
        return None
    if boot[3:11] == b"EXFAT   ":
        place = int.from_bytes(boot[64:72], "little") << min(boot[108], 12)
        return ("exFAT", place) if place else None
    if boot[3:11] == b"NTFS    ":
        kind = "NTFS"
    elif boot[54:57] == b"FAT" or boot[82:87] == b"FAT32":
        kind = "FAT"
    else:
        return None
    place = int.from_bytes(boot[28:32], "little") * int.from_bytes(boot[11:13], "little")
    return (kind, place) if place else None


def _start_of(device: Path) -> int | None:
    """The byte of its disk, or of the file behind a loop device, at which a partition begins; None: it is none."""
    number = sysfs.rdev(device)
    folder = sysfs.folder_of(number) if number is not None else None
    if folder is None:
        return None
    if sysfs.text(folder / "partition") is not None:
        return sysfs.count(folder / "start") * 512  # in these units, whatever the sectors
    return sysfs.count(folder / "loop" / "offset") or None
