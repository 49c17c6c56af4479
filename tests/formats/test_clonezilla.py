"""Clonezilla folders, composed of what sfdisk, partclone, ntfsclone and the compressors make."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from ferrotype.block import read
from ferrotype.block.memory import MemoryDisk
from ferrotype.block.views import Slice
from ferrotype.errors import DeviceError, FerrotypeError, FormatError, InvalidImage, NotAllowed, UnsupportedError
from ferrotype.extents import State
from ferrotype.formats import Image
from ferrotype.formats.registry import open_folder
from ferrotype.formats.related import Related
from ferrotype.formats.spool import Spool
from ferrotype.formats.streams import unpacked
from ferrotype.job import NullJob
from ferrotype.testing.sources import check_source
from tests.formats.judges import KiB, MiB
from tests.formats.test_partclone import clone, restored, volume
from tests.machine import need, run

SECTOR = 512
PACKERS = {
    "gz": ("gzip", "-1"),
    "zst": ("zstd", "-q", "-1"),
    "xz": ("xz", "-0"),
    "bz2": ("bzip2", "-1"),
    "lz4": ("lz4", "-q", "-1"),
}


def opened(path: Path) -> Image:
    return open_folder(path, Related(path))


def pack(source: Path, target: Path, compression: str, *, part: int = 0) -> None:
    """A stream as Clonezilla keeps it: packed, and split into files of ``part`` bytes."""
    data = source.read_bytes()
    if compression:
        need(PACKERS[compression][0])
        data = subprocess.run([*PACKERS[compression], "-c"], input=data, capture_output=True, check=True).stdout
    target = target.with_name(target.name + (f".{compression}" if compression else ""))
    if not part:
        target.write_bytes(data)
        return
    whole = target.with_name("whole")
    whole.write_bytes(data)
    run("split", "-b", str(part), whole, f"{target}.")
    whole.unlink()


@dataclass(frozen=True)
class Made:
    """Partitions as partclone images, and what partclone restores from them."""

    volumes: dict[str, Path]
    images: dict[str, Path]
    contents: dict[str, bytes]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    need("partclone.ext4", "partclone.restore", "mkfs.vfat", "mkntfs")
    base = tmp_path_factory.mktemp("volumes")

    def make(kind: str) -> tuple[Path, Path, bytes]:
        (base / kind).mkdir()
        source = volume(base / kind / "volume", kind)
        image = clone(source, kind)
        return source, image, restored(image, source.stat().st_size)

    kinds = ["ext4", "fat", "ntfs"]
    with ThreadPoolExecutor(3) as pool:
        found = dict(zip(kinds, pool.map(make, kinds), strict=True))
    return Made(*({kind: row[n] for kind, row in found.items()} for n in range(3)))  # type: ignore[arg-type]


SCRIPTS = {
    "gpt": (
        "label: gpt\nstart=2048, size=24576\nstart=28672, size=24579\nstart=57344, size=24579\nstart=83968, size=4096"
    ),
    "dos": (
        "label: dos\nlabel-id: 0x1234abcd\nstart=2048, size=24576, type=83, bootable\n"
        "start=28672, size=65536, type=5\nstart=30720, size=24579, type=c\n"
        "start=59392, size=24579, type=7\nstart=88064, size=4096, type=82"
    ),
}
NAMES = {"gpt": ["sda1", "sda2", "sda3", "sda4"], "dos": ["sda1", "sda5", "sda6", "sda7"]}
SIZE = 96 * 1024 * SECTOR


def disk(path: Path, label: str) -> bytes:
    """A disk with a partition table, and code to boot from."""
    with path.open("wb") as file:
        file.truncate(SIZE)
    run("sfdisk", "-q", path, text_in=SCRIPTS[label])
    content = bytearray(path.read_bytes())
    content[:440] = random.Random(label).randbytes(440)
    path.write_bytes(content)
    return bytes(content)


def dump(path: Path) -> str:
    """The partition table as sfdisk reads it, without the file's name."""
    return run("sfdisk", "-d", path).replace(str(path), "")


def save_table(source: Path, content: bytes, folder: Path, label: str, name: str = "sda") -> None:
    (folder / f"{name}-pt.sf").write_text(run("sfdisk", "-d", source).replace(f"{source}", f"/dev/{name}"))
    (folder / f"{name}-pt.parted").write_text(
        f"Model: A Disk (scsi)\nDisk /dev/{name}: {len(content) // SECTOR}s\n"
        f"Sector size (logical/physical): 512B/512B\nPartition Table: {'gpt' if label == 'gpt' else 'msdos'}\n"
    )
    (folder / f"{name}-mbr").write_bytes(content[:SECTOR])
    if label == "gpt":
        (folder / f"{name}-gpt-1st").write_bytes(content[: 34 * SECTOR])
        (folder / f"{name}-gpt-2nd").write_bytes(content[-33 * SECTOR :])
    else:
        (folder / f"{name}-hidden-data-after-mbr").write_bytes(content[SECTOR : 2048 * SECTOR])


def make_folder(tmp: Path, made: Made, label: str, compression: str, *, part: int = 0) -> tuple[Path, bytes]:
    """A folder of one disk, and that disk's content."""
    folder = tmp / "image"
    folder.mkdir()
    content = bytearray(disk(tmp / "disk.raw", label))
    save_table(tmp / "disk.raw", bytes(content), folder, label)
    names = NAMES[label]
    (folder / "disk").write_text("sda\n")
    (folder / "parts").write_text(" ".join(names) + "\n")
    (folder / "clonezilla-img").write_text("This image was saved by Clonezilla.\n")
    starts = [2048, 28672, 57344] if label == "gpt" else [2048, 30720, 59392]
    for name, start, (kind, image) in zip(names, starts, made.images.items(), strict=False):
        pack(image, folder / f"{name}.{'vfat' if kind == 'fat' else kind}-ptcl-img", compression, part=part)
        volume_content = made.contents[kind]
        content[start * SECTOR : start * SECTOR + len(volume_content)] = volume_content
    uuid = "0b61bdbc-28ef-4a55-8b32-cd5c8b0e4c02"
    (folder / f"swappt-{names[3]}.info").write_text(f'UUID="{uuid}"\nLABEL="my swap"\n')
    return folder, bytes(content)


@pytest.fixture(scope="module")
def plain(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without compression, to be copied."""
    return make_folder(tmp_path_factory.mktemp("plain"), made, "gpt", "")[0]


@pytest.mark.parametrize(
    ("label", "compression", "part"),
    [
        ("gpt", "gz", 1 * MiB),
        ("gpt", "zst", 0),
        ("dos", "xz", 700_000),
        ("dos", "", 2 * MiB),
    ],
)
def test_a_disk_is_put_together(label: str, compression: str, part: int, made: Made, tmp_path: Path) -> None:
    folder, content = make_folder(tmp_path, made, label, compression, part=part)
    image = opened(folder)
    assert image.format == "clonezilla"
    assert not image.warnings
    swap = (83968 if label == "gpt" else 88064) * SECTOR
    found = bytearray(read(image.source, 0, image.source.size))
    (tmp_path / "swap").write_bytes(found[swap : swap + 2 * MiB])
    described = run("blkid", "-p", "-o", "export", tmp_path / "swap")
    assert "TYPE=swap" in described
    assert "UUID=0b61bdbc-28ef-4a55-8b32-cd5c8b0e4c02" in described
    assert "LABEL=my\\ swap" in described
    found[swap : swap + 4096] = bytes(4096)
    if label == "dos":  # boot records are made again
        (tmp_path / "made.raw").write_bytes(found)
        dumps = [
            run("sfdisk", "-d", tmp_path / name).replace(str(tmp_path / name), "")
            for name in ("made.raw", "disk.raw")
        ]
        assert dumps[0] == dumps[1]
        for at in (28672, 57344, 86016):
            found[at * SECTOR : (at + 1) * SECTOR] = content[at * SECTOR : (at + 1) * SECTOR]
    assert bytes(found) == content
    assert image.check is not None
    assert image.check(NullJob()) == []
    image.close()
    if compression != "gz":
        return
    image = opened(folder)
    whole = read(image.source, 0, image.source.size)
    check_source(lambda: Slice(image.source, 0, image.source.size), whole, rounds=8)
    assert image.source.extents(0, SIZE).total(State.ZERO) > SIZE // 3
    image.close()


def test_partitions_are_further_disks(made: Made, tmp_path: Path) -> None:
    folder, _ = make_folder(tmp_path, made, "gpt", "zst")
    image = opened(folder)
    assert sorted(image.disks) == ["sda", "sda1", "sda2", "sda3"]
    for name, kind in zip(["sda1", "sda2", "sda3"], ["ext4", "fat", "ntfs"], strict=True):
        part = image.disk(name)
        assert read(part, 0, part.size) == made.contents[kind][: part.size]
        assert not any(made.contents[kind][part.size :])
    image.close()


def test_two_disks(made: Made, tmp_path: Path) -> None:
    folder, content = make_folder(tmp_path, made, "gpt", "gz")
    with (tmp_path / "second.raw").open("wb") as file:
        file.truncate(20 * MiB)
    run("sfdisk", "-q", tmp_path / "second.raw", text_in="label: dos\nstart=2048, size=24576, type=83")
    second = bytearray((tmp_path / "second.raw").read_bytes())
    save_table(tmp_path / "second.raw", bytes(second), folder, "dos", "sdb")
    (folder / "disk").write_text("sda sdb\n")
    (folder / "parts").write_text("sda1 sda2 sda3 sda4 sdb1\n")
    every = made.volumes["ext4"].read_bytes()
    (tmp_path / "dd").write_bytes(every)
    pack(tmp_path / "dd", folder / "sdb1.dd-ptcl-img", "gz", part=MiB)
    second[MiB : MiB + len(every)] = every
    image = opened(folder)
    assert image.facts["disks"] == ["sda", "sdb"]
    assert read(image.disk("sdb"), 0, len(second)) == bytes(second)
    assert read(image.source, 0, 2048 * SECTOR) == content[: 2048 * SECTOR]
    image.close()


def test_single_partitions_and_ntfsclone(made: Made, tmp_path: Path) -> None:
    need("ntfsclone")
    folder = tmp_path / "image"
    folder.mkdir()
    (folder / "parts").write_text("sdc2\n")
    source = made.volumes["ntfs"]
    run("ntfsclone", "--save-image", "--force", "-o", tmp_path / "ntfs.img", source)
    run("ntfsclone", "--restore-image", "-o", tmp_path / "ntfs.raw", tmp_path / "ntfs.img")
    pack(tmp_path / "ntfs.img", folder / "sdc2.ntfs-img", "gz", part=300_000)
    image = opened(folder)
    assert image.facts["subformat"] == "partitions"
    assert read(image.source, 0, image.source.size) == (tmp_path / "ntfs.raw").read_bytes()
    image.close()


def test_a_table_that_was_not_saved_is_made_again(made: Made, tmp_path: Path) -> None:
    folder, content = make_folder(tmp_path, made, "dos", "")
    (folder / "sda-mbr").unlink()
    (folder / "sda-hidden-data-after-mbr").unlink()
    (folder / "sda-pt.parted").unlink()
    image = opened(folder)
    assert len(image.warnings) == 2
    (tmp_path / "made.raw").write_bytes(read(image.source, 0, image.source.size))
    dumps = [
        run("sfdisk", "-d", tmp_path / name).replace(str(tmp_path / name), "") for name in ("made.raw", "disk.raw")
    ]
    assert dumps[0] == dumps[1]
    image.close()
    assert content


def test_a_gpt_from_the_backup_of_sgdisk(made: Made, tmp_path: Path) -> None:
    folder, content = make_folder(tmp_path, made, "gpt", "")
    parts = content[:SECTOR] + content[SECTOR : 2 * SECTOR] + content[-SECTOR:] + content[2 * SECTOR : 34 * SECTOR]
    (folder / "sda-gpt.gdisk").write_bytes(parts)
    (folder / "sda-gpt-1st").unlink()
    (folder / "sda-gpt-2nd").unlink()
    image = opened(folder)
    assert not image.warnings
    found = read(image.source, 0, image.source.size)
    assert found[: 2048 * SECTOR] == content[: 2048 * SECTOR]
    assert found[-33 * SECTOR :] == content[-33 * SECTOR :]
    image.close()


# ---------------------------------------------------------------------- damage and hostile folders


def test_a_missing_piece_is_named(made: Made, tmp_path: Path) -> None:
    folder, _ = make_folder(tmp_path, made, "gpt", "gz", part=500_000)
    (folder / "sda1.ext4-ptcl-img.gz.ab").unlink()
    with pytest.raises(InvalidImage, match=r"\.ab"):
        opened(folder)


@pytest.mark.parametrize("compression", ["gz", "zst", "lz4"])
def test_a_stream_that_is_cut_or_damaged_is_never_zeros(compression: str, made: Made, tmp_path: Path) -> None:
    folder, content = make_folder(tmp_path, made, "gpt", compression)
    path = folder / f"sda1.ext4-ptcl-img.{compression}"
    good = path.read_bytes()
    half = len(good) // 2
    for bad in (good[:-9], good[:half], good[:half] + b"wrong" * 9 + good[half + 45 :]):
        path.write_bytes(bad)
        try:
            image = opened(folder)
        except FormatError:
            continue
        assert image.check is not None
        assert image.check(NullJob())
        try:
            assert read(image.source, 0, 28672 * SECTOR) == content[: 28672 * SECTOR]
            assert bad == good[:-9], "all the data is there, and its checksum is not"
        except InvalidImage:
            pass
        except AssertionError:
            assert bad not in (good[:-9], good[:half]), "what partclone's own checksum has shown"
        image.close()


def test_no_room_for_what_is_unpacked(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = make_folder(tmp_path, made, "gpt", "gz")
    usage = shutil.disk_usage(tempfile.gettempdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=MiB))
    with pytest.raises(DeviceError, match="TMPDIR"):
        opened(folder)


def test_a_stream_is_unpacked_only_as_far_as_is_asked(tmp_path: Path) -> None:
    need("gzip")
    (tmp_path / "data").write_bytes(random.Random(1).randbytes(9 * MiB))
    pack(tmp_path / "data", tmp_path / "data", "gz")
    packed = MemoryDisk((tmp_path / "data.gz").read_bytes())
    spool = Spool(packed, "gz", 9 * MiB, limit=9 * MiB)
    assert read(spool, MiB, 100) == (tmp_path / "data").read_bytes()[MiB : MiB + 100]
    assert spool._scratch.size < 4 * MiB
    check_source(lambda: Slice(spool, 0, spool.size), (tmp_path / "data").read_bytes(), rounds=20)
    spool.close()


def test_streams_that_follow_each_other(tmp_path: Path) -> None:
    for compression in ("gz", "zst", "xz", "bz2", "lz4"):
        joined = b""
        for piece in (b"first" * 5000, b"", b"second" * 300_000):
            (tmp_path / "data").write_bytes(piece)
            pack(tmp_path / "data", tmp_path / "data", compression)
            joined += (tmp_path / f"data.{compression}").read_bytes()
        found = b"".join(unpacked(MemoryDisk(joined), compression))
        assert found == b"first" * 5000 + b"second" * 300_000, compression


def test_a_bomb_goes_no_further_than_its_header_says(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(40 * MiB))
    pack(tmp_path / "data", tmp_path / "data", "gz")
    packed = MemoryDisk((tmp_path / "data.gz").read_bytes())
    with pytest.raises(InvalidImage, match="allows"):
        Spool(packed, "gz", None, limit=MiB)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("disk", "../../etc"),
        ("disk", ""),
        ("disk", "sdz"),
        ("parts", "/dev/sda1 sda2"),
        ("parts", "x" * 100_000),
        ("parts", "\0\0"),
        ("sda-pt.sf", ""),
        ("sda-pt.sf", "label: gpt\nsector-size: 77\n/dev/sda1 : start=2048, size=24576"),
        ("sda-pt.sf", "label: gpt\n/dev/sda1 : start=2048, size=24576\n/dev/sda2 : start=4096, size=24579"),
        ("sda-pt.sf", "label: gpt\n/dev/sda1 : start=999999999999999, size=999999999999999"),
        ("sda-pt.sf", "label: dos\n/dev/sda1 : start=0, size=24576, type=83"),
        ("sda-pt.parted", "Disk /dev/sda: 999999999999999s"),
        ("sda-pt.parted", "Disk /dev/sda: 5s"),
        ("sda-gpt-2nd", "x" * 70_000_000),
        ("sda-gpt-1st", ""),
    ],
)
def test_odd_files_do_no_harm(name: str, text: str, plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "image", copy_function=os.link)
    (folder / name).unlink()
    (folder / name).write_text(text)
    try:
        image = opened(folder)
    except FerrotypeError:
        return
    read(image.source, 0, min(MiB, image.source.size))
    image.source.extents(0, image.source.size)
    image.close()


def test_links_out_of_the_folder_are_not_followed(made: Made, plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "image", copy_function=os.link)
    secret = tmp_path / "secret"
    secret.write_bytes(made.images["ext4"].read_bytes())
    (folder / "sda1.ext4-ptcl-img").unlink()
    (folder / "sda1.ext4-ptcl-img").symlink_to(secret)
    with pytest.raises(NotAllowed):
        opened(folder)


def test_what_is_not_read_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(plain, tmp_path / "image", copy_function=os.link)
    (folder / "sda1.ext4-ptcl-img").rename(folder / "sda1.ext4-ptcl-img.lrz")
    with pytest.raises(UnsupportedError, match="lrzip"):
        opened(folder)
    (folder / "sda1.ext4-ptcl-img.lrz").unlink()
    (folder / "sda1.ext4-ptcl-img").write_bytes(bytes(100 * KiB))
    with pytest.raises(InvalidImage, match="not by partclone"):
        opened(folder)
