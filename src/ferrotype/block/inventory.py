"""What rests on what among files and devices: the questions a restore asks before its first write.

Every block device and file comes down to ranges of a root, through partitions and loop devices:

    /dev/loop0p1  ->  /dev/loop0 from 1 MiB  ->  /var/disk.raw from 1 MiB        file root: its (st_dev, st_ino)
    /dev/sda2     ->  /dev/sda from 512 MiB                                      device root: its (major, minor)

and rests on more: a file root on the devices of its file system, a device-mapper or md device on its slaves.

    same_storage    ranges of one meet ranges of the other, or of what the other rests on
    lies_on         what the file is or rests on meets the device
    writers_of      what is mounted so that it may be written to, and whose hands it is in
    uses            what is mounted, swapped to or held among the devices that meet the path
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from ferrotype import linux
from ferrotype.block import sysfs
from ferrotype.block.holders import device_number, held, writers, writing_processes

__all__ = ["lies_on", "same_storage", "uses", "writers_of"]

_UNIT: Final = 512  # bytes; sysfs counts in it whatever the sector size


# ---------------------------------------------------------------------- ranges of roots


class _Range(NamedTuple):
    """Bytes ``start`` to ``end`` of a device or a file."""

    kind: str  # "device": number is (major, minor); "file": (st_dev, st_ino)
    number: tuple[int, int]
    start: int
    end: int
    path: str | None = None  # of a file, where it has one

    def meets(self, other: _Range) -> bool:
        same = self.kind == other.kind and self.number == other.number
        return same and self.start < other.end and other.start < self.end

    def part(self, start: int, length: int) -> _Range:
        return self._replace(start=self.start + start, end=min(self.start + start + length, self.end))


def _meet(some: list[_Range], others: list[_Range]) -> bool:
    return any(one.meets(other) for one in some for other in others)


_DEPTH: Final = 32  # loop devices over loop devices, a partition between each two


def _device_range(number: sysfs.Number, depth: int = _DEPTH) -> _Range:
    """A device as a range of its root: the disk of a partition, what a loop device is attached to."""
    folder = sysfs.folder_of(number)
    own = _Range("device", number, 0, 1 << 63)
    if folder is None or depth == 0:
        return own
    size = sysfs.count(folder / "size") * _UNIT
    disk = sysfs.number_of(folder.parent) if (folder / "partition").exists() else None
    if disk is not None:
        return _device_range(disk, depth - 1).part(sysfs.count(folder / "start") * _UNIT, size)
    backing = _backing(folder, depth)
    return backing.part(sysfs.count(folder / "loop" / "offset"), size) if backing else own


def _backing(folder: Path, depth: int) -> _Range | None:
    """What a loop device is attached to, as a whole."""
    name = sysfs.text(folder / "loop" / "backing_file")
    if name is None:
        return None
    found = _path_range(name, depth - 1)
    if found is not None:
        return found
    # Deleted meanwhile, or out of our sight: the driver still knows which one it is.
    with contextlib.suppress(OSError):
        fd = os.open(sysfs.device_path(folder), os.O_RDONLY | os.O_CLOEXEC)
        try:
            info = linux.loop_info(fd)
        finally:
            os.close(fd)
        if info.lo_rdevice:
            return _device_range(sysfs.number_from(info.lo_rdevice), depth - 1)
        return _Range("file", (info.lo_device, info.lo_inode), 0, 1 << 63)
    return None


def _path_range(path: str | os.PathLike[str], depth: int = _DEPTH) -> _Range | None:
    """What the path is, as a range of its root; None where it is neither a block device nor a regular file."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    if stat.S_ISBLK(status.st_mode):
        return _device_range(sysfs.number_from(status.st_rdev), depth)
    if stat.S_ISREG(status.st_mode):
        return _Range("file", (status.st_dev, status.st_ino), 0, 1 << 63, os.path.realpath(path))
    return None


def _rests_on(first: list[_Range]) -> list[_Range]:
    """The ranges, and all that they rest on: file systems' devices, slaves of made-up devices, and so on down."""
    found: list[_Range] = []
    todo = list(first)
    while todo:
        one = todo.pop()
        if one in found:
            continue
        found.append(one)
        if one.kind == "device":
            folder = sysfs.folder_of(sysfs.Number(*one.number))
            slaves = folder / "slaves" if folder else Path()
            numbers = [sysfs.number_of(slaves / name) for name in sysfs.names(slaves)] if folder else []
            todo += [_device_range(number) for number in numbers if number]
        elif one.path is not None:
            todo += _file_system_ranges(Path(one.path))
        else:
            todo.append(_device_range(sysfs.number_from(one.number[0])))
    return found


def _file_system_ranges(path: Path) -> list[_Range]:
    """Where the file system that holds the existing path keeps its bytes."""
    try:
        device = sysfs.number_from(os.stat(path).st_dev)
    except OSError:
        return []
    ranges = [_device_range(device)] if sysfs.folder_of(device) else []
    mount = sysfs.mount_of(path)
    return ranges + _mount_ranges(mount) if mount else ranges


def _mount_ranges(mount: sysfs.Mount) -> list[_Range]:
    """Where a mounted file system keeps its bytes.  The device number of many (btrfs, FUSE, overlay) is made up."""
    ranges = [_device_range(mount.device)] if sysfs.folder_of(mount.device) else []
    if mount.source.startswith("/"):
        source = _path_range(mount.source)
        ranges += [source] if source else []
    if mount.kind == "btrfs":
        ranges += _btrfs_ranges(mount.source)
    if mount.kind == "overlay":
        # Writes go to the upper folder, but reading the file may read a lower one.
        for option in mount.options.split(","):
            key, _, folders = option.partition("=")
            if key in ("upperdir", "lowerdir", "lowerdir+", "datadir+"):
                below = [Path(sysfs.unescape(folder)) for folder in folders.split(":") if folder]
                # Through the path, not the mount: an overlay over an overlay ends, at the latest, where paths do.
                ranges += [r for folder in below for r in _plain_folder_ranges(folder)]
    return ranges


def _plain_folder_ranges(folder: Path) -> list[_Range]:
    try:
        device = sysfs.number_from(os.stat(folder).st_dev)
    except OSError:
        return []
    return [_device_range(device)] if sysfs.folder_of(device) else []


def _btrfs_ranges(source: str) -> list[_Range]:
    """All devices of the btrfs that has the device ``source``; mountinfo names one only."""
    own = sysfs.rdev(source)
    for folder in (sysfs.SYS / "fs" / "btrfs").glob("*-*-*-*-*/devices"):
        numbers = [number for name in sysfs.names(folder) if (number := sysfs.number_of(folder / name))]
        if own in numbers:
            return [_device_range(number) for number in numbers]
    return []


# ---------------------------------------------------------------------- what a restore asks


def same_storage(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> bool:
    """Whether writing to one would change the other.

    So it is for the same device or file under two names, for a disk and its partition, for a loop device and the
    part of the file or device it is attached to, for a device-mapper or md device and what it is made of.  A path
    that does not exist is nobody's.
    """
    one, other = _path_range(a), _path_range(b)
    if one is None or other is None:
        return False
    return _meet([one], _made_of(other)) or _meet(_made_of(one), [other])


def _made_of(one: _Range) -> list[_Range]:
    """The range and the slaves below it; not the file systems below a file, which have room for others."""
    return [one] if one.kind == "file" else [r for r in _rests_on([one]) if r.kind == "device"]


def lies_on(file: str | os.PathLike[str], device: str | os.PathLike[str]) -> bool:
    """Whether the file, which need not exist yet, is stored on the device or on a part of it.

    It is looked for through partitions, device-mapper and md slaves, and the files behind loop devices.
    """
    target = _path_range(device)
    if target is None:
        return False
    path = Path(os.path.realpath(file))
    own = _path_range(path)
    while not path.exists() and path != path.parent:
        path = path.parent
    return _meet(_rests_on([own] if own else _file_system_ranges(path)), [target])


def uses(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Why the device or file, or any part of it, is in use: one sentence a reason, none where it is not."""
    target = _path_range(path)
    if target is None:
        return ()
    itself = sysfs.rdev(path)
    below = _below(itself)
    reasons = []
    for number, folder in sysfs.devices():
        if _device_range(number).meets(target):
            title = sysfs.title(folder)
            if number not in below and (folder / "loop" / "backing_file").exists():
                reasons.append(f"{title} is attached to it as a loop device")
            holders = folder / "holders"
            reasons += [f"{title} is part of {sysfs.title(holders / name)}" for name in sysfs.names(holders)]
    for mount in sysfs.mounts():
        reasons += [f"{what} is mounted at {mount.where}" for _, what in _kept_on(mount, {Path(path): target})]
    reasons += [f"{swap} is used as swap space" for swap in sysfs.swaps() if _swaps_to(swap, target)]
    if not reasons and itself is not None and _is_held(path):
        reasons.append(f"{path} is held by another program")
    if not reasons:
        by = held(Path(path)) if itself is None else _written_device(Path(path), target)
        reasons = [by] if by is not None else []
    return tuple(dict.fromkeys(reasons))


def writers_of(*paths: Path) -> tuple[str, ...]:
    """Who may write to devices or files, or to any part of them, while they are read: mounts, swap, else programs."""
    targets = {path: target for path in paths if (target := _path_range(path)) is not None}
    mounted: dict[Path, str] = {}
    quiet: set[Path] = set()  # mounted to be read: held, and not written to
    for mount in sysfs.mounts() if targets else ():
        for path, what in _kept_on(mount, targets):
            if mount.read_only:
                quiet.add(path)
            else:
                mounted.setdefault(path, f"{what} is mounted at {mount.where}")
    for swap in sysfs.swaps():
        for path in (path for path, target in targets.items() if _swaps_to(swap, target)):
            mounted.setdefault(path, f"{swap} is used as swap space")
    others = [path for path in targets if path not in mounted]
    found = writers([path for path in others if sysfs.rdev(path) is None])
    for path in others:
        if path not in found and sysfs.rdev(path) is not None and (by := _written_device(path, targets[path])):
            found[path] = by
    unknown = {path: targets[path] for path in others if path not in found and path not in quiet}
    return tuple(dict.fromkeys([*mounted.values(), *found.values(), *_held_out_of_sight(unknown)]))


def _held_out_of_sight(targets: dict[Path, _Range]) -> Iterator[str]:
    """Devices over the targets that are held for what does not show here, such as mounts of other namespaces."""
    there = [folder for number, folder in sysfs.devices() if _meet([_device_range(number)], list(targets.values()))]
    if any(sysfs.names(folder / "holders") for folder in there):  # what is made of them shows
        return
    for folder in there:
        if not sysfs.count(folder / "ro") and _is_held(sysfs.device_path(folder)):
            yield f"{sysfs.title(folder)} is held by another program"


def _kept_on(mount: sysfs.Mount, targets: dict[Path, _Range]) -> Iterator[tuple[Path, str]]:
    """The targets that a mounted file system keeps bytes on, and what it is on."""
    parts = [part for one in _mount_ranges(mount) for part in _made_of(one)]
    for path, target in targets.items():
        if _meet(parts, [target]):
            device = sysfs.folder_of(mount.device)
            yield path, sysfs.title(device) if device else mount.source


def _written_device(path: Path, target: _Range) -> str | None:
    """The program that has the device, a part of it or what it is a part of open for writing, in a sentence."""

    def which(link: str, descriptor: Path) -> Path | None:
        number = device_number(descriptor) if link.startswith("/dev/") else None
        return path if number is not None and _device_range(sysfs.number_from(number)).meets(target) else None

    return next((f"{path} is open for writing in {who}" for who, _ in writing_processes(which)), None)


def _below(device: sysfs.Number | None) -> list[sysfs.Number]:
    """The device, and those it is a range of: a partition's disk, the device a loop device is attached to."""
    found: list[sysfs.Number] = []
    while device is not None and device not in found:
        found.append(device)
        folder = sysfs.folder_of(device)
        if folder is None:
            break
        if (folder / "partition").exists():
            device = sysfs.number_of(folder.parent)
        else:
            device = sysfs.rdev(sysfs.text(folder / "loop" / "backing_file") or "")
    return found


def _swaps_to(swap: str, target: _Range) -> bool:
    own = _path_range(swap)
    return own is not None and _meet(_made_of(own), [target])


def _is_held(path: str | os.PathLike[str]) -> bool:
    """Whether someone has the device open exclusively, as mkfs, ZFS and other mount namespaces do."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False
