"""Disks that something else owns, as its own tool makes it (MD: by its layout), under old tables and file systems.

What comes back from a backup is the same to the last byte, and the owner's own tool finds its volume whole: for every
owner x MBR, GPT, both, hybrid x every old file system x whole disk and partition.  Combinations in which old bytes
would lie on the owner's own structures are no disks that anybody has; its tool says so before the backup.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pytest

from ferrotype.block import read
from ferrotype.block.memory import MemoryDisk
from ferrotype.repository.source import SnapshotSource
from ferrotype.units import KiB, MiB
from tests.engine.images import back_up, in_memory
from tests.machine import loop, need, run
from tests.owners import md_090, md_1
from tests.volumes.disks import blank, sfdisk

SIZE = 26 * MiB
START, PART = MiB, 24 * MiB  # the partition of every table
ENTRY = f"\nstart={START // 512}, size={PART // 512}, type="
STALE: dict[str, tuple[str, ...]] = {
    "ext4": ("mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal"),
    "swap": ("mkswap", "-q"),
    "vfat": ("mkfs.vfat",),
    "ntfs": ("mkntfs", "-q", "-F", "-Q"),
    "exfat": ("mkfs.exfat",),
}


class Owner(NamedTuple):
    make: Callable[[Path], object]
    judge: tuple[str, ...]  # a command that ends with 0 where the volume is whole, given its path behind
    says: str = ""  # what it has to say besides


def _put(mark: Callable[[bytearray], None]) -> Callable[[Path], object]:
    def make(path: Path) -> None:
        disk = bytearray(path.read_bytes())
        mark(disk)
        path.write_bytes(disk)

    return make


def _tool(*argv: str, text_in: str | None = None) -> Callable[[Path], object]:
    return lambda path: run(*argv, path, text_in=text_in)


def _physical_volume(path: Path) -> None:
    with loop(path) as device:
        only = f'devices {{ use_devicesfile=0 filter=["a|^{device}$|","r|.*|"] }}'
        run("pvcreate", "--config", only, device)


LUKS = ("cryptsetup", "luksFormat", "-q", "--type", "luks1", "--pbkdf-force-iterations", "1000")

OWNERS: dict[str, Owner] = {
    "md 0.90": Owner(_put(md_090), ("mdadm", "--examine"), "correct"),
    "md 1.0": Owner(_put(md_1(-1)), ("mdadm", "--examine"), "correct"),
    "md 1.1": Owner(_put(md_1(0)), ("mdadm", "--examine"), "correct"),
    "md 1.2": Owner(_put(md_1(4 * KiB)), ("mdadm", "--examine"), "correct"),
    "LVM": Owner(_physical_volume, ("pvck", "--dump", "headers"), "label_header.id LABELONE"),
    "LUKS": Owner(_tool(*LUKS, text_in="x"), ("cryptsetup", "isLuks", "--type", "luks1")),
    "bcache": Owner(_tool("make-bcache", "-B"), ("bcache-super-show",), "[match]"),
    "btrfs": Owner(_tool("mkfs.btrfs", "-q", "-f", "--mixed"), ("btrfs", "check", "--readonly")),
    "jfs": Owner(_tool("mkfs.jfs", "-q"), ("jfs_fsck", "-n", "-f")),
    "ext4": Owner(_tool(*STALE["ext4"]), ("e2fsck", "-fn")),
}


@cache
def _made(maker: str, size: int, *, stale: bool) -> bytes:
    """What a tool makes of zeros.  Behind an owner's structures stands data: the blocks that it did not write."""
    with TemporaryDirectory() as folder:
        path = blank(Path(folder) / "made", size)
        if stale:
            run(*STALE[maker], path)
            return path.read_bytes()
        OWNERS[maker].make(path)
        blocks = np.frombuffer(bytearray(path.read_bytes()), np.uint8).reshape(-1, 4 * KiB)
    empty = ~np.asarray(blocks.any(axis=1))
    empty[: 4 * MiB // (4 * KiB)] = empty[-MiB // (4 * KiB) :] = False
    blocks[empty] = np.random.default_rng(size).integers(0, 256, (int(empty.sum()), 4 * KiB), np.uint8)
    return blocks.tobytes()


@cache
def _table(kind: str) -> bytes:
    """A disk with nothing but a table of one partition."""
    with TemporaryDirectory() as folder:
        path = blank(Path(folder) / "table", SIZE)
        sfdisk(path, ("label: dos" + ENTRY + "83") if kind == "mbr" else ("label: gpt" + ENTRY + "linux"))
        disk = bytearray(path.read_bytes())
    if kind == "both":  # an MBR over a GPT, whose backup is left as well
        disk[:512] = _table("mbr")[:512]
    if kind == "hybrid":
        disk[462:478] = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0x83, b"\xff" * 3, START // 512, PART // 512)
    return bytes(disk)


def _laid_over(disk: bytes, *layers: tuple[int, bytes]) -> bytes:
    """The disk with what the layers have in their sectors that are not all zeros."""
    out = np.frombuffer(bytearray(disk), np.uint8).reshape(-1, 512)
    for at, layer in layers:
        sectors = np.frombuffer(layer, np.uint8).reshape(-1, 512)
        full = np.flatnonzero(sectors.any(axis=1))
        out[full + at // 512] = sectors[full]
    return out.tobytes()


def _is_whole(owner: Owner, volume: bytes, path: Path) -> bool:
    path.write_bytes(volume)
    need(owner.judge[0])
    done = subprocess.run([*owner.judge, str(path)], capture_output=True, text=True, errors="replace", check=False)
    return done.returncode == 0 and owner.says in done.stdout


def _disks(name: str) -> list[tuple[str, bytes, slice]]:
    """Title, content, and where the owner's volume is on it."""
    out = []
    headers = [header for header in STALE if header != name]
    for scope, table, header in product(("disk", "partition"), ("mbr", "gpt", "both", "hybrid"), headers):
        title = f"{name} on the {scope}, {table}, {header}"
        if scope == "disk":
            owned = _made(name, SIZE, stale=False)
            old = _made(header, PART, stale=True)
            out.append((title, _laid_over(owned, (START, old), (0, _table(table))), slice(0, SIZE)))
        else:
            disk = bytearray(_table(table))
            disk[START : START + PART] = _laid_over(
                _made(name, PART, stale=False), (0, _made(header, PART, stale=True))
            )
            out.append((title, bytes(disk), slice(START, START + PART)))
    return out


# So many of the combinations are disks that the owner's tool calls whole, of 40; together they are 200 or more.
FEWEST = {
    "md 0.90": 40,
    "md 1.0": 40,
    "md 1.1": 8,
    "md 1.2": 32,
    "LVM": 17,
    "LUKS": 8,
    "bcache": 32,
    "btrfs": 32,
    "jfs": 32,
    "ext4": 4,
}


@pytest.mark.parametrize("name", OWNERS)
def test_what_something_else_owns_comes_back_whole(name: str, tmp_path: Path) -> None:
    owner = OWNERS[name]
    assert _is_whole(owner, _made(name, PART, stale=False), tmp_path / "volume")
    repository, tried = in_memory(), 0
    for title, disk, where in _disks(name):
        if not _is_whole(owner, disk[where], tmp_path / "volume"):
            continue
        tried += 1
        record = back_up(repository, MemoryDisk(disk)).disks[0]
        restored = read(SnapshotSource(repository, record), 0, SIZE)
        assert _is_whole(owner, restored[where], tmp_path / "volume"), title
        assert restored == disk, title  # every byte, also those that the tool does not look at
    assert tried >= FEWEST[name]
