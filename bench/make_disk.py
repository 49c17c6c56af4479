#!/usr/bin/env python3
"""Builds the benchmark disk: a used workstation disk, and the same disk after one more day of work.

    make_disk.py DIR [--scale 0.5] [--seed 1] [--source /usr]

    |  1 MiB  |  ESP, FAT32  |       root, ext4        |   data, NTFS   |  unallocated  |
       GPT       512 MiB             4608 MiB               2048 MiB         1023 MiB         at scale 1

A bit over half is in use.  The files come from ``--source``, with logs, a database, media and a second copy of a
project added; about a tenth of what was written is deleted again before the disk is closed, so that free blocks
hold stale data.  Day two appends, rotates, updates, deletes and adds: about 2 % of what is in use changes.  What
disks.py says is written beside the images.  The free ranges are partclone's opinion, not ours.

Needs root, loop devices, and: sfdisk mkfs.vfat mcopy mkfs.ext4 mkfs.ntfs ntfs-3g fuser partclone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import content
from content import Item, Stock

from disks import Day, Manifest, MiB, Partition, digest, in_use, load_free

GiB: Final = 1 << 30
SECTOR: Final = 512
SMALLEST: Final = 64  # MiB a partition; a smaller one cannot be FAT32
DAYS: Final = ("day1", "day2")
TYPES: Final = {  # UEFI 2.10 table 5.7; Discoverable Partitions Specification
    "esp": "C12A7328-F81F-11D2-BA4B-00A0C93EC93B",
    "root": "0FC63DAF-8483-4772-8E79-3D69D8477DE4",
    "data": "EBD0A0A2-B9E5-4433-87C0-68B6B72699C7",
}
UUID: Final = "fe440000-0000-4000-8000-0000000000{:02x}"


def run(*argv: str | Path, text: str | None = None) -> str:
    """Standard output of a tool; a failing one ends the program with what it said."""
    env = os.environ | {"LC_ALL": "C", "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    done = subprocess.run([str(a) for a in argv], input=text, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        sys.exit(f"make_disk: {' '.join(map(str, argv))}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def patiently(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not done():
        if time.monotonic() > end:
            sys.exit(f"make_disk: {what} does not come to an end")
        time.sleep(0.1)


def works(*argv: str) -> bool:
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def loop(image: Path, part: Partition) -> Iterator[str]:
    """A loop device over one partition."""
    device = run(
        "losetup", "--find", "--show", "--offset", str(part.start), "--sizelimit", str(part.size), image
    ).strip()
    try:
        yield device
    finally:
        patiently(lambda: works("losetup", "--detach", device), f"detaching {device}")


@contextlib.contextmanager
def mounted(image: Path, part: Partition) -> Iterator[Path]:
    """One partition, mounted on a new folder; written back and let go afterwards."""
    with loop(image, part) as device, tempfile.TemporaryDirectory(prefix="make-disk-") as where:
        if part.filesystem == "ntfs":
            run("ntfs-3g", "-o", "big_writes,noatime", device, where)
        else:
            run("mount", "-t", part.filesystem, "-o", "noatime", device, where)
        try:
            yield Path(where)
        finally:
            os.sync()
            patiently(lambda: works("umount", where), f"unmounting {where}")
            # A FUSE umount returns before its daemon has written back and closed the device.
            patiently(lambda: not works("fuser", "--silent", device), f"use of {device}")


# ---------------------------------------------------------------------- an empty disk


def partition(image: Path, scale: float) -> tuple[Partition, ...]:
    """A new sparse disk with a GPT; the partitions on it."""
    parts, at = [], MiB
    for name, filesystem, full_size in (("esp", "vfat", 512), ("root", "ext4", 4608), ("data", "ntfs", 2048)):
        size = max(int(full_size * scale), SMALLEST) * MiB
        parts.append(Partition(name, filesystem, at, size))
        at += size
    with image.open("wb") as out:
        out.truncate(at + (int(1022 * scale) + 1) * MiB)
    table = [f"label: gpt\nlabel-id: {UUID.format(1)}\nunit: sectors"]
    table += [
        f"start={p.start // SECTOR}, size={p.size // SECTOR}, "
        f"type={TYPES[p.name]}, uuid={UUID.format(i)}, name={p.name}"
        for i, p in enumerate(parts, 16)
    ]
    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", image, text="\n".join(table) + "\n")
    return tuple(parts)


def make_filesystem(device: str, part: Partition) -> None:
    if part.filesystem == "vfat":
        run("mkfs.vfat", "-F", "32", "-n", "ESP", "-i", "FE440001", device)
    elif part.filesystem == "ext4":
        uuid = UUID.format(32)
        options = f"hash_seed={uuid},lazy_itable_init=0,lazy_journal_init=0"
        run("mkfs.ext4", "-q", "-F", "-U", uuid, "-L", "root", "-E", options, device)
    else:
        start = str(part.start // SECTOR)
        run("mkfs.ntfs", "-Q", "-q", "-F", "-L", "data", "-p", start, "-H", "255", "-S", "63", device)


# ---------------------------------------------------------------------- day one


def build_day_one(image: Path, stock: Stock, rng: random.Random, scale: float) -> tuple[Partition, ...]:
    parts = partition(image, scale)
    for part in parts:
        with loop(image, part) as device:
            make_filesystem(device, part)
    esp, root, data = parts
    say("root: system files, logs, a database, media")
    fill_root(image, root, stock, rng, scale)
    say("data: programs, pictures")
    programs = fill_data(image, data, stock, rng, scale)
    say("esp: boot files")
    fill_esp(image, esp, stock, programs, int(60 * MiB * scale))
    return parts


def fill_root(image: Path, root: Partition, stock: Stock, rng: random.Random, scale: float) -> None:
    system = stock.draw(int(2.1 * GiB * scale), int(52_000 * scale))
    doomed = stock.draw(int(0.2 * GiB * scale), int(1_500 * scale))
    middle = len(system) * 6 // 10
    with mounted(image, root) as top:
        content.copy(stock.tree, system[:middle], top / "usr")
        content.copy(stock.tree, doomed, top / "old")
        content.media(top / "old/film.bin", int(60 * MiB * scale), rng)
        content.copy(stock.tree, system[middle:], top / "usr")
        clips = max(2, int(24 * scale))
        for number in range(clips):
            content.media(top / f"home/user/media/clip{number:03d}.bin", int(300 * MiB * scale / clips), rng)
        for number in range(5):
            content.log(top / f"var/log/service{number}.log", int(40 * MiB * scale), rng, number)
        content.database(top / "var/lib/app/app.db", int(64 * MiB * scale), rng)
        content.copy(stock.tree, first_bytes(system[middle:], int(100 * MiB * scale)), top / "home/user/project")
        os.sync()
        shutil.rmtree(top / "old")


def fill_data(image: Path, data: Partition, stock: Stock, rng: random.Random, scale: float) -> list[Item]:
    programs = stock.draw(int(0.95 * GiB * scale), int(6_000 * scale), windows=True)
    doomed = stock.draw(int(0.1 * GiB * scale), int(500 * scale), windows=True)
    middle = len(programs) // 2
    with mounted(image, data) as top:
        content.copy(stock.tree, programs[:middle], top / "Program Files", posix=False)
        content.copy(stock.tree, doomed, top / "Temp", posix=False)
        content.copy(stock.tree, programs[middle:], top / "Program Files", posix=False)
        content.media(top / "Users/user/Pictures/album.bin", int(40 * MiB * scale), rng)
        content.log(top / "Windows/Logs/setup.log", int(20 * MiB * scale), rng, 90)
        os.sync()
        shutil.rmtree(top / "Temp")
    return programs


def fill_esp(image: Path, esp: Partition, stock: Stock, items: list[Item], size: int) -> None:
    """Through mtools, since the kernel may lack a FAT driver."""
    boot = first_bytes([i for i in items if 64 << 10 <= i.size <= 8 * MiB], size)
    with loop(image, esp) as device, tempfile.TemporaryDirectory(prefix="make-disk-") as folder:
        for number, item in enumerate(boot):
            target = Path(folder, "EFI", ("BOOT", "vendor", "tools")[number % 3], f"image{number:03d}.efi")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(stock.tree / item.path, target)
            os.utime(target, (1_700_000_000, 1_700_000_000))
        if boot:
            run("mcopy", "-s", "-m", "-Q", "-i", device, Path(folder, "EFI"), "::/")


def first_bytes(items: list[Item], size: int) -> list[Item]:
    """The leading items that together come to ``size`` bytes."""
    taken, total = [], 0
    for item in items:
        if total >= size:
            break
        taken.append(item)
        total += item.size
    return taken


# ---------------------------------------------------------------------- day two


def live_a_day(image: Path, parts: tuple[Partition, ...], rng: random.Random, scale: float) -> None:
    _, root, data = parts
    with mounted(image, root) as top:
        for number in range(5):
            content.log(top / f"var/log/service{number}.log", int(3 * MiB * scale), rng, 100 + number)
        (top / "var/log/service4.log").replace(top / "var/log/service4.log.1")
        content.log(top / "var/log/service4.log", int(MiB * scale), rng, 110)
        content.touch_database(top / "var/lib/app/app.db", int(1_200 * scale), rng)
        update_some(top / "usr", int(28 * MiB * scale), rng)
        content.media(top / "home/user/media/new.bin", int(12 * MiB * scale), rng)
        small = content.files_below(top / "usr", 1, 64 << 10)
        rng.shuffle(small)
        gone, read = int(300 * scale), int(2_000 * scale)
        for path in small[:gone]:
            path.unlink()
        for path in small[gone : gone + read]:
            os.utime(path, (1_735_000_000, 1_735_000_000))
    with mounted(image, data) as top:
        update_some(top / "Program Files", int(8 * MiB * scale), rng)
        content.log(top / "Windows/Logs/setup.log", int(2 * MiB * scale), rng, 120)
        content.media(top / "Users/user/Pictures/new.bin", int(4 * MiB * scale), rng)


def update_some(folder: Path, size: int, rng: random.Random) -> None:
    """Files picked at random are replaced by newer ones, until ``size`` bytes were written."""
    pool = content.files_below(folder, 4096, 4 * MiB)
    rng.shuffle(pool)
    for path in pool:
        if size <= 0:
            break
        size -= content.update(path, rng)


# ---------------------------------------------------------------------- what was built


def free_ranges(image: Path, part: Partition) -> Iterator[tuple[int, int]]:
    """(start, length) of what the file system does not use, in bytes of the disk, as partclone maps it."""
    tool = "partclone.fat32" if part.filesystem == "vfat" else f"partclone.{part.filesystem}"
    with loop(image, part) as device, tempfile.TemporaryDirectory(prefix="make-disk-") as folder:
        domain = Path(folder, "domain")
        run(tool, "-D", "-q", "-s", device, "-o", domain, "-L", Path(folder, "log"))
        for line in domain.read_text().splitlines():
            fields = line.split()
            if len(fields) == 3 and fields[2] == "?":
                yield part.start + int(fields[0], 16), int(fields[1], 16)


def describe(image: Path, parts: tuple[Partition, ...]) -> Day:
    """The facts of one day; writes its free ranges beside the image."""
    free = [extent for part in parts for extent in free_ranges(image, part)]
    image.with_suffix(".free").write_text("".join(f"{start} {length}\n" for start, length in free))
    used = sum(p.size for p in parts) - sum(length for _, length in free)
    facts = image.stat()
    with image.open("rb") as disk:
        whole = digest(disk, in_use([], facts.st_size))
        disk.seek(0)
        kept = digest(disk, in_use(load_free(image.parent, image.stem), facts.st_size))
    return Day(used=used, allocated=facts.st_blocks * 512, sha256=whole, sha256_used=kept)


def count_changes(one: Path, two: Path) -> dict[str, int]:
    """Bytes of blocks that differ between two disks of one size, for three block sizes."""
    changed = {4096: 0, 65536: 0, MiB: 0}
    with one.open("rb") as a, two.open("rb") as b:
        while left := a.read(MiB):
            right = b.read(MiB)
            if left == right:
                continue
            for size in changed:
                changed[size] += size * sum(
                    left[at : at + size] != right[at : at + size] for at in range(0, len(left), size)
                )
    return {str(size): count for size, count in changed.items()}


def build(folder: Path, scale: float, seed: int, source: Path) -> Manifest:
    """Both days and their manifest in ``folder``; an earlier build there is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)  # it is written last: without it nothing was built
    one, two = (folder / f"{day}.img" for day in DAYS)
    rng = random.Random(seed)
    parts = build_day_one(one, Stock(source, rng), rng, scale)
    say("day two")
    two.unlink(missing_ok=True)
    run("cp", "--sparse=always", one, two)
    live_a_day(two, parts, rng, scale)
    say("free ranges and sums")
    days = {image.stem: describe(image, parts) for image in (one, two)}
    manifest = Manifest(scale, seed, str(source), one.stat().st_size, count_changes(one, two), parts, days)
    manifest.save(folder)
    used, changed = days["day1"].used, manifest.changed["4096"]
    say(f"{one.stat().st_size / GiB:.2f} GiB, {used / GiB:.2f} GiB in use, {changed / used:.1%} changed on day two")
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=0.5, help="1 is a disk of 8 GiB (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--source", type=Path, default=Path("/usr"), help="tree the files come from")
    options = parser.parse_args()
    build(options.folder, options.scale, options.seed, options.source)


if __name__ == "__main__":
    main()
