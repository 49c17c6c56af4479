"""Free space needs an owner beyond doubt: whole disks and partitions that something else owns, under stale tables and
old headers, are kept to the last byte.

Every owner x every kind of table x every stale header.
"""

from __future__ import annotations

import os
import struct
from functools import cache
from itertools import product
from pathlib import Path

import pytest

from ferrotype.block.file import FileSource
from ferrotype.block.views import Slice
from ferrotype.engine.survey import Survey, survey
from ferrotype.extents import State
from ferrotype.units import MiB
from ferrotype.volumes.labels import labels
from tests.machine import run
from tests.owners import LABELS, OWNERS, md_1
from tests.volumes.disks import blank, sfdisk

SIZE = 24 * MiB
START, PART = MiB, 20 * MiB  # the partition of every table here
MBR = f"label: dos\nlabel-id: 0x01020304\nstart={START // 512}, size={PART // 512}, type="
GPT = f"label: gpt\nstart={START // 512}, size={PART // 512}, type="
TABLES = {"mbr": MBR + "83", "gpt": GPT + "linux"}
HEADERS = ("ext4", "swap", "vfat", "ntfs", "exfat")


@cache
def _stale(kind: str) -> bytes:
    """The first and only content of the partition: a clean file system of ``kind``, almost all of it free."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = blank(Path(folder) / "fs", PART)
        commands = {
            "ext4": ("mkfs.ext4", "-q", path),
            "swap": ("mkswap", "-q", path),
            "vfat": ("mkfs.vfat", path),
            "ntfs": ("mkntfs", "-q", "-F", "-Q", path),
            "exfat": ("mkfs.exfat", path),
        }
        run(*commands[kind])
        return path.read_bytes()


def _disk(tmp_path: Path, table: str, header: str) -> bytearray:
    path = sfdisk(blank(tmp_path / "disk.img", SIZE), table)
    disk = bytearray(path.read_bytes())
    disk[START : START + PART] = _stale(header)
    return disk


def _surveyed(tmp_path: Path, disk: bytearray) -> Survey:
    path = tmp_path / "disk.img"
    path.write_bytes(disk)
    with FileSource(path) as source:
        return survey(source)


@pytest.mark.parametrize(("table", "header"), list(product(TABLES, HEADERS)))
def test_a_disk_with_an_owner_of_its_own_is_kept_whole(tmp_path: Path, table: str, header: str) -> None:
    clean = _disk(tmp_path, TABLES[table], header)
    assert _surveyed(tmp_path, clean).extents.total(State.FREE) > PART // 2  # nobody else: room is saved
    for name, put in OWNERS.items():
        disk = bytearray(clean)
        put(disk)
        found = _surveyed(tmp_path, disk)
        assert found.extents.total(State.FREE) == 0, name
        if found.volumes:
            assert found.volumes[0].note, name
            assert any("kept" in sentence for sentence in found.told.notes), name


@pytest.mark.parametrize("header", HEADERS)
def test_a_partition_with_an_owner_of_its_own_is_kept_whole(tmp_path: Path, header: str) -> None:
    for (name, put), table in product(OWNERS.items(), TABLES.values()):
        if name == "dynamic disk":  # stands on whole disks alone
            continue
        disk = _disk(tmp_path, table, header)
        inner = disk[START : START + PART]
        put(inner)
        disk[START : START + PART] = inner
        assert _surveyed(tmp_path, disk).extents.total(State.FREE) == 0, name


@pytest.mark.parametrize(
    "table",
    [MBR + kind for kind in ("42", "8e", "fd", "e8", "fb")]
    + [
        GPT + kind
        for kind in (
            "AF9B60A0-1431-4F62-BC68-3311714A69AD",
            "E75CAF8F-F680-4CEE-AFA3-B001E56EFC2D",
            "E6D6D379-F507-44C2-A23C-238F2A3DF928",
            "A19D880F-05FC-4D3B-A006-743F0F84911E",
            "CA7D7CCB-63ED-4C53-861C-1742536059CC",
            "516E7CBA-6ECF-11D6-8FF8-00022D09712B",
            "4FBD7E29-9D25-41B8-AFD0-062C0CEFF05D",
        )
    ],
)
def test_a_partition_that_is_a_container_by_its_type_is_kept_whole(tmp_path: Path, table: str) -> None:
    found = _surveyed(tmp_path, _disk(tmp_path, table, "ext4"))
    assert found.extents.total(State.FREE) == 0
    assert found.volumes[0].as_json()["kept"]


@pytest.mark.parametrize("scope", ["partition", "disk"])
@pytest.mark.parametrize("header", ["ext4", "swap"])
def test_what_has_a_table_of_another_system_is_kept_whole(tmp_path: Path, scope: str, header: str) -> None:
    for name, put in LABELS.items():
        inner = bytearray(_stale(header))
        put(inner)
        disk = _disk(tmp_path, TABLES["mbr"], header)
        if scope == "partition":
            disk[START : START + PART] = inner
        found = _surveyed(tmp_path, disk if scope == "partition" else inner)
        assert found.extents.total(State.FREE) == 0, name
        assert found.volumes[0].note, name


def test_the_tables_of_other_systems_are_those_of_util_linux(tmp_path: Path) -> None:
    for kind, name in {"sun": "Sun", "sgi": "SGI"}.items():
        with FileSource(sfdisk(blank(tmp_path / kind), f"label: {kind}")) as source:
            assert labels(source) == [name]
    disk = sfdisk(blank(tmp_path / "bsd"), "label: dos\nstart=2048, type=a5")
    run("fdisk", disk, text_in="b\ny\nw\nq\n")
    with FileSource(disk) as source:
        assert labels(source) == []
        assert labels(Slice(source, MiB, 15 * MiB)) == ["BSD"]
    for name in ("BSD", "Sun", "SGI"):  # and those that these tests make
        path = tmp_path / "made"
        made = bytearray(4 * MiB)
        LABELS[name](made)
        path.write_bytes(made)
        assert f"Disklabel type: {name.lower()}" in run("fdisk", "-l", path)


@pytest.mark.parametrize("kind", ["dos", "gpt"])
@pytest.mark.parametrize("header", ["ext4", "vfat"])
def test_a_partition_that_is_a_disk_of_its_own_is_kept_whole(tmp_path: Path, kind: str, header: str) -> None:
    """As virtual machines are given partitions: a table in the partition, and an older file system in its gaps."""
    inner = sfdisk(blank(tmp_path / "inner", PART), f"label: {kind}\nstart=8192, size=16384").read_bytes()
    disk = _disk(tmp_path, TABLES["mbr"], header)
    for at in range(0, PART, 512):
        if any(inner[at : at + 512]):
            disk[START + at : START + at + 512] = inner[at : at + 512]
    assert _surveyed(tmp_path, disk).extents.total(State.FREE) == 0


def test_logical_partitions_that_are_hidden_are_kept(tmp_path: Path) -> None:
    """Whose extended partition has a type that is not followed; the chain begins in its first sector."""
    disk = _disk(tmp_path, TABLES["mbr"], "ext4")
    struct.pack_into("<B3sB3sII", disk, START + 446, 0, b"", 0x83, b"", 8192, 16384)
    disk[START + 510 : START + 512] = b"\x55\xaa"
    assert _surveyed(tmp_path, disk).extents.total(State.FREE) == 0


def test_the_boot_code_of_a_partition_is_no_table(tmp_path: Path) -> None:
    disk = _disk(tmp_path, TABLES["mbr"], "ext4")
    disk[START : START + 440] = os.urandom(440)
    disk[START + 510 : START + 512] = b"\x55\xaa"
    assert _surveyed(tmp_path, disk).extents.total(State.FREE) > PART // 2


def test_what_a_hybrid_mbr_names_besides_the_gpt_is_kept(tmp_path: Path) -> None:
    disk = _disk(tmp_path, TABLES["gpt"], "ext4")

    def name(start: int, size: int) -> None:
        disk[462:478] = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0x07, b"\xff" * 3, start // 512, size // 512)

    name(START, PART)  # the GPT's own partition: that is what hybrids are for
    assert _surveyed(tmp_path, disk).extents.total(State.FREE) > PART // 2
    name(START + 4 * MiB, 8 * MiB)
    found = _surveyed(tmp_path, disk)
    assert found.extents.total(State.FREE) == 0
    assert "hybrid" in str(found.volumes[0].note)


def test_the_superblocks_of_a_disk_and_of_its_last_partition_are_told_apart(tmp_path: Path) -> None:
    """The last partition ends with the disk and is a member; the first one is not, and gives its space away."""
    table = f"label: dos\nstart={START // 512}, size={20 * MiB // 512}, type=83\nstart={21 * MiB // 512}, type=fd"
    disk = _disk(tmp_path, table, "ext4")
    last = disk[21 * MiB :]
    md_1(-1)(last)
    disk[21 * MiB :] = last
    (tmp_path / "part.img").write_bytes(last)
    assert "1.0" in run("mdadm", "--examine", tmp_path / "part.img")  # the judge
    found = _surveyed(tmp_path, disk)
    assert found.extents.total(State.FREE) > PART // 2
    assert [volume.filesystem for volume in found.volumes] == ["ext4", "linux_raid_member"]


def test_a_leftover_superblock_whose_copies_are_gone_owns_nothing(tmp_path: Path) -> None:
    """What has no header of its own, such as an encrypted volume with its header elsewhere, wrote over the copies."""
    path = blank(tmp_path / "fs.img", 40 * MiB)
    run("mkfs.ext4", "-q", "-b", "1024", path)
    clean = bytearray(path.read_bytes())
    assert _surveyed(tmp_path, clean).extents.total(State.FREE) > 20 * MiB
    group = 8192 * 1024 + 1024
    over = bytearray(clean)
    over[group : group + 4096] = b"\xa5" * 4096
    assert _surveyed(tmp_path, over).extents.total(State.FREE) > 20 * MiB  # one of them may be damaged
    for copy in (1, 3):
        at = copy * 8192 * 1024 + 1024
        over[at : at + 4096] = b"\xa5" * 4096
    found = _surveyed(tmp_path, over)
    assert found.extents.total(State.FREE) == 0
    assert any("leftover" in sentence for sentence in found.told.damage)


def test_fat_that_calls_itself_fat16_and_counts_as_fat12_is_kept(tmp_path: Path) -> None:
    path = blank(tmp_path / "fs.img", 8 * MiB)
    run("mkfs.vfat", "-F", "16", "-s", "1", path)
    disk = bytearray(path.read_bytes())
    assert _surveyed(tmp_path, disk).extents.total(State.FREE) > 4 * MiB
    disk[13] = 8  # sectors of a cluster: an eighth as many of them, as some programs made it
    found = _surveyed(tmp_path, disk)
    assert found.extents.total(State.FREE) == 0
    assert any("FAT16" in sentence for sentence in (*found.told.notes, *found.told.damage))


def test_shadow_copies_in_free_space_are_told(tmp_path: Path) -> None:
    path = blank(tmp_path / "fs.img", 8 * MiB)
    run("mkntfs", "-q", "-F", "-Q", path)
    disk = bytearray(path.read_bytes())
    assert not _surveyed(tmp_path, disk).told.notes
    disk[0x1E00:0x1E10] = bytes.fromhex("6b87083876c1484eb7ae04046e6cc752")
    assert not _surveyed(tmp_path, disk).told.notes  # there were some once
    disk[0x1E30:0x1E38] = (0x4000).to_bytes(8, "little")
    assert any("--all-sectors" in sentence for sentence in _surveyed(tmp_path, disk).told.notes)


@pytest.mark.parametrize(("inner", "kept"), [(1_600_000_000, False), (1_800_000_000, True)])
def test_a_volume_that_begins_in_free_space_is_told_and_kept_where_it_is_newer(
    inner: int, kept: bool, tmp_path: Path
) -> None:
    disk = _disk(tmp_path, TABLES["gpt"], "ext4")
    outer, other = (blank(tmp_path / name, size) for name, size in (("outer", PART), ("other", 4 * MiB)))
    for path, written in ((outer, 1_700_000_000), (other, inner)):
        run("mkfs.ext4", "-q", "-L", path.name, path, env=os.environ | {"E2FSPROGS_FAKE_TIME": str(written)})
    disk[START : START + PART] = outer.read_bytes()
    at = START + 12 * MiB  # of blocks that the outer one does not use
    disk[at : at + 4 * MiB] = other.read_bytes()
    found = _surveyed(tmp_path, disk)
    assert any("(other)" in sentence and ("kept" in sentence) == kept for sentence in found.told.notes)
    inside = found.extents.clip(at, 4 * MiB)
    assert inside.total(State.FREE) == (0 if kept else 4 * MiB)
    assert found.extents.total(State.FREE) > PART // 4  # the rest is saved in any case


INSIDE = {
    "xfs": ("mkfs.xfs", "--unsupported", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f", "--mixed"),
    "f2fs": ("mkfs.f2fs", "-q", "-f"),
    "jfs": ("mkfs.jfs", "-q"),
    "reiserfs": ("mkfs.reiserfs", "-q", "-ff"),
    "nilfs2": ("mkfs.nilfs2", "-q", "-f", "-B", "16"),
}


@pytest.mark.parametrize("kind", INSIDE)
def test_a_volume_without_a_map_that_begins_in_free_space_is_told_and_kept(tmp_path: Path, kind: str) -> None:
    size, inside = 128 * MiB, 64 * MiB
    outer, inner = blank(tmp_path / "outer", size), blank(tmp_path / "inner", inside)
    run("mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal", outer)
    run(*INSIDE[kind], inner)
    disk, at = bytearray(outer.read_bytes()), 48 * MiB
    disk[at : at + inside] = inner.read_bytes()
    found = _surveyed(tmp_path, disk)
    assert found.extents.clip(at, inside).total(State.FREE) == 0
    assert found.extents.total(State.FREE) > size - inside - 32 * MiB  # it says how long it is
    assert any(f"there is {kind}" in sentence and "kept" in sentence for sentence in found.told.notes)


def test_a_container_in_free_space_is_kept_up_to_the_end(tmp_path: Path) -> None:
    size, at = 96 * MiB, 40 * MiB
    outer, inner = blank(tmp_path / "outer", size), blank(tmp_path / "inner", size - at)
    run("mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal", outer)
    run("cryptsetup", "luksFormat", "-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", inner, text_in="x")
    disk = bytearray(outer.read_bytes())
    disk[at : at + 16 * MiB] = inner.read_bytes()[: 16 * MiB]
    found = _surveyed(tmp_path, disk)
    assert found.extents.clip(at, size - at).total(State.FREE) == 0
    assert any("crypto_LUKS" in sentence for sentence in found.told.notes)


def test_old_swap_space_and_old_discs_in_free_space_cost_nothing(tmp_path: Path) -> None:
    size = 96 * MiB
    outer, swap = blank(tmp_path / "outer", size), blank(tmp_path / "swap", 20 * MiB)
    run("mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal", outer)
    run("mkswap", "-q", swap)
    clean = bytearray(outer.read_bytes())
    before = _surveyed(tmp_path, clean).extents.total(State.FREE)
    clean[40 * MiB : 60 * MiB] = swap.read_bytes()
    clean[64 * MiB : 64 * MiB + 96] = b"hsqs".ljust(28, b"\0") + b"\4\0".ljust(68, b"\0")
    found = _surveyed(tmp_path, clean)
    assert found.extents.total(State.FREE) == before
    assert any("swap" in sentence for sentence in found.told.notes)


@pytest.mark.parametrize("outer", ["vfat", "exfat"])
def test_a_volume_inside_one_that_tells_no_time_is_kept(tmp_path: Path, outer: str) -> None:
    disk = _disk(tmp_path, TABLES["mbr"], outer)
    other = blank(tmp_path / "other", 4 * MiB)
    run("mkfs.ext4", "-q", "-L", "other", other)
    at = START + 12 * MiB
    disk[at : at + 4 * MiB] = other.read_bytes()
    found = _surveyed(tmp_path, disk)
    assert found.extents.clip(at, 4 * MiB).total(State.FREE) == 0
    assert any("(other)" in sentence and "may have been written later" in sentence for sentence in found.told.notes)
    assert found.extents.total(State.FREE) > PART // 4


def test_what_begins_in_swap_space_is_kept(tmp_path: Path) -> None:
    disk = _disk(tmp_path, TABLES["mbr"], "swap")
    other = blank(tmp_path / "other", 4 * MiB)
    run("mkntfs", "-q", "-F", "-Q", "-L", "other", other)
    disk[START + 3 * MiB : START + 7 * MiB] = other.read_bytes()
    found = _surveyed(tmp_path, disk)
    assert found.extents.clip(START + 3 * MiB, 4 * MiB - 4096).total(State.FREE) == 0
    assert found.extents.total(State.FREE) > PART // 2


def _made(kind: str, tmp_path: Path) -> bytearray:
    path = blank(tmp_path / "fs.img", 40 * MiB)
    commands = {
        "vfat": ("mkfs.vfat", "-F", "32", "-s", "1", "-i", "11223344", path),
        "exfat": ("mkfs.exfat", path),
        "ntfs": ("mkntfs", "-q", "-F", "-Q", path),
    }
    run(*commands[kind])
    return bytearray(path.read_bytes())


COPIES = {
    "vfat": (6 * 512, 67),
    "exfat": (12 * 512, 100),
    "ntfs": (40 * MiB - 512, 72),
}  # where, and its serial number
SIZES = {"vfat": 32, "exfat": 72, "ntfs": 40}  # byte of the boot sector where the number of sectors is


@pytest.mark.parametrize("kind", COPIES)
def test_a_boot_sector_whose_copy_has_another_layout_owns_nothing(tmp_path: Path, kind: str) -> None:
    clean = _made(kind, tmp_path)
    assert _surveyed(tmp_path, clean).extents.total(State.FREE) > 20 * MiB
    at = COPIES[kind][0] + SIZES[kind]
    clean[at : at + 4] = (int.from_bytes(clean[at : at + 4], "little") - 2048).to_bytes(4, "little")
    found = _surveyed(tmp_path, clean)
    assert found.extents.total(State.FREE) == 0
    assert any("leftover" in sentence for sentence in found.told.damage)


@pytest.mark.parametrize("kind", COPIES)
def test_copies_that_are_missing_or_older_cost_nothing(tmp_path: Path, kind: str) -> None:
    clean, (at, serial) = _made(kind, tmp_path), COPIES[kind]
    for what in (b"\0" * 512, b"\xff" * 512, b"\xf6" * 512):
        clean[at : at + 512] = what
        assert _surveyed(tmp_path, clean).extents.total(State.FREE) > 20 * MiB
    clean[at : at + 512] = clean[:512]
    clean[at + serial] ^= 0xFF
    assert _surveyed(tmp_path, clean).extents.total(State.FREE) > 20 * MiB
    if kind == "vfat":
        clean[at : at + 512] = os.urandom(512)
        assert _surveyed(tmp_path, clean).extents.total(State.FREE) == 0
        clean[50:52] = b"\0\0"  # BPB_BkBootSec: none
        assert _surveyed(tmp_path, clean).extents.total(State.FREE) > 20 * MiB


def test_an_ntfs_whose_backup_and_mirror_are_overwritten_owns_nothing(tmp_path: Path) -> None:
    clean = _made("ntfs", tmp_path)
    clean[-512:] = os.urandom(512)  # as programs that resize leave it
    assert _surveyed(tmp_path, clean).extents.total(State.FREE) > 20 * MiB
    mirror = int.from_bytes(clean[56:64], "little") * 4096
    clean[mirror : mirror + 1024] = os.urandom(1024)
    assert _surveyed(tmp_path, clean).extents.total(State.FREE) == 0


def _outer_with(
    tmp_path: Path, at: int, *makers: tuple[str, ...], size: int = 40 * MiB
) -> tuple[bytearray, bytearray]:
    """An ext4 of 96 MiB, written in 2023, with a volume put in at a byte of its free space; and that volume."""
    outer, inner = blank(tmp_path / "outer", 96 * MiB), blank(tmp_path / "inner", size)
    then = os.environ | {"E2FSPROGS_FAKE_TIME": "1700000000"}
    run("mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal", outer, env=then)
    for maker in makers:
        run(*maker, inner)
    disk, put = bytearray(outer.read_bytes()), bytearray(inner.read_bytes())
    end = min(at + size, len(disk))
    disk[at:end] = put[: end - at]
    return disk, put


@pytest.mark.parametrize("kind", ["ext4", "vfat"])
def test_a_volume_that_reaches_out_of_the_one_around_it_is_kept(kind: str, tmp_path: Path) -> None:
    """An old table was put back: the live volume begins in the free space and ends behind the partition."""
    maker = {"ext4": ("mkfs.ext4", "-q"), "vfat": ("mkfs.vfat",)}[kind]
    at = 64 * MiB
    disk, _ = _outer_with(tmp_path, at, maker, size=80 * MiB)
    found = _surveyed(tmp_path, disk)
    assert found.extents.clip(at, len(disk) - at).total(State.FREE) == 0
    assert any(f"there is {kind}" in sentence and "kept" in sentence for sentence in found.told.notes)


def test_a_volume_whose_first_bytes_are_known_zeros_is_found(tmp_path: Path) -> None:
    """The sign of btrfs stands at 64 KiB, behind zeros that a sparse file or an image knows of."""
    at = 40 * MiB
    disk, _ = _outer_with(tmp_path, at, ("mkfs.btrfs", "-q", "-f", "--mixed"))
    path = tmp_path / "sparse.img"
    run("dd", f"of={path}", "bs=4096", "conv=sparse", f"if={_written(tmp_path, disk)}", "status=none")
    with FileSource(path) as source:
        assert source.extents(at, 64 * 1024).total(State.ZERO) == 64 * 1024
        found = survey(source)
    assert found.extents.clip(at, 40 * MiB).total(State.FREE) == 0


def _written(tmp_path: Path, disk: bytearray) -> Path:
    path = tmp_path / "full.img"
    path.write_bytes(disk)
    return path


def test_behind_more_volumes_than_can_be_told_all_is_kept(tmp_path: Path) -> None:
    disk, swap = _outer_with(tmp_path, 20 * MiB, ("mkswap", "-q"), size=MiB)
    for number in range(1, 18):
        disk[(20 + number) * MiB : (21 + number) * MiB] = swap
    luks = blank(tmp_path / "luks", 16 * MiB)
    words = ("cryptsetup", "luksFormat", "-q", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", luks)
    run(*words, text_in="x")
    disk[60 * MiB : 76 * MiB] = luks.read_bytes()
    found = _surveyed(tmp_path, disk)
    assert found.extents.clip(60 * MiB, 16 * MiB).total(State.FREE) == 0
    assert any("more than can be told" in sentence for sentence in found.told.notes)


@pytest.mark.parametrize("inner", [1_700_000_000, 946_684_800])
def test_times_that_tell_nothing_are_doubt(inner: int, tmp_path: Path) -> None:
    """The same second for both, as builds with a fixed time have it, or a clock that was never set."""
    at = 40 * MiB
    disk, _ = _outer_with(tmp_path, at)
    path = blank(tmp_path / "other", 16 * MiB)
    run("mkfs.ext4", "-q", path, env=os.environ | {"E2FSPROGS_FAKE_TIME": str(inner)})
    disk[at : at + 16 * MiB] = path.read_bytes()
    found = _surveyed(tmp_path, disk)
    assert found.extents.clip(at, 16 * MiB).total(State.FREE) == 0
    assert any("may have been written later" in sentence for sentence in found.told.notes)


def test_copies_of_its_own_superblock_are_no_volumes(tmp_path: Path) -> None:
    path = blank(tmp_path / "fs.img", 64 * MiB)
    run("mkfs.ext4", "-q", "-b", "1024", path)
    found = _surveyed(tmp_path, bytearray(path.read_bytes()))
    assert found.extents.total(State.FREE) > 48 * MiB
    assert found.told.notes == []
