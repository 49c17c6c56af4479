"""What a disk image holds besides its disk, or what lies beside it, is told by whoever takes the disk alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import ferrotype as api
from ferrotype.job import NullJob
from ferrotype.units import MiB
from tests.cli.program import ferrotype
from tests.machine import loop, need, run


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    """One internal snapshot and one bitmap."""
    need("qemu-img")
    path = tmp_path / "d.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    run("qemu-img", "snapshot", "-c", "before-upgrade", path)
    run("qemu-img", "bitmap", "--add", path, "cbt0")
    return path


def test_internal_snapshots_are_told_wherever_the_disk_is_taken(qcow2: Path, tmp_path: Path) -> None:
    said = ferrotype("convert", qcow2, tmp_path / "a.raw", "--json", code=8).document["warnings"]
    assert any("1 internal snapshot is not taken (before-upgrade)" in one for one in said)
    assert any("bitmaps (cbt0)" in one for one in said)
    said = ferrotype("backup", qcow2, tmp_path / "a.ferro", "--json", code=8).document["warnings"]
    assert any("before-upgrade" in one for one in said)
    assert any("before-upgrade" in one for one in ferrotype("info", qcow2, "--json").document["warnings"])
    ferrotype("convert", f"{qcow2}::before-upgrade", tmp_path / "b.raw")  # it was chosen
    job = NullJob()
    api.convert(qcow2, tmp_path / "c.raw", job=job)
    assert any("before-upgrade" in one for one in job.warnings)


def test_bitmaps_alone_are_a_remark(tmp_path: Path) -> None:
    need("qemu-img")
    path = tmp_path / "d.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
    run("qemu-img", "bitmap", "--add", path, "cbt0")
    said = ferrotype("convert", path, tmp_path / "a.raw", "--json").document["warnings"]
    assert any("bitmaps (cbt0)" in one for one in said)


@pytest.mark.parametrize("format", ["qcow2", "qed", "vmdk"])
def test_the_base_of_a_chain_is_told(tmp_path: Path, format: str) -> None:
    need("qemu-img")
    base, middle, top = tmp_path / f"vm.{format}", tmp_path / "vm.snap1", tmp_path / "other.snap2"
    run("qemu-img", "create", "-q", "-f", format, base, "1M")
    run("qemu-img", "create", "-q", "-f", format, "-b", base.name, "-F", format, middle)
    run("qemu-img", "create", "-q", "-f", format, "-b", middle.name, "-F", format, top)
    os.mkfifo(tmp_path / "vm.pipe")  # never waited for
    said = ferrotype("convert", base, tmp_path / "a.raw", "--json", code=8).document["warnings"]
    assert any("other.snap2 says that it stands over this file" in one for one in said)
    assert ferrotype("info", base, "--json").document["warnings"]
    said = ferrotype("backup", middle, tmp_path / "a.ferro", "--json", code=8).document["warnings"]
    assert any("other.snap2 says" in one for one in said)
    ferrotype("convert", top, tmp_path / "b.raw")


def test_a_raw_base_under_an_absolute_name_and_a_loop(tmp_path: Path) -> None:
    need("qemu-img")
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(MiB))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", tmp_path / "a.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", tmp_path / "b.qcow2")
    said = ferrotype("convert", base, tmp_path / "out.vdi", "--json", code=8).document["warnings"]
    assert any("2 files beside it (a.qcow2, b.qcow2) say" in one for one in said)
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", tmp_path / "b.qcow2")
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "b.qcow2", "-F", "qcow2", tmp_path / "a.qcow2")
    ferrotype("convert", base, tmp_path / "out2.vdi")


# ---------------------------------------------------------------------- sectors of 4096 bytes


@pytest.fixture
def large_sectors(tmp_path: Path) -> Path:
    """A disk whose GPT counts in sectors of 4096 bytes."""
    need("sfdisk")
    path = tmp_path / "d.img"
    with path.open("wb") as file:
        file.truncate(16 * MiB)
    with loop(path, sector_size=4096) as device:
        run("sfdisk", "-q", "--no-reread", "--no-tell-kernel", device, text_in="label: gpt\nstart=256, size=1024\n")
    return path


@pytest.mark.parametrize("name", ["a.qcow2", "a.vhd", "a.vmdk", "a.vdi"])
def test_a_format_that_shows_sectors_of_512_is_told(large_sectors: Path, tmp_path: Path, name: str) -> None:
    said = ferrotype("convert", large_sectors, tmp_path / name, "--json", code=8).document["warnings"]
    assert any("counts in sectors of 4096" in one for one in said)


@pytest.mark.parametrize("name", ["a.vhdx", "a.E01"])
def test_a_format_that_can_say_4096_says_it(large_sectors: Path, tmp_path: Path, name: str) -> None:
    ferrotype("convert", large_sectors, tmp_path / name)
    with api.open_disk(tmp_path / name) as source:
        assert (source.traits.sector_size, source.traits.sector_known) == (4096, True)
    if name == "a.E01":
        need("ewfinfo", "ewfverify")
        assert "4096" in next(line for line in run("ewfinfo", tmp_path / name).splitlines() if "per sector" in line)
        run("ewfverify", "-q", tmp_path / name)
    else:  # [MS-VHDX] 2.6.2.4: QEMU opens no such disk
        info = ferrotype("info", tmp_path / name, "--json").document
        assert info["container"]["logical_sector_size"] == 4096


# ---------------------------------------------------------------------- maps of ddrescue

MAP = """# Mapfile. Created by GNU ddrescue version 1.27
# Command line: ddrescue /dev/sdb d.img d.map
0x00300000     ?               1
0x00000000  0x00100000  +
0x00100000  0x00100000  -
0x00200000  0x00080000  /
0x00280000  0x00180000  +
"""


@pytest.mark.parametrize("name", ["d.map", "d.img.map", "d.mapfile", "d.log"])
def test_what_ddrescue_has_not_read_is_unreadable_and_kept(tmp_path: Path, name: str) -> None:
    content = os.urandom(4 * MiB)
    (tmp_path / "d.img").write_bytes(content)
    (tmp_path / name).write_text(MAP)
    unread = [{"start": MiB, "length": 3 * MiB // 2}]
    done = ferrotype("backup", tmp_path / "d.img", tmp_path / "a.ferro", "--json", code=8).document
    assert done["unreadable"] == [{"disk": "d.img", **unread[0]}]
    ferrotype("restore", tmp_path / "a.ferro", tmp_path / "back.img", code=8)
    assert (tmp_path / "back.img").read_bytes() == content
    done = ferrotype("convert", tmp_path / "d.img", tmp_path / "a.E01", "--json", code=8).document
    assert done["unreadable"] == unread
    with api.open_disk(tmp_path / "a.E01") as source:
        assert list(source.unreadable) == [(MiB, 3 * MiB // 2)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (MAP.replace("0x00280000  0x00180000  +", "0x0028"), "damaged or cut short"),
        (MAP.replace("0x00180000", "0x00980000"), "the file has 4194304"),
    ],
)
def test_a_map_that_is_no_good_is_told(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "d.img").write_bytes(bytes(4 * MiB))
    (tmp_path / "d.map").write_text(text)
    found = ferrotype("convert", tmp_path / "d.img", tmp_path / "a.vdi", "--json", code=8).document["warnings"]
    assert any(said in one for one in found)


def test_other_files_with_such_names_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "d.img").write_bytes(bytes(MiB))
    (tmp_path / "d.log").write_text("0x0 0x100 -\n")
    os.mkfifo(tmp_path / "d.map")
    (tmp_path / "d.img.map").symlink_to("/dev/zero")
    ferrotype("convert", tmp_path / "d.img", tmp_path / "a.vdi")


# ---------------------------------------------------------------------- volumes that begin elsewhere


@pytest.mark.parametrize(
    ("verb", "start", "told"), [("restore", 8192, True), ("convert", 8192, True), ("restore", 2048, False)]
)
def test_a_volume_that_begins_elsewhere_now_is_told(tmp_path: Path, verb: str, start: int, told: bool) -> None:
    need("mkntfs", "sfdisk")
    source, fs, target = tmp_path / "d.img", tmp_path / "fs", tmp_path / "t.img"
    for path, size in ((source, 12), (fs, 8), (target, 16)):
        with path.open("wb") as file:
            file.truncate(size * MiB)
    run("sfdisk", "-q", source, text_in="label: dos\nstart=2048, size=16384, type=7, bootable\n")
    run("mkntfs", "-qFQ", "-p", "2048", "-H", "255", "-S", "63", fs)
    with source.open("r+b") as file:
        file.seek(MiB)
        file.write(fs.read_bytes())
    with loop(target, offset=start * 512, size=8 * MiB) as device:
        if verb == "restore":
            ferrotype("backup", source, tmp_path / "a.ferro")
            said = ferrotype("restore", "--force", "--json", f"{tmp_path / 'a.ferro'}#1", device).document["warnings"]
        else:
            said = ferrotype("convert", "--force", "--json", f"{source}#1", device).document["warnings"]
    assert any("says that its partition begins at byte 1048576" in one for one in said) == told
