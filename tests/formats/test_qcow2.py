"""qcow2 as QEMU writes it: every kind of cluster, chains, data files, internal snapshots, bitmaps."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from ferrotype.block import read
from ferrotype.errors import FormatError, InvalidImage, NotAllowed, UnsupportedError
from ferrotype.formats import Image, qcow2
from ferrotype.testing.formats import check_format
from ferrotype.testing.sources import check_source
from ferrotype.units import TiB, parse_size
from tests.formats.judges import KiB, MiB, check_reader, content_of, facts_of, opened, random_disk, scatter, scattered
from tests.machine import corpus, run, unpack

KINDS = {
    "v3": ("", False),
    "v2": ("compat=0.10", False),
    "512": ("cluster_size=512", True),
    "2M": ("cluster_size=2M", True),
    "v2 4K compressed": ("compat=0.10,cluster_size=4k", True),
    "compressed": ("", True),
    "zstd": ("compression_type=zstd", True),
    "zstd 16K": ("compression_type=zstd,cluster_size=16k", True),
    "subclusters": ("extended_l2=on,cluster_size=64k", False),
    "subclusters compressed": ("extended_l2=on,cluster_size=16k", True),
    "subclusters 2M": ("extended_l2=on,cluster_size=2M,compression_type=zstd", True),
    "lazy": ("lazy_refcounts=on,refcount_bits=1", False),
    "preallocated": ("preallocation=metadata", False),
}


def made(path: Path, size: int, options: str = "", *, seed: int = 0, compressed: bool = False) -> Path:
    """An image with data strewn over it by QEMU."""
    run("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), path, str(size))
    chosen = dict(text.split("=") for text in options.split(",") if text)
    cluster = parse_size(chosen.get("cluster_size", "64k"))
    scatter(path, "qcow2", size, seed=seed, compressed=compressed, cluster=cluster)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_qemu_writes(tmp_path: Path, kind: str) -> None:
    options, compressed = KINDS[kind]
    size = 9 * MiB + 3 * 512 if "2M" not in kind else 20 * MiB + 512
    path = made(tmp_path / "a.qcow2", size, options, seed=len(kind), compressed=compressed)
    check_reader(path, content_of(path, "qcow2", tmp_path))


@pytest.mark.parametrize(
    "options", ["", "cluster_size=2M", "compression_type=zstd", "extended_l2=on,cluster_size=16k"]
)
def test_compressed_clusters_of_all_lengths(tmp_path: Path, options: str) -> None:
    content = random_disk(5 * MiB, seed=3)
    lines = b"".join(b"line %d of a text that is not quite the same\n" % number for number in range(40_000))
    (tmp_path / "a.raw").write_bytes(content + lines)
    path = tmp_path / "a.qcow2"
    run("qemu-img", "convert", "-c", "-O", "qcow2", *(["-o", options] if options else []), tmp_path / "a.raw", path)
    check_reader(path, content_of(path, "qcow2", tmp_path), rounds=40)


def test_what_is_stored_is_known_without_reading(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", path, "8M")
    run("qemu-io", "-f", "qcow2", "-c", "write 1M 4k", "-c", "write -z 2M 1M", "-c", "write -c 4M 64k", path)
    image = opened(path)
    extents = [
        (extent.start // KiB, extent.length // KiB) for extent in image.source.extents(0, 8 * MiB) if not extent.state
    ]
    image.close()
    assert extents == [(1024, 4), (4096, 64)]


def test_the_conformance_suite(tmp_path: Path) -> None:
    path = made(tmp_path / "a.qcow2", 3 * MiB + 512, "cluster_size=4k", seed=4, compressed=True)
    check_format(qcow2, path, content_of(path, "qcow2", tmp_path))


# ---------------------------------------------------------------------- chains and data files


@pytest.mark.parametrize("top_options", ["", "extended_l2=on,cluster_size=16k", "compat=0.10,cluster_size=512"])
def test_a_chain_of_different_sizes(tmp_path: Path, top_options: str) -> None:
    (tmp_path / "base.img").write_bytes(random_disk(3 * MiB + 512, seed=1))
    scattered(tmp_path / "mid.qcow2", "qcow2", 4 * MiB + 1536, seed=2, writes=20, backing=(Path("base.img"), "raw"))
    top = scattered(
        tmp_path / "top.qcow2",
        "qcow2",
        5 * MiB + 512,
        top_options,
        seed=3,
        writes=30,
        backing=(Path("mid.qcow2"), "qcow2"),
    )
    check_reader(top, content_of(top, "qcow2", tmp_path))
    assert facts_of(top)["backing"] == {"name": "mid.qcow2", "format": "qcow2"}


def test_a_backing_file_without_a_stated_format_is_never_taken_as_raw(tmp_path: Path) -> None:
    (tmp_path / "base.img").write_bytes(random_disk(MiB, seed=1))
    made(tmp_path / "base.qcow2", MiB, seed=1)
    for base in ("base.img", "base.qcow2"):
        top = tmp_path / f"{base}.top"
        run(
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            base,
            "-F",
            base.rpartition(".")[2].replace("img", "raw"),
            top,
        )
        data = bytearray(top.read_bytes())
        at = data.index(0xE2792ACA.to_bytes(4, "big"))
        data[at : at + 4] = b"\x12\x34\x56\x78"  # an extension that nobody knows
        top.write_bytes(data)
    with pytest.raises(UnsupportedError, match="does not say in which format"):
        opened(tmp_path / "base.img.top")
    image = opened(tmp_path / "base.qcow2.top")
    assert "looks like qcow2" in image.warnings[0]
    assert read(image.source, 0, MiB) == content_of(tmp_path / "base.qcow2", "qcow2", tmp_path)
    image.close()


@pytest.mark.parametrize("raw", ["on", "off"])
def test_a_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: str) -> None:
    monkeypatch.chdir(tmp_path)  # where qemu-io looks for it
    path = tmp_path / "a.qcow2"
    run(
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        f"data_file=data.bin,data_file_raw={raw}",
        path,
        "6M",
        cwd=tmp_path,
    )
    scatter(path, "qcow2", 6 * MiB, seed=7)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 70000", path)  # byte 0 of the data file
    check_reader(path, content_of(path, "qcow2", tmp_path))
    facts = facts_of(path)
    assert (facts["data_file"], facts["data_file_raw"], facts["files"]) == ("data.bin", raw == "on", ["data.bin"])
    (tmp_path / "data.bin").unlink()
    with pytest.raises(InvalidImage, match="data file"):
        opened(path)


@pytest.mark.parametrize("name", [b"/etc/passwd", b"../secret", b"nbd:localhost:1", b'json:{"driver":"file"}'])
@pytest.mark.parametrize("kind", ["backing", "data"])
def test_names_that_lead_elsewhere_are_not_opened(tmp_path: Path, name: bytes, kind: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(MiB))
    (folder / ("x" * len(name))).write_bytes(bytes(MiB))
    path = folder / "a.qcow2"
    options = ["-b", "x" * len(name), "-F", "raw"] if kind == "backing" else ["-o", f"data_file={'x' * len(name)}"]
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, "1M", cwd=folder)
    opened(path).close()
    path.write_bytes(path.read_bytes().replace(b"x" * len(name), name))
    with pytest.raises(NotAllowed):
        opened(path)


# ---------------------------------------------------------------------- snapshots, bitmaps, facts


def test_internal_snapshots_are_further_disks(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "3M")
    contents = {}
    for number, name in enumerate(["first", "second", "second"]):
        scatter(path, "qcow2", 3 * MiB, seed=number, writes=20)
        run("qemu-img", "snapshot", "-c", name, path)
        contents[name if name not in contents else str(number + 1)] = content_of(path, "qcow2", tmp_path)
    run("qemu-img", "resize", "-q", path, "5M")
    scatter(path, "qcow2", 5 * MiB, seed=9, writes=20)
    image = opened(path)
    assert list(image.disks) == ["first", "second", "3"]
    for name, content in contents.items():
        check_source(lambda name=name: image.disk(name), content, rounds=20)  # type: ignore[misc]
    assert read(image.source, 0, 5 * MiB) == content_of(path, "qcow2", tmp_path)
    image.close()
    listed: Any = facts_of(path)["snapshots"]
    assert [(one["id"], one["name"], one["disk_size"]) for one in listed] == [
        ("1", "first", 3 * MiB),
        ("2", "second", 3 * MiB),
        ("3", "second", 3 * MiB),
    ]


def test_persistent_bitmaps_are_listed(tmp_path: Path) -> None:
    path = made(tmp_path / "a.qcow2", 3 * MiB)
    run("qemu-img", "bitmap", "--add", "-g", "32k", path, "one")
    run("qemu-img", "bitmap", "--add", path, "another")
    run("qemu-img", "bitmap", "--disable", path, "another")
    assert facts_of(path)["bitmaps"] == [
        {"name": "one", "granularity": 32 * KiB, "flags": ["auto"]},
        {"name": "another", "granularity": 64 * KiB, "flags": []},
    ]


def test_the_facts_are_those_of_qemu_img(tmp_path: Path) -> None:
    options = "lazy_refcounts=on,refcount_bits=32,compression_type=zstd,extended_l2=on,cluster_size=128k"
    path = made(tmp_path / "a.qcow2", MiB, options)
    facts = facts_of(path)
    names = ("compat", "compression", "refcount_bits", "lazy_refcounts", "extended_l2", "corrupt", "dirty", "unit")
    assert [facts[name] for name in names] == ["1.1", "zstd", 32, True, True, False, False, 128 * KiB]
    assert (facts["encrypted"], facts["encryption"], facts["backing"], facts["data_file"]) == (
        False,
        None,
        None,
        None,
    )
    assert facts_of(made(tmp_path / "b.qcow2", MiB, "compat=0.10"))["compat"] == "0.10"


@pytest.mark.parametrize(
    ("bit", "fact", "says"), [(1, "dirty", "not closed cleanly"), (2, "corrupt", "marked corrupt")]
)
def test_marks_are_told_and_the_disk_is_read(tmp_path: Path, bit: int, fact: str, says: str) -> None:
    path = made(tmp_path / "a.qcow2", MiB)
    content = content_of(path, "qcow2", tmp_path)
    data = bytearray(path.read_bytes())
    data[79] |= bit
    path.write_bytes(data)
    image = opened(path)
    assert image.facts[fact] is True
    assert says in image.warnings[0]
    assert read(image.source, 0, MiB) == content
    image.close()


def test_the_old_encryption_is_refused(tmp_path: Path) -> None:
    path = made(tmp_path / "a.qcow2", MiB)
    data = bytearray(path.read_bytes())
    data[35] = 1
    path.write_bytes(data)
    with pytest.raises(UnsupportedError, match="AES"):
        opened(path)


# ---------------------------------------------------------------------- large disks, and other programs' images


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=2M", "extended_l2=on,cluster_size=64k"])
def test_a_huge_empty_disk_is_told_at_once(tmp_path: Path, options: str) -> None:
    path = tmp_path / "a.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "64T")
    places = [0, 300 * MiB, 17 << 30, 40 * TiB, 63 * TiB + 500 * MiB]
    for number, place in enumerate(places):
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {number + 1} {place} 4k", path)
    image = opened(path)
    stored = [one for one in image.source.extents(0, 64 * TiB) if not one.state]
    assert {one.start for one in stored} >= set(places)
    assert sum(one.length for one in stored) <= len(places) * 2 * MiB  # less where the file has holes
    for number, place in enumerate(places):
        assert read(image.source, place, 4096) == bytes([number + 1]) * 4096
    assert read(image.source, 40 * TiB - 512, 1024) == bytes(512) + b"\4" * 512
    image.close()


def _sums(image: Image) -> tuple[str, str]:
    """sha256 of the disk, and as the corpus makes it of its blocks that are not zeros."""
    source, whole, sparse = image.source, hashlib.sha256(), hashlib.sha256()
    for start in range(0, source.size, MiB):
        piece = read(source, start, min(MiB, source.size - start))
        whole.update(piece)
        for at in range(0, len(piece), 64 * KiB):
            block = piece[at : at + 64 * KiB]
            if block.count(0) != len(block):
                sparse.update((start + at).to_bytes(8, "little") + block)
    sparse.update(source.size.to_bytes(8, "little"))
    return whole.hexdigest(), sparse.hexdigest()


@pytest.mark.parametrize(
    "entry", [one for one in corpus() if one["format"] in ("qcow", "qcow2")], ids=lambda entry: str(entry["id"])
)
def test_the_corpus(tmp_path: Path, entry: dict[str, Any]) -> None:
    path = unpack(entry, tmp_path)
    if entry["expect"] == "read":
        image = opened(path)
        told = entry["virtual_disk"]
        assert image.source.size == told["size"]
        assert _sums(image) == (told["sha256"], told["sparse64k_sha256"])
        image.close()
        return
    with pytest.raises(FormatError) as caught:
        image = opened(path)
        try:
            read(image.source, 0, image.source.size)
        finally:
            image.close()
    if entry["expect"] == "refuse-no-file-access":
        assert isinstance(caught.value, NotAllowed)
