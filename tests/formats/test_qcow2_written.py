"""qcow2 as we write it, judged by QEMU."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ferrotype.block import read
from ferrotype.block.file import FileSource
from ferrotype.block.outputs import Outputs
from ferrotype.errors import UsageError
from ferrotype.formats import Backing, Spec, qcow2
from ferrotype.formats.codecs import deflate, unzstd, zstd_frame
from ferrotype.formats.raw import open as open_raw
from ferrotype.formats.related import Related
from ferrotype.testing.formats import check_writable
from ferrotype.units import TiB
from tests.formats.judges import (
    KiB,
    MiB,
    check_reader,
    check_written,
    content_of,
    facts_of,
    make_image,
    make_image_piecemeal,
    opened,
    random_disk,
    scatter,
    scattered,
)
from tests.machine import run

KINDS = {
    "plain": ((), False),
    "plain 512": (("cluster_size=512",), False),
    "plain 2M": (("cluster_size=2MiB",), False),
    "zlib": ((), True),
    "zlib 512": (("cluster_size=512",), True),
    "zlib 2M": (("cluster_size=2MiB", "level=9"), True),
    "zstd": (("compression_type=zstd",), True),
    "zstd 4K": (("compression_type=zstd", "cluster_size=4KiB", "level=3"), True),
    "zstd 2M": (("compression_type=zstd", "cluster_size=2MiB"), True),
    "zstd plain": (("compression_type=zstd", "compat=1.1"), False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_qemu_reads_it_and_finds_no_error(tmp_path: Path, kind: str) -> None:
    texts, compress = KINDS[kind]
    content = random_disk(9 * MiB + 1536, seed=len(kind))
    path = make_image(tmp_path / "a.qcow2", "qcow2", content, *texts, compress=compress)
    check_written(path, "qcow2", content, tmp_path)
    check_reader(path, content, rounds=30)


@pytest.mark.parametrize("texts", [(), ("cluster_size=512",), ("cluster_size=1MiB",)])
def test_written_in_any_order(tmp_path: Path, texts: tuple[str, ...]) -> None:
    content = random_disk(9 * MiB + 512, seed=4)
    path = make_image_piecemeal(tmp_path / "a.qcow2", "qcow2", content, *texts)
    check_written(path, "qcow2", content, tmp_path)


@pytest.mark.parametrize("compress", [False, True])
def test_the_conformance_suite(tmp_path: Path, compress: bool) -> None:
    content = random_disk(2 * MiB + 512, seed=5)
    path = tmp_path / "a.qcow2"
    check_writable(qcow2, path, content, compress=compress, chosen={"cluster_size": 4 * KiB})
    check_written(path, "qcow2", content, tmp_path)


def test_qemu_goes_on_with_it(tmp_path: Path) -> None:
    """Reference counts that are wrong would let it overwrite what others use."""
    for number, compress in enumerate([False, True, True]):
        content = random_disk(4 * MiB, seed=6)
        texts = ("cluster_size=16KiB", *(("compression_type=zstd",) if number == 2 else ()))
        path = make_image(tmp_path / f"{number}.qcow2", "qcow2", content, *texts, compress=compress)
        scatter(path, "qcow2", 4 * MiB, seed=7)
        run("qemu-img", "snapshot", "-c", "one", path)
        scatter(path, "qcow2", 4 * MiB, seed=8)
        run("qemu-img", "check", "-q", path)
        check_reader(path, content_of(path, "qcow2", tmp_path), rounds=30)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_compressed_clusters_lie_close_together(tmp_path: Path, kind: str) -> None:
    """As QEMU packs them, whatever cluster of the file they end in; what does not shrink is stored as it is."""
    text = b"".join(b"line %d of a text that is not quite the same\n" % number for number in range(120_000))
    rng = random.Random(9)
    content = b"".join(text[at : at + 192 * KiB] + rng.randbytes(64 * KiB) for at in range(0, 4 * MiB, 256 * KiB))
    ours = make_image(tmp_path / "ours.qcow2", "qcow2", content, f"compression_type={kind}", compress=True)
    check_written(ours, "qcow2", content, tmp_path)
    (tmp_path / "a.raw").write_bytes(content)
    option = f"compression_type={kind}"
    run("qemu-img", "convert", "-c", "-O", "qcow2", "-o", option, tmp_path / "a.raw", tmp_path / "theirs.qcow2")
    assert ours.stat().st_size < 1.35 * (tmp_path / "theirs.qcow2").stat().st_size
    found: Any = json.loads(run("qemu-img", "check", "--output=json", ours))
    assert found["compressed-clusters"] == len(content) // (64 * KiB) * 3 // 4
    assert found["allocated-clusters"] == len(content) // (64 * KiB)
    pack = zstd_frame if kind == "zstd" else partial(deflate, wbits=-12)
    text = rng.randbytes(MiB).hex().encode()
    alone = make_image(tmp_path / "alone.qcow2", "qcow2", text, f"compression_type={kind}", compress=True)
    packed = sum(len(pack(text[at : at + 64 * KiB])) for at in range(0, len(text), 64 * KiB))
    tables = 5  # header, L2 and L1 table, reference counts and their table
    assert alone.stat().st_size == (-(-packed // (64 * KiB)) + tables) * 64 * KiB


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("cluster", ["512", "64KiB"])
def test_over_a_backing_file(tmp_path: Path, cluster: str, compress: bool) -> None:
    """Only what differs is stored, zeros over data as well; behind the end of the backing file too."""
    base = random_disk(3 * MiB + 512, seed=10)
    content = bytearray(base + random_disk(MiB, seed=11))
    content[MiB : MiB + 300_000] = bytes(300_000)
    content[2 * MiB : 2 * MiB + 100_000] = b"\x77" * 100_000
    (tmp_path / "base.img").write_bytes(base)
    image = open_raw(FileSource(tmp_path / "base.img"), Related(tmp_path / "base.img"))
    path = make_image(
        tmp_path / "a.qcow2",
        "qcow2",
        bytes(content),
        f"cluster_size={cluster}",
        compress=compress,
        backing=Backing("base.img", "raw", image.source),
    )
    image.close()
    check_written(path, "qcow2", bytes(content), tmp_path)
    told: Any = json.loads(run("qemu-img", "info", "--output=json", path))
    assert (told["backing-filename"], told["backing-filename-format"]) == ("base.img", "raw")
    assert path.stat().st_size < len(base) * 3 // 4
    check_reader(path, bytes(content), rounds=20)


def test_over_an_image_of_another_format(tmp_path: Path) -> None:
    scattered(tmp_path / "base.qcow2", "qcow2", 2 * MiB, seed=12)
    base = opened(tmp_path / "base.qcow2")
    content = bytearray(read(base.source, 0, 2 * MiB))
    content[70_000:140_000] = b"\5" * 70_000
    path = make_image(
        tmp_path / "a.qcow2", "qcow2", bytes(content), backing=Backing("base.qcow2", "qcow2", base.source)
    )
    base.close()
    check_written(path, "qcow2", bytes(content), tmp_path)
    assert facts_of(path)["backing"] == {"name": "base.qcow2", "format": "qcow2"}


@pytest.mark.parametrize("size", [0, 512, 1000, 64 * KiB, 64 * KiB + 1, 512 * MiB, 512 * MiB + 512])
@pytest.mark.parametrize("compress", [False, True])
def test_sizes_of_all_kinds(tmp_path: Path, size: int, compress: bool) -> None:
    """A disk that is not whole sectors is given zeros up to the next one: QEMU would leave its end out."""
    path = tmp_path / "a.qcow2"
    with Outputs(path) as outputs:
        sink = qcow2.create(outputs, Spec(size, compress=compress))
        if size:
            last = (size - 1) // (64 * KiB) * (64 * KiB)
            sink.write(last, memoryview(b"\1" * (size - last)))
        sink.finish()
        outputs.commit()
        sink.close()
    run("qemu-img", "check", "-q", path)
    told: Any = json.loads(run("qemu-img", "info", "--output=json", path))
    assert told["virtual-size"] == -(-size // 512) * 512
    if size:
        assert "failed" not in run("qemu-io", "-r", "-f", "qcow2", "-c", f"read -P 1 {last} {size - last}", path)
        image = opened(path)
        assert read(image.source, last, image.source.size - last).rstrip(b"\0") == b"\1" * (size - last)
        image.close()


def test_a_huge_disk_with_little_in_it(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    with Outputs(path) as outputs:
        sink = qcow2.create(outputs, Spec(64 * TiB))
        for at in (0, 5 * TiB, 64 * TiB - 64 * KiB):
            sink.write(at, memoryview(b"\2" * (64 * KiB)))
        sink.finish()
        outputs.commit()
        sink.close()
    run("qemu-img", "check", "-q", path)
    assert path.stat().st_size < 3 * MiB
    image = opened(path)
    assert [(one.start, one.length) for one in image.source.extents(0, 64 * TiB) if not one.state] == [
        (at, 64 * KiB) for at in (0, 5 * TiB, 64 * TiB - 64 * KiB)
    ]
    image.close()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cluster_size", "100"),
        ("cluster_size", "4MiB"),
        ("cluster_size", "256"),
        ("compression_type", "lzma"),
        ("level", "0"),
        ("level", "20"),
        ("level", "fast"),
        ("compat", "0.10"),
    ],
)
def test_options_that_mean_nothing(name: str, text: str) -> None:
    with pytest.raises(ValueError):
        qcow2.OPTIONS[name].parse(text)


@pytest.mark.parametrize(
    "spec",
    [
        Spec(4 * TiB, chosen={"cluster_size": 512}),
        Spec(MiB, chosen={"level": 12}),
        Spec(MiB, chosen={"cluster_size": 512}, backing=Backing("x" * 400, "raw", None)),  # type: ignore[arg-type]
        Spec(MiB, backing=Backing("x" * 1024, "raw", None)),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(tmp_path: Path, spec: Spec) -> None:
    with Outputs(tmp_path / "a.qcow2") as outputs, pytest.raises(UsageError):
        qcow2.create(outputs, spec)
    assert list(tmp_path.iterdir()) == []


def test_frames_of_zstd_in_a_row_are_one_cluster() -> None:
    plain = random_disk(100_000, seed=1)
    packed = zstd_frame(plain[:60_000]) + zstd_frame(plain[60_000:], level=3) + b"whatever follows"
    assert unzstd(packed, len(plain)) == plain
    assert len(deflate(plain, wbits=-12)) < len(plain)
