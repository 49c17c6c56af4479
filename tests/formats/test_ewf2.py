"""Ex01, version 2 of EWF: built here section by section, since only libewf newer than Debian's writes it."""

from __future__ import annotations

import bz2
import random
import struct
import zlib
from pathlib import Path

import pytest

from ferrotype.block import read
from ferrotype.errors import FerrotypeError, FormatError, InvalidImage, UnsupportedError
from ferrotype.extents import State
from ferrotype.formats.ewf import ewf2
from ferrotype.formats.ewf.bzip2 import bunzip2_sealed
from ferrotype.job import NullJob
from tests.formats.judges import KiB, check_reader, opened, random_disk
from tests.formats.test_ewf import digest_of, sealed

CHUNK = 32 * KiB
PATTERN = b"pattern!"
BODY = random_disk(200 * KiB, seed=4)
CONTENT = BODY[: 2 * CHUNK] + bytes(3 * CHUNK) + PATTERN * (CHUNK // 8) + BODY[: 4 * CHUNK + 1024]

DEVICE, CASE, DATA, TABLE, ERRORS, SESSIONS, MD5, SHA1, NEXT, DONE = 1, 2, 3, 4, 5, 6, 8, 9, 13, 15


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 16)


def text(keys: str, values: list[str]) -> bytes:
    lines = ["1", "main", "\t".join(keys.split()), "\t".join(values), "", ""]
    return b"\xff\xfe" + "\n".join(lines).encode("utf-16-le")


def bare(data: bytes) -> bytes:
    """The one block of a bzip2 stream, without the four bytes before it, the end mark and the checksum behind it."""
    stream = bz2.compress(data)
    bits = f"{int.from_bytes(stream, 'big'):b}".zfill(8 * len(stream))
    end = bits.rindex(f"{0x177245385090:048b}")
    assert len(bits) - end < 88
    block = bits[32:end]
    return int(block.ljust(-(-len(block) // 8) * 8, "0"), 2).to_bytes(-(-len(block) // 8), "big")


class Segment:
    """A segment from its sections.  ``method`` is that of its texts, 0 to 2, and ``chunk_method`` that of chunks."""

    def __init__(
        self, number: int = 1, *, method: int = 1, identifier: bytes = b"g" * 16, chunk_method: int | None = None
    ) -> None:
        self.method = method
        self.chunk_method = (method or 1) if chunk_method is None else chunk_method
        self.data = bytearray(b"EVF2\x0d\x0a\x81\x00" + struct.pack("<BBHI", 2, 1, method, number) + identifier)
        self.last = 0

    def add(self, kind: int, content: bytes = b"", flags: int = 1) -> int:
        """Append a section; where its content begins."""
        start = len(self.data)
        body = padded(content)
        self.data += body
        fields = (kind, flags, self.last, len(body), 64, len(body) - len(content), digest_of("md5", body))
        self.last = len(self.data)
        self.data += sealed(struct.pack("<IIQQII16s12x", *fields))
        return start

    def about(
        self, size: int, chunk_sectors: int = 64, *, notes: str = "some notes", physical: str = "1", said: str = ""
    ) -> None:
        keys = "sn md lb ts hs dc dt pid rs ls bp ph"
        device = text(keys, ["S1", "M1", "", str(size // 512), "", "", "f", "", "", "", "512", physical])
        values = ["a disk", "case 7", "e1", "A. Miner", notes, "7.04", "Windows", "1795443894", "1795443800"]
        method = said or str(self.chunk_method)
        values += [str(-(-size // (512 * chunk_sectors))), method, str(chunk_sectors), "64", "2"]
        case = text("nm cn en ex nt av os tt at tb cp sb gr wb", values)
        for kind, data in ((DEVICE, device), (CASE, case)):
            self.add(kind, (bytes, zlib.compress, bare)[self.method](data))

    def chunks(self, content: bytes, first: int = 0) -> int:
        """Sector data and its table: zlib, plain and patterns in turn; where the table's entries begin."""
        base = len(self.data)
        stored, entries = b"", b""
        for number, at in enumerate(range(0, len(content), CHUNK)):
            chunk = content[at : at + CHUNK]
            if len(chunk) == CHUNK and chunk == chunk[:8] * (CHUNK // 8):
                entries += struct.pack("<8sII", chunk[:8], 0, 5)
                continue
            pack = zlib.compress if self.chunk_method == 1 else bare if number % 4 else bz2.compress
            part, flags = (sealed(chunk), 2) if number % 2 else (pack(chunk), 1)
            entries += struct.pack("<QII", base + len(stored), len(part), flags)
            stored += padded(part)
        self.add(DATA, stored, flags=0)
        count = len(entries) // 16
        head = padded(sealed(struct.pack("<QI4x", first, count)))
        return self.add(TABLE, head + padded(sealed(entries))) + 32

    def write(self, path: Path) -> Path:
        path.write_bytes(self.data)
        return path


def built(path: Path, *extra: tuple[int, bytes], content: bytes = CONTENT, method: int = 1) -> Path:
    segment = Segment(method=method)
    segment.about(len(content))
    segment.chunks(content)
    for kind, data in extra:
        segment.add(kind, data)
    segment.add(MD5, sealed(digest_of("md5", content)))
    segment.add(SHA1, sealed(digest_of("sha1", content)))
    segment.add(DONE, flags=0)
    return segment.write(path)


@pytest.mark.parametrize("method", [0, 1, 2])
def test_all_kinds_of_chunks(tmp_path: Path, method: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ewf2, "_PAGE", 4)
    path = built(tmp_path / "disk.Ex01", method=method)
    check_reader(path, CONTENT, rounds=60)
    image = opened(path)
    facts = image.facts
    assert (facts["subformat"], facts["media_type"], facts["unit"]) == ("EWF2-Ex01", "fixed", CHUNK)
    assert (facts["case_number"], facts["examiner_name"], facts["os"]) == ("case 7", "A. Miner", "Windows")
    assert (facts["serial_number"], facts["model"], facts["write_blocker"]) == ("S1", "M1", "Tableau")
    assert (facts["acquired"], facts["system_date"]) == ("2026-11-23T14:23:20Z", "2026-11-23T14:24:54Z")
    assert image.hashes == {"md5": digest_of("md5", CONTENT).hex(), "sha1": digest_of("sha1", CONTENT).hex()}
    assert image.check is not None
    assert image.check(NullJob()) == []
    zero = image.source.extents(0, 5 * CHUNK + 1024).runs(State.ZERO)
    assert [run.tolist() for run in zero] == [[2 * CHUNK], [5 * CHUNK]]
    image.close()


def pair(tmp: Path) -> tuple[Segment, Segment]:
    first, second = Segment(1), Segment(2)
    first.about(len(CONTENT))
    first.chunks(CONTENT[: 4 * CHUNK])
    first.add(NEXT)
    second.about(len(CONTENT))
    second.chunks(CONTENT[4 * CHUNK :], 4)
    second.add(DONE)
    first.write(tmp / "disk.Ex01")
    second.write(tmp / "disk.Ex02")
    return first, second


def test_segments(tmp_path: Path) -> None:
    path = tmp_path / "disk.Ex01"
    first, second = pair(tmp_path)
    check_reader(path, CONTENT, rounds=30)
    second.data[16] ^= 1
    second.write(tmp_path / "disk.Ex02")
    with pytest.raises(InvalidImage, match="another image"):
        opened(path)
    first.write(tmp_path / "disk.Ex02")
    with pytest.raises(InvalidImage, match="says it is segment 1 where segment 2"):
        opened(path)
    (tmp_path / "disk.Ex02").unlink()
    with pytest.raises(InvalidImage, match=r"there is no disk\.Ex02"):
        opened(path)


def test_tables_follow_each_other(tmp_path: Path) -> None:
    for first in (0, 3, 5):
        segment = Segment()
        segment.about(len(CONTENT))
        segment.chunks(CONTENT[: 4 * CHUNK])
        segment.chunks(CONTENT[4 * CHUNK :], first)
        segment.add(DONE)
        with pytest.raises(InvalidImage, match="where chunk 4 is next"):
            opened(segment.write(tmp_path / "disk.Ex01"))


def test_errors_and_sessions(tmp_path: Path) -> None:
    errors = padded(sealed(struct.pack("<I12x", 1))) + sealed(struct.pack("<QI4x", (1 << 32) + 5, 3))
    sessions = padded(sealed(struct.pack("<I12x", 1))) + sealed(struct.pack("<QI20x", 16, 0))
    image = opened(built(tmp_path / "disk.Ex01", (SESSIONS, sessions), (ERRORS, errors)))
    assert image.facts["unreadable_sectors"] == [[(1 << 32) + 5, 3]]
    assert image.facts["sessions"] == [{"start": 16, "audio": False}]
    assert "3 sectors in 1 range" in image.warnings[0]
    image.close()


def test_encrypted_and_unknown_kinds_are_refused(tmp_path: Path) -> None:
    segment = Segment()
    segment.add(DEVICE, b"secret", flags=3)
    segment.add(DONE, flags=2)
    with pytest.raises(UnsupportedError, match="encrypted"):
        opened(segment.write(tmp_path / "disk.Ex01"))
    segment = Segment()
    segment.data[10] = 3
    segment.add(DONE)
    with pytest.raises(UnsupportedError, match="compression method 3"):
        opened(segment.write(tmp_path / "disk.Ex01"))
    segment = Segment()
    segment.about(512, said="3")
    segment.add(DONE)
    with pytest.raises(UnsupportedError, match="compression method 3"):
        opened(segment.write(tmp_path / "disk.Ex01"))


def test_blocks_of_bzip2() -> None:
    """Every byte that is changed is found; zeros behind a block are not its own, and those that are may not lack."""
    rng = random.Random(3)
    some = (bytes(int(rng.expovariate(0.2)) % 40 for _ in range(300)) for _ in range(4000))
    ends_with_a_zero = next(plain for plain in some if bare(plain).endswith(b"\0"))
    for plain in (b"a", bytes(CHUNK), BODY[:CHUNK], b"abc" * 30_000, ends_with_a_zero):
        for packed in (bare(plain), bz2.compress(plain)):
            for tail in (0, 1, 15):
                assert bunzip2_sealed(packed + bytes(tail), len(plain)) == plain
                assert bunzip2_sealed(packed + bytes(tail), len(plain) + 9) == plain
            with pytest.raises(InvalidImage, match="more than"):
                bunzip2_sealed(packed, len(plain) - 1)
            for at in range(4, len(packed) - 1, max(1, len(packed) // 40)):
                broken = packed[:at] + bytes([packed[at] ^ 0x10]) + packed[at + 1 :]
                try:
                    assert bunzip2_sealed(broken, len(plain)) in (plain, b"")  # the stream's own end, or none
                except InvalidImage:
                    continue
    assert bunzip2_sealed(b"", 10) == b""
    assert bunzip2_sealed(bare(b"abc" * 9999)[:-9], CHUNK) == b""


def test_texts_and_chunks_may_be_packed_in_two_ways(tmp_path: Path) -> None:
    for method, chunk_method, name in [(1, 2, "bzip2"), (2, 1, "zlib"), (0, 2, "bzip2")]:
        segment = Segment(method=method, chunk_method=chunk_method)
        segment.about(len(CONTENT))
        segment.chunks(CONTENT)
        segment.add(DONE, flags=0)
        check_reader(segment.write(tmp_path / "disk.Ex01"), CONTENT, rounds=4)
        image = opened(tmp_path / "disk.Ex01")
        assert image.facts["compression"] == name
        image.close()


def test_values_of_the_texts(tmp_path: Path) -> None:
    """Marks within a value are escaped; a false boolean is empty, and the method may be."""
    segment = Segment()
    segment.about(512, notes="one\x02\x01two\x03three", physical="", said=" ")
    segment.chunks(CONTENT[:512])
    segment.add(DONE, flags=0)
    image = opened(segment.write(tmp_path / "disk.Ex01"))
    assert image.facts["notes"] == "one\r\ntwo\tthree"
    assert image.facts["physical"] is False
    assert image.facts["compression"] == "zlib"
    assert read(image.source, 0, 512) == CONTENT[:512]  # packed as the file header says
    image.close()


def test_a_chunk_without_a_checksum_is_all_there(tmp_path: Path) -> None:
    """The flag of patterns means nothing without that of compression."""
    chunk = BODY[:CHUNK]
    for length, flags in [(CHUNK, 0), (CHUNK, 4), (CHUNK - 1, 0), (1, 4)]:
        segment = Segment()
        segment.about(2 * CHUNK)
        start = segment.add(DATA, chunk + chunk, flags=0)
        entries = struct.pack("<QIIQII", start, length, flags, start + CHUNK, CHUNK, flags)
        segment.add(TABLE, padded(sealed(struct.pack("<QI4x", 0, 2))) + padded(sealed(entries)))
        segment.add(DONE, flags=0)
        image = opened(segment.write(tmp_path / "disk.Ex01"))
        assert read(image.source, CHUNK, CHUNK) == chunk
        if length == CHUNK:
            assert read(image.source, 0, 2 * CHUNK) == chunk + chunk
        else:
            with pytest.raises(InvalidImage, match=f"holds {length} bytes where {CHUNK} are needed"):
                read(image.source, 0, 512)
        image.close()


def test_damage_is_found(tmp_path: Path) -> None:
    path = built(tmp_path / "disk.Ex01")
    clean = path.read_bytes()
    chunk = clean.index(sealed(CONTENT[CHUNK : 2 * CHUNK]))
    path.write_bytes(clean[: chunk + 5] + b"?!" + clean[chunk + 7 :])
    image = opened(path)
    assert image.check is not None
    (found,) = image.check(NullJob())
    assert "chunk 1 " in found
    assert "Adler-32" in found
    with pytest.raises(InvalidImage, match="chunk 1 "):
        read(image.source, CHUNK, 512)
    assert read(image.source, 2 * CHUNK, len(CONTENT) - 2 * CHUNK) == CONTENT[2 * CHUNK :]
    image.close()


def harmless(path: Path, content: bytes) -> None:
    try:
        image = opened(path)
    except FerrotypeError:
        return
    try:
        for at in range(0, min(image.source.size, len(content)), CHUNK):
            length = min(CHUNK, image.source.size - at, len(content) - at)
            try:
                found = read(image.source, at, length)
            except FerrotypeError:
                continue
            assert found == content[at : at + length]
    finally:
        image.close()


def test_hostile_words(tmp_path: Path) -> None:
    """Every word of every descriptor, and of the table, checksums made right or not."""
    path = built(tmp_path / "disk.Ex01")
    clean = path.read_bytes()
    at, descriptors = len(clean) - 64, []
    while True:
        descriptors.append(at)
        previous = struct.unpack_from("<Q", clean, at + 8)[0]
        if not previous:
            break
        at = previous
    for at in descriptors:
        for word in range(0, 64, 4):
            for value in (0, 64, 0xFFFF_FFFF):
                data = bytearray(clean)
                struct.pack_into("<I", data, at + word, value)
                for mend in (False, True):
                    if mend:
                        struct.pack_into("<I", data, at + 60, zlib.adler32(data[at : at + 60]))
                    path.write_bytes(data)
                    harmless(path, CONTENT)


def test_hostile_entries(tmp_path: Path) -> None:
    segment = Segment()
    segment.about(len(CONTENT))
    at = segment.chunks(CONTENT)
    end = at + 16 * -(-len(CONTENT) // CHUNK)
    body = len(segment.data)
    segment.add(DONE, flags=0)
    path = segment.write(tmp_path / "disk.Ex01")
    for entry in (0, 1, 2, 5, 9):
        for word in range(4):
            for value in (0, 1, 31, 0x8000_0000, 0xFFFF_FFFF, body, len(segment.data)):
                data = bytearray(segment.data)
                struct.pack_into("<I", data, at + 16 * entry + 4 * word, value)
                struct.pack_into("<I", data, end, zlib.adler32(data[at:end]))
                path.write_bytes(data)
                try:
                    image = opened(path)
                except FormatError:
                    continue
                for number in range(10):
                    try:
                        read(image.source, number * CHUNK, 100)
                    except FormatError:
                        continue
                image.close()


def test_truncated_anywhere(tmp_path: Path) -> None:
    clean = built(tmp_path / "disk.Ex01").read_bytes()
    for length in [*range(0, 300, 7), *range(300, len(clean), len(clean) // 60), *range(len(clean) - 70, len(clean))]:
        (tmp_path / "cut.Ex01").write_bytes(clean[:length])
        with pytest.raises(FerrotypeError):
            opened(tmp_path / "cut.Ex01", "ewf")
