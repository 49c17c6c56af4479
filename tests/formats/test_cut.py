"""Files that end inside their last cluster: what is missing is told when it is read, and nothing else ever is."""

from __future__ import annotations

from pathlib import Path

import pytest

from ferrotype.block import read
from ferrotype.engine.references import Access, open_disk
from ferrotype.errors import InvalidImage
from ferrotype.formats.mapped import shortfalls
from ferrotype.job import NullJob
from tests.cli.program import ferrotype
from tests.formats import vmdk_builders as build
from tests.formats.judges import MiB, make_image, opened, random_disk, scattered
from tests.machine import need, run

KiB = 1024
CONTENT = random_disk(3 * MiB, seed=9)
QEMU = {
    "qcow2": ("qcow2", "cluster_size=64k"),
    "large": ("qcow2", "cluster_size=2M"),
    "qed": ("qed", "cluster_size=64k"),
    "qcow": ("qcow", ""),
    "vdi": ("vdi", ""),
    "vmdk": ("vmdk", "subformat=monolithicSparse"),
    "vhdx": ("vhdx", "block_size=1M"),
    "parallels": ("parallels", ""),
    "vpc": ("vpc", "subformat=dynamic,force_size=on"),
}


def made(path: Path, kind: str, content: bytes) -> bytes:
    """An image by qemu-img."""
    need("qemu-img")
    format, options = QEMU[kind]
    raw = path.with_name("content.raw")
    raw.write_bytes(content)
    run("qemu-img", "convert", "-f", "raw", "-O", format, *(("-o", options) if options else ()), raw, path)
    return path.read_bytes()


def seen(path: Path) -> tuple[bytes, list[str]]:
    job = NullJob()
    with open_disk(str(path), Access(), job) as disk:
        content = read(disk.source, 0, disk.source.size)
    return content, job.warnings


@pytest.mark.parametrize("kind", sorted(QEMU))
def test_a_file_cut_inside_its_last_cluster(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image"
    data = made(path, kind, CONTENT)
    end = max(
        data.rfind(CONTENT[at : at + 512]) + 512 for at in range(0, len(CONTENT), 512) if any(CONTENT[at : at + 512])
    )
    guest = max(at for at in range(0, len(CONTENT), 512) if data[end - 512 : end] == CONTENT[at : at + 512]) + 512
    for lost in (1, 511, 512, *(() if kind == "qcow" else (1700, 3000))):  # its clusters are small
        path.write_bytes(data[: end - lost])
        content, warnings = seen(path)
        assert content == CONTENT[: guest - lost] + bytes(lost) + CONTENT[guest:]
        told = [one for one in warnings if "the file ends too early" in one]
        assert len(told) == 1
        beyond = int(told[0].split(", by ")[1].split()[0])
        assert beyond >= lost
        assert f"those from byte {guest - lost} of the disk on" in told[0]
    ferrotype("checksum", path, code=8)
    ferrotype("backup", path, tmp_path / "a.ferro", code=8)
    ferrotype("convert", path, tmp_path / "a.raw", code=8)
    done = seen(path)
    with open_disk(str(path), Access(), job := NullJob()) as disk:
        read(disk.source, 0, 512)
    assert not any("too early" in one for one in job.warnings), "what is not read is not told"
    assert len(done[1]) >= 1


@pytest.mark.parametrize("kind", sorted(QEMU))
def test_a_file_cut_by_whole_clusters_is_an_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image"
    data = made(path, kind, CONTENT)
    unit = 2 * MiB if kind in ("large", "vpc") else MiB
    path.write_bytes(data[: len(data) - unit - 3 * KiB])
    with pytest.raises(InvalidImage):
        seen(path)


def test_a_parent_that_was_cut_is_told(tmp_path: Path) -> None:
    base = tmp_path / "base.qcow2"
    data = made(base, "qcow2", CONTENT)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", tmp_path / "top.qcow2")
    base.write_bytes(data[:-1000])
    assert "too early, by 1000 bytes" in seen(tmp_path / "top.qcow2")[1][0]


def test_extents_of_a_set_that_were_cut_are_told(tmp_path: Path) -> None:
    (tmp_path / "a-delta.vmdk").write_bytes(build.cowd(CONTENT, grain=4096)[:-100])
    build.write_descriptor(
        tmp_path / "a.vmdk", [f'RW {len(CONTENT) // 512} VMFSSPARSE "a-delta.vmdk"', "RW 8 ZERO"], "vmfsSparse"
    )
    assert "by 100 bytes" in seen(tmp_path / "a.vmdk")[1][0]


# ---------------------------------------------------------------------- no false alarm


@pytest.mark.parametrize("kind", sorted(QEMU))
@pytest.mark.parametrize("size", [512, 3 * MiB + 1024, 5_000_192])
def test_what_qemu_makes_is_whole(tmp_path: Path, kind: str, size: int) -> None:
    path = tmp_path / "image"
    content = random_disk(size, seed=size)
    made(path, kind, content)
    assert seen(path)[1] == []


@pytest.mark.parametrize(
    "options",
    [
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on",
        "extended_l2=on,cluster_size=2M",
        "preallocation=metadata",
        "preallocation=falloc",
        "lazy_refcounts=on",
        "compat=0.10",
        "compression_type=zstd",
    ],
)
@pytest.mark.parametrize("size", [1000 * KiB, 5_000_192])
def test_what_qemu_wrote_in_places_is_whole(tmp_path: Path, options: str, size: int) -> None:
    """QEMU writes its clusters whole, but for those of extended L2 entries, whose subclusters are."""
    need("qemu-io")
    path = tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(size))
    writes = ["write -P 1 4k 3k", "write -P 2 500k 100k", "write -P 3 700000 512", "write -z 3000 9000"]
    run("qemu-io", *(word for one in writes for word in ("-c", one)), path)
    assert seen(path)[1] == []
    for format in ("qcow2", "qed"):
        scattered(tmp_path / f"b.{format}", format, 5_000_192, seed=4, writes=40)
        assert seen(tmp_path / f"b.{format}")[1] == []


@pytest.mark.parametrize(
    ("format", "texts"),
    [
        ("qcow2", ()),
        ("qcow2", ("cluster_size=2MiB",)),
        ("vhd", ()),
        ("vhdx", ()),
        ("vmdk", ()),
        ("vmdk", ("subformat=twoGbMaxExtentSparse",)),
        ("vdi", ()),
    ],
)
def test_what_ferrotype_makes_is_whole(tmp_path: Path, format: str, texts: tuple[str, ...]) -> None:
    path = make_image(tmp_path / f"a.{format}", format, CONTENT + b"x" * 1536, *texts)
    image = opened(path)
    assert read(image.source, 0, image.source.size) == CONTENT + b"x" * 1536
    assert list(shortfalls(image.source)) == []
    image.close()
