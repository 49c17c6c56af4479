"""Files that are named like a container, or are one of a kind that is not read: never raw disks in silence."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ferrotype.api import restore
from ferrotype.block import read
from ferrotype.engine.references import Access, open_disk
from ferrotype.errors import FormatError, UsageError
from ferrotype.formats.names import FOREIGN
from ferrotype.formats.registry import FORMATS, RAW_SUFFIXES
from ferrotype.job import NullJob
from tests.cli.program import ferrotype
from tests.formats.judges import random_disk
from tests.machine import need, run

CONTENT = random_disk(256 << 10, seed=11)
SUFFIXES = sorted(
    {suffix for row in FORMATS.values() for suffix in row.suffixes} - RAW_SUFFIXES - {".ferro"}
    | {suffix for foreign in FOREIGN for suffix in foreign.suffixes.split()}
)


def content_of(path: Path, format: str | None = None) -> tuple[bytes, list[str]]:
    """The disk in a file, and the notes."""
    job = NullJob()
    with open_disk(str(path), Access(format=format), job) as disk:
        return read(disk.source, 0, disk.source.size), job.notes


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_name_that_promises_a_container(tmp_path: Path, suffix: str) -> None:
    contents = (CONTENT, b"", bytes(100), CONTENT)
    names = (f"disk{suffix}", f"disk.img{suffix}", f"disk{suffix.upper()}", f"disk{suffix}.bak")
    for name, content in zip(names, contents, strict=True):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(FormatError, match="--format raw"):
            content_of(path)
        if content:  # a file of no bytes is no disk in any format
            assert content_of(path, "raw") == (content, [])


@pytest.mark.parametrize("name", ["case.E02", "case.EAA", "case.Ex03", "case.s07"])
def test_a_name_of_a_further_segment(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CONTENT)
    with pytest.raises(FormatError, match="in the format ewf"):
        content_of(tmp_path / name)


@pytest.mark.parametrize("name", ["disk.xyz", "disk", "disk.2026", "mail.example", "backup.img.bak", "esx-flat.vmdk"])
def test_a_name_that_promises_nothing_is_raw_and_said_so(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(CONTENT)
    assert content_of(tmp_path / name) == (CONTENT, [f"{tmp_path / name} is read as a raw disk"])


PACKED = {
    "7z": ("7z", "a", "-bso0", "{out}", "{disk}"),
    "lz4": ("lz4", "-q", "{disk}", "{out}"),
    "lzma": ("sh", "-c", "xz -k --format=lzma -c {disk} > {out}"),
    "cpio": ("sh", "-c", "cd {folder} && echo disk.img | cpio -o -H newc > {out} 2>/dev/null"),
}


@pytest.mark.parametrize("kind", sorted(PACKED))
@pytest.mark.parametrize("name", ["backup.img", "backup.dd", "backup.xyz", "backup"])
def test_what_is_packed_is_no_disk_whatever_its_name(tmp_path: Path, kind: str, name: str) -> None:
    need(PACKED[kind][0])
    (tmp_path / "in").mkdir()
    disk, out = tmp_path / "in" / "disk.img", tmp_path / f"disk.{kind}"
    disk.write_bytes(CONTENT)
    subprocess.run([word.format(out=out, disk=disk, folder=disk.parent) for word in PACKED[kind]], check=True)
    path = out.rename(tmp_path / name)
    with pytest.raises(FormatError, match=r"and no disk: unpack it with .*--format raw"):
        content_of(path)
    assert content_of(path, "raw")[0] == path.read_bytes()


def test_every_verb_refuses(tmp_path: Path) -> None:
    need("qemu-img")
    (tmp_path / "good.img").write_bytes(CONTENT)
    bad = tmp_path / "bad.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "good.img", bad)
    with bad.open("r+b") as file:
        file.write(bytes(512))
    for words in (
        ("info", bad),
        ("map", bad),
        ("checksum", bad),
        ("compare", bad, tmp_path / "good.img"),
        ("compare", tmp_path / "good.img", bad),
        ("convert", bad, tmp_path / "out.raw"),
        ("backup", bad, tmp_path / "out.ferro"),
    ):
        done = ferrotype(*words, code=4)
        assert "say --format raw" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.qcow2", "good.img"]
    ferrotype("convert", bad, tmp_path / "out.raw", "--format", "raw", code=0)


MAGICS = {
    "partimage": b"PaRtImAgE-VoLuMe",
    "Proxmox": b"VMA\0\0\0\0\1",
    "fsarchiver": b"FsA0",
    "rbd export-diff": b"rbd diff v1\n",
    "btrfs send": b"btrfs-stream\0\1",
    "zfs send": bytes(8) + bytes.fromhex("accbbaf502000000"),
    "xfsdump": b"xFSdump0",
    "AFF": b"AFF10\r\n\0",
    "MAME": b"MComprHD",
    "openssl enc": b"Salted__12345678",
    "age": b"age-encryption.org/v1\n",
    "gpg --armor": b"-----BEGIN PGP MESSAGE-----\n",
}


@pytest.mark.parametrize("program", MAGICS)
def test_what_other_programs_make_is_no_raw_disk_under_any_name(program: str, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(MAGICS[program] + CONTENT)
    assert "--format raw" in ferrotype("convert", path, tmp_path / "out.qcow2", code=4).err
    assert not (tmp_path / "out.qcow2").exists()


@pytest.mark.parametrize("name", ["disk.qcow", "disk.dmg", "disk.ova", "disk.wim", "disk.gz", "disk.7z", "disk.tib"])
def test_a_raw_disk_is_not_restored_to_a_name_of_something_else(name: str, tmp_path: Path) -> None:
    disk, image, target = tmp_path / "disk.img", tmp_path / "a.ferro", tmp_path / name
    disk.write_bytes(CONTENT)
    ferrotype("backup", disk, image)
    assert "-O raw" in ferrotype("restore", image, target, code=2).err
    assert not target.exists()
    with pytest.raises(UsageError):
        restore(image, target)
    assert "as raw" in ferrotype("restore", image, target, "-O", "raw").out
    assert target.read_bytes() == CONTENT
    assert "as raw" in ferrotype("restore", image, tmp_path / "a.bak").out


def test_a_longer_file_that_is_restored_over_in_place_is_told(tmp_path: Path) -> None:
    disk, image, target = tmp_path / "disk.img", tmp_path / "a.ferro", tmp_path / "old.img"
    disk.write_bytes(CONTENT)
    ferrotype("backup", disk, image)
    target.write_bytes(bytes(len(CONTENT)) + b"longer" * 1000)
    assert "what it held there stays" in ferrotype("restore", image, target, "--force", "--delta").err
    assert target.read_bytes() == CONTENT + b"longer" * 1000
