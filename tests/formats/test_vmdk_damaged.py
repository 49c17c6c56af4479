"""Damaged and hostile VMDK: every header field, tables and their copies, markers, files cut short."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from ferrotype.block import read
from ferrotype.errors import FormatError, InvalidImage, UnsupportedError
from ferrotype.job import NullJob
from tests.formats import vmdk_builders as build
from tests.formats.judges import MiB, check_reader, content_of, facts_of, opened, random_disk, scattered
from tests.formats.vmdk_builders import patch, refused, warnings_of, whole
from tests.machine import need

CONTENT = random_disk(9 * MiB + 1536, seed=11)

FIELDS = {
    "magicNumber": (0, 4), "version": (4, 4), "flags": (8, 4), "capacity": (12, 8), "grainSize": (20, 8),
    "descriptorOffset": (28, 8), "descriptorSize": (36, 8), "numGTEsPerGT": (44, 4), "rgdOffset": (48, 8),
    "gdOffset": (56, 8), "overHead": (64, 8), "uncleanShutdown": (72, 1), "newlines": (73, 4), "compress": (77, 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def sparse_image(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A sparse disk by qemu, and its content."""
    need("qemu-img", "qemu-io")
    folder = tmp_path_factory.mktemp("sparse")
    path = scattered(folder / "a.vmdk", "vmdk", 40 * MiB, "subformat=monolithicSparse", seed=31, writes=12)
    return path.read_bytes(), content_of(path, "vmdk", folder)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("stream", [False, True])
def test_any_value_of_any_field_is_an_error_or_a_disk(
    tmp_path: Path, sparse_image: tuple[bytes, bytes], field: str, *, stream: bool
) -> None:
    data = build.stream(CONTENT[: 3 * MiB]) if stream else sparse_image[0]
    offset, width = FIELDS[field]
    own = int.from_bytes(data[offset : offset + width], "little")
    most = (1 << 8 * width) - 1
    path = tmp_path / "a.vmdk"
    for value in {
        0,
        1,
        2,
        3,
        7,
        511,
        0x10000,
        most,
        most >> 1,
        most >> 1 ^ most,
        own + 1,
        own - 1,
        own << 1,
        own >> 1,
    }:
        path.write_bytes(data)
        patch(path, offset, (value & most).to_bytes(width, "little"))
        try:
            image = opened(path, "vmdk")
        except FormatError:
            continue
        try:
            size = min(image.source.size, 40 * MiB)
            image.source.extents(0, image.source.size)
            read(image.source, 0, size)
        except FormatError:
            pass
        finally:
            image.close()


@pytest.mark.parametrize(
    ("field", "value", "kind", "words"),
    [
        ("version", 4, UnsupportedError, "version 4"),
        ("flags", 3 | 1 << 5, UnsupportedError, "unknown"),
        ("flags", 3 | 1 << 16, InvalidImage, "contradicts"),
        ("capacity", 0xFFFFFFFFFFFF, InvalidImage, ""),
        ("grainSize", 100, InvalidImage, "grains of 100"),
        ("grainSize", 1 << 40, InvalidImage, "grains of"),
        ("grainSize", 0, InvalidImage, "grains of 0"),
        ("numGTEsPerGT", 0, UnsupportedError, "0 entries"),
        ("newlines", 0x0A0D0A20, InvalidImage, "text mode"),
        ("compress", 2, UnsupportedError, "compression 2"),
        ("overHead", 1 << 40, InvalidImage, "metadata"),
        ("descriptorSize", 1 << 40, InvalidImage, "descriptor has"),
        ("capacity", 1000, InvalidImage, "its header 1000"),
    ],
)
def test_what_is_said_of_a_damaged_header(
    tmp_path: Path, sparse_image: tuple[bytes, bytes], field: str, value: int, kind: type[FormatError], words: str
) -> None:
    path = tmp_path / "a.vmdk"
    path.write_bytes(sparse_image[0])
    offset, width = FIELDS[field]
    patch(path, offset, value.to_bytes(width, "little"))
    refused(path, words, kind)


def test_an_unclean_shutdown_is_said(tmp_path: Path, sparse_image: tuple[bytes, bytes]) -> None:
    path = tmp_path / "a.vmdk"
    path.write_bytes(sparse_image[0])
    assert warnings_of(path) == ""
    patch(path, 72, b"\1")
    assert "not closed properly" in warnings_of(path)
    assert facts_of(path)["dirty"] is True
    assert whole(path) == sparse_image[1]


def _directories(data: bytes) -> tuple[int, int]:
    """Offsets of the directory and of its redundant copy."""
    return struct.unpack_from("<Q", data, 56)[0] * 512, struct.unpack_from("<Q", data, 48)[0] * 512


def test_the_redundant_directory_stands_in(tmp_path: Path, sparse_image: tuple[bytes, bytes]) -> None:
    data, content = sparse_image
    first, copy = _directories(data)
    path = tmp_path / "a.vmdk"
    path.write_bytes(data)
    patch(path, first, b"\xff\xff\xff\x7f")
    assert "redundant copy is used" in warnings_of(path)
    check_reader(path, content, rounds=30)
    patch(path, copy + 4, data[copy : copy + 4])  # two tables in one place
    refused(path, "outside the file")
    path.write_bytes(data)
    patch(path, copy + 4, data[copy : copy + 4])
    assert "overlap" in warnings_of(path)
    assert whole(path) == content
    patch(path, 8, struct.pack("<I", 1))  # no redundant directory at all
    patch(path, first, b"\xff\xff\xff\x7f")
    refused(path, "outside the file")


@pytest.mark.parametrize("entry", [1, 5, 0xFFFFFFFF])
def test_a_redundant_table_stands_in_for_an_impossible_one(
    tmp_path: Path, sparse_image: tuple[bytes, bytes], entry: int
) -> None:
    data, content = sparse_image
    places = [struct.unpack_from("<I", data, at + 4)[0] * 512 for at in _directories(data)]
    path = tmp_path / "a.vmdk"
    path.write_bytes(data)
    patch(path, places[0] + 40, struct.pack("<I", entry))
    check_reader(path, content, rounds=30)
    patch(path, places[1] + 44, struct.pack("<I", entry))
    with pytest.raises(InvalidImage, match="grain table entry of byte"):
        whole(path)
    image = opened(path)  # what is sound can still be read
    assert read(image.source, 0, 32 * MiB) == content[: 32 * MiB]
    assert read(image.source, 33 * MiB, MiB) == content[33 * MiB : 34 * MiB]
    image.close()


def test_cut_short_sparse_disks_are_errors(tmp_path: Path, sparse_image: tuple[bytes, bytes]) -> None:
    data, content = sparse_image
    path = tmp_path / "a.vmdk"
    for length in [
        0,
        3,
        4,
        100,
        511,
        512,
        600,
        10_751,
        11_000,
        20_000,
        65_535,
        65_536,
        len(data) // 2,  # what is cut inside the last grain is told: test_cut.py
    ]:
        path.write_bytes(data[:length])
        refused(path)
    path.write_bytes(data + b"\0" * 100)
    assert whole(path) == content


def test_cut_short_streams_are_errors(tmp_path: Path) -> None:
    data = build.stream(CONTENT[: 2 * MiB])
    path = tmp_path / "a.vmdk"
    for length in [
        *range(0, len(data), 20_011),
        *range(len(data) - 3000, len(data), 61),
        *range(0, len(data), 65_536),
    ]:
        path.write_bytes(data[:length])
        refused(path)
    for at in (0, 8, 12):
        path.write_bytes(data)
        patch(path, len(data) - 512 + at, b"\1")  # no end of the stream
        refused(path, "does not end with a footer")
    for length in range(512, len(data), 30_208):  # cut, and then filled up with zeros by a helpful copy program
        path.write_bytes(data[:length].ljust(len(data), b"\0"))
        refused(path)


@pytest.mark.parametrize(
    ("at", "change", "words"),
    [
        (0, struct.pack("<Q", 128), "says it is"),
        (8, struct.pack("<I", 0), "says it is"),
        (8, struct.pack("<I", 200_000), "says it is"),
        (8, struct.pack("<I", 20), "compressed data"),
        (12, b"\0\0\0\0", "compressed data"),
        (40, b"\x55\xaa\x55\xaa", "compressed data"),
    ],
)
def test_grains_that_are_not_what_they_say(tmp_path: Path, at: int, change: bytes, words: str) -> None:
    path = tmp_path / "a.vmdk"
    path.write_bytes(build.stream(b"x" + CONTENT[1 : 2 * MiB]))
    patch(path, 65_536 + at, change)
    refused(path, words)


def test_the_last_grain_of_a_stream_is_checked_as_well(tmp_path: Path) -> None:
    content = bytes(MiB) + CONTENT[:1024].replace(b"\0", b"y")
    path = tmp_path / "a.vmdk"
    for whole_last in (True, False):
        data = build.stream(content, whole_last=whole_last)
        size = struct.unpack_from("<I", data, 65_536 + 8)[0]
        path.write_bytes(data)
        assert whole(path) == content
        patch(path, 65_536 + 12 + size - 1, bytes([data[65_536 + 12 + size - 1] ^ 1]))  # its checksum
        refused(path, "compressed data")
        path.write_bytes(data)
        patch(path, 65_536 + 8, struct.pack("<I", size - 6))  # its end
        refused(path, "compressed data")


def test_extents_without_end_take_no_memory_without_end(tmp_path: Path, sparse_image: tuple[bytes, bytes]) -> None:
    head = bytearray(sparse_image[0][:512])
    tables = 1 << 21
    for offset, value in [(12, tables * 65_536), (28, 0), (36, 0), (48, 0), (56, 128)]:
        struct.pack_into("<Q", head, offset, value)
    with (tmp_path / "s.vmdk").open("wb") as file:
        file.write(head)
        file.truncate(65_536 + 4 * tables)
    lines = [f'RW 2048 SPARSE "{"./" * number}s.vmdk"' for number in range(400)]
    refused(build.write_descriptor(tmp_path / "a.vmdk", lines, "custom"), "grain tables", UnsupportedError)
    (tmp_path / "z.vmdk").write_bytes(build.stream(CONTENT[:MiB]))
    build.write_descriptor(tmp_path / "a.vmdk", ['RW 2048 SPARSE "z.vmdk"'] * 17, "custom")
    refused(tmp_path / "a.vmdk", "compressed extents", UnsupportedError)
    build.write_descriptor(tmp_path / "a.vmdk", ['RW 2048 SPARSE "z.vmdk"'] * 3, "custom")
    assert whole(tmp_path / "a.vmdk") == CONTENT[:MiB] * 3


def test_the_check_opens_every_grain(tmp_path: Path) -> None:
    path = tmp_path / "a.vmdk"
    data = build.stream(CONTENT[: 3 * MiB])
    path.write_bytes(data)
    assert _check(path) == []
    patch(path, 65_536 + 100, bytes([data[65_536 + 100] ^ 1]))
    directory = struct.unpack_from("<Q", data, len(data) - 1024 + 56)[0]
    table = struct.unpack_from("<I", data, directory * 512)[0] * 512
    patch(path, table + 12, b"\xff\xff\xff\xff")
    found = _check(path)
    assert len(found) == 2
    assert "cannot be right" in found[0]
    assert "compressed data cannot be opened" in found[1]


def _check(path: Path) -> list[str]:
    image = opened(path)
    assert image.check is not None
    try:
        return image.check(NullJob())
    finally:
        image.close()
