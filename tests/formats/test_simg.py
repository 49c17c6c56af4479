"""Android sparse images against img2simg and simg2img, and built by hand."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import pytest

from ferrotype.block import read
from ferrotype.errors import FerrotypeError, InvalidImage, UnsupportedError
from ferrotype.extents import State
from ferrotype.formats import simg
from ferrotype.testing.formats import check_format
from tests.cli.program import ferrotype
from tests.formats.judges import damages_of, opened, random_disk
from tests.machine import need, run

KiB, MiB = 1024, 1 << 20
RAW, FILL, SKIP, CRC = 0xCAC1, 0xCAC2, 0xCAC3, 0xCAC4


def chunk(kind: int, blocks: int, data: bytes = b"", *, header: int = 12) -> bytes:
    return struct.pack("<HHII", kind, 0, blocks, header + len(data)).ljust(header, b"\0") + data


def sparse(chunks: list[bytes], blocks: int, *, block: int = 4096, checksum: int = 0, **changed: int) -> bytes:
    """An image of chunks that is right but for what is ``changed``."""
    fields = {"major": 1, "header": 28, "chunk_header": 12, "count": len(chunks)} | changed
    head = struct.pack(
        "<IHHHHIIII",
        0xED26FF3A,
        fields["major"],
        0,
        fields["header"],
        fields["chunk_header"],
        block,
        blocks,
        fields["count"],
        checksum,
    )
    return head.ljust(fields["header"], b"\0") + b"".join(chunks)


def by_hand(*, good: bool = True) -> tuple[bytes, bytes]:
    """An image with every kind of chunk and checksums, and its disk."""
    rng = random.Random(3)
    first, second = rng.randbytes(3 * 4096), rng.randbytes(4096)
    pattern = b"\xde\xad\xbe\xef"
    disk = first + pattern * (40 * 1024) + bytes(7 * 4096) + second + bytes(2 * 4096)
    upto = zlib.crc32(disk[: 43 * 4096]) ^ (not good)
    chunks = [
        chunk(RAW, 3, first),
        chunk(FILL, 40, pattern),
        chunk(CRC, 0, struct.pack("<I", upto)),
        chunk(SKIP, 7),
        chunk(RAW, 1, second),
        chunk(FILL, 2, bytes(4)),
        chunk(CRC, 0, struct.pack("<I", zlib.crc32(disk))),
    ]
    return sparse(chunks, 53, checksum=zlib.crc32(disk)), disk


def test_what_img2simg_makes(tmp_path: Path) -> None:
    need("img2simg")
    content = bytearray(random_disk(6 * MiB, seed=4))
    content[MiB : 2 * MiB] = b"\xaa" * MiB  # a FILL
    content[3 * MiB : 4 * MiB] = bytes(MiB)
    (tmp_path / "disk.raw").write_bytes(content)
    for block in ("4096", "1024"):
        run("img2simg", tmp_path / "disk.raw", tmp_path / "disk.simg", block)
        check_format(simg, tmp_path / "disk.simg", bytes(content), rounds=40)
    image = opened(tmp_path / "disk.simg")
    assert image.format == "simg"
    assert image.check is None  # img2simg makes no checksums
    image.close()


def test_simg2img_reads_the_same(tmp_path: Path) -> None:
    need("simg2img")
    data, disk = by_hand()
    (tmp_path / "disk.simg").write_bytes(data)
    run("simg2img", tmp_path / "disk.simg", tmp_path / "judge.raw")
    assert (tmp_path / "judge.raw").read_bytes().ljust(len(disk), b"\0") == disk


def test_every_kind_of_chunk(tmp_path: Path) -> None:
    data, disk = by_hand()
    path = tmp_path / "disk.simg"
    path.write_bytes(data)
    check_format(simg, path, disk)
    image = opened(path)
    known = image.source.extents(0, len(disk))
    holes = known.runs(State.HOLE)
    assert [(int(a), int(b)) for a, b in zip(*holes, strict=True)] == [(43 * 4096, 50 * 4096)]
    image.close()
    assert damages_of(path) == []
    path.write_bytes(by_hand(good=False)[0])
    (sentence,) = damages_of(path)
    assert f"bytes 0 to {43 * 4096} of the disk have another CRC-32" in sentence
    path.write_bytes(data[:100] + b"?" + data[101:])
    assert len(damages_of(path)) == 3


def test_longer_headers_and_bytes_behind(tmp_path: Path) -> None:
    path = tmp_path / "disk.simg"
    chunks = [chunk(RAW, 1, b"x" * 4096, header=20), chunk(SKIP, 1, header=20)]
    path.write_bytes(sparse(chunks, 2, header=40, chunk_header=20) + b"more")
    image = opened(path)
    assert read(image.source, 0, 8192) == b"x" * 4096 + bytes(4096)
    assert image.warnings == ("4 bytes behind the last chunk mean nothing, and are left out",)
    image.close()


@pytest.mark.parametrize(
    ("data", "error", "sentence"),
    [
        (sparse([chunk(RAW, 1, bytes(4096))], 2), InvalidImage, "hold 1 of 2 blocks"),
        (sparse([chunk(RAW, 2, bytes(8192))], 1), InvalidImage, "more than the disk"),
        (sparse([chunk(RAW, 1, bytes(4000))], 1), InvalidImage, "total_sz"),
        (sparse([chunk(FILL, 1, bytes(8))], 1), InvalidImage, "total_sz"),
        (sparse([chunk(SKIP, 1, b"1234")], 1), InvalidImage, "total_sz"),
        (sparse([chunk(0xCAC5, 1)], 1), InvalidImage, "type 0xcac5"),
        (sparse([chunk(RAW, 1, bytes(4096))], 1)[:-1], InvalidImage, "cut short"),
        (sparse([chunk(SKIP, 1)], 2, count=2), InvalidImage, "cut short"),
        (sparse([chunk(SKIP, 1)], 1, count=0xFFFFFFFF), UnsupportedError, "chunks"),
        (sparse([chunk(SKIP, 1)], 1, count=1 << 20), InvalidImage, "total_chunks"),
        (sparse([chunk(SKIP, 1)], 1, block=0), InvalidImage, "blk_sz"),
        (sparse([chunk(SKIP, 1)], 1, block=4095), InvalidImage, "blk_sz"),
        (sparse([chunk(SKIP, 1)], 1, block=1 << 31), InvalidImage, "blk_sz"),
        (sparse([chunk(SKIP, 1)], 1, major=2), UnsupportedError, "major_version"),
        (sparse([chunk(SKIP, 1)], 1, header=20), InvalidImage, "file_hdr_sz"),
        (sparse([chunk(SKIP, 0xFFFFFFFF)], 0xFFFFFFFF, block=1 << 26), InvalidImage, "total_blks"),
    ],
)
def test_what_contradicts_itself(tmp_path: Path, data: bytes, error: type[FerrotypeError], sentence: str) -> None:
    path = tmp_path / "disk.simg"
    path.write_bytes(data)
    with pytest.raises(error, match=sentence):
        opened(path)


def test_a_card_is_written_with_the_disk_and_not_with_the_image(tmp_path: Path) -> None:
    data, disk = by_hand()
    path = tmp_path / "userdata"
    path.write_bytes(data)
    ferrotype("convert", path, tmp_path / "out.raw")
    assert (tmp_path / "out.raw").read_bytes() == disk
    assert ferrotype("verify", path, "--json").document["ok"] is True
    done = ferrotype("convert", path.rename(tmp_path / "userdata.img"), tmp_path / "other.raw", code=4)
    assert "--format raw, or simg" in done.err
    ferrotype("convert", tmp_path / "userdata.img", tmp_path / "other.raw", "--format", "simg")
    assert (tmp_path / "other.raw").read_bytes() == disk
    part = tmp_path / "super.img_sparsechunk.0"
    part.write_bytes(data)
    assert "simg2img" in ferrotype("info", part, code=4).err
