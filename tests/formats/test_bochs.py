"""Bochs growing disks, built here from the documented layout and judged by qemu-img."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from ferrotype.block import read
from ferrotype.errors import InvalidImage, UnsupportedError
from ferrotype.formats.bochs import Header
from tests.formats.hostile import bad_values, fields_of, survives, with_bytes
from tests.formats.judges import MiB, check_reader, content_of, opened


def built(
    path: Path, size: int, *, extent: int = 16384, version: int = 2, seed: int = 0, subtype: bytes = b"Growing"
) -> Path:
    """A disk some of whose extents are there, in shuffled order, each with some of its sectors."""
    rng = random.Random(seed)
    sectors = extent // 512
    count = -(-size // extent)
    catalog, body = [0xFFFFFFFF] * count, b""
    bitmap = -(-sectors // 8)
    some = rng.sample(range(count), k=count * 2 // 3)
    for place, number in enumerate(some):
        catalog[number] = place
        bits = rng.choice([0, (1 << sectors) - 1, rng.getrandbits(sectors), rng.getrandbits(sectors) & 0xFFFF])
        body += bits.to_bytes(bitmap, "little").ljust(-(-bitmap // 512) * 512, b"\xaa") + rng.randbytes(extent)
    head = struct.pack(
        "<32s16s16s5I", b"Bochs Virtual HD Image", b"Redolog", subtype, version << 16, 512, count, bitmap, extent
    )
    head += struct.pack("<Q", size) if version == 1 else struct.pack("<IQ", 0x12345678, size)
    path.write_bytes(head.ljust(512, b"\0") + struct.pack(f"<{count}I", *catalog) + body)
    return path


@pytest.mark.parametrize(
    ("size", "extent", "version"),
    [(MiB + 1536, 16384, 2), (MiB, 512, 2), (MiB, 4096, 1), (5 * MiB + 512, MiB, 2), (9 * MiB, 8 * MiB, 2)],
)
def test_disks_as_qemu_reads_them(tmp_path: Path, size: int, extent: int, version: int) -> None:
    path = built(tmp_path / "a.bochs", size, extent=extent, version=version, seed=extent)
    content = content_of(path, "bochs", tmp_path)
    assert len(content) == size
    check_reader(path, content)


@pytest.mark.parametrize("subtype", [b"Undoable", b"Volatile", b"x"])
def test_redologs_over_another_disk(tmp_path: Path, subtype: bytes) -> None:
    with pytest.raises(UnsupportedError, match="only growing disks"):
        opened(built(tmp_path / "a.bochs", MiB, subtype=subtype))


def test_every_field_set_to_what_it_must_not_be(tmp_path: Path) -> None:
    image = built(tmp_path / "good", MiB).read_bytes()
    path = tmp_path / "a.bochs"
    refused = kept = 0
    for field in fields_of(Header):
        for value in bad_values(field, image[field.offset : field.offset + field.size]):
            path.write_bytes(with_bytes(image, field.offset, value))
            survived = survives(path, "bochs")
            refused, kept = refused + (not survived), kept + survived
    assert refused > 30
    assert kept > 10
    for entry in (1000, 0x7FFFFFFF, 0xFFFFFFFE):
        path.write_bytes(with_bytes(image, 512, struct.pack("<I", entry)))
        broken = opened(path)
        with pytest.raises(InvalidImage):
            read(broken.source, 0, 512)
        broken.close()
    used = next(at for at in range(512, 4096, 4) if image[at : at + 4] != b"\xff" * 4)
    path.write_bytes(with_bytes(image, 512, image[used : used + 4] * 2))
    with pytest.raises(InvalidImage, match="names a block twice"):
        opened(path)
    for length in [*range(0, 1000, 13), *range(1000, len(image), 30_000)]:
        path.write_bytes(image[:length])
        survives(path, "bochs")
