"""VDI: read against qemu-img and differencing disks built here, written for qemu-img."""

from __future__ import annotations

import random
import struct
import uuid
from pathlib import Path

import pytest

from ferrotype.block import read
from ferrotype.block.outputs import Outputs
from ferrotype.errors import InvalidImage, UnsupportedError, UsageError
from ferrotype.extents import State
from ferrotype.formats import Spec
from ferrotype.formats.vdi import create
from ferrotype.formats.vdi.writer import Header
from tests.formats.hostile import bad_values, fields_of, survives, with_bytes
from tests.formats.judges import (
    KiB,
    MiB,
    check_reader,
    check_written,
    content_of,
    make_image,
    make_image_piecemeal,
    opened,
    random_disk,
    scattered,
    zero_bytes,
)
from tests.machine import run

FREE, ZERO = 0xFFFFFFFF, 0xFFFFFFFE
BLOCK = 32 * KiB  # of the disks built here: small, so that there are many
IDS = [uuid.UUID(int=number + 1).bytes_le for number in range(9)]


def built(
    path: Path,
    size: int,
    table: list[int],
    body: bytes,
    *,
    kind: int = 1,
    ids: tuple[bytes, bytes, bytes, bytes] = (IDS[0], IDS[1], bytes(16), bytes(16)),
    extra: int = 0,
    old: bool = False,
) -> Path:
    """A disk of blocks of 32 KiB; ``ids`` are its own, of its content, of its parent, of the parent's content."""
    bmap = struct.pack(f"<{len(table)}I", *table)
    used = sum(entry < ZERO for entry in table)
    before = b"<<< a disk >>>\n".ljust(64, b"\0")
    if old:
        header = struct.pack(
            "<II256s4IQ3I16s16s16s", kind, 0, b"", 0, 0, 0, 512, size, BLOCK, len(table), used, *ids[:3]
        )
        path.write_bytes(before + struct.pack("<II", 0xBEDA107F, 2) + header + bmap + body)
        return path
    data = -(-(1024 + len(bmap)) // 512) * 512
    header = struct.pack(
        "<III256sII4IIQ4I16s16s16s16s", 400, kind, 0, b"made by hand", 1024, data, 0, 0, 0, 512, 0, size, BLOCK,
        extra, len(table), used, *ids,
    )  # fmt: skip
    start = (before + struct.pack("<II", 0xBEDA107F, 0x10001) + header).ljust(1024, b"\0")
    path.write_bytes((start + bmap).ljust(data, b"\0") + body)
    return path


def layer(size: int, seed: int, extra: int = 0) -> tuple[list[int], bytes, dict[int, bytes]]:
    """A block map with blocks in shuffled order, their data, and what each block of the disk then reads as."""
    rng = random.Random(seed)
    count = -(-size // BLOCK)
    table = [rng.choice([FREE, FREE, ZERO, 0]) for _ in range(count)]
    stored = [number for number in range(count) if table[number] == 0]
    rng.shuffle(stored)
    body, shown = b"", {number: bytes(BLOCK) for number in range(count) if table[number] == ZERO}
    for place, number in enumerate(stored):
        table[number] = place
        shown[number] = rng.randbytes(BLOCK)
        body += b"\xee" * extra + shown[number]
    return table, body, shown


def over(below: bytes, size: int, shown: dict[int, bytes]) -> bytes:
    disk = bytearray(below[:size].ljust(size, b"\0"))
    for number, content in shown.items():
        at = number * BLOCK
        disk[at : at + BLOCK] = content[: max(0, size - at)]
    return bytes(disk[:size])


@pytest.mark.parametrize(
    ("size", "options"), [(17 * MiB + 512, "static=off"), (5 * MiB + 1536, "static=on"), (3 * MiB, "static=off")]
)
def test_disks_made_by_qemu(tmp_path: Path, size: int, options: str) -> None:
    path = scattered(tmp_path / "a.vdi", "vdi", size, options, seed=size)
    content = content_of(path, "vdi", tmp_path)
    assert len(content) == size
    check_reader(path, content)
    image = opened(path)
    assert image.facts["subformat"] == ("fixed" if options == "static=on" else "dynamic")
    image.close()


@pytest.mark.parametrize(("extra", "old"), [(0, False), (512, False), (0, True)])
def test_all_versions_and_bytes_before_each_block(tmp_path: Path, extra: int, old: bool) -> None:
    size = MiB + 1536
    table, body, shown = layer(size, 7, extra)
    path = built(tmp_path / "a.vdi", size, table, body, extra=extra, old=old)
    check_reader(path, over(b"", size, shown))


def test_an_odd_size_is_rounded_up_to_sectors(tmp_path: Path) -> None:
    path = built(tmp_path / "a.vdi", 700, [0], b"x" * BLOCK)
    check_reader(path, b"x" * 1024, rounds=5)


@pytest.mark.parametrize("seed", range(3))
def test_a_chain_found_by_uuid_alone(tmp_path: Path, seed: int) -> None:
    size = MiB + 512
    (tmp_path / "aaa.vdi").write_bytes(b"no disk")
    built(tmp_path / "bbb.vdi", 512, [FREE], b"", ids=(IDS[8], IDS[8], bytes(16), bytes(16)))
    content = b""
    for number in range(3):
        table, body, shown = layer(size, 10 * seed + number)
        content = over(content, size, shown)
        parent = (IDS[2 * number - 2], IDS[2 * number - 1]) if number else (bytes(16), bytes(16))
        kind = 4 if number else 1
        path = tmp_path / f"{random.Random(number).random()}.vdi"
        built(path, size, table, body, kind=kind, ids=(IDS[2 * number], IDS[2 * number + 1], *parent))
        check_reader(path, content, rounds=40)
    image = opened(path)
    assert image.warnings == ()
    assert image.facts["backing"] == {"name": f"{random.Random(1).random()}.vdi", "format": "vdi"}
    image.close()


def test_parents_that_are_elsewhere_or_changed(tmp_path: Path) -> None:
    folder = tmp_path / "Snapshots"
    folder.mkdir()
    content = b"parent".ljust(BLOCK, b".")
    built(tmp_path / "base.vdi", BLOCK, [0], content)
    child = built(folder / "child.vdi", BLOCK, [FREE], b"", kind=4, ids=(IDS[2], IDS[3], IDS[0], IDS[5]))
    with pytest.raises(InvalidImage, match="--allow-related"):
        opened(child)
    for allowed in (tmp_path, tmp_path / "base.vdi"):
        image = opened(child, allowed=[allowed])
        assert read(image.source, 0, BLOCK) == content
        assert "was changed" in image.warnings[0]
        image.close()
    (folder / "link.vdi").symlink_to(tmp_path / "base.vdi")
    with pytest.raises(InvalidImage, match="--allow-related"):
        opened(child)


def test_a_loop_of_parents(tmp_path: Path) -> None:
    one = built(tmp_path / "1.vdi", BLOCK, [FREE], b"", kind=4, ids=(IDS[0], IDS[1], IDS[2], IDS[3]))
    built(tmp_path / "2.vdi", BLOCK, [FREE], b"", kind=4, ids=(IDS[2], IDS[3], IDS[0], IDS[1]))
    with pytest.raises(InvalidImage, match="loop"):
        opened(one)
    built(one, BLOCK, [FREE], b"", kind=4, ids=(IDS[0], IDS[1], IDS[0], IDS[1]))
    with pytest.raises(InvalidImage, match="loop"):
        opened(one)


# ---------------------------------------------------------------------- hostile


def test_every_field_set_to_what_it_must_not_be(tmp_path: Path) -> None:
    size = MiB
    table, body, _ = layer(size, 1)
    image = built(tmp_path / "good.vdi", size, table, body).read_bytes()
    path = tmp_path / "a.vdi"
    refused = kept = 0
    for field in fields_of(Header):
        at = 72 + field.offset
        for value in bad_values(field, image[at : at + field.size]):
            path.write_bytes(with_bytes(image, at, value))
            survived = survives(path, "vdi")
            refused, kept = refused + (not survived), kept + survived
    assert refused > 50
    assert kept > 50
    for version in (0, 1, 3, 0x20000, 0xFFFFFFFF):
        path.write_bytes(with_bytes(image, 68, struct.pack("<I", version)))
        with pytest.raises(UnsupportedError):
            opened(path, "vdi")


def test_entries_of_the_block_map(tmp_path: Path) -> None:
    for entry in (3, 1000, 0x7FFFFFFF, 0xFFFFFFFD):
        image = opened(built(tmp_path / "a.vdi", 2 * BLOCK, [0, entry], bytes(2 * BLOCK)))
        read(image.source, 0, BLOCK)
        with pytest.raises(InvalidImage):
            read(image.source, BLOCK, BLOCK)
        image.close()


def test_one_block_for_many(tmp_path: Path) -> None:
    image = opened(built(tmp_path / "a.vdi", 3 * BLOCK, [0, FREE, 0], bytes(2 * BLOCK)))
    with pytest.raises(InvalidImage, match="names a block twice"):
        image.source.extents(0, 3 * BLOCK)
    image.close()


def test_files_cut_short(tmp_path: Path) -> None:
    table, body, _ = layer(MiB, 3)
    image = built(tmp_path / "good.vdi", MiB, table, body).read_bytes()
    path = tmp_path / "a.vdi"
    opens = 0
    for length in [*range(0, 2200, 97), *range(2200, len(image), 29_000)]:
        path.write_bytes(image[:length])
        opens += survives(path, "vdi")
    assert opens > 5


# ---------------------------------------------------------------------- written


@pytest.mark.parametrize("make", [make_image, make_image_piecemeal])
@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
@pytest.mark.parametrize("size", [512, 2 * MiB, 9 * MiB + 1536])
def test_written_disks(tmp_path: Path, make: type, subformat: str, size: int) -> None:
    content = random_disk(size, seed=size)
    path = make(tmp_path / "a.vdi", "vdi", content, f"subformat={subformat}")
    check_written(path, "vdi", content, tmp_path)
    check_reader(path, content, rounds=30)
    image = path.read_bytes()
    header = Header.unpack(image, 72)
    assert header.disk_size == size
    assert header.offset_data % MiB == 0
    assert len(image) == header.offset_data + header.blocks_allocated * MiB
    for unique in (header.uuid_image, header.uuid_modify):
        assert uuid.UUID(bytes_le=unique).version == 4
    assert header.uuid_link == header.uuid_parent_modify == bytes(16)
    # what VirtualBox looks at besides when it opens an image (vdiValidateHeader)
    assert header.header_size == 400
    assert struct.unpack_from("<4I", image, 72 + Header.SIZE) == (0, 0, 0, 512)
    assert header.image_flags == header.block_extra == 0
    assert header.blocks_allocated <= header.blocks_in_image == -(-size // MiB)


def test_zeros_take_no_blocks(tmp_path: Path) -> None:
    content = bytes(7 * MiB) + random_disk(MiB, seed=2) + bytes(32 * MiB)
    path = make_image(tmp_path / "a.vdi", "vdi", content)
    assert path.stat().st_size == 2 * MiB
    image = opened(path)
    assert zero_bytes(image) >= 39 * MiB
    image.close()


@pytest.mark.parametrize("spec", [Spec(0), Spec(513), Spec(1 << 50), Spec(MiB, compress=True)])
def test_what_a_vdi_cannot_be(tmp_path: Path, spec: Spec) -> None:
    with Outputs(tmp_path / "a.vdi") as outputs, pytest.raises(UsageError):
        create(outputs, spec)


def test_a_very_large_disk(tmp_path: Path) -> None:
    size = 16 << 40
    with Outputs(tmp_path / "a.vdi") as outputs:
        sink = create(outputs, Spec(size))
        sink.write(size - MiB, memoryview(b"the end".ljust(MiB, b".")))
        sink.finish()
        outputs.commit()
    assert f'"virtual-size": {size}' in run("qemu-img", "info", "--output=json", "-f", "vdi", tmp_path / "a.vdi")
    image = opened(tmp_path / "a.vdi")
    assert read(image.source, size - MiB, 8) == b"the end."
    assert image.source.extents(0, size).total(State.ZERO) == size - MiB
    image.close()
