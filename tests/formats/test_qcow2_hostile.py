"""qcow2 images that are damaged, or made to do harm."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ferrotype.block import read
from ferrotype.block.memory import MemoryDisk
from ferrotype.errors import FormatError, InvalidImage, UnsupportedError
from ferrotype.formats import Image, qcow2
from ferrotype.formats.related import Related
from tests.formats.judges import KiB, MiB, content_of, opened, scattered
from tests.machine import run

# where each field of the header stands, and how long it is
FIELDS = {
    "magic": (0, 4),
    "version": (4, 4),
    "backing_file_offset": (8, 8),
    "backing_file_size": (16, 4),
    "cluster_bits": (20, 4),
    "size": (24, 8),
    "crypt_method": (32, 4),
    "l1_size": (36, 4),
    "l1_table_offset": (40, 8),
    "refcount_table_offset": (48, 8),
    "refcount_table_clusters": (56, 4),
    "nb_snapshots": (60, 4),
    "snapshots_offset": (64, 8),
    "incompatible_features": (72, 8),
    "compatible_features": (80, 8),
    "autoclear_features": (88, 8),
    "refcount_order": (96, 4),
    "header_length": (100, 4),
    "compression_type": (104, 1),
    "extension_type": (112, 4),
    "extension_length": (116, 4),
}


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """An image with snapshots, bitmaps and compressed clusters; and its disk."""
    tmp = tmp_path_factory.mktemp("seed")
    path = scattered(tmp / "a.qcow2", "qcow2", 2 * MiB, "cluster_size=4096", writes=25, seed=1)
    run("qemu-img", "snapshot", "-c", "snap", path)
    run("qemu-img", "bitmap", "--add", path, "bits")
    run("qemu-io", "-f", "qcow2", "-c", "write -c -P 9 1M 64k", path, ok=(0, 1))
    return path.read_bytes(), content_of(path, "qcow2", tmp)


def tried(data: bytes) -> bytes | None:
    """The disk of an image, its first MiBs if it is long; None where it is refused."""
    try:
        image = qcow2.open(MemoryDisk(data), Related.nothing())
    except FormatError:
        return None
    try:
        size = image.source.size
        image.source.extents(0, size)
        for name in image.disks:
            snapshot = image.disk(name)
            read(snapshot, 0, min(snapshot.size, MiB))
        return read(image.source, 0, min(size, 4 * MiB))
    except FormatError:
        return None
    finally:
        image.close()


def changed(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


@pytest.mark.parametrize("field", FIELDS)
def test_any_field_may_hold_anything(seed: tuple[bytes, bytes], field: str) -> None:
    data, _ = seed
    at, length = FIELDS[field]
    old, top = int.from_bytes(data[at : at + length], "big"), (1 << 8 * length) - 1
    values = {0, 1, 2, 7, old + 1, old - 1, old * 2, old // 2, old | 1 << 8 * length - 1, top, top // 2, top - 511}
    values |= {1 << bit for bit in range(0, 8 * length, 5)} | {old ^ 1 << bit for bit in range(8 * length)}
    for value in sorted(values):
        tried(changed(data, at, (value & top).to_bytes(length, "big")))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("version", 4, "version 4"),
        ("cluster_bits", 8, "clusters of"),
        ("cluster_bits", 22, "clusters of"),
        ("size", 1 << 63, "a disk of"),
        ("size", 1 << 40, "too small for the disk"),
        ("crypt_method", 77, "encryption method"),
        ("l1_size", 1 << 23, "L1 table"),
        ("l1_size", 0, "L1 table"),
        ("l1_table_offset", 0, "L1 table"),
        ("l1_table_offset", 4097, "L1 table"),
        ("l1_table_offset", 1 << 62, "L1 table"),
        ("refcount_table_offset", 4097, "reference count table"),
        ("refcount_table_offset", 0, "reference count table"),
        ("refcount_table_clusters", 0, "reference count table"),
        ("refcount_table_clusters", 1 << 20, "reference count table"),
        ("nb_snapshots", 65537, "snapshots"),
        ("nb_snapshots", 65536, "L1 table"),
        ("snapshots_offset", 8, "snapshot table"),
        ("refcount_order", 7, "reference counts"),
        ("header_length", 96, "a header of"),
        ("header_length", 106, "a header of"),
        ("header_length", 1 << 20, "a header of"),
        ("compression_type", 1, "contradict"),
        ("compression_type", 2, "compression type"),
        ("incompatible_features", 8, "contradict"),
        ("incompatible_features", 4, "data in another file"),
        ("incompatible_features", 16, "subclusters"),
        ("incompatible_features", 1 << 40, "not known"),
        ("extension_length", 1 << 31, "does not fit"),
        ("backing_file_offset", 8, "backing file name"),
        ("backing_file_offset", 1 << 50, "backing file name"),
    ],
)
def test_what_is_refused(seed: tuple[bytes, bytes], field: str, value: int, says: str) -> None:
    at, length = FIELDS[field]
    with pytest.raises(FormatError, match=says):
        qcow2.open(MemoryDisk(changed(seed[0], at, value.to_bytes(length, "big"))), Related.nothing())


def test_a_feature_that_is_not_known_is_named() -> None:
    data = tables(features=1 << 9)
    data[104:160] = 0x6803F857_00000030.to_bytes(8, "big") + b"\0\x09frobnication".ljust(48, b"\0")
    with pytest.raises(UnsupportedError, match="frobnication"):
        disk(bytes(data))


def test_what_is_cut_short_is_refused_or_right(seed: tuple[bytes, bytes]) -> None:
    data, content = seed
    refused = 0
    for length in [*range(0, 600, 7), *range(0, len(data), 40_961), *(len(data) - 4096 * n for n in range(1, 20))]:
        got = tried(data[:length])
        refused += got is None
        if got is not None:  # the end of the last cluster may be missing
            assert sum(got[at : at + 4096] != content[at : at + 4096] for at in range(0, len(content), 4096)) <= 1
    assert refused > 80


# ---------------------------------------------------------------------- tables


def tables(cluster: int = 4 * KiB, *, version: int = 3, features: int = 0, clusters: int = 64) -> bytearray:
    """An image of 4 MiB made by hand: header, refcount table, L1 at cluster 2, L2 at cluster 3, data behind."""
    head = b"QFI\xfb" + version.to_bytes(4, "big") + bytes(12) + (cluster.bit_length() - 1).to_bytes(4, "big")
    head += (4 * MiB).to_bytes(8, "big") + bytes(4) + (8).to_bytes(4, "big") + (2 * cluster).to_bytes(8, "big")
    head += cluster.to_bytes(8, "big") + (1).to_bytes(4, "big") + bytes(12)
    if version == 3:
        head += features.to_bytes(8, "big") + bytes(16) + (4).to_bytes(4, "big") + (104).to_bytes(4, "big")
    data = bytearray(head.ljust(clusters * cluster, b"\0"))
    data[4 * cluster :] = b"\x11" * (len(data) - 4 * cluster)
    data[2 * cluster : 2 * cluster + 8] = (3 * cluster | 1 << 63).to_bytes(8, "big")
    return data


def disk(data: bytes) -> Image:
    return qcow2.open(MemoryDisk(data), Related.nothing())


def entry(data: bytearray, number: int, value: int, *, table: int = 3, cluster: int = 4 * KiB) -> None:
    at = table * cluster + number * 8
    data[at : at + 8] = value.to_bytes(8, "big")


@pytest.mark.parametrize(
    "value",
    [
        5 * 4096 + 512,  # not at a cluster
        64 * 4096,  # behind the end
        1 << 55,
        5 * 4096 | 2,  # reserved bits
        5 * 4096 | 1 << 57,
        1 << 62 | 1 << 57,  # compressed, behind the end
        1 << 62 | 64 * 4096,
        1 << 62 | 5 * 4096,  # no deflate stream
        1 << 62,
        (1 << 64) - 1,
    ],
)
def test_an_entry_that_may_not_be_spoils_its_own_cluster_only(value: int) -> None:
    data = tables()
    entry(data, 0, 5 * 4096)
    entry(data, 1, value)
    entry(data, 2, 5 * 4096)
    image = disk(bytes(data))
    assert read(image.source, 0, 4096) == read(image.source, 8192, 4096) == b"\x11" * 4096
    with pytest.raises(InvalidImage):
        read(image.source, 4096, 1)
    assert read(image.source, 3 * 4096, 4096) == bytes(4096)


@pytest.mark.parametrize(
    "value", [3 * 4096 + 512, 64 * 4096, 1 << 50, 2 * 4096, 3 * 4096, 4 * 4096 | 1 << 60, 4 * 4096 | 4, (1 << 64) - 1]
)
def test_an_l2_table_stands_in_the_file_for_itself(value: int) -> None:
    """Not at a cluster, behind the end, over the L1 table, another one's, reserved bits."""
    data = tables()
    entry(data, 1, value, table=2)
    image = disk(bytes(data))
    assert read(image.source, 0, 512 * KiB).count(0) == 512 * KiB
    with pytest.raises(InvalidImage):
        image.source.extents(0, 4 * MiB)
    assert read(image.source, 0, 100) == bytes(100) if value != 3 * 4096 else True


def test_many_tables_in_the_same_place_do_not_make_a_long_map() -> None:
    data = tables(clusters=1100)
    data[24:32] = (512 * 512 * KiB * 8).to_bytes(8, "big")
    data[36:40] = (4096).to_bytes(4, "big")
    data[40:48] = (8 * 4096).to_bytes(8, "big")
    data[8 * 4096 : 16 * 4096] = (3 * 4096).to_bytes(8, "big") * 4096
    image = disk(bytes(data))
    with pytest.raises(InvalidImage):
        image.source.extents(0, image.source.size)


def test_version_2_has_no_zero_clusters() -> None:
    data = tables(version=2)
    entry(data, 0, 1)
    with pytest.raises(InvalidImage):
        read(disk(bytes(data)).source, 0, 1)
    data = tables()
    entry(data, 0, 1)
    assert read(disk(bytes(data)).source, 0, 1) == b"\0"


@pytest.mark.parametrize(
    ("word", "bitmap", "good"),
    [
        (0x10 * 4096, 0xFFFF_FFFF, True),
        (0x10 * 4096, 0xFFFF_FFFF << 32, True),
        (0, 1 << 32, True),
        (0x10 * 4096, 1 << 32 | 1, False),  # both stored and zeros
        (0, 1, False),  # stored nowhere
        (0x10 * 4096 | 1, 0, False),  # a bit that has moved
    ],
)
def test_subclusters(word: int, bitmap: int, good: bool) -> None:
    data = tables(16 * KiB, features=16)
    entry(data, 0, word, cluster=16 * KiB)
    entry(data, 1, bitmap, cluster=16 * KiB)
    image = disk(bytes(data))
    if good:
        expected = b"\x11" if bitmap & 1 else b"\0"
        assert read(image.source, 0, 512) == expected * 512
    else:
        with pytest.raises(InvalidImage):
            read(image.source, 0, 512)


def test_the_last_cluster_may_be_cut_short_and_no_other() -> None:
    data = tables()
    entry(data, 0, 63 * 4096)
    cut = bytes(data[: 63 * 4096 + 100])
    image = disk(cut)
    assert read(image.source, 0, 4096) == b"\x11" * 100 + bytes(3996)
    assert read(image.source, 50, 60) == b"\x11" * 50 + bytes(10)
    assert read(image.source, 4000, 96) == bytes(96)
    with pytest.raises(InvalidImage):
        read(disk(bytes(data[: 63 * 4096])).source, 0, 1)


def test_a_sparse_file_of_empty_tables(tmp_path: Path) -> None:
    """64 GiB of L2 tables that are holes of the file are not read."""
    count = 1 << 20
    data = tables(64 * KiB, clusters=4)
    data[24:32] = (count * 8192 * 64 * KiB // 4).to_bytes(8, "big")
    data[36:40] = count.to_bytes(4, "big")
    data[40:48] = (1 << 20).to_bytes(8, "big")
    path = tmp_path / "a.qcow2"
    with path.open("wb") as file:
        file.write(data[: 64 * KiB])
        file.seek(1 << 20)
        file.write((np.arange(count, dtype=">u8") * (64 * KiB) + (1 << 30)).astype(">u8").tobytes())
        file.truncate((1 << 30) + count * 64 * KiB)
    image = opened(path)
    assert len(image.source.extents(0, image.source.size)) == 1
    image.close()


def test_a_long_l1_table_must_be_in_the_file() -> None:
    data = tables()
    data[36:40] = (1 << 22).to_bytes(4, "big")
    with pytest.raises(InvalidImage, match="L1 table"):
        disk(bytes(data))
