"""ntfsclone's special images against ntfsclone, and made by hand."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

from ferrotype.block import read
from ferrotype.block.memory import MemoryDisk
from ferrotype.errors import FormatError, InvalidImage, UnsupportedError
from ferrotype.extents import State
from ferrotype.formats import ntfsclone
from ferrotype.formats.registry import open_file
from ferrotype.formats.related import Related
from ferrotype.testing.sources import check_source
from tests.formats.corpus import check_virtual_disk, entries
from tests.formats.judges import MiB, check_reader, opened
from tests.formats.test_partclone import some_blocks
from tests.machine import need, run, unpack


@pytest.mark.parametrize(("cluster", "size"), [(512, 8 * MiB), (4096, 16 * MiB + 1536), (65536, 24 * MiB + 512)])
def test_an_image_is_what_ntfsclone_restores(cluster: int, size: int, tmp_path: Path) -> None:
    need("mkntfs", "ntfscp", "ntfsclone")
    volume, image, back = tmp_path / "volume", tmp_path / "volume.img", tmp_path / "restored"
    with volume.open("wb") as file:
        file.truncate(size)
    run("mkntfs", "-F", "-q", "-c", str(cluster), volume)
    rng = random.Random(cluster)
    for number in range(4):
        added = tmp_path / f"file{number}"
        added.write_bytes(rng.randbytes(rng.randrange(1, MiB)))
        run("ntfscp", "-q", volume, added, added.name)
    run("ntfsclone", "--save-image", "--force", "-o", image, volume)
    run("ntfsclone", "--restore-image", "-o", back, image)
    content = back.read_bytes()
    assert len(content) == size
    check_reader(image, content)
    opening = opened(image)
    assert opening.format == "ntfsclone"
    assert opening.facts["unit"] == cluster
    known = opening.source.extents(0, size)
    assert size // 10 < known.total(State.ZERO) < size
    with volume.open("rb") as file:
        for extent in known:
            if not extent.state & State.ZERO:
                file.seek(extent.start)
                assert content[extent.start : extent.end] == file.read(extent.length)
    opening.close()


# ---------------------------------------------------------------------- made by hand


def image_of(
    blocks: list[bytes | None],
    size: int,
    *,
    version: tuple[int, int] = (10, 1),
    tail: bytes | None = None,
    offset: int = 56,
    **fields: int,
) -> bytes:
    """An image; ``tail`` is what stands behind the last cluster."""
    values: dict[str, int] = {
        "size": size,
        "device": len(blocks) * size + len(tail or b""),
        "clusters": len(blocks),
        "used": sum(block is not None for block in blocks),
    } | {name.removeprefix("its_"): value for name, value in fields.items()}
    image = b"\0ntfsclone-image" + struct.pack(
        "<BBIqqq", *version, values["size"], values["device"], values["clusters"], values["used"]
    )
    if version[0] >= 10:
        image = (image + struct.pack("<I", offset)).ljust(offset, b"\0")
    gap = 0
    for block in blocks:
        if block is None:
            gap += 1
            continue
        image += (b"\0" + struct.pack("<q", gap) if gap else b"") + b"\1" + block
        gap = 0
    image += b"\0" + struct.pack("<q", gap) if gap else b""
    return image + (b"" if tail is None else b"\1" + tail)


def content_of(blocks: list[bytes | None], size: int, tail: bytes = b"") -> bytes:
    return b"".join(bytes(size) if block is None else block for block in blocks) + tail


def opened_bytes(image: bytes) -> Any:
    return open_file(MemoryDisk(image), Related.nothing())


@pytest.mark.parametrize("size", [512, 4096])
@pytest.mark.parametrize("version", [(3, 1), (10, 0), (10, 1)])
@pytest.mark.parametrize("tail", [None, b"", b"copy of the boot sector".ljust(512)])
@pytest.mark.parametrize("window", [1000, 20_000, 4 * MiB])
def test_any_version_at_any_cut(
    size: int, version: tuple[int, int], tail: bytes | None, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ntfsclone, "_WINDOW", window)
    if tail:
        tail = tail[: size - 1]
    blocks = some_blocks(150, size, seed=size + len(tail or b""))
    image = opened_bytes(image_of(blocks, size, version=version, tail=tail))
    check_source(lambda: image.source, content_of(blocks, size, tail or b""), rounds=40)


def test_a_device_longer_than_its_clusters_ends_in_zeros() -> None:
    blocks = some_blocks(40, 1024)
    image = opened_bytes(image_of(blocks, 1024, its_device=40 * 1024 + 5000))
    check_source(lambda: image.source, content_of(blocks, 1024, bytes(5000)), rounds=40)


BLOCKS = some_blocks(60, 512, seed=4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("its_size", 0),
        ("its_size", 1),
        ("its_size", 1000),
        ("its_size", 1 << 31),
        ("its_device", 0),
        ("its_device", -1),
        ("its_device", 512),
        ("its_device", (1 << 63) - 1),
        ("its_clusters", 0),
        ("its_clusters", -5),
        ("its_clusters", 61),
        ("its_clusters", 1 << 60),
        ("its_used", -1),
        ("its_used", 1 << 40),
        ("offset", 1 << 20),
        ("offset", 49),
    ],
)
def test_an_impossible_header_is_refused_or_does_no_harm(field: str, value: int) -> None:
    arguments: dict[str, Any] = {field: value}
    with pytest.raises(FormatError):
        image = opened_bytes(image_of(BLOCKS, 512, **arguments))
        image.source.extents(0, image.source.size)


@pytest.mark.parametrize("version", [(11, 0), (255, 9)])
def test_a_later_version_is_not_read(version: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedError, match="version"):
        opened_bytes(image_of(BLOCKS, 512, version=version))


@pytest.mark.parametrize("count", [0, -1, 1 << 40, -(1 << 63), (1 << 63) - 1])
def test_impossible_gaps(count: int) -> None:
    whole = image_of([b"a" * 512], 512, its_clusters=9, its_device=9 * 512) + b"\0" + struct.pack("<q", count)
    image = opened_bytes(whole)
    assert read(image.source, 0, 512) == b"a" * 512
    with pytest.raises(FormatError):
        read(image.source, 512, 512)


def test_gaps_that_follow_each_other_are_refused() -> None:
    gap = b"\0" + struct.pack("<q", 1)
    image = opened_bytes(image_of([], 512, its_clusters=1 << 40, its_device=1 << 50) + gap * 100_000)
    with pytest.raises(InvalidImage, match="gap"):
        image.source.extents(0, image.source.size)


def test_a_file_cut_short_is_never_zeros() -> None:
    tail = b"boot".ljust(100)
    whole = image_of(BLOCKS, 512, tail=tail)
    content = content_of(BLOCKS, 512, tail)
    assert opened_bytes(whole).source.size == len(content)
    for length in [*range(70), *random.Random(1).sample(range(70, len(whole)), 80), len(whole) - 1]:
        try:
            image = opened_bytes(whole[:length])
        except FormatError:
            continue
        failed = False
        for at in range(0, len(content), 512):
            try:
                assert read(image.source, at, min(512, len(content) - at)) == content[at : at + 512]
                assert not failed
            except InvalidImage:
                failed = True
        # an old image ends before the copy of the boot sector; what is behind reads as zeros then
        assert failed


def test_an_unknown_command_is_refused() -> None:
    whole = bytearray(image_of(BLOCKS, 512))
    whole[56] = 2
    with pytest.raises(InvalidImage, match="command 2"):
        read(opened_bytes(bytes(whole)).source, 0, 512)


@pytest.mark.parametrize("entry", entries("ntfsclone"), ids=lambda entry: str(entry["id"]))
def test_corpus(entry: dict[str, Any], tmp_path: Path) -> None:
    check_virtual_disk(entry, unpack(entry, tmp_path))
