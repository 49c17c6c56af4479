"""What stands on a volume: against blkid, on images made by other software and on volumes of every kind."""

from __future__ import annotations

import random
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from ferrotype.block import Source, read
from ferrotype.block.memory import MemoryDisk
from ferrotype.errors import ReadError
from ferrotype.extents import State
from ferrotype.filesystems.registry import FILESYSTEMS, Identified, identify
from ferrotype.units import KiB, MiB
from tests.filesystems.test_fat import OnFile
from tests.machine import corpus, need, run, unpack

MAPPED = {"vfat", "exfat", "swap", "ext2", "ext3", "ext4", "ntfs"}

# Where we say something that blkid did not, and why.
DIFFERENT = {
    "syz-msdos-1": ("vfat", "no 0x55AA mark; the FAT confirms it"),
    "syz-msdos-26": ("vfat", "as above"),
    "syz-vfat-1": ("vfat", "as above"),
    "syz-vfat-26": ("vfat", "as above"),
    "syz-udf-26": ("udf", "the head of a UDF volume, cut off before the anchor that blkid wants"),
    "ul-bcachefs-3": ("bcachefs", "too young for the blkid that was asked"),
    "ul-erofs-minix-magic": ("erofs", "blkid finds it ambivalent; minix's magic is short and met by chance"),
}

ENTRIES = [
    e
    for e in corpus()
    if e["format"] in ("raw", "iso9660")
    and e["kind"] in ("filesystem", "crypt", "volume", "partition", "malformed")
    and e["decompressed_size"] <= 200 * MiB
    and any(t["claim"] == "blkid" for t in e["truth"])
]


class Offset:
    """A volume inside an image."""

    def __init__(self, path: Path, start: int) -> None:
        self._inner = OnFile(path)
        self._start = start
        self.size = self._inner.size - start
        self.traits = self._inner.traits
        self.extents = self._inner.extents
        self.close = self._inner.close

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        self._inner.read_into(self._start + offset, buf)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e["id"])
def test_corpus(entry: dict[str, Any], tmp_path: Path) -> None:
    image = unpack(entry, tmp_path)
    try:
        for truth in entry["truth"]:
            if truth["claim"] != "blkid":
                continue
            began = time.monotonic()
            found = identify(Offset(image, truth["at"]))
            if found is not None and found.filesystem is not None:
                found.filesystem.facts  # noqa: B018  opening it must have filled them in
            assert time.monotonic() - began < 10
            if entry["validity"] == "malformed" or truth.get("observed"):
                continue  # blkid's word on broken superblocks is no truth
            kind = found.kind if found else None
            expected = DIFFERENT.get(entry["id"], (truth["value"].get("TYPE"), ""))[0]
            assert kind == expected
            if found is not None:
                assert (found.filesystem is not None) == (found.problem is None)
                assert found.filesystem is not None or kind not in MAPPED, found.problem
    finally:
        image.unlink()


def volume(tmp_path: Path, *argv: str, size: int = 24 * MiB) -> bytearray:
    image = tmp_path / "volume.img"
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate(size)
    image.chmod(0o600)
    run(*argv, image)
    return bytearray(image.read_bytes())


MADE = [
    ("ext2", ("mkfs.ext2", "-q", "-F")),
    ("ext4", ("mkfs.ext4", "-q", "-F", "-L", "name")),
    ("jbd", ("mke2fs", "-q", "-F", "-O", "journal_dev", "-L", "log")),
    ("ntfs", ("mkfs.ntfs", "-q", "-F", "-Q", "-L", "name")),
    ("vfat", ("mkfs.vfat", "-n", "NAME")),
    ("exfat", ("mkfs.exfat", "-L", "name")),
    ("swap", ("mkswap", "-L", "name")),
    ("minix", ("mkfs.minix",)),
    ("xfs", ("mkfs.xfs", "-q", "-f", "-L", "name")),
    ("btrfs", ("mkfs.btrfs", "-q", "-f", "-L", "name")),
]


@pytest.mark.parametrize(("kind", "argv"), MADE, ids=[kind for kind, _ in MADE])
def test_it_says_what_blkid_says(tmp_path: Path, kind: str, argv: tuple[str, ...]) -> None:
    need("blkid")
    data = volume(tmp_path, *argv, size=320 * MiB if kind == "xfs" else 120 * MiB if kind == "btrfs" else 24 * MiB)
    image = tmp_path / "volume.img"
    stated = dict(
        line.split("=", 1) for line in run("blkid", "-p", "-o", "export", image).splitlines() if "=" in line
    )
    found = identify(MemoryDisk(data))
    assert found is not None
    assert (found.kind, found.label, found.uuid) == (kind, stated.get("LABEL"), stated.get("UUID"))
    assert stated["TYPE"] == kind
    if kind in MAPPED:
        assert found.problem is None
        assert found.filesystem is not None
        assert found.filesystem.allocation().total(State.FREE) > 0
    else:
        assert found == Identified(kind, found.label, found.uuid, None, f"ferrotype has no allocation map for {kind}")


def test_nothing_is_recognised_in_nothing() -> None:
    for content in (b"", b"\0", bytes(511), bytes(512), bytes(4096), bytes(MiB), random.Random(1).randbytes(MiB)):
        assert identify(MemoryDisk(content)) is None


@pytest.mark.parametrize(
    ("kind", "at", "magic"),
    [
        ("linux_raid_member", 24 * MiB - 64 * KiB, bytes.fromhex("fc4e2ba900000000")),
        ("linux_raid_member", 24 * MiB - 8 * KiB, bytes.fromhex("fc4e2ba901000000")),
        ("linux_raid_member", 4 * KiB, bytes.fromhex("fc4e2ba901000000")),
        ("isw_raid_member", 24 * MiB - 1024, b"Intel Raid ISM Cfg Sig. 1.0"),
        ("drbd", 24 * MiB - 4096 + 60, bytes.fromhex("8374026b")),
        ("LVM2_member", 512, b"LABELONE" + bytes(16) + b"LVM2 001"),
        ("BitLocker", 3, b"-FVE-FS-"),
        ("crypto_LUKS", 0, b"LUKS\xba\xbe\0\1"),
    ],
)
def test_a_container_hides_the_file_system_it_shows(tmp_path: Path, kind: str, at: int, magic: bytes) -> None:
    data = volume(tmp_path, "mkfs.vfat", "-F16", "-R16")
    data[at : at + len(magic)] = magic
    found = identify(MemoryDisk(data))
    assert found is not None
    assert (found.kind, found.filesystem) == (kind, None)


def test_two_file_systems_at_once_are_imaged_whole(tmp_path: Path) -> None:
    boot = volume(tmp_path, "mkfs.vfat", "-F16", "-R16")[:512]
    data = volume(tmp_path, "mkfs.ext4", "-q", "-F")
    data[:512] = boot
    data[16 * 512] = 0xF8
    found = identify(MemoryDisk(data))
    assert found is not None
    assert (found.kind, found.filesystem) == ("vfat", None)
    assert found.problem == "it has the signatures of vfat and ext4 at once"
    data = volume(tmp_path, "mkfs.ext4", "-q", "-F")
    data[64 * KiB + 64 : 64 * KiB + 72] = b"_BHRfS_M"
    found = identify(MemoryDisk(data))
    assert found is not None
    assert found.filesystem is None


def test_damage_is_a_problem_not_an_error(tmp_path: Path) -> None:
    data = volume(tmp_path, "mkfs.vfat", "-F16", "-f1")
    data[4 * 512 : 5 * 512] = bytes(512)
    found = identify(MemoryDisk(data))
    assert found is not None
    assert (found.kind, found.filesystem) == ("vfat", None)
    assert "media byte" in str(found.problem)


class Failing(MemoryDisk):
    """A disk that cannot be read from some byte on; it counts what is read."""

    limit = 1 << 60
    count = 0

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        self.count += len(buf)
        if offset + len(buf) > self.limit:
            raise ReadError("disk", offset, len(buf), "it is broken")
        super().read_into(offset, buf)


def test_what_cannot_be_read_is_no_reason_to_fail(tmp_path: Path) -> None:
    disk = Failing(volume(tmp_path, "mkfs.vfat", "-F16", "-a", "-R16"))
    disk.limit = 12 * MiB
    found = identify(disk)
    assert found is not None
    assert found.filesystem is not None
    disk.limit = 200 * KiB
    found = identify(disk)
    assert found is not None
    assert (found.kind, found.uuid is None) == ("vfat", False)
    disk.limit = 8 * KiB  # where the FAT begins
    found = identify(disk)
    assert found is not None
    assert (found.kind, found.filesystem) == ("vfat", None)
    assert "it is broken" in str(found.problem)
    disk.limit = 0
    assert identify(disk) is None


def test_little_is_read() -> None:
    disk = Failing(64 * MiB)
    assert identify(disk) is None
    assert disk.count <= MiB


def test_the_table_names_modules_that_keep_the_contract() -> None:
    from importlib import import_module

    for name, path in FILESYSTEMS.items():
        module = import_module(path)
        assert path == f"ferrotype.filesystems.{name}"
        assert module.probe(MemoryDisk(b"")) is False


def test_plug_ins_are_asked_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def entry_points(group: str) -> list[EntryPoint]:
        asked.append(group)
        return [EntryPoint("mine", f"{__name__}:PlugIn", group)]

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    assert identify(MemoryDisk(volume(tmp_path, "mkswap"))) is not None
    assert asked == []
    found = identify(MemoryDisk(b"MINE" + bytes(1000)))
    assert found is not None
    assert found.kind == "swap"
    assert asked == ["ferrotype.filesystems"]
    assert identify(MemoryDisk(b"YOUR" + bytes(1000))) is None


class PlugIn:
    """A file system that someone else wrote: swap behind another name."""

    @staticmethod
    def probe(source: Source) -> bool:
        return read(source, 0, 4) == b"MINE"

    @staticmethod
    def open(_: MemoryDisk) -> object:
        from ferrotype.filesystems import swap

        data = bytearray(64 * KiB)
        data[1024:1032] = b"\1\0\0\0\x0f\0\0\0"
        data[4086:4096] = b"SWAPSPACE2"
        return swap.open(MemoryDisk(data))
