"""Opening what is damaged at its head, changes while it is looked at, or was made to be slow to look at."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from ferrotype.errors import InvalidImage
from ferrotype.objects import opening
from ferrotype.objects.container import Container
from ferrotype.objects.layout import (
    ANCHORS_AT,
    BLOCK,
    RECORDS_AT,
    Anchor,
    Catalog,
    Kind,
    Place,
    RecordHeader,
    checksum,
    decode_catalog,
)
from ferrotype.objects.reading import Records
from ferrotype.objects.volumes import PosixFile, volume_path
from ferrotype.units import KiB, MiB
from tests.cli.program import ferrotype
from tests.repository import small

Model = dict[str, bytes]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "laptop.ferro"


@pytest.fixture(autouse=True)
def tiny_volumes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ferrotype.objects.container._LEAST_SPLIT", 64 * KiB)


def made(path: Path, *, split: int = 0) -> Model:
    rng = random.Random(1)
    store = Container.create(path, split=split)
    model = {f"pack/{number:02}": rng.randbytes(30 * KiB) for number in range(12)}
    for name, data in model.items():
        store.put(name, [data])
        store.flush()
    store.close()
    return model


def content(path: Path) -> tuple[Model, list[str]]:
    store = Container.open(path)
    try:
        return {info.name: store.get(info.name) for info in store.list("")}, store.warnings
    finally:
        store.close()


def damage(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


# ---------------------------------------------------------------------- volume headers


@pytest.mark.parametrize("lost", [1, BLOCK, RECORDS_AT, RECORDS_AT + BLOCK])
@pytest.mark.parametrize("split", [0, 128 * KiB])
@pytest.mark.parametrize("volume", [0, 1, 2])
def test_a_damaged_volume_header_keeps_nobody_from_reading(image: Path, volume: int, split: int, lost: int) -> None:
    if volume and not split:
        return
    model = made(image, split=split)
    path = volume_path(image, volume)
    damage(path, 0, os.urandom(lost))
    before = path.read_bytes()
    found, warnings = content(image)
    assert found.keys() <= model.keys()
    assert sum(found.get(name) != model[name] for name in model) == (lost > RECORDS_AT)  # the first record too
    assert any(f"{path}: the volume header is damaged" in warning for warning in warnings)
    with pytest.raises(InvalidImage, match=r"volume header is damaged.*ferrotype salvage"):
        Container.open(image, writable=True)
    assert path.read_bytes() == before


def test_a_stranger_beside_an_image_with_a_damaged_header(image: Path) -> None:
    model = made(image)
    made(volume_path(image, 1))
    damage(image, 9, b"\xff")
    assert content(image)[0] == model


def test_verification_reports_a_damaged_volume_header(image: Path) -> None:
    with small.create(Container.create(image)) as repository:
        small.back_up(repository, small.disk_content(20, 1), "one")
    damage(image, 20, b"\xff" * 8)
    done = ferrotype("verify", image, "--json", code=1)
    assert any("volume header is damaged" in problem for problem in done.document["problems"])
    assert done.document["damaged"] == []
    assert "ferrotype salvage" in ferrotype("forget", image, "--keep-last", "1", code=4).err


def test_what_has_no_header_nor_records_is_no_image(image: Path) -> None:
    for junk in (bytes(MiB), os.urandom(MiB), b"FERROREC" * 100_000, b"FERROANC" * 100_000):
        image.write_bytes(junk)
        with pytest.raises(InvalidImage, match="not a ferrotype image"):
            Container.open(image)
    with image.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InvalidImage, match="not a ferrotype image"):
        Container.open(image)


# ---------------------------------------------------------------------- what changes while it is read


@pytest.mark.parametrize("at", [0, *ANCHORS_AT])
def test_a_block_that_is_read_while_it_is_written_is_read_again(image: Path, at: int) -> None:
    model = made(image)

    class Torn(PosixFile):
        reads = 0

        def read(self, offset: int, length: int, /) -> bytes:
            data = super().read(offset, length)
            if offset != at:
                return data
            Torn.reads += 1
            return data[:30] + bytes(len(data) - 30) if Torn.reads == 1 else data

    store = Container.open(image, opener=Torn)
    assert store.warnings == []
    assert {info.name: store.get(info.name) for info in store.list("")} == model
    store.close()
    assert Torn.reads > 1


# ---------------------------------------------------------------------- made to do harm


class Counted(PosixFile):
    """A file that counts what is read of it."""

    calls = 0
    total = 0

    def read(self, offset: int, length: int, /) -> bytes:
        data = super().read(offset, length)
        Counted.calls += 1
        Counted.total += len(data)
        return data


@pytest.fixture
def counted() -> Callable[[Path], Container]:
    Counted.calls = Counted.total = 0
    return lambda path: Container.open(path, opener=Counted)


@pytest.mark.parametrize("anchors", [True, False])
def test_a_hole_of_terabytes_is_stepped_over(
    image: Path, counted: Callable[[Path], Container], anchors: bool
) -> None:
    model = made(image)
    writer = Container.open(image, writable=True)
    uuid = writer._log.records.uuid
    writer.close()
    far = 1 << 43  # what ext4 lets a file be
    data = os.urandom(700)
    header = RecordHeader.make(Kind.OBJECT, uuid, 1000, len(data), checksum(data), "pack/far")
    damage(image, far, (header.pack() + data).ljust(BLOCK, b"\0"))
    with image.open("r+b") as file:
        file.truncate(far + (1 << 42))
    if not anchors:
        damage(image, BLOCK, b"\xff" * 2 * BLOCK)
    store = counted(image)
    assert {info.name: store.get(info.name) for info in store.list("")} == model  # it was never committed
    names = [entry.name for entry, _ in store._log.records.scan(Place(0, RECORDS_AT), prove=True)]
    store.close()
    assert [name for name in names if name] == [*model, "pack/far"]
    assert Counted.total < 8 * MiB
    assert Counted.calls < 500


def test_a_scan_finds_records_wherever_they_begin(image: Path) -> None:
    """Through bytes that hold the magic anywhere, at the ends of what is read at a time too."""
    rng = random.Random(7)
    uuid = rng.randbytes(16)
    blocks = [rng.choice([bytes(BLOCK), rng.randbytes(BLOCK), b"FERROREC" * (BLOCK // 8)]) for _ in range(1100)]
    places = [0, 3, 255, 256, 257, 511, 512, 700, 1023, 1024, 1099]
    for number, place in enumerate(places):
        name = f"pack/{number:02}"
        blocks[place] = RecordHeader.make(Kind.OBJECT, uuid, number, 10, checksum(b"x" * 10), name).pack()
        blocks[place] = (blocks[place] + b"x" * 10).ljust(BLOCK, b"\0")
    image.write_bytes(bytes(RECORDS_AT) + b"".join(blocks))
    records = Records(image, uuid, [PosixFile(image, writable=False)])
    found = [entry.offset for entry, _ in records.scan(Place(0, RECORDS_AT), prove=True)]
    records.files[0].close()
    assert found == [RECORDS_AT + place * BLOCK for place in places]


def test_headers_that_claim_each_others_bytes_are_not_all_believed(
    image: Path, counted: Callable[[Path], Container]
) -> None:
    """A whole header in each block says that eight MiB follow it, with a checksum that is wrong."""
    made(image)
    writer = Container.open(image, writable=True)
    uuid = writer._log.records.uuid
    writer.close()
    block = RecordHeader.make(Kind.OBJECT, uuid, 5, 8 * MiB - BLOCK, bytes(16), "pack/bad").pack().ljust(BLOCK, b"x")
    with image.open("ab") as file:
        for _ in range(512):  # 2 MiB of them
            file.write(block)
        file.write(os.urandom(10 * MiB))
    store = counted(image)
    store.close()
    assert Counted.total < 150 * MiB


def hostile(image: Path, payload: bytes, room: int = 0) -> None:
    """Have both anchors lead to a catalog of these bytes."""
    store = Container.create(image)
    store.put("config", [b"x"])
    store.flush()
    uuid = store._log.records.uuid
    store.close()
    with image.open("ab") as file:
        file.truncate(file.tell() + room)
        at = file.seek(0, os.SEEK_END)
        header = RecordHeader.make(Kind.CATALOG, uuid, 99, len(payload), checksum(payload), "")
        file.write((header.pack() + payload).ljust(-(-(128 + len(payload)) // BLOCK) * BLOCK, b"\0"))
    for generation, place in enumerate(ANCHORS_AT):
        damage(image, place, Anchor.make(uuid, 50 + generation, 99, Place(0, at)).pack().ljust(BLOCK, b"\0"))


def test_a_catalog_cannot_name_more_objects_than_there_is_room_for(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = ["", 0, RECORDS_AT, 0, 1]
    for added, removed in (([entry] * 5000, []), ([], [""] * 5000)):
        payload = msgspec.msgpack.encode([None, added, removed])
        with pytest.raises(InvalidImage, match="more objects"):
            decode_catalog(payload, 4999)
        assert len(decode_catalog(payload, 5000).added) == len(added)
        image.unlink(missing_ok=True)
        hostile(image, payload, MiB)
        found, warnings = content(image)
        assert found == {"config": b"x"}
        assert any("more objects than" in warning for warning in warnings)
    image.unlink()
    hostile(image, msgspec.msgpack.encode([None, [], ["x" * 40] * 3000]) + bytes(9 * MiB))

    def small_only(payload: bytes, most: int) -> Catalog:
        assert len(payload) < MiB
        return decode_catalog(payload, most)

    monkeypatch.setattr(opening, "decode_catalog", small_only)
    found, warnings = content(image)
    assert found["config"] == b"x"
    assert any("larger than any image needs" in warning for warning in warnings)


def test_a_catalog_of_an_odd_shape_is_refused() -> None:
    for payload in (
        b"",
        b"\x93",
        b"\x93\xc0\xc0\xc0",
        b"\x93\xc0\xdc\xff",
        b"\x93\xc0\xdd\xff\xff\xff\xff\x90",
        b"\xc0",
    ):
        with pytest.raises(InvalidImage):
            decode_catalog(payload)
