"""What is known of the benchmark disks: their partitions, which bytes are in use, and the sums of those bytes.

    DIR/day1.img, day2.img    the disk, and the same disk a day later
    DIR/manifest.json         Manifest: facts and SHA-256 sums
    DIR/day1.free, day2.free  ranges that no file system uses, one "start length" a line, bytes, ascending

A backup may leave out free space, so two sums are kept of each day: of every byte, and of the bytes in use, which
is everything that stands in no free range.  Run as a program it compares a restored disk with these sums.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class Partition:
    name: str
    filesystem: str
    start: int  # bytes
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Day:
    used: int  # bytes that file systems say are in use, partition tables and gaps not counted
    allocated: int  # bytes the image file takes up
    sha256: str  # of every byte
    sha256_used: str  # of the bytes outside the free ranges, in order


@dataclass(frozen=True, slots=True)
class Manifest:
    scale: float
    seed: int
    source: str
    disk_size: int
    changed: dict[str, int]  # block size -> bytes of such blocks that differ between the days
    partitions: tuple[Partition, ...]
    days: dict[str, Day]

    def save(self, folder: Path) -> None:
        (folder / "manifest.json").write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        return cls.parse(json.loads((folder / "manifest.json").read_text()))

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Manifest:
        raw["partitions"] = tuple(Partition(**p) for p in raw["partitions"])
        raw["days"] = {name: Day(**facts) for name, facts in raw["days"].items()}
        return cls(**raw)


def load_free(folder: Path, day: str) -> list[tuple[int, int]]:
    """(start, length) of the free ranges of a day."""
    lines = (folder / f"{day}.free").read_text().splitlines()
    return [(int(start), int(length)) for start, length in (line.split() for line in lines)]


def in_use(free: list[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    """(start, length) of what lies between free ranges of a disk of ``size`` bytes."""
    at = 0
    for start, length in free:
        if start > at:
            yield at, start - at
        at = start + length
    if at < size:
        yield at, size - at


def digest(disk: BinaryIO, ranges: Iterator[tuple[int, int]]) -> str:
    """SHA-256 of ascending ranges; a pipe will do.  A short disk gives the sum of what it has."""
    total = hashlib.sha256()
    buffer = memoryview(bytearray(MiB))
    at = 0
    for start, length in ranges:
        _skip(disk, start - at)
        at = start + length
        while length:
            count = disk.readinto(buffer[: min(length, MiB)])  # type: ignore[attr-defined]  # a buffered reader
            if not count:
                return total.hexdigest()
            total.update(buffer[:count])
            length -= count
    if disk.read(1):
        total.update(b"longer than the disk")
    return total.hexdigest()


def _skip(disk: BinaryIO, count: int) -> None:
    if disk.seekable():
        disk.seek(count, 1)
        return
    while count:
        got = len(disk.read(min(count, MiB)))
        if not got:
            return
        count -= got


def main() -> int:
    parser = argparse.ArgumentParser(description="Is a restored disk the disk of that day?")
    parser.add_argument("folder", type=Path, help="where the disks were built")
    parser.add_argument("day", choices=("day1", "day2"))
    parser.add_argument("restored", type=Path, help="may be /dev/stdin")
    parser.add_argument("--used", action="store_true", help="compare only what file systems have in use")
    options = parser.parse_args()
    manifest = Manifest.load(options.folder)
    day = manifest.days[options.day]
    free = load_free(options.folder, options.day) if options.used else []
    with options.restored.open("rb") as disk:
        found = digest(disk, in_use(free, manifest.disk_size))
    if found == (day.sha256_used if options.used else day.sha256):
        return 0
    print(f"{options.restored} is not the disk of {options.day}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
