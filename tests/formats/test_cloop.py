"""cloop images, built here from the documented layout and judged by qemu-img."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import pytest

from ferrotype.block import read
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats.cloop import Header
from tests.formats.hostile import bad_values, fields_of, survives, with_bytes
from tests.formats.judges import KiB, MiB, check_reader, content_of, opened, random_disk

SCRIPT = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"


def built(path: Path, content: bytes, block: int) -> Path:
    """An image of blocks, each packed at a level of its own."""
    rng = random.Random(block)
    pieces = [content[at : at + block].ljust(block, b"\0") for at in range(0, len(content), block)]
    packed = [zlib.compress(piece, rng.choice([0, 1, 6, 9])) for piece in pieces]
    at = 136 + 8 * (len(packed) + 1)
    offsets = [at]
    for one in packed:
        offsets.append(offsets[-1] + len(one))
    head = SCRIPT.ljust(128, b"\0") + struct.pack(">II", block, len(packed))
    path.write_bytes(head + struct.pack(f">{len(offsets)}Q", *offsets) + b"".join(packed) + bytes(512))
    return path


@pytest.mark.parametrize(
    ("size", "block"), [(MiB + 1536, 64 * KiB), (300 * KiB, 512), (3 * MiB, 256 * KiB), (MiB, 1536)]
)
def test_images_as_qemu_reads_them(tmp_path: Path, size: int, block: int) -> None:
    content = random_disk(size, seed=size)
    content = content.ljust(-(-size // block) * block, b"\0")
    path = built(tmp_path / "a.cloop", content, block)
    assert content_of(path, "cloop", tmp_path) == content
    check_reader(path, content, rounds=60)


def test_every_field_set_to_what_it_must_not_be(tmp_path: Path) -> None:
    image = built(tmp_path / "good", random_disk(MiB, seed=1), 64 * KiB).read_bytes()
    path = tmp_path / "a.cloop"
    refused = kept = 0
    for field in fields_of(Header):
        for value in bad_values(field, image[field.offset : field.offset + field.size]):
            path.write_bytes(with_bytes(image, field.offset, value))
            survived = survives(path, "cloop")
            refused, kept = refused + (not survived), kept + survived
    assert refused > 15
    assert kept > 5
    with pytest.raises(UnsupportedError):
        path.write_bytes(with_bytes(image, 128, struct.pack(">I", 128 * MiB)))
        opened(path)
    for length in [*range(0, 400, 13), *range(400, len(image), 30_000)]:
        path.write_bytes(image[:length])
        survives(path, "cloop")


@pytest.mark.parametrize("offset", [0, 136, 1000, 1 << 40, 1 << 62, (1 << 64) - 1])
def test_offsets_of_blocks(tmp_path: Path, offset: int) -> None:
    image = built(tmp_path / "good", random_disk(MiB, seed=1), 64 * KiB).read_bytes()
    path = tmp_path / "a.cloop"
    for number in (3, 4):
        path.write_bytes(with_bytes(image, 136 + 8 * number, struct.pack(">Q", offset)))
        broken = opened(path)
        with pytest.raises(InvalidImage):
            read(broken.source, 3 * 64 * KiB, 512)
        broken.close()


def test_a_block_that_is_much_longer_packed(tmp_path: Path) -> None:
    packed = zlib.compress(bytes(512))
    path = tmp_path / "a.cloop"
    for rest, opens in ((500, True), (4096, False)):
        end = 152 + len(packed) + rest
        head = SCRIPT.ljust(128, b"\0") + struct.pack(">IIQQ", 512, 1, 152, end)
        path.write_bytes(head + packed + bytes(rest))
        image = opened(path)
        if opens:
            assert read(image.source, 0, 512) == bytes(512)
        else:
            with pytest.raises(InvalidImage, match="cannot stand"):
                read(image.source, 0, 512)
        image.close()


def test_blocks_that_cannot_be_unpacked(tmp_path: Path) -> None:
    image = built(tmp_path / "good", bytes(MiB), 64 * KiB).read_bytes()
    path = tmp_path / "a.cloop"
    path.write_bytes(with_bytes(image, 136 + 8 * 17 + 10, b"\xff" * 16))
    broken = opened(path)
    with pytest.raises(InvalidImage):
        read(broken.source, 0, 512)
    broken.close()
