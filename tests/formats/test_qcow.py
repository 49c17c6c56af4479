"""qcow (version 1) and QED, as QEMU writes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ferrotype.block import read
from ferrotype.block.memory import MemoryDisk
from ferrotype.errors import FormatError, InvalidImage, UnsupportedError
from ferrotype.formats import Format, qcow, qed
from ferrotype.formats.related import Related
from ferrotype.testing.formats import check_format
from tests.formats.judges import MiB, check_reader, content_of, facts_of, opened, random_disk, scatter, scattered
from tests.machine import run

MODULES: dict[str, Format] = {"qcow": qcow, "qed": qed}


@pytest.mark.parametrize(
    ("format", "options"),
    [("qcow", ""), ("qed", ""), ("qed", "cluster_size=4096,table_size=2"), ("qed", "cluster_size=64k,table_size=16")],
)
def test_reads_what_qemu_writes(tmp_path: Path, format: str, options: str) -> None:
    path = scattered(tmp_path / "a", format, 9 * MiB + 1536, options, seed=5, zeros=format == "qed")
    check_reader(path, content_of(path, format, tmp_path))


def test_compressed_clusters_of_qcow(tmp_path: Path) -> None:
    content = random_disk(4 * MiB, seed=8)
    (tmp_path / "a.raw").write_bytes(content)
    path = tmp_path / "a.qcow"
    # QEMU 7.2 ends with an error after the last cluster, when all is written
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow", tmp_path / "a.raw", path, ok=(0, 1))
    assert content_of(path, "qcow", tmp_path) == content
    assert path.stat().st_size < len(content) - content.count(0) + MiB // 4
    scatter(path, "qcow", 4 * MiB, seed=9, writes=10, zeros=False)
    check_reader(path, content_of(path, "qcow", tmp_path))


@pytest.mark.parametrize("format", ["qcow", "qed"])
def test_the_conformance_suite(tmp_path: Path, format: str) -> None:
    path = scattered(tmp_path / "a", format, 2 * MiB, seed=6, writes=20, zeros=False)
    check_format(MODULES[format], path, content_of(path, format, tmp_path))


@pytest.mark.parametrize("format", ["qcow", "qed"])
def test_a_backing_file(tmp_path: Path, format: str) -> None:
    scattered(tmp_path / "base.qcow2", "qcow2", 3 * MiB + 512, seed=1, writes=20)
    path = tmp_path / "top"
    run("qemu-img", "create", "-q", "-f", format, "-b", "base.qcow2", "-F", "qcow2", path, "4M")
    scatter(path, format, 4 * MiB, seed=2, writes=6, zeros=False)
    if format == "qed":  # zeros that hide the backing file
        run("qemu-io", "-f", format, "-c", "write -z 64k 2M", path)
    content = content_of(path, format, tmp_path)
    check_reader(path, content, rounds=25)
    assert facts_of(path)["backing"] == {"name": "base.qcow2", "format": None}
    (tmp_path / "base.qcow2").unlink()
    with pytest.raises(InvalidImage, match="backing file"):
        opened(path)


def test_a_raw_backing_file_is_read_where_the_image_says_raw(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(random_disk(MiB, seed=1))
    for format in ("qcow", "qed"):
        run("qemu-img", "create", "-q", "-f", format, "-b", "base", "-F", "raw", tmp_path / format, "2M")
    check_reader(tmp_path / "qed", content_of(tmp_path / "qed", "qed", tmp_path))
    with pytest.raises(UnsupportedError, match="does not say in which format"):
        opened(tmp_path / "qcow")  # which cannot say it


def test_marks_of_qed(tmp_path: Path) -> None:
    path = scattered(tmp_path / "a.qed", "qed", MiB, writes=5)
    data = bytearray(path.read_bytes())
    data[16] = 2
    path.write_bytes(data)
    image = opened(path)
    assert image.facts["dirty"] is True
    assert "not closed cleanly" in image.warnings[0]
    image.close()
    data[16] = 8
    path.write_bytes(data)
    with pytest.raises(UnsupportedError, match="not known"):
        opened(path)


def tried(module: Format, data: bytes) -> None:
    """Opened and read, or refused."""
    try:
        image = module.open(MemoryDisk(data), Related.nothing())
    except FormatError:
        return
    try:
        image.source.extents(0, image.source.size)
        read(image.source, 0, min(image.source.size, MiB))
    except FormatError:
        pass
    finally:
        image.close()


FIELDS = {
    "qcow": ((8, 8), (16, 4), (24, 8), (32, 1), (33, 1), (36, 4), (40, 8)),
    "qed": ((4, 4), (8, 4), (12, 4), (16, 8), (40, 8), (48, 8), (56, 4), (60, 4)),
}


@pytest.mark.parametrize("format", FIELDS)
def test_any_field_may_hold_anything(tmp_path: Path, format: str) -> None:
    path = scattered(tmp_path / "a", format, MiB, seed=6, writes=10, zeros=False)
    data, order = path.read_bytes(), "big" if format == "qcow" else "little"
    for at, length in FIELDS[format]:
        old = int.from_bytes(data[at : at + length], order)  # type: ignore[arg-type]
        for value in {0, 1, (1 << 8 * length) - 1, old + 1, old * 2, *(old ^ 1 << bit for bit in range(8 * length))}:
            new = (value & (1 << 8 * length) - 1).to_bytes(length, order)  # type: ignore[arg-type]
            tried(MODULES[format], data[:at] + new + data[at + length :])
    for length in [*range(0, 70, 3), *range(0, len(data), 30_011)]:
        tried(MODULES[format], data[:length])


@pytest.mark.parametrize(
    ("format", "at", "value", "says"),
    [
        ("qcow", 24, (1 << 63).to_bytes(8, "big"), "a disk of"),
        ("qcow", 24, (1 << 50).to_bytes(8, "big"), "L1 table"),
        ("qcow", 32, b"\x08", "clusters of"),
        ("qcow", 33, b"\x0e", "L2 tables"),
        ("qcow", 36, b"\0\0\0\1", "AES"),
        ("qcow", 36, b"\0\0\0\2", "encryption method"),
        ("qcow", 40, bytes(8), "L1 table"),
        ("qcow", 8, b"\0\0\0\0\0\0\0\1", "backing file name"),
        ("qed", 4, b"\0\0\1\1", "clusters of"),
        ("qed", 8, b"\3\0\0\0", "tables of"),
        ("qed", 40, b"\0\0\0\0\0\0\0\0", "L1 table"),
        ("qed", 48, b"\xff" * 8, "a disk of"),
    ],
)
def test_what_is_refused(tmp_path: Path, format: str, at: int, value: bytes, says: str) -> None:
    path = tmp_path / "a"
    run("qemu-img", "create", "-q", "-f", format, path, "1M")
    data = path.read_bytes()
    path.write_bytes(data[:at] + value + data[at + len(value) :])
    with pytest.raises(FormatError, match=says):
        opened(path)


@pytest.mark.parametrize("format", ["qcow", "qed"])
def test_tables_stand_in_the_file_for_themselves(tmp_path: Path, format: str) -> None:
    """An L2 table over the header, and behind the end; a cluster there."""
    path = scattered(tmp_path / "a", format, MiB, seed=6, writes=10, zeros=False)
    order = "big" if format == "qcow" else "little"
    data = path.read_bytes()
    l1 = int.from_bytes(data[40:48], order)  # type: ignore[arg-type]  # at the same place in both
    l2 = int.from_bytes(data[l1 : l1 + 8], order)  # type: ignore[arg-type]
    for table in (l1, l2):
        for value in (16, len(data) + (-len(data) % 65536), 1 << 62):
            bad = bytearray(data)
            for at in range(table, table + 64, 8):
                bad[at : at + 8] = value.to_bytes(8, order)  # type: ignore[arg-type]
            image = MODULES[format].open(MemoryDisk(bytes(bad)), Related.nothing())
            with pytest.raises(InvalidImage):
                read(image.source, 0, MiB)
            image.close()


def test_names_beside_the_image_only(tmp_path: Path) -> None:
    shutil.copy("/etc/hostname", tmp_path / "12345678901")
    for format in ("qcow", "qed"):
        path = tmp_path / f"a.{format}"
        run("qemu-img", "create", "-q", "-f", format, "-b", "12345678901", "-F", "raw", path, "1M")
        path.write_bytes(path.read_bytes().replace(b"12345678901", b"/etc/passwd"))
        with pytest.raises(FormatError, match="outside its own folder"):
            opened(path)
