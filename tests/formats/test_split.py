"""Split files: every style of names, opened at any part, with parts missing, and what only looks like a part."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from ferrotype.block import read
from ferrotype.engine.references import Access, open_disk
from ferrotype.errors import FerrotypeError, InvalidImage
from ferrotype.job import NullJob
from tests.cli.program import ferrotype
from tests.formats.judges import MiB, check_reader, opened, random_disk
from tests.machine import need, run

CONTENT = random_disk(MiB + 1000, seed=11)


def content_of(path: Path) -> tuple[bytes, list[str]]:
    """What the command line sees, and its warnings."""
    job = NullJob()
    with open_disk(str(path), Access(), job) as disk:
        content = read(disk.source, 0, disk.source.size)
    return content, job.warnings


def parts_of(folder: Path, names: list[str], content: bytes = CONTENT, each: int = 0) -> list[Path]:
    each = each or -(-len(content) // len(names))
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).write_bytes(content[number * each : (number + 1) * each])
    return [folder / name for name in names]


STYLES = {
    "three": [f"img.{n:03}" for n in range(1, 7)],
    "zero": [f"img.{n:03}" for n in range(6)],
    "four": [f"img.{n:04}" for n in range(1, 7)],
    "two": [f"img.{n:02}" for n in range(12)],
    "one": [f"img.{n}" for n in range(1, 12)],
    "dd": [f"img.dd.{n:03}" for n in range(1, 4)],
    "raw1": [f"disk.raw{n}" for n in range(1, 13)],
    "e01": [f"case.E01.{n:03}" for n in range(1, 4)],
    "words": [f"Fall – Ü.{n:03}" for n in range(1, 4)],
    "many": [f"img.{n:03}" for n in range(1, 1003)],
    "letters": ["img.aa", "img.ab", "img.ac"],
    "three letters": ["img.aaa", "img.aab"],
}


@pytest.mark.parametrize("style", sorted(STYLES))
def test_any_part_opens_all(tmp_path: Path, style: str) -> None:
    parts = parts_of(tmp_path / "s", STYLES[style])
    assert b"".join(part.read_bytes() for part in parts) == CONTENT
    for name in ("img.001.txt", "img.csv", "img.txt", "img", "img.01.log"):
        (tmp_path / "s" / name).write_bytes(b"beside")
    for part in {parts[0], parts[1], parts[len(parts) // 2], parts[-1]}:
        assert content_of(part) == (CONTENT, []), part
    check_reader(parts[0], CONTENT, "raw", rounds=30)


@pytest.mark.parametrize(("tail", "digits"), [(("-d",), "numbers"), ((), "letters"), (("-d", "-a", "4"), "four")])
def test_parts_that_split_made(tmp_path: Path, tail: tuple[str, ...], digits: str) -> None:
    """With so many that split(1) makes its names longer: .89 is followed by .9000, .yz by .zaaa."""
    need("split")
    content = random_disk(700_000, seed=3)
    (tmp_path / "whole").write_bytes(content)
    run("split", *tail, "-b", "1000", "whole", "img.", cwd=tmp_path)
    parts = sorted(tmp_path.glob("img.*"))
    assert len(parts) == 700
    if digits != "four":
        assert len(parts[-1].suffix) == 5
    for part in random.Random(1).sample(parts, 5):
        assert content_of(part) == (content, []), part


def test_parts_of_unequal_content_at_random_cuts(tmp_path: Path) -> None:
    rng = random.Random(5)
    for number in range(12):
        each = rng.choice((1, 511, 512, 1000, 4096, 100_001)) + rng.randrange(3000)
        count = -(-len(CONTENT[:200_000]) // each)
        parts = parts_of(tmp_path / str(number), [f"x.{n:04}" for n in range(1, count + 1)], CONTENT[:200_000], each)
        check_reader(rng.choice(parts), CONTENT[:200_000], "raw", rounds=10, seed=number)


# ---------------------------------------------------------------------- parts that are missing


@pytest.mark.parametrize("style", ["three", "zero", "four", "two", "dd", "letters", "words"])
def test_a_hole_in_the_numbering_is_an_error(tmp_path: Path, style: str) -> None:
    parts = parts_of(tmp_path / "s", STYLES[style])
    parts[1].rename(tmp_path / "away")
    for part in (parts[0], parts[2], parts[-1]):
        with pytest.raises(InvalidImage, match=f"part {parts[1].name} of a split file is missing"):
            content_of(part)
    (tmp_path / "away").rename(parts[1])
    parts[0].rename(tmp_path / "away")
    for part in parts[1:] if style not in ("zero", "two") else ():  # what begins with 1 is whole
        with pytest.raises(InvalidImage, match="of a split file is missing"):
            content_of(part)


def test_a_later_part_alone(tmp_path: Path) -> None:
    (part,) = parts_of(tmp_path / "s", ["img.002"])
    with pytest.raises(InvalidImage, match=r"part img\.001 of a split file is missing, and img\.002 is called like"):
        content_of(part)
    assert ferrotype("checksum", part, code=4).err.count("\n") == 1


def test_parts_that_may_be_cut_short_are_told(tmp_path: Path) -> None:
    parts = parts_of(tmp_path / "s", STYLES["three"])
    parts[-1].write_bytes(b"")
    assert "is empty" in content_of(parts[0])[1][0]
    parts[-1].write_bytes(bytes(400_000))
    assert "larger than the others" in content_of(parts[0])[1][0]
    parts[2].write_bytes(parts[2].read_bytes()[:-1])
    content, warnings = content_of(parts[0])
    assert content == b"".join(part.read_bytes() for part in parts)
    assert "differ in size, img.003 has" in warnings[0]
    ferrotype("checksum", parts[4], code=8)


# ---------------------------------------------------------------------- what is split, and what is not


def test_a_split_container_is_one_file(tmp_path: Path) -> None:
    need("qemu-img")
    (tmp_path / "a.raw").write_bytes(CONTENT[:MiB])
    for format, name in (("qcow2", "qcow2"), ("vpc", "vhd"), ("vmdk", "vmdk")):
        more = ("-o", "subformat=fixed,force_size=on") if format == "vpc" else ()
        run("qemu-img", "convert", "-O", format, *more, tmp_path / "a.raw", tmp_path / f"a.{name}")
        whole = (tmp_path / f"a.{name}").read_bytes()
        parts = parts_of(tmp_path / name, [f"a.{name}.{n:03}" for n in range(1, 6)], whole)
        for part in parts:
            image = opened(part)
            assert image.format == name
            assert read(image.source, 0, image.source.size) == CONTENT[:MiB]
            image.close()
            assert content_of(part)[0] == CONTENT[:MiB]
        parts[2].unlink()
        for part in parts[:2] + parts[3:]:
            with pytest.raises(InvalidImage, match="is missing"):
                content_of(part)


def test_a_split_raw_disk_that_says_it_is_a_container_is_asked_about(tmp_path: Path) -> None:
    need("qemu-img")
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "a.qcow2", "1M")
    parts = parts_of(tmp_path / "s", ["disk.img.001", "disk.img.002"], (tmp_path / "a.qcow2").read_bytes())
    with pytest.raises(FerrotypeError, match="named like a raw disk"):
        content_of(parts[1])


def test_images_that_are_only_numbered_stay_apart(tmp_path: Path) -> None:
    """Older images of a disk, as they are kept by log rotation and by people."""
    need("qemu-img")
    for number, fill in ((1, CONTENT[:MiB]), (2, bytes(MiB)), (3, CONTENT[512 : MiB + 512])):
        (tmp_path / "a.raw").write_bytes(fill)
        run("qemu-img", "convert", "-O", "qcow2", tmp_path / "a.raw", tmp_path / f"vm.qcow2.{number}")
    assert content_of(tmp_path / "vm.qcow2.1") == (CONTENT[:MiB], [])
    assert content_of(tmp_path / "vm.qcow2.3") == (CONTENT[512 : MiB + 512], [])


@pytest.mark.parametrize("names", [["backup.2024", "backup.2025"], ["disk.dd", "disk.gz", "disk.de"], ["a.raw2"]])
def test_names_that_are_no_parts(tmp_path: Path, names: list[str]) -> None:
    parts = parts_of(tmp_path / "s", names)
    assert content_of(parts[0]) == (parts[0].read_bytes(), [])


def test_disks_of_other_sizes_are_no_parts_and_told(tmp_path: Path) -> None:
    (tmp_path / "disk.img1").write_bytes(CONTENT[:4096])
    (tmp_path / "disk.img2").write_bytes(CONTENT[:8192])
    content, warnings = content_of(tmp_path / "disk.img1")
    assert content == CONTENT[:4096]
    assert "disk.img2 beside it is of another size" in warnings[0]


# ---------------------------------------------------------------------- disks that end before their partitions do


@pytest.mark.parametrize("label", ["dos", "gpt"])
@pytest.mark.parametrize("name", ["only.001", "disk.img"])
def test_a_table_that_reaches_behind_the_end_is_told_by_every_verb(tmp_path: Path, label: str, name: str) -> None:
    need("sfdisk")
    path = tmp_path / name
    path.write_bytes(bytes(8 * MiB))
    run("sfdisk", "-q", path, text_in=f"label: {label}\nstart=2048, size=2048\nstart=8192, size=6000\n")
    out = tmp_path / "out"
    verbs = [("checksum", path), ("info", path), ("convert", path, out, "-O", "qcow2"), ("compare", path, path)]
    assert "warning" not in ferrotype(*verbs[0]).err
    with path.open("r+b") as file:
        file.truncate(3 * MiB)
    for words in (*verbs, ("backup", path, tmp_path / "a.ferro")):
        done = ferrotype(*words, code=8)
        assert "beyond the end of the disk" in done.err or "smaller than its GPT says" in done.err, words
