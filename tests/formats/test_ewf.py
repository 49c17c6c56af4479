"""EWF: what libewf makes is read, what is written is judged by libewf; damage, hostile bytes, sets of segments."""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from ferrotype.block import read
from ferrotype.block.outputs import Outputs
from ferrotype.errors import FerrotypeError, FormatError, InvalidImage, Refused, UnsupportedError, UsageError
from ferrotype.formats import Spec, numbered
from ferrotype.formats.ewf import segment_writer, tables
from ferrotype.formats.ewf.segments import segment_name
from ferrotype.formats.registry import writer
from ferrotype.job import NullJob
from tests.formats.judges import (
    KiB,
    MiB,
    check_reader,
    facts_of,
    make_image,
    make_image_piecemeal,
    opened,
    random_disk,
)
from tests.machine import corpus, need, run, unpack

CONTENT = random_disk(3 * MiB + 1536, seed=8)  # the last chunk is a short one
SMALL = random_disk(300 * KiB + 512, seed=4)
CHUNK = 32 * KiB


# ---------------------------------------------------------------------- made by libewf


def acquired(tmp: Path, content: bytes, format: str, *options: str) -> Path:
    """The first segment of an image made by ewfacquire."""
    need("ewfacquire")
    raw = tmp / "disk.content.raw"
    raw.write_bytes(content)
    case = ("-C", "case 7", "-D", "a disk", "-e", "A. Miner", "-E", "e1", "-N", "some notes")
    run(
        "ewfacquire",
        "-u",
        "-q",
        "-t",
        tmp / "disk",
        "-f",
        format,
        *case,
        "-m",
        "fixed",
        "-M",
        "physical",
        *options,
        raw,
    )
    raw.unlink()
    return next(path for path in sorted(tmp.iterdir()) if path.suffix.lower() in (".e01", ".s01", ".ex01"))


@pytest.mark.parametrize(
    ("format", "subformat"),
    [
        ("ewf", "EWF"),
        ("smart", "EWF-S01"),
        *((name, "EWF-E01") for name in ("ftk", "encase2", "encase3", "encase4", "encase5", "encase6", "encase7")),
        *((name, "EWF-E01") for name in ("linen5", "linen6", "linen7", "ewfx")),
    ],
)
def test_every_flavour_is_read(tmp_path: Path, format: str, subformat: str) -> None:
    level = "none" if format in ("ftk", "linen5") else "best" if format == "encase5" else "fast"
    path = acquired(tmp_path, CONTENT, format, "-c", level)
    check_reader(path, CONTENT, rounds=40)
    image = opened(path)
    facts = image.facts
    assert (image.format, facts["subformat"], facts["unit"]) == ("ewf", subformat, CHUNK)
    assert facts["case_number"] == "case 7"
    assert facts["description"] == "a disk"
    assert (facts["examiner_name"], facts["evidence_number"]) == ("A. Miner", "e1")
    assert (facts["notes"], facts["media_type"]) == ("some notes", "fixed")
    assert str(facts["acquired"]).startswith("20")
    assert image.hashes["md5"] == digest_of("md5", CONTENT).hex()
    assert image.check is not None
    assert image.check(NullJob()) == []
    assert image.warnings == ()
    image.close()


@pytest.mark.parametrize(("format", "sectors"), [("encase1", 64), ("encase6", 16), ("encase6", 1024), ("smart", 64)])
def test_chunks_of_other_sizes(tmp_path: Path, format: str, sectors: int) -> None:
    path = acquired(tmp_path, CONTENT, format, "-c", "empty-block", "-b", str(sectors), "-d", "sha1")
    check_reader(path, CONTENT, rounds=40)
    assert facts_of(path)["unit"] == sectors * 512


@pytest.mark.parametrize(("format", "second"), [("encase6", ".E02"), ("smart", ".s02"), ("encase1", ".E02")])
def test_segments_are_read_as_one(tmp_path: Path, format: str, second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbered, "_OPEN", 1)  # so that segments are closed and opened again
    content = np.random.default_rng(1).bytes(5 * MiB)
    path = acquired(tmp_path, content, format, "-c", "none", "-S", "1048576")
    assert path.with_suffix(second).exists()
    check_reader(path, content, rounds=40)
    files = facts_of(path)["files"]
    assert isinstance(files, list)
    assert len(files) >= 4
    assert files[0] == path.with_suffix(second).name


def test_tables_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "_PAGE", 7)
    monkeypatch.setattr(tables, "_KEPT", 40)
    path = acquired(tmp_path, CONTENT, "encase6", "-c", "fast")
    check_reader(path, CONTENT, rounds=40)


@pytest.mark.parametrize("entry", [e for e in corpus() if e["format"] in ("ewf", "ewf2")], ids=lambda e: e["id"])
def test_corpus(entry: dict[str, object], tmp_path: Path) -> None:
    path = unpack(entry, tmp_path)
    if entry["validity"] == "malformed":
        with pytest.raises(FormatError):
            opened(path)
        return
    image = opened(path)
    disk = entry["virtual_disk"]
    assert isinstance(disk, dict)
    assert image.source.size == disk["size"]
    digest = hashlib.sha256()
    for at in range(0, image.source.size, MiB):
        digest.update(read(image.source, at, min(MiB, image.source.size - at)))
    assert digest.hexdigest() == disk["sha256"]
    assert image.check is not None
    assert image.check(NullJob()) == []
    image.close()


# ---------------------------------------------------------------------- written


@pytest.mark.parametrize("make", [make_image, make_image_piecemeal])
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("level=none", "segment_size=1MiB"),
        ("level=best", "sectors_per_chunk=256", "media_type=removable", "physical=no"),
        ("sectors_per_chunk=16", "segment_size=1100KiB"),
    ],
    ids=" ".join,
)
def test_what_is_written_satisfies_libewf(
    tmp_path: Path, make: Callable[..., Path], options: tuple[str, ...]
) -> None:
    content = bytes(2 * MiB) + CONTENT + bytes(5 * MiB + 512)
    path = make(tmp_path / "disk.E01", "ewf", content, *options, "case_number=7/ä", "notes=as found")
    segments = sorted(tmp_path.glob("disk.E*"))
    assert len(segments) > 1 or not any("segment_size" in option for option in options)
    assert all(segment.stat().st_size <= 1100 * KiB for segment in segments) or len(segments) == 1
    assert "SUCCESS" in run("ewfverify", "-q", "-d", "sha1", path)
    run("ewfexport", "-u", "-q", "-f", "raw", "-t", tmp_path / "out", path)
    assert (tmp_path / "out.raw").read_bytes() == content
    check_reader(path, content, rounds=40)
    told = run("ewfinfo", path)
    assert "7/ä" in told or "7/" in told
    assert digest_of("sha1", content).hex() in told
    image = opened(path)
    assert image.facts["case_number"] == "7/ä"
    assert image.hashes == {"md5": digest_of("md5", content).hex(), "sha1": digest_of("sha1", content).hex()}
    assert image.check is not None
    assert image.check(NullJob()) == []
    image.close()


def test_what_is_never_put_is_zeros(tmp_path: Path) -> None:
    content = bytes(3 * CHUNK) + SMALL[:CHUNK] + bytes(2 * CHUNK + 1024)
    path = tmp_path / "disk.E01"
    with Outputs(path) as outputs:
        sink = writer("ewf").create(outputs, Spec(len(content)))
        sink.write(3 * CHUNK, memoryview(SMALL)[:CHUNK])
        sink.finish()
        outputs.commit()
        sink.close()
    assert "SUCCESS" in run("ewfverify", "-q", path)
    check_reader(path, content, rounds=20)


def test_the_sleuth_kit_agrees(tmp_path: Path) -> None:
    need("img_stat", "img_cat")
    path = make_image(tmp_path / "disk.E01", "ewf", SMALL)
    assert f"Size of data in bytes:\t{len(SMALL)}" in run("img_stat", path)


def test_large_segments_count_offsets_from_a_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_writer, "_REACH", MiB)  # as if 31 bits did not reach further
    content = np.random.default_rng(2).bytes(5 * MiB)
    path = make_image(tmp_path / "disk.E01", "ewf", content)
    data = path.read_bytes()
    tables = [found.start() for found in re.finditer(rb"table\0{11}", data)]
    assert len(tables) > 4
    for table in tables:
        base = struct.unpack_from("<Q", data, table + 76 + 8)[0]
        assert data.startswith(b"sectors\0", base)
        count = struct.unpack_from("<I", data, table + 76)[0]
        entries = struct.unpack_from(f"<{count}I", data, table + 100)
        assert max(entries) < 1 << 31  # deflate would have made these chunks larger
    assert "SUCCESS" in run("ewfverify", "-q", path)
    check_reader(path, content, rounds=40)


def test_tables_have_as_many_entries_as_everybody_reads(tmp_path: Path) -> None:
    content = bytes(16376 * 8 * KiB) + b"x" * 512
    path = make_image(tmp_path / "disk.E01", "ewf", content, "sectors_per_chunk=16")
    assert "SUCCESS" in run("ewfverify", "-q", path)
    assert path.read_bytes().count(b"table2\0") == 2
    image = opened(path)
    assert read(image.source, len(content) - 1024, 1024) == content[-1024:]
    image.close()


def test_optical_sectors(tmp_path: Path) -> None:
    content = random_disk(MiB, seed=2)
    path = make_image(tmp_path / "disc.E01", "ewf", content, "media_type=optical", sector_size=2048)
    image = opened(path)
    assert (image.source.traits.sector_size, image.facts["media_type"]) == (2048, "optical")
    image.close()
    assert "SUCCESS" in run("ewfverify", "-q", path)


@pytest.mark.parametrize(
    ("name", "size", "options", "said"),
    [
        ("disk.img", 1024, (), "NAME.E01"),
        ("disk.Ex01", 1024, (), "NAME.E01"),
        ("disk.E01", 1000, (), "whole sectors"),
        ("disk.E01", 0, (), "whole sectors"),
        ("disk.E01", 1024, ("segment_size=64KiB",), "segments have"),
        ("disk.E01", 1024, ("sectors_per_chunk=48",), "power of two"),
        ("disk.E01", 1024, ("notes=one\ttwo",), "without tabs"),
        ("disk.E01", 1024, ("level=9",), "one of none"),
    ],
)
def test_what_cannot_be_written(tmp_path: Path, name: str, size: int, options: Sequence[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_image(tmp_path / name, "ewf", bytes(size), *options)
    assert not list(tmp_path.glob(".*part"))


# ---------------------------------------------------------------------- built by hand


def digest_of(algorithm: str, data: bytes) -> bytes:
    return hashlib.new(algorithm, data, usedforsecurity=False).digest()


def sealed(data: bytes) -> bytes:
    return data + struct.pack("<I", zlib.adler32(data))


class Segment:
    """An EWF segment from its sections."""

    def __init__(self, number: int = 1) -> None:
        self.data = bytearray(b"EVF\x09\x0d\x0a\xff\x00" + struct.pack("<BHH", 1, number, 0))

    def add(self, kind: str, content: bytes = b"") -> int:
        """Append a section; where its content begins."""
        at, last = len(self.data), kind in ("next", "done")
        following = at if last else at + 76 + len(content)
        self.data += sealed(struct.pack("<16sQQ40x", kind.encode(), following, 0 if last else 76 + len(content)))
        self.data += content
        return at + 76

    def volume(
        self, size: int, *, kind: str = "volume", identifier: bytes = bytes(16), chunk_sectors: int = 64
    ) -> None:
        chunks = -(-size // (chunk_sectors * 512))
        head = struct.pack(
            "<B3xIIIQ12xB15xB3xI4x16s", 1, chunks, chunk_sectors, 512, size // 512, 3, 1, 64, identifier
        )
        self.add(kind, sealed(head.ljust(1048, b"\0")))

    def chunks(self, content: bytes, *, packed: bool = True, mirror: bool = True) -> list[int]:
        parts = [content[at : at + CHUNK] for at in range(0, len(content), CHUNK)]
        stored = [zlib.compress(part) if packed else sealed(part) for part in parts]
        at = self.add("sectors", b"".join(stored))
        offsets = []
        for part in stored:
            offsets.append(at)
            at += len(part)
        table = table_of([offset | (0x8000_0000 if packed else 0) for offset in offsets])
        self.add("table", table)
        if mirror:
            self.add("table2", table)
        return offsets

    def write(self, path: Path) -> Path:
        path.write_bytes(self.data)
        return path


def table_of(entries: list[int], base: int = 0) -> bytes:
    return sealed(struct.pack("<I4xQ4x", len(entries), base)) + sealed(struct.pack(f"<{len(entries)}I", *entries))


def built(path: Path, content: bytes = SMALL, *extra: tuple[str, bytes]) -> Path:
    """One segment with ``extra`` sections before its end."""
    segment = Segment()
    segment.volume(len(content))
    segment.chunks(content)
    for kind, data in extra:
        segment.add(kind, data)
    segment.add("hash", sealed(digest_of("md5", content) + bytes(16)))
    segment.add("done")
    return segment.write(path)


def test_unreadable_sectors_and_sessions_are_told(tmp_path: Path) -> None:
    errors = sealed(struct.pack("<I512x", 2)) + sealed(struct.pack("<4I", 10, 2, 64, 16))
    sessions = sealed(struct.pack("<I28x", 1)) + sealed(struct.pack("<II24x", 1, 16))
    path = built(tmp_path / "disk.E01", SMALL, ("error2", errors), ("session", sessions))
    check_reader(path, SMALL, rounds=20)
    image = opened(path)
    assert image.facts["unreadable_sectors"] == [[10, 2], [64, 16]]
    assert image.facts["sessions"] == [{"start": 16, "audio": True}]
    assert len(image.warnings) == 1
    assert "18 sectors in 2 ranges" in image.warnings[0]
    image.close()
    broken = bytearray(errors)
    broken[-6] ^= 1
    image = opened(built(tmp_path / "broken.E01", SMALL, ("error2", bytes(broken))))
    assert "unreadable_sectors" not in image.facts
    assert "error2 section" in image.warnings[0]
    image.close()


@pytest.mark.parametrize("place", ["header", "entry"])
def test_table2_stands_in_for_a_damaged_table(tmp_path: Path, place: str) -> None:
    path = built(tmp_path / "disk.E01")
    data = bytearray(path.read_bytes())
    at = data.index(b"table\0") + 76 + (0 if place == "header" else 26)
    data[at] ^= 4
    path.write_bytes(data)
    check_reader(path, SMALL, rounds=20)
    image = opened(path)
    assert "table2" in image.warnings[0]
    assert image.check is not None
    assert len(image.check(NullJob())) == 1
    image.close()
    data[data.index(b"table2\0") + (at - data.index(b"table\0"))] ^= 4
    path.write_bytes(data)
    with pytest.raises(InvalidImage, match="damaged"):
        opened(path)


def test_a_table_alone_and_one_missing(tmp_path: Path) -> None:
    segment = Segment()
    segment.volume(len(SMALL))
    segment.chunks(SMALL, mirror=False, packed=False)
    segment.add("done")
    check_reader(segment.write(tmp_path / "alone.E01"), SMALL, rounds=20)
    segment = Segment()
    segment.volume(2 * len(SMALL))
    segment.chunks(SMALL)
    segment.add("done")
    with pytest.raises(InvalidImage, match="incomplete"):
        opened(segment.write(tmp_path / "short.E01"))


def test_a_last_chunk_may_be_filled_up(tmp_path: Path) -> None:
    for packed in (True, False):
        segment = Segment()
        segment.volume(len(SMALL))
        segment.chunks(SMALL + b"\xee" * (-len(SMALL) % CHUNK), packed=packed)
        segment.add("done")
        check_reader(segment.write(tmp_path / f"{packed}.E01"), SMALL, rounds=20)


@pytest.mark.parametrize("more", [1, 511])
def test_bytes_behind_the_last_whole_sector(tmp_path: Path, more: int) -> None:
    """As libewf acquires a file that is no whole sectors: its last bytes are in a chunk, and in no sector."""
    segment = Segment()
    segment.volume(len(SMALL))
    segment.chunks(SMALL + b"\xee" * more, packed=False)
    segment.add("done")
    path = segment.write(tmp_path / "disk.E01")
    check_reader(path, SMALL, rounds=20)
    data = bytearray(path.read_bytes())
    data[data.index(b"table\0") - 5] ^= 1  # the last of them; its Adler-32 follows
    path.write_bytes(data)
    image = opened(path)
    with pytest.raises(InvalidImage, match="Adler-32"):
        read(image.source, len(SMALL) - 1, 1)
    image.close()


def test_a_chunk_without_its_checksum_is_refused(tmp_path: Path) -> None:
    segment = Segment()
    segment.volume(CHUNK)
    at = segment.add("sectors", zlib.compress(SMALL[:CHUNK])[:-4])
    segment.add("table", table_of([at | 0x8000_0000]))
    segment.add("done")
    image = opened(segment.write(tmp_path / "disk.E01"))
    with pytest.raises(InvalidImage, match="ends before its checksum"):
        read(image.source, 0, CHUNK)
    image.close()


@pytest.mark.parametrize("base", [0, 1000])
def test_offsets_beyond_31_bits(tmp_path: Path, base: int) -> None:
    """As EnCase 6.7.1 wrote them: plain chunks whose offsets go on with 32 bits."""
    content = np.random.default_rng(3).bytes(4 * CHUNK)
    segment = Segment()
    segment.volume(len(content))
    sectors = len(segment.data)
    first = (1 << 31) - 2 * (CHUNK + 4) - 5 + base  # the third one begins before the border and ends behind it
    places = [first + number * (CHUNK + 4) for number in range(4)]
    end = places[-1] + CHUNK + 4
    segment.data += sealed(struct.pack("<16sQQ40x", b"sectors", end, end - sectors))
    path = tmp_path / "disk.E01"
    tail = Segment()
    start = len(tail.data)
    tail.data += bytes(76)
    with path.open("wb") as file:
        file.write(segment.data)
        for number, place in enumerate(places):
            file.seek(place)
            file.write(sealed(content[number * CHUNK : (number + 1) * CHUNK]))
        table = table_of([place - base for place in places], base)
        file.write(sealed(struct.pack("<16sQQ40x", b"table", end + 76 + len(table), 76 + len(table))) + table)
        at = end + 76 + len(table)
        file.write(sealed(struct.pack("<16sQQ40x", b"done", at, 0)))
    assert start == 13
    image = opened(path)
    assert read(image.source, 0, len(content)) == content
    image.close()
    path.unlink()


# ---------------------------------------------------------------------- sets of segments


def pair(tmp: Path, content: bytes = SMALL) -> tuple[Segment, Segment]:
    """Two segments of one image."""
    half = len(content) // 2 // CHUNK * CHUNK
    first, second = Segment(1), Segment(2)
    first.volume(len(content), identifier=b"i" * 16)
    first.chunks(content[:half])
    first.add("next")
    second.volume(len(content), kind="data", identifier=b"i" * 16)
    second.chunks(content[half:])
    second.add("done")
    first.write(tmp / "disk.E01")
    second.write(tmp / "disk.E02")
    return first, second


def test_segments_missing_doubled_and_of_another_image(tmp_path: Path) -> None:
    path = tmp_path / "disk.E01"
    first, second = pair(tmp_path)
    check_reader(path, SMALL, rounds=20)
    (tmp_path / "disk.E02").unlink()
    with pytest.raises(InvalidImage, match=r"segment 2 of the image is missing: there is no disk\.E02"):
        opened(path)
    first.write(tmp_path / "disk.E02")
    with pytest.raises(InvalidImage, match="says it is segment 1 where segment 2 is needed"):
        opened(path)
    second.data[9] = 3
    second.write(tmp_path / "disk.E02")
    with pytest.raises(InvalidImage, match="says it is segment 3"):
        opened(path)
    with pytest.raises(InvalidImage, match="open the first"):
        opened(tmp_path / "disk.E02")
    (tmp_path / "disk.E02").write_bytes(bytes(1000))
    with pytest.raises(InvalidImage, match="no EWF segment"):
        opened(path)
    other = Segment(2)
    other.volume(len(SMALL), kind="data", identifier=b"j" * 16)
    other.chunks(SMALL)
    other.add("done")
    other.write(tmp_path / "disk.E02")
    with pytest.raises(InvalidImage, match="another image"):
        opened(path)


def test_a_segment_that_leads_out_is_not_opened(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    pair(inner)
    (inner / "disk.E02").rename(tmp_path / "elsewhere")
    (inner / "disk.E02").symlink_to("../elsewhere")
    with pytest.raises(FormatError, match="outside"):
        opened(inner / "disk.E01")


def test_names_of_segments() -> None:
    def names(first: str, *numbers: int) -> list[str | None]:
        return [segment_name(first, number) for number in numbers]

    assert names("a.b.E01", 1, 2, 99, 100, 101, 126) == [
        "a.b.E01",
        "a.b.E02",
        "a.b.E99",
        "a.b.EAA",
        "a.b.EAB",
        "a.b.EBA",
    ]
    assert names("x.E01", 775, 776, 14971, 14972) == ["x.EZZ", "x.FAA", "x.ZZZ", None]
    assert names("x.e01", 100, 776) == ["x.eaa", "x.faa"]
    assert names("x.s01", 99, 100, 776) == ["x.s99", "x.saa", "x.taa"]
    assert names("x.Ex01", 2, 99, 100, 775, 776, 2127, 2128) == [
        "x.Ex02",
        "x.Ex99",
        "x.ExAA",
        "x.ExZZ",
        "x.EyAA",
        "x.EzZZ",
        None,
    ]
    assert names("x.img", 1, 2) == ["x.img", None]


def test_names_are_libewfs(tmp_path: Path) -> None:
    """More than a hundred segments, so that letters follow the digits."""
    content = np.random.default_rng(5).bytes(103 * MiB)
    path = make_image(tmp_path / "disk.E01", "ewf", content, "level=none", "segment_size=1MiB")
    assert (tmp_path / "disk.EAA").exists()
    assert "SUCCESS" in run("ewfverify", "-q", path)
    image = opened(path)
    last = 102 * MiB
    assert read(image.source, last, MiB) == content[last:]
    image.close()


def _written_anew(path: Path, content: bytes, *, replace: bool = True) -> None:
    """An image in one segment, over what stands there."""
    with Outputs(path, replace=replace) as outputs:
        sink = writer("ewf").create(outputs, Spec(len(content)))
        sink.write(0, memoryview(content))
        sink.finish()
        outputs.commit()
        sink.close()


def test_fewer_segments_leave_none_of_the_older_image(tmp_path: Path) -> None:
    content = np.random.default_rng(6).bytes(4 * MiB)
    path = make_image(tmp_path / "disk.E01", "ewf", content, "level=none", "segment_size=1MiB")
    assert sorted(one.name for one in tmp_path.iterdir()) == [f"disk.E0{number}" for number in range(1, 6)]
    _written_anew(path, SMALL)
    assert [one.name for one in tmp_path.iterdir()] == ["disk.E01"]
    assert "SUCCESS" in run("ewfverify", "-q", path)


def test_a_segment_that_stands_there_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "disk.E02").write_bytes(b"mine")
    with pytest.raises(Refused, match=r"disk\.E02 exists"):
        _written_anew(tmp_path / "disk.E01", SMALL, replace=False)
    assert [one.name for one in tmp_path.iterdir()] == ["disk.E02"]


# ---------------------------------------------------------------------- damage and harm


def test_each_damaged_chunk_is_found_and_nothing_else(tmp_path: Path) -> None:
    for packed in (True, False):
        segment = Segment()
        segment.volume(len(SMALL))
        content = np.random.default_rng(6).bytes(len(SMALL))
        offsets = segment.chunks(content, packed=packed)
        segment.add("hash", sealed(digest_of("md5", content) + bytes(16)))
        segment.add("done")
        for number in (2, 5):
            segment.data[offsets[number] + 9000] ^= 1
        image = opened(segment.write(tmp_path / "disk.E01"))
        assert image.check is not None
        found = image.check(NullJob())
        assert len(found) == 2
        assert "chunk 2 " in found[0]
        assert "chunk 5 " in found[1]
        with pytest.raises(InvalidImage, match="chunk 2 "):
            read(image.source, 2 * CHUNK + 5, 10)
        assert read(image.source, 3 * CHUNK, 2 * CHUNK) == content[3 * CHUNK : 5 * CHUNK]
        image.close()


def test_check_compares_the_hashes(tmp_path: Path) -> None:
    digest = ("digest", sealed(digest_of("md5", SMALL) + b"\x01" * 20 + bytes(40)))
    image = opened(built(tmp_path / "disk.E01", SMALL, digest))
    assert image.check is not None
    (found,) = image.check(NullJob())
    assert found.startswith("the SHA1 of the disk is " + digest_of("sha1", SMALL).hex())
    image.close()


def test_logical_evidence_and_encrypted_images_are_refused(tmp_path: Path) -> None:
    for number, magic in enumerate((b"LVF\x09\x0d\x0a\xff\x00", b"LEF2\x0d\x0a\x81\x00")):
        path = tmp_path / f"{number}.L01"
        path.write_bytes(magic + bytes(200))
        with pytest.raises(UnsupportedError, match="logical evidence"):
            opened(path)
    path.write_bytes(b"ADCRYPT\0" + bytes(600))
    with pytest.raises(UnsupportedError, match="encrypted"):
        opened(path)


def harmless(path: Path, content: bytes) -> None:
    """Opening gives a clear error or an image whose bytes are right wherever it gives any."""
    try:
        image = opened(path)
    except FerrotypeError:
        return
    try:
        for at in range(0, min(image.source.size, 64 * MiB), CHUNK):
            length = min(CHUNK, image.source.size - at)
            try:
                found = read(image.source, at, length)
            except FerrotypeError:
                continue
            if length == CHUNK and at + CHUNK <= len(content):
                assert found == content[at : at + CHUNK]
    finally:
        image.close()


VALUES = (0, 1, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF)


@pytest.mark.parametrize("mended", [False, True], ids=["as is", "checksums made right"])
@pytest.mark.parametrize("kind", ["volume", "sectors", "table", "table2", "hash", "done", "data"])
def test_hostile_fields(tmp_path: Path, kind: str, mended: bool) -> None:
    """Every 32-bit word of a section's descriptor, and of the head of its content."""
    path = tmp_path / "disk.E01"
    first, second = pair(tmp_path)
    if kind == "hash":
        second = Segment(2)
        second.data = bytearray(built(tmp_path / "other.E01").read_bytes())
        path = tmp_path / "other.E01"
    target, where = (second, tmp_path / "disk.E02") if kind in ("data", "done") else (first, path)
    target = second if kind == "hash" else target
    clean = bytes(target.data)
    at = clean.index(kind.encode() + b"\0")
    sizes = {"volume": 1052, "data": 1052, "table": 24, "table2": 24, "hash": 36}
    for word in [*range(0, 76, 4), *range(76, 76 + min(sizes.get(kind, 0), 84), 4)]:
        for value in VALUES:
            data = bytearray(clean)
            struct.pack_into("<I", data, at + word, value)
            if mended:
                struct.pack_into("<I", data, at + 72, zlib.adler32(data[at : at + 72]))
                if kind in sizes:
                    end = at + 76 + sizes[kind] - 4
                    struct.pack_into("<I", data, end, zlib.adler32(data[at + 76 : end]))
            where.write_bytes(data)
            # a disk of another size, or in chunks of another size, is another disk
            harmless(path, b"" if mended and kind in ("volume", "data", "table", "table2") else SMALL)


@pytest.mark.parametrize("mended", [False, True], ids=["as is", "checksums made right"])
def test_hostile_table_entries(tmp_path: Path, mended: bool) -> None:
    path = built(tmp_path / "disk.E01")
    clean = path.read_bytes()
    count = -(-len(SMALL) // CHUNK)
    for number in (0, 1, count - 1):
        for value in (*VALUES, len(clean), len(clean) - 1, 12, 0x8000_000D, len(clean) | 0x8000_0000):
            data = bytearray(clean)
            for kind in (b"table\0", b"table2\0"):
                at = clean.index(kind) + 100
                struct.pack_into("<I", data, at + 4 * number, value)
                if mended:
                    end = at + 4 * count
                    struct.pack_into("<I", data, end, zlib.adler32(data[at:end]))
            path.write_bytes(data)
            harmless(path, SMALL)


def test_truncated_anywhere(tmp_path: Path) -> None:
    clean = built(tmp_path / "disk.E01").read_bytes()
    path = tmp_path / "cut.E01"
    for length in [*range(0, 200, 7), *range(200, len(clean), len(clean) // 60), *range(len(clean) - 80, len(clean))]:
        path.write_bytes(clean[:length])
        with pytest.raises(FerrotypeError):
            opened(path, "ewf")


def test_a_damaged_descriptor_is_refused(tmp_path: Path) -> None:
    clean = built(tmp_path / "disk.E01").read_bytes()
    for kind in (b"volume\0", b"sectors\0", b"hash\0", b"done\0"):
        data = bytearray(clean)
        data[clean.index(kind) + 50] ^= 1  # in its padding
        (tmp_path / "disk.E01").write_bytes(data)
        with pytest.raises(InvalidImage, match="descriptor"):
            opened(tmp_path / "disk.E01")


def test_sections_that_lead_back(tmp_path: Path) -> None:
    segment = Segment()
    segment.volume(512)
    at = len(segment.data)
    segment.data += sealed(struct.pack("<16sQQ40x", b"sectors", 13, 76))
    assert at > 13
    with pytest.raises(InvalidImage, match="followed by"):
        opened(segment.write(tmp_path / "disk.E01"))
