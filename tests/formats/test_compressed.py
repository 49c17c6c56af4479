"""Disks and disk images that were compressed as a whole, by the compressors' own programs."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from ferrotype.block import read
from ferrotype.block.memory import MemoryDisk
from ferrotype.block.views import Slice
from ferrotype.engine.references import Access, open_disk
from ferrotype.errors import DeviceError, FormatError, InvalidImage, UnsupportedError
from ferrotype.extents import State
from ferrotype.formats import streams, wrapping
from ferrotype.formats.codecs import zstd_frame
from ferrotype.formats.streams import unpacked
from ferrotype.job import NullJob
from ferrotype.testing.sources import check_source
from tests.cli.program import ferrotype
from tests.formats.judges import damages_of, random_disk
from tests.machine import loop, need, run

KiB, MiB = 1024, 1 << 20
DISK = random_disk(3 * MiB, seed=2) + bytes(2 * MiB) + random_disk(MiB + 512, seed=3)
PROGRAMS = {".gz": "gzip", ".xz": "xz", ".zst": "zstd", ".bz2": "bzip2"}
FORMATS = {".gz": "gzip", ".xz": "xz", ".zst": "zstd", ".bz2": "bzip2"}
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": lambda data: gzip.compress(data, 1, mtime=0),
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".zst": zstd_frame,
    ".bz2": lambda data: bz2.compress(data, 1),
}


def packed(path: Path, suffix: str) -> Path:
    """The file compressed by the program of the suffix, beside it."""
    need(PROGRAMS[suffix])
    run(PROGRAMS[suffix], "-k", "-q", path)
    return path.with_name(path.name + suffix)


def disk_of(path: Path, name: str = "", format: str | None = None) -> tuple[bytes, NullJob]:
    job = NullJob()
    with open_disk(f"{path}{name}", Access(format=format), job) as disk:
        return read(disk.source, 0, disk.source.size), job


@pytest.mark.parametrize("suffix", sorted(PROGRAMS))
def test_a_raw_disk(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "disk.img").write_bytes(DISK)
    path = packed(tmp_path / "disk.img", suffix)
    job = NullJob()
    with open_disk(str(path), Access(), job) as disk:
        source = disk.source
        check_source(lambda: Slice(source, 0, source.size), DISK, rounds=30)
        zeros = source.extents(0, len(DISK)).total(State.ZERO)
        assert zeros >= MiB
    (note,) = job.notes
    assert "was unpacked into an unnamed file" in note
    document = ferrotype("info", path, "--json").document
    assert document["format"] == "raw"
    assert document["virtual_size"] == len(DISK)
    (wrapped,) = document["container"]["wrapped"]
    assert wrapped == {"format": FORMATS[suffix], "packed_bytes": path.stat().st_size, "unpacked_bytes": len(DISK)}
    assert damages_of(path) == []
    assert all("offset" not in extent for extent in ferrotype("map", path, "--json").document["extents"])
    for name in ("nameless", "disk.xyz"):
        path = path.rename(tmp_path / name)
        assert disk_of(path)[0] == DISK


@pytest.mark.parametrize("name", ["backup.img", "backup.dd"])
def test_a_stream_that_is_named_like_a_raw_disk(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(PACK[".gz"](DISK))
    for words in (("info",), ("convert", tmp_path / "out.raw")):
        done = ferrotype(words[0], tmp_path / name, *words[1:], code=4)
        assert "say --format raw, or gzip" in done.err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert disk_of(tmp_path / name, format="gzip")[0] == DISK
    assert disk_of(tmp_path / name, format="raw")[0] == PACK[".gz"](DISK)


@pytest.mark.parametrize(("format", "suffix"), [("vmdk", ".gz"), ("qcow2", ".zst"), ("vhdx", ".xz"), ("vpc", ".bz2")])
def test_an_image_within(tmp_path: Path, format: str, suffix: str) -> None:
    need("qemu-img")
    (tmp_path / "disk.img").write_bytes(DISK)
    inner = tmp_path / f"vm.{format.replace('vpc', 'vhd')}"
    run("qemu-img", "convert", "-f", "raw", "-O", format, tmp_path / "disk.img", inner)
    run("qemu-img", "convert", "-f", format, "-O", "raw", inner, tmp_path / "judge.raw")
    path = packed(inner, suffix)
    inner.unlink()
    assert disk_of(path)[0] == (tmp_path / "judge.raw").read_bytes()


def test_a_backup_of_it_and_its_verification(tmp_path: Path) -> None:
    path = tmp_path / "disk.img.zst"
    path.write_bytes(PACK[".zst"](DISK))
    (tmp_path / "disk.img").write_bytes(DISK)
    ferrotype("backup", path, tmp_path / "a.ferro")
    ferrotype("compare", tmp_path / "a.ferro", tmp_path / "disk.img")
    assert ferrotype("verify", path, "--json").document["ok"] is True


def test_a_stream_in_parts(tmp_path: Path) -> None:
    data = PACK[".gz"](DISK)
    for ends in (("001", "002", "003"), ("aa", "ab", "ac")):
        for end, at in zip(ends, range(0, len(data), len(data) // 3 + 1), strict=True):
            (tmp_path / f"disk.img.gz.{end}").write_bytes(data[at : at + len(data) // 3 + 1])
        found, job = disk_of(tmp_path / f"disk.img.gz.{ends[0]}")
        assert found == DISK
        assert not any("raw" in note for note in job.notes)


def test_a_device_is_written_with_the_disk_and_not_with_the_stream(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(DISK)
    path = packed(tmp_path / "disk.img", ".xz")
    (tmp_path / "card").write_bytes(bytes(8 * MiB))
    with loop(tmp_path / "card") as card:
        ferrotype("convert", "--force", path, card)
    assert (tmp_path / "card").read_bytes()[: len(DISK)] == DISK


def test_what_is_inside_keeps_to_the_rules_of_names(tmp_path: Path) -> None:
    need("qemu-img")
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "a", "1M")
    (tmp_path / "guest.img.gz").write_bytes(gzip.compress((tmp_path / "a").read_bytes()))
    (tmp_path / "lost.qcow2.gz").write_bytes(gzip.compress(DISK))
    (tmp_path / "disk.001.gz").write_bytes(gzip.compress(DISK))
    for name, sentence in (("guest.img.gz", "qcow2"), ("lost.qcow2.gz", "shows none"), ("disk.001.gz", "one part")):
        with pytest.raises(FormatError, match=sentence):
            disk_of(tmp_path / name)
    (tmp_path / "guest.gz").write_bytes((tmp_path / "guest.img.gz").read_bytes())
    assert disk_of(tmp_path / "guest.gz")[0] == bytes(MiB)
    nested = DISK
    for _ in range(4):
        nested = gzip.compress(nested, 1)
    (tmp_path / "deep.gz").write_bytes(nested)
    with pytest.raises(UnsupportedError, match="lie in each other"):
        disk_of(tmp_path / "deep.gz")
    # what names a packed file as its backing file does not get into it
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "guest.gz", "-F", "raw", tmp_path / "top.qcow2", "1M")
    assert len(disk_of(tmp_path / "top.qcow2")[0]) == MiB
    data = (tmp_path / "top.qcow2").read_bytes()
    (tmp_path / "top.qcow2").write_bytes(data.replace(b"raw", b"xz\0", 1))
    with pytest.raises(FormatError):
        disk_of(tmp_path / "top.qcow2")


@pytest.mark.parametrize("suffix", sorted(PACK))
def test_damage_is_told_before_anything_is_written(tmp_path: Path, suffix: str) -> None:
    good = PACK[suffix](DISK)
    path = tmp_path / f"disk.img{suffix}"
    middle = bytearray(good)
    middle[len(good) // 2] ^= 0x10
    bad = [good[: len(good) // 2], good[:-1], good[:20]]
    bad += [bytes(middle)] if suffix != ".zst" else []  # without a checksum zstd cannot know
    for data in bad:
        path.write_bytes(data)
        with pytest.raises(InvalidImage, match=r"cut short|damaged"):
            disk_of(path)


@pytest.mark.parametrize("suffix", sorted(PACK))
def test_members_that_follow_each_other_and_what_follows_them(tmp_path: Path, suffix: str) -> None:
    parts = [DISK[: MiB + 5], b"", DISK[MiB + 5 :]]
    data = b"".join(map(PACK[suffix], parts))
    path = tmp_path / f"disk.img{suffix}"
    path.write_bytes(data + bytes(2 * MiB + 4))  # padding, as tapes and xz have it
    found, job = disk_of(path)
    assert (found, job.warnings) == (DISK, [])
    path.write_bytes(data + b"junk")
    found, job = disk_of(path)
    assert found == DISK
    (warning,) = job.warnings
    assert f"from byte {len(data)} on is none, and is left out" in warning


def test_zstd_streams_with_checksums_and_skippable_frames(tmp_path: Path) -> None:
    need("zstd")
    (tmp_path / "disk.img").write_bytes(DISK)
    run("zstd", "-q", "--check", tmp_path / "disk.img")
    data = (tmp_path / "disk.img.zst").read_bytes()
    skipped = b"\x53*M\x18" + (5).to_bytes(4, "little") + b"hello"
    (tmp_path / "skip.img.zst").write_bytes(skipped + data + skipped)
    assert disk_of(tmp_path / "skip.img.zst")[0] == DISK
    damaged = bytearray(data)
    damaged[-1] ^= 1
    (tmp_path / "disk.img.zst").write_bytes(damaged)
    with pytest.raises(InvalidImage, match="damaged"):
        disk_of(tmp_path / "disk.img.zst")
    run("zstd", "-q", "-f", "--long=31", "--ultra", "-20", tmp_path / "disk.img", "-o", tmp_path / "long.img.zst")
    (tmp_path / "window.img.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00\xa8" + bytes(20))  # a window of 2 GiB
    with pytest.raises(UnsupportedError, match="--long=31"):
        disk_of(tmp_path / "window.img.zst")


def test_a_bomb_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapping, "_FREE", 4 * MiB)
    (tmp_path / "bomb.img.bz2").write_bytes(bz2.compress(bytes(64 * MiB)))
    with pytest.raises(UnsupportedError, match="bzip2 -dk if it is meant"):
        disk_of(tmp_path / "bomb.img.bz2")


def test_there_is_no_room_to_unpack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk.img.gz").write_bytes(PACK[".gz"](DISK))
    usage = shutil.disk_usage(tempfile.gettempdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=MiB))
    with pytest.raises(DeviceError, match="set TMPDIR"):
        disk_of(tmp_path / "disk.img.gz")
    (tmp_path / "zeros.img.gz").write_bytes(PACK[".gz"](bytes(64 * MiB)))  # takes none
    assert len(disk_of(tmp_path / "zeros.img.gz")[0]) == 64 * MiB


@pytest.mark.parametrize("head", [PACK[".zst"](DISK), b"\x28\xb5\x2f\xfd\x00\x58"], ids=["padding", "empty blocks"])
def test_a_hole_that_never_ends(tmp_path: Path, head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_MOST_IDLE", 20)
    path = tmp_path / "disk.img.zst"
    path.write_bytes(head)
    with path.open("r+b") as file:
        file.truncate(8 << 40)
    if len(head) < 10:
        with pytest.raises(InvalidImage, match="holds nothing"):
            disk_of(path)
        return
    found, job = disk_of(path)
    assert found == DISK
    assert any("the rest is left out" in warning for warning in job.warnings)


def test_streams_are_read_at_any_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies at the edges of the pieces that are read: heads, ends, padding."""
    monkeypatch.setattr(streams, "_PIECE", 7)
    plain = b"a few words, " * 40
    for suffix, pack in PACK.items():
        data = pack(plain) + pack(b"") + bytes(23) + pack(plain[::-1]) + bytes(9)
        told: list[str] = []
        assert b"".join(unpacked(MemoryDisk(data), suffix[1:], told=told.append)) == plain + plain[::-1], suffix
        assert told == []
        assert b"".join(unpacked(MemoryDisk(data + b"ab"), suffix[1:], told=told.append)) == plain + plain[::-1]
        assert len(told) == 1
        with pytest.raises(InvalidImage, match="is none: it is damaged"):
            list(unpacked(MemoryDisk(data + b"ab"), suffix[1:]))
