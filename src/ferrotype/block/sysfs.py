"""What Linux tells of block devices and mounts, in sysfs and /proc, as it stands at the moment of the call.

    /sys/dev/block/8:2 -> ../../devices/.../block/sda/sda2      one folder a device, that of its disk around it
    /proc/self/mountinfo                                        36 35 98:0 /sub /mnt rw - ext4 /dev/sda2 rw

Everything here may vanish between two looks, so what cannot be read is simply not there.

Sources: Documentation/ABI/stable/sysfs-block, proc_pid_mountinfo(5), proc_pid_fdinfo(5).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

SYS: Final = Path("/sys")
DEV: Final = Path("/dev")
PROC: Final = Path("/proc")


class Number(NamedTuple):
    """A device number."""

    major: int
    minor: int


def number_from(encoded: int) -> Number:
    """The number in an inode's st_dev or st_rdev."""
    return Number(os.major(encoded), os.minor(encoded))


def text(path: Path) -> str | None:
    """The contents of a sysfs attribute; None where it is not there, empty, or will not be read."""
    try:
        return os.fsdecode(path.read_bytes()).rstrip("\n") or None
    except OSError:
        return None


def count(path: Path) -> int:
    """A decimal attribute; 0 where it is not there."""
    digits = (text(path) or "").strip()
    return int(digits) if digits.isascii() and digits.isdigit() else 0


def names(folder: Path) -> list[str]:
    """What the folder holds, sda2 before sda10; nothing where it is not there."""
    try:
        return sorted(os.listdir(folder), key=_natural)
    except OSError:
        return []


def _natural(name: str) -> list[tuple[str, int]]:
    return [(word, int(digits or 0)) for word, digits in re.findall(r"(\D*)(\d*)", name)]


def folder_of(number: Number) -> Path | None:
    """The device's folder in sysfs, its real one; None where there is no such block device."""
    link = SYS / "dev" / "block" / f"{number.major}:{number.minor}"
    return Path(os.path.realpath(link)) if link.exists() else None


def number_of(folder: Path) -> Number | None:
    """The number of the device with that folder."""
    match = re.fullmatch(r"(\d+):(\d+)", text(folder / "dev") or "")
    return Number(int(match[1]), int(match[2])) if match else None


def device_path(folder: Path) -> Path:
    """The device's node: the kernel's own name for it, which may hold a slash."""
    match = re.search(r"^DEVNAME=(.+)$", text(folder / "uevent") or "", re.MULTILINE)
    return DEV / (match[1] if match else folder.name.replace("!", "/"))


def title(folder: Path) -> str:
    """What a user calls the device: its node, and the name it has in the device mapper."""
    mapped = text(folder / "dm" / "name")
    return f"{device_path(folder)} ({mapped})" if mapped else str(device_path(folder))


def rdev(path: str | os.PathLike[str]) -> Number | None:
    """The number of the block device at ``path``; None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return number_from(status.st_rdev) if stat.S_ISBLK(status.st_mode) else None


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo."""

    identity: int
    device: Number
    where: str
    kind: str
    source: str
    options: str  # of the file system, not of the mount

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written through any mount of the file system."""
        return self.options.split(",")[0] == "ro"


def unescape(word: str) -> str:
    """Undo what keeps spaces and line ends out of the tables in /proc."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), word)


def mounts() -> list[Mount]:
    """All mounts in sight of this process, oldest first."""
    found = []
    for line in (text(PROC / "self" / "mountinfo") or "").split("\n"):  # a path may hold what splitlines() splits at
        head, _, tail = line.partition(" - ")
        fields, rest = head.split(" "), tail.split(" ")
        if len(fields) < 6 or len(rest) < 2:
            continue
        major, _, minor = fields[2].partition(":")
        device = Number(int(major), int(minor))
        found.append(
            Mount(int(fields[0]), device, unescape(fields[4]), rest[0], unescape(rest[1]), " ".join(rest[2:]))
        )
    return found


def mount_of(path: Path) -> Mount | None:
    """The mount an existing path is reached through.

    By its descriptor: neither the device number (btrfs gives each subvolume one of its own) nor the longest prefix
    (mounts hide each other) would tell for sure.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        match = re.search(r"^mnt_id:\s*(\d+)$", text(Path("/proc/self/fdinfo") / str(fd)) or "", re.MULTILINE)
    finally:
        os.close(fd)
    return next((mount for mount in mounts() if match and mount.identity == int(match[1])), None)


def swaps() -> list[str]:
    """Devices and files that are swapped to."""
    lines = (text(PROC / "swaps") or "").split("\n")[1:]
    return [unescape(line.split()[0]) for line in lines if line.split()]


def machine_id() -> str:
    """What the hardware, or what stands in for it, calls itself; empty where it does not, or not to this user."""
    told = text(SYS / "class/dmi/id/product_uuid") or text(SYS / "firmware/devicetree/base/serial-number") or ""
    return told.strip("\0 \n").lower()


def devices() -> Iterator[tuple[Number, Path]]:
    """Every block device, partitions too, with its folder."""
    for name in names(SYS / "dev" / "block"):
        folder = Path(os.path.realpath(SYS / "dev" / "block" / name))
        number = number_of(folder)
        if number is not None:
            yield number, folder
