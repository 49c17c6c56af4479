"""Whole disks as other software makes them: real partition tables around real file systems, used and aged.

Every volume is noise before it is formatted, so whatever a file system does not use holds stale bytes that cannot be
mistaken for zeros, and that do not compress.
"""

from __future__ import annotations

import functools
import hashlib
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ferrotype.units import KiB, MiB
from tests.machine import loop, mounted, need, run

Files = dict[str, str]  # path -> SHA-256 of the content
Runs = list[tuple[int, int]]  # (start, end) in bytes

MOUNTABLE = {"ext2", "ext4", "ntfs", "exfat"}
_PARTCLONE = {"ext2": "extfs", "ext4": "extfs", "ntfs": "ntfs", "exfat": "exfat", "vfat": "fat"}
_GPT_TYPE = {
    "vfat": "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
    "ntfs": "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7",
    "exfat": "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7",
    "swap": "0657FD6D-A4AB-43C4-84E5-0933C84B4F4F",
}
_LINUX = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
_MBR_TYPE = {"vfat": "e", "ntfs": "7", "exfat": "7", "swap": "82"}


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """A volume, in a file of its own, and where on the disk it stands."""

    kind: str  # blkid's name, or "noise"
    path: Path
    size: int
    files: Files
    index: int = 0
    start: int = 0

    @property
    def end(self) -> int:
        return self.start + self.size


@dataclass(frozen=True, slots=True, eq=False)
class Disk:
    """A disk, in a file."""

    path: Path
    sector_size: int
    volumes: tuple[Volume, ...]

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def volume(self, kind: str) -> Volume:
        return next(volume for volume in self.volumes if volume.kind == kind)

    def image(self) -> bytes:
        return self.path.read_bytes()


# ---------------------------------------------------------------------- volumes


def make_volume(
    folder: Path, kind: str, size: int, *, sector_size: int = 512, seed: int = 0, name: str | None = None
) -> Volume:
    """A volume of noise, formatted, filled and aged."""
    path = folder / f"{name or kind}.volume"
    path.write_bytes(random.Random(f"{kind} {seed}").randbytes(size))
    files: Files = {}
    if kind in ("ext2", "ext4"):
        block = max(sector_size, 1024)
        run("mke2fs", "-q", "-F", "-t", kind, "-b", str(block), "-E", "nodiscard", "-L", f"{kind} {seed}", path)
    elif kind == "ntfs":
        geometry = ["-s", str(sector_size), "-p", "0", "-H", "0", "-S", "0", "-c", "4096"]
        run("mkntfs", "-q", "-F", "-Q", *geometry, "-L", f"ntfs {seed}", path)
    elif kind == "vfat":
        run("mkfs.vfat", "-F16", "-S", str(sector_size), "-s1", "-n", f"FAT {seed}", path)
    elif kind == "exfat":
        with loop(path, sector_size=sector_size) as device:
            run("mkfs.exfat", "-L", f"exfat {seed}", device)
    elif kind == "swap":
        run("mkswap", "-q", "-L", f"swap {seed}", path)
    if kind == "vfat":
        files = _fill_fat(path, folder, seed)
    elif kind in MOUNTABLE:
        with opened(path, kind, folder / "mount", sector_size) as root:
            _age(root, seed, size)
            if kind == "ntfs":
                (root / "pagefile.sys").write_bytes(random.Random(seed).randbytes(600 * KiB))
        files = files_of(kind, path, folder / "mount", sector_size)
    return Volume(kind, path, size, files)


@contextmanager
def opened(
    image: Path, kind: str, where: Path, sector_size: int = 512, *, offset: int = 0, size: int = 0
) -> Iterator[Path]:
    """(Part of) an image mounted, on a loop device with the disk's sectors."""
    with (
        loop(image, offset=offset, size=size, sector_size=sector_size) as device,
        mounted(device, kind, where) as root,
    ):
        yield root


def _age(root: Path, seed: int, size: int) -> None:
    """Files of many lengths, a third of them deleted, and longer ones in the gaps."""
    rng = random.Random(seed)
    lengths = [0, 10, 700, 3000, 20_000, 60_000]
    for i in range(60):
        (root / f"d{i % 4}").mkdir(exist_ok=True)
        (root / f"d{i % 4}" / f"f{i}").write_bytes(rng.randbytes(rng.choice(lengths)))
    for i in range(0, 60, 3):
        (root / f"d{i % 4}" / f"f{i}").unlink()
    (root / "large").write_bytes(rng.randbytes(min(size // 8, 2 * MiB)))
    (root / "zeros").write_bytes(bytes(100_000))


def _fill_fat(image: Path, folder: Path, seed: int) -> Files:
    need("mcopy", "mdel")
    tree = folder / f"{image.name}.tree"
    tree.mkdir(exist_ok=True)
    rng = random.Random(seed)
    names = [f"f{i}" for i in range(30)]
    for name in names:
        (tree / name).write_bytes(rng.randbytes(rng.choice([0, 300, 5000, 70_000])))
    run("mcopy", "-i", image, *(tree / name for name in names), "::/")
    run("mdel", "-i", image, *(f"::/{name}" for name in names[::3]))
    (tree / "large").write_bytes(rng.randbytes(MiB))
    run("mcopy", "-i", image, tree / "large", "::/")
    return files_of("vfat", image, folder / "mount")


def files_of(kind: str, image: Path, where: Path, sector_size: int = 512) -> Files:
    """Every file of a volume and the hash of its content, told by the file system's own driver or by mtools."""
    if kind == "vfat":
        where = where.with_name(where.name + ".fat")
        run("rm", "-rf", where)
        where.mkdir(parents=True)
        run("mcopy", "-s", "-n", "-i", image, "::/", where)
        return _hashes(where)
    if kind not in MOUNTABLE:
        return {}
    with opened(image, kind, where, sector_size) as root:
        return _hashes(root)


def _hashes(root: Path) -> Files:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def check_clean(kind: str, image: Path) -> None:
    """The file system's own checker finds nothing; the image stays as it is."""
    if kind in ("ext2", "ext4"):
        run("e2fsck", "-fn", image)
    elif kind == "ntfs":
        run("ntfsfix", "-n", image)
        run("ntfsresize", "-i", "-f", "-P", image)  # compares the bitmap with all runs
    elif kind == "vfat":
        run("fsck.fat", "-n", image)
    elif kind == "exfat":
        assert "clean" in run("fsck.exfat", "-n", image)
    elif kind == "swap":
        assert "swap" in run("swaplabel", image)


def free_runs(kind: str, image: Path) -> Runs:
    """What the file system does not use, told by partclone.  Of swap space only the first page is worth keeping."""
    size = image.stat().st_size
    if kind == "swap":
        return [(4096, size)]
    if kind not in _PARTCLONE:
        return []
    log = image.with_suffix(".domain")
    log.unlink(missing_ok=True)
    run(f"partclone.{_PARTCLONE[kind]}", "-D", "-d0", "-L", image.with_suffix(".log"), "-s", image, "-o", log)
    found = re.findall(r"^(0x[0-9A-F]+)\s+(0x[0-9A-F]+)\s+\?$", log.read_text(), re.MULTILINE)
    return [(int(start, 16), min(int(start, 16) + int(length, 16), size)) for start, length in found]


@functools.cache
def _free_runs(volume: Volume) -> Runs:
    return free_runs(volume.kind, volume.path)


# ---------------------------------------------------------------------- disks


def cut_out(disk: Path, volume: Volume, into: Path) -> Path:
    """One volume of a disk as a file."""
    with disk.open("rb") as file:
        file.seek(volume.start)
        into.write_bytes(file.read(volume.size))
    return into


def put_in(disk: Path, volume: Volume, start: int) -> None:
    """The bytes of a volume, at a place of a disk."""
    with disk.open("r+b") as file:
        file.seek(start)
        file.write(volume.path.read_bytes())


def without_free(disk: Disk) -> bytes:
    """The bytes of a disk with zeros wherever a file system does not use them."""
    image = bytearray(disk.image())
    for volume in disk.volumes:
        for start, end in _free_runs(volume):
            image[volume.start + start : volume.start + end] = bytes(end - start)
    return bytes(image)


def _placed(volumes: list[Volume], indexes: list[int], start: int = MiB, gap: int = MiB) -> tuple[Volume, ...]:
    placed = []
    for volume, index in zip(volumes, indexes, strict=True):
        placed.append(Volume(volume.kind, volume.path, volume.size, volume.files, index, start))
        start += volume.size + gap
    return tuple(placed)


def _assemble(path: Path, size: int, sector_size: int, script: str, volumes: tuple[Volume, ...]) -> Disk:
    with path.open("wb") as file:
        file.truncate(size)
    with loop(path, sector_size=sector_size) as device:
        run("sfdisk", "--no-reread", "--no-tell-kernel", "-q", device, text_in=script)
    for volume in volumes:
        put_in(path, volume, volume.start)
    return Disk(path, sector_size, volumes)


def gpt_disk(path: Path, volumes: list[Volume], sector_size: int, *, tail: int = MiB) -> Disk:
    """A GPT disk with a MiB of nothing between its partitions, and ``tail`` bytes behind the last."""
    placed = _placed(volumes, list(range(1, len(volumes) + 1)))
    lines = ["label: gpt"]
    for volume in placed:
        kind = _GPT_TYPE.get(volume.kind, _LINUX)
        start, size = volume.start // sector_size, volume.size // sector_size
        lines.append(f'start={start}, size={size}, type={kind}, name="part {volume.index}"')
    return _assemble(path, placed[-1].end + tail, sector_size, "\n".join(lines) + "\n", placed)


def mbr_disk(path: Path, volumes: list[Volume], sector_size: int) -> Disk:
    """An MBR disk: two primary partitions, the others in an extended one, each a MiB behind its own table."""
    indexes = [1, 2, *range(5, 3 + len(volumes))]
    placed = _placed(volumes, indexes)
    end = placed[-1].end
    lines = ["label: dos"]
    for volume in placed:
        if volume.index == 5:
            start = volume.start - MiB // 2
            lines.append(f"3: start={start // sector_size}, size={(end - start) // sector_size}, type=5")
        kind = _MBR_TYPE.get(volume.kind, "83")
        start, size = volume.start // sector_size, volume.size // sector_size
        lines.append(f"{volume.index}: start={start}, size={size}, type={kind}")
    return _assemble(path, end + MiB, sector_size, "\n".join(lines) + "\n", placed)


def hybrid_disk(path: Path, volumes: list[Volume]) -> Disk:
    """A GPT disk whose first two partitions are in its MBR too."""
    disk = gpt_disk(path, volumes, 512)
    run("sgdisk", "-h", "1:2", path)
    return disk


def bare_disk(path: Path, volume: Volume, sector_size: int = 512) -> Disk:
    """A volume without a table around it."""
    path.write_bytes(volume.path.read_bytes())
    return Disk(path, sector_size, (volume,))


def table_of(device: Path) -> list[str]:
    """The partitions as sfdisk dumps them, without the device's name and what the size of the disk decides."""
    lines = run("sfdisk", "-d", device).splitlines()
    kept = [line for line in lines if not line.startswith(("device:", "last-lba:", "first-lba:", "unit:"))]
    return [re.sub(r"^\S+?(p?\d+) :", lambda match: match[1].removeprefix("p") + ":", line) for line in kept]


def check_same(found: bytes | bytearray, wanted: bytes | bytearray) -> None:
    """Bytes are equal; where they are not, say where instead of showing megabytes."""
    if bytes(found) == bytes(wanted):
        return
    assert len(found) == len(wanted)
    step = 4096
    wrong = [at for at in range(0, len(wanted), step) if found[at : at + step] != wanted[at : at + step]]
    raise AssertionError(
        f"{len(wrong)} blocks of {step} bytes differ, the first at {wrong[0]}, the last at {wrong[-1]}"
    )


def blank_file(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


def drop(path: Path) -> None:
    """Give the room of a large test file back at once."""
    path.unlink(missing_ok=True)
    os.sync()
