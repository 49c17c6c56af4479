"""EWF whose sections do not agree on how large the disk is: never read short, never with segments of another."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from ferrotype.block import read
from ferrotype.errors import InvalidImage
from tests.cli.program import ferrotype
from tests.formats import test_ewf2
from tests.formats.judges import KiB, MiB, check_reader, opened, random_disk
from tests.formats.test_ewf import CHUNK, Segment, acquired, digest_of, sealed, table_of
from tests.machine import need, run

CONTENT = random_disk(3 * MiB - 4 * KiB, seed=31) + b"the end " * 512
SECTORS = len(CONTENT) // 512
Change = Callable[[bytearray], None]


def chunks(count: int) -> Change:
    def change(data: bytearray) -> None:
        struct.pack_into("<I", data, 4, count)

    return change


def sectors(count: int) -> Change:
    def change(data: bytearray) -> None:
        struct.pack_into("<Q", data, 16, count)

    return change


def changed(path: Path, kind: bytes, *changes: Change) -> None:
    """The volume or data sections of a segment, changed and sealed anew."""
    data = bytearray(path.read_bytes())
    at = 13
    while True:
        found, following = data[at : at + 16].rstrip(b"\0"), int.from_bytes(data[at + 16 : at + 24], "little")
        if found == kind:
            body = data[at + 76 : at + 76 + 1048]
            for change in changes:
                change(body)
            data[at + 76 : at + 76 + 1052] = sealed(bytes(body))
        if following in (at, 0):
            break
        at = following
    path.write_bytes(data)


@pytest.fixture
def segments(tmp_path: Path) -> list[Path]:
    """An acquisition by libewf in several segments, with a data section in each but the first."""
    first = acquired(tmp_path, CONTENT, "encase6", "-c", "none", "-S", "1048576")
    return sorted(first.parent.glob("disk.E*"))


def said(path: Path) -> str:
    image = opened(path)
    assert read(image.source, 0, image.source.size) == CONTENT
    image.close()
    return "; ".join(image.warnings)


def test_a_volume_section_that_says_nothing(segments: list[Path], tmp_path: Path) -> None:
    """As PassMark OSForensics leaves it."""
    assert said(segments[0]) == ""
    changed(segments[0], b"volume", chunks(0))
    assert "says that the disk has 0 chunks; the tables have 96" in said(segments[0])
    changed(segments[0], b"volume", sectors(0))
    assert f"0 sectors; the data section of disk.E02 says {SECTORS}" in said(segments[0])
    check_reader(segments[0], CONTENT, rounds=30)
    ferrotype("convert", segments[0], tmp_path / "a.raw", code=8)
    assert (tmp_path / "a.raw").read_bytes() == CONTENT
    for path in segments[1:]:
        changed(path, b"data", sectors(0))
    with pytest.raises(InvalidImage, match="no section says how many sectors the disk has, and the tables have 96"):
        opened(segments[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ((sectors(SECTORS - 640),), "says that the disk has 5504 sectors, and the data section of disk.E02 6144"),
        ((sectors(SECTORS + 1),), "sectors, and the data section"),
        ((sectors(64), chunks(1)), "sectors, and the data section"),
        ((chunks(95),), "has 95 chunks, and 6144 sectors need 96"),
        ((chunks(97),), "has 97 chunks"),
    ],
)
def test_sections_that_disagree(segments: list[Path], changes: tuple[Change, ...], words: str) -> None:
    need("ewfexport")
    changed(segments[0], b"volume", *changes)
    with pytest.raises(InvalidImage, match=words):
        opened(segments[0])
    run("ewfexport", "-u", "-q", "-f", "raw", "-t", segments[0].with_name("judge"), segments[0], ok=(1,))


@pytest.mark.parametrize("more", [-64, -65, 64, 640])
def test_tables_with_other_chunks_than_all_sections_say(segments: list[Path], more: int) -> None:
    count = SECTORS + more
    for path, kind in [(segments[0], b"volume"), *((path, b"data") for path in segments[1:])]:
        changed(path, kind, sectors(count), chunks(-(-count // 64)))
    with pytest.raises(InvalidImage, match=rf"the tables have 96 chunks where a disk of {count} sectors needs"):
        opened(segments[0])


def test_a_last_chunk_that_holds_more_is_told(segments: list[Path]) -> None:
    for path, kind in [(segments[0], b"volume"), *((path, b"data") for path in segments[1:])]:
        changed(path, kind, sectors(SECTORS - 3))
    image = opened(segments[0])
    assert read(image.source, 0, image.source.size) == CONTENT[:-1536]
    assert "the last chunk holds 1536 bytes behind the last of the 6141 sectors" in image.warnings[0]
    image.close()


def test_a_segment_of_another_acquisition_without_identifiers(tmp_path: Path) -> None:
    """Most programs leave the set identifier 0: nothing but the disk tells their images apart."""
    for number, size, per_chunk, words in (
        (1, len(CONTENT) - 512, 64, "segments of different images are mixed"),
        (2, len(CONTENT) + 64 * CHUNK, 64, "segments of different images are mixed"),
        (3, len(CONTENT), 128, "belongs to another image: it has chunks of 128"),
    ):
        first, second = Segment(1), Segment(2)
        first.volume(len(CONTENT))
        first.chunks(CONTENT[:MiB])
        first.add("next")
        second.volume(size, kind="data", chunk_sectors=per_chunk)
        second.chunks(CONTENT[MiB:])
        second.add("done")
        path = first.write(tmp_path / f"{number}.E01")
        second.write(tmp_path / f"{number}.E02")
        with pytest.raises(InvalidImage, match=words):
            opened(path)


def test_more_chunks_than_the_disk_has(tmp_path: Path) -> None:
    segment = Segment()
    segment.volume(len(CONTENT))
    segment.chunks(CONTENT)
    segment.add("sectors", zlib.compress(bytes(CHUNK)))
    at = len(segment.data) - len(zlib.compress(bytes(CHUNK)))
    segment.add("table", table_of([at | 0x8000_0000]))
    segment.add("hash", sealed(digest_of("md5", CONTENT) + bytes(16)))
    segment.add("done")
    with pytest.raises(
        InvalidImage, match=r"the tables have 97 chunks where a disk of 6144 sectors needs 96: .*damaged"
    ):
        opened(segment.write(tmp_path / "a.E01"))


# ---------------------------------------------------------------------- version 2


def version2(tmp: Path, *sizes: int, each: int = 4 * CHUNK) -> Path:
    """Segments whose device information and case data say these sizes of the disk, whatever it is."""
    content = test_ewf2.CONTENT
    for number, size in enumerate(sizes):
        segment = test_ewf2.Segment(number + 1)
        segment.about(size)
        last = number == len(sizes) - 1
        part = content[number * each :] if last else content[number * each : (number + 1) * each]
        segment.chunks(part, number * each // CHUNK)
        segment.add(test_ewf2.DONE if last else test_ewf2.NEXT)
        segment.write(tmp / f"disk.Ex{number + 1:02}")
    return tmp / "disk.Ex01"


def test_version_2_likewise(tmp_path: Path) -> None:
    size = len(test_ewf2.CONTENT)
    image = opened(version2(tmp_path, size, size))
    assert image.warnings == ()
    image.close()
    path = version2(tmp_path, 0, size)
    check_reader(path, test_ewf2.CONTENT, rounds=20)
    image = opened(path)
    assert "the device information says that the disk has 0 sectors" in image.warnings[0]
    image.close()
    for sizes, words in (
        ((size, size - 64 * KiB), "different images"),
        ((0, 0), "no section says how many sectors"),
        ((size - 64 * KiB,) * 2, "where a disk of"),
        ((size + 64 * KiB,) * 2, "where a disk of"),
    ):
        with pytest.raises(InvalidImage, match=words):
            opened(version2(tmp_path, *sizes))
