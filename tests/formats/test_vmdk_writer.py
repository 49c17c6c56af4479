"""Writing VMDK: judged by qemu, and streams by a parser that follows their markers."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from ferrotype.block import read
from ferrotype.block.outputs import Outputs
from ferrotype.errors import UsageError
from ferrotype.extents import State
from ferrotype.formats import Backing, Packer, Spec
from ferrotype.formats.vmdk import create
from tests.formats import vmdk_builders as build
from tests.formats.judges import (
    KiB,
    MiB,
    check_reader,
    check_written,
    facts_of,
    make_image,
    make_image_piecemeal,
    opened,
    random_disk,
)
from tests.machine import need, run

SUBFORMATS = ["monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized"]
GiB, TiB = 1 << 30, 1 << 40


@pytest.mark.parametrize("subformat", SUBFORMATS)
@pytest.mark.parametrize("make", [make_image, make_image_piecemeal])
@pytest.mark.parametrize("size", [512, 5 * MiB + 1536, 34 * MiB])
def test_written_disks_hold_what_was_written(
    tmp_path: Path, subformat: str, make: Callable[..., Path], size: int
) -> None:
    need("qemu-img")
    content = random_disk(size, seed=size)
    path = make(tmp_path / "a.vmdk", "vmdk", content, f"subformat={subformat}")
    check_written(path, "vmdk", content, tmp_path, consistent="Flat" not in subformat)
    assert facts_of(path)["subformat"] == subformat
    names = {
        "monolithicFlat": ["a-flat.vmdk"],
        "twoGbMaxExtentSparse": ["a-s001.vmdk"],
        "twoGbMaxExtentFlat": ["a-f001.vmdk"],
    }
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(["a.vmdk", *names.get(subformat, [])])


@pytest.mark.parametrize("subformat", SUBFORMATS)
def test_the_capacity_is_whole_sectors_and_no_more(tmp_path: Path, subformat: str) -> None:
    need("qemu-img")
    content = random_disk(3 * MiB, seed=5) + b"x" * 77
    path = make_image(tmp_path / "a.vmdk", "vmdk", content, f"subformat={subformat}")
    check_reader(path, content + bytes(512 - 77), rounds=30)
    assert f'"virtual-size": {3 * MiB + 512}' in run("qemu-img", "info", "--output=json", path)


@pytest.mark.parametrize("subformat", SUBFORMATS)
def test_zeros_take_no_room(tmp_path: Path, subformat: str) -> None:
    content = b"a" * (64 * KiB) + bytes(30 * MiB) + b"b" * (64 * KiB)
    path = make_image(tmp_path / "a.vmdk", "vmdk", content, f"subformat={subformat}")
    assert sum(one.stat().st_blocks for one in tmp_path.iterdir()) * 512 < MiB
    image = opened(path)
    assert image.source.extents(0, len(content)).total(State.ZERO) == 30 * MiB
    image.close()


def test_the_redundant_tables_are_filled(tmp_path: Path) -> None:
    content = random_disk(36 * MiB, seed=8)
    path = make_image(tmp_path / "a.vmdk", "vmdk", content)
    data = path.read_bytes()
    directory, copy = (struct.unpack_from("<Q", data, at)[0] * 512 for at in (56, 48))
    own, other = (struct.unpack_from("<2I", data, at) for at in (directory, copy))
    assert own != other
    build.patch(path, directory, struct.pack("<2I", *other))
    assert build.whole(path) == content
    build.patch(path, directory, b"\xff\xff\xff\xff")
    assert build.whole(path) == content
    assert "redundant copy is used" in build.warnings_of(path)


@pytest.mark.parametrize("size", [512, 64 * KiB, 5 * MiB + 1536, 32 * MiB, 67 * MiB + 512])
@pytest.mark.parametrize("texts", [("level=9",), ()])
def test_the_markers_of_a_stream(tmp_path: Path, size: int, texts: tuple[str, ...]) -> None:
    content = random_disk(size, seed=size + 1)
    path = make_image(tmp_path / "a.vmdk", "vmdk", content, *texts, compress=True)
    found = build.parse_stream(path.read_bytes())
    assert found["content"] == content
    assert found["tables"] == sum(any(content[at : at + 32 * MiB]) for at in range(0, size, 32 * MiB))
    assert f'RDONLY {size // 512} SPARSE "a.vmdk"' in found["text"]


def test_tables_without_grains_are_left_out_of_a_stream(tmp_path: Path) -> None:
    need("qemu-img")
    content = bytearray(100 * MiB)
    content[70 * MiB : 70 * MiB + 3] = b"abc"
    path = make_image(tmp_path / "a.vmdk", "vmdk", bytes(content), compress=True)
    assert build.parse_stream(path.read_bytes())["tables"] == 1
    check_written(path, "vmdk", bytes(content), tmp_path)
    empty = make_image(tmp_path / "e.vmdk", "vmdk", bytes(3 * MiB), compress=True)
    assert build.parse_stream(empty.read_bytes())["tables"] == 0
    check_written(empty, "vmdk", bytes(3 * MiB), tmp_path)


def test_a_stream_packs_on_all_cores(tmp_path: Path) -> None:
    with Outputs(tmp_path / "a.vmdk") as outputs:
        sink = create(outputs, Spec(MiB, compress=True))
        assert isinstance(sink, Packer)
        assert sink.traits.ordered


@pytest.mark.parametrize("subformat", ["monolithicSparse", "streamOptimized", "monolithicFlat"])
@pytest.mark.parametrize(
    ("adapter", "size", "geometry"),
    [
        ("ide", 10 * MiB, (20, 16, 63)),
        ("lsilogic", 10 * MiB, (10, 64, 32)),
        ("buslogic", 10 * MiB, (10, 64, 32)),
        ("legacyESX", 10 * MiB, (10, 64, 32)),
        ("lsilogic", GiB, (512, 128, 32)),
        ("lsilogic", 2 * GiB, (261, 255, 63)),
        ("ide", 9 * GiB, (16383, 16, 63)),
    ],
)
def test_the_descriptor_says_what_was_asked_for(
    tmp_path: Path, subformat: str, adapter: str, size: int, geometry: tuple[int, int, int]
) -> None:
    path = tmp_path / "a.vmdk"
    texts = {"subformat": subformat, "adapter_type": adapter, "hardware_version": 13}
    with Outputs(path) as outputs:
        sink = create(outputs, Spec(size, chosen=texts))
        sink.finish()
        outputs.commit()
        sink.close()
    text = path.read_bytes()[:12_000].decode("latin-1")
    settings = dict(re.findall(r'^([\w.]+) *= *"?([^"\n]*)"?$', text, re.MULTILINE))
    found = tuple(int(settings[f"ddb.geometry.{key}"]) for key in ("cylinders", "heads", "sectors"))
    assert found == geometry
    assert settings["ddb.adapterType"] == adapter
    assert settings["ddb.virtualHWVersion"] == "13"
    assert settings["parentCID"] == "ffffffff"
    assert settings["createType"] == subformat
    assert settings["ddb.longContentID"].endswith(settings["CID"])
    assert re.fullmatch(r"60 00 c2 9.( ..){4}-..( ..){7}", settings["ddb.uuid"])


def test_two_disks_have_two_contents(tmp_path: Path) -> None:
    paths = [make_image(tmp_path / f"{name}.vmdk", "vmdk", bytes(MiB)) for name in "ab"]
    assert len({facts_of(path)["cid"] for path in paths}) == 2


@pytest.mark.parametrize("flat", [True, False])
def test_split_disks_meet_at_the_boundary(tmp_path: Path, *, flat: bool) -> None:
    need("qemu-img")
    subformat = "twoGbMaxExtentFlat" if flat else "twoGbMaxExtentSparse"
    size, part = 5 * GiB + 512, 2047 * MiB
    with Outputs(tmp_path / "a.VMDK") as outputs, (tmp_path / "a.raw").open("wb") as raw:
        sink = create(outputs, Spec(size, chosen={"subformat": subformat}))
        for offset, length in [(part - MiB, 2 * MiB), (0, 64 * KiB), (2 * part, MiB), (size - 512, 512)]:
            piece = random_disk(length, offset).replace(b"\0\0", b"ab")
            offset = offset // (64 * KiB) * 64 * KiB
            sink.write(offset, memoryview(piece))
            raw.seek(offset)
            raw.write(piece)
        raw.truncate(size)
        sink.finish()
        outputs.commit()
        sink.close()
    names = [f"a-{'f' if flat else 's'}00{number}.vmdk" for number in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["a.VMDK", "a.raw", *names])
    run("qemu-img", "compare", "-f", "vmdk", "-F", "raw", tmp_path / "a.VMDK", tmp_path / "a.raw")
    image = opened(tmp_path / "a.VMDK")
    assert image.source.size == size
    with (tmp_path / "a.raw").open("rb") as file:
        for offset in (0, part - MiB - 5, 2 * part - 3, size - 100_000):
            file.seek(offset)
            expected = file.read(min(3 * MiB, size - offset))
            assert read(image.source, offset, len(expected)) == expected
    image.close()


def test_a_disk_of_64_tib_with_little_in_it(tmp_path: Path) -> None:
    need("qemu-img")
    path = tmp_path / "a.vmdk"
    with Outputs(path) as outputs:
        sink = create(outputs, Spec(64 * TiB))
        sink.write(63 * TiB, memoryview(b"x" * 64 * KiB))
        sink.write(MiB, memoryview(b"y" * 64 * KiB))
        sink.finish()
        outputs.commit()
        sink.close()
    image = opened(path)
    extents = image.source.extents(0, image.source.size)
    assert [(one.start, one.length) for one in extents if not one.state & State.ZERO] == [
        (MiB, 64 * KiB), (63 * TiB, 64 * KiB),
    ]  # fmt: skip
    assert read(image.source, 63 * TiB - 1, 64 * KiB + 2) == b"\0" + b"x" * 64 * KiB + b"\0"
    image.close()
    assert '"virtual-size": 70368744177664' in run("qemu-img", "info", "--output=json", path)


@pytest.mark.parametrize(
    ("texts", "compress", "words"),
    [
        (["subformat=monolithicFlat"], True, "not compressed"),
        (["subformat=nonsense"], False, "one of monolithicSparse"),
        (["adapter_type=floppy"], False, "one of ide"),
        (["hardware_version=x"], False, "a number from"),
        (["level=0"], True, "a number from"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, texts: list[str], words: str, *, compress: bool) -> None:
    with pytest.raises(UsageError, match=words):
        make_image(tmp_path / "a.vmdk", "vmdk", bytes(MiB), *texts, compress=compress)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    for name in ('a".vmdk', "a\n.vmdk"):
        with pytest.raises(UsageError, match="plainer"):
            make_image(tmp_path / name, "vmdk", bytes(MiB), tmp=tmp_path)
    for size in (0, 64 * TiB + 1):
        with Outputs(tmp_path / "b.vmdk") as outputs, pytest.raises(UsageError, match="a VMDK disk has from"):
            create(outputs, Spec(size))
    base = make_image(tmp_path / "base.vmdk", "vmdk", bytes(MiB))
    image = opened(base)
    with Outputs(tmp_path / "b.vmdk") as outputs, pytest.raises(UsageError, match="over another"):
        create(outputs, Spec(MiB, backing=Backing("base.vmdk", "vmdk", image.source)))
    image.close()
    with Outputs(tmp_path / "b.vmdk") as outputs, pytest.raises(UsageError, match="too many"):
        create(outputs, Spec(3 * TiB, chosen={"subformat": "twoGbMaxExtentFlat"}))
    assert not (tmp_path / "b.vmdk").exists()


@pytest.mark.parametrize("new", SUBFORMATS)
@pytest.mark.parametrize("old", SUBFORMATS)
def test_extents_of_the_disk_that_is_replaced_go_with_it(tmp_path: Path, old: str, new: str) -> None:
    path = make_image(tmp_path / "a.vmdk", "vmdk", random_disk(MiB), f"subformat={old}")
    mine = {"a-s002.vmdk", "a-flat2.vmdk", "b-flat.vmdk"}  # called like extents, and of no disk that is replaced
    for name in mine:
        (tmp_path / name).write_bytes(b"mine")
    content = random_disk(2 * MiB, seed=2)
    with Outputs(path, replace=True) as outputs:
        sink = create(outputs, Spec(len(content), chosen={"subformat": new}))
        sink.write(0, memoryview(content))
        sink.finish()
        outputs.commit()
        sink.close()
    check_reader(path, content, rounds=5)
    names = {one.name for one in tmp_path.iterdir()}
    extents = {"monolithicFlat": {"a-flat.vmdk"}, "twoGbMaxExtentSparse": {"a-s001.vmdk"}}
    extents["twoGbMaxExtentFlat"] = {"a-f001.vmdk"}
    assert names == mine | {"a.vmdk"} | extents.get(new, set())


def test_a_descriptor_does_not_choose_which_files_go(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    names = ["b-flat.vmdk", "a-flat.txt", "../a-flat.vmdk", "sub/a-s001.vmdk", str(tmp_path / "a-flat.vmdk")]
    lines = "".join(f'RW 2048 FLAT "{name}" 0\n' for name in names)
    path = tmp_path / "a.vmdk"
    path.write_text(f'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="custom"\n{lines}')
    for name in ("b-flat.vmdk", "a-flat.txt", "sub/a-s001.vmdk", "a-flat.vmdk"):
        (tmp_path / name).write_bytes(b"mine")
    with Outputs(path, replace=True) as outputs:
        create(outputs, Spec(MiB)).finish()
        outputs.commit()
    assert (tmp_path / "a-flat.vmdk").exists()
    assert len(list(tmp_path.rglob("*.*"))) == 5
