"""VHD: read against qemu-img and a builder of differencing disks, written for qemu-img and libvhdi."""

from __future__ import annotations

import os
import random
import struct
import uuid
from pathlib import Path

import pytest

from ferrotype.block import read
from ferrotype.errors import FormatError, InvalidImage, NotAllowed, UnsupportedError, UsageError
from ferrotype.extents import State
from ferrotype.formats.vhd.records import DynamicHeader, Footer, checksum
from ferrotype.formats.vhd.writer import geometry
from tests.cli.program import ferrotype
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
from tests.machine import need, run

BLOCK = 64 * KiB  # of the disks built here: small, so that there are many
PARENT_ID, CHILD_ID, OTHER_ID = (uuid.UUID(int=number).bytes for number in (1, 2, 3))


# ---------------------------------------------------------------------- building


def footer_of(
    size: int, kind: int, *, unique_id: bytes = CHILD_ID, app: bytes = b"win ", chs: tuple[int, int, int] = (1, 4, 17)
) -> bytes:
    """A footer, from the table of the specification."""
    data = struct.pack(
        ">8sIIQI4sI4sQQHBBII16sB427s", b"conectix", 2, 0x10000, 512 if kind != 2 else 2**64 - 1, 0x1E56F9C4, app,
        0x60001, b"Wi2k", size, size, *chs, kind, 0, unique_id, 0, b"",
    )  # fmt: skip
    return with_bytes(data, 64, struct.pack(">I", ~sum(data) & 0xFFFFFFFF))


def built(
    path: Path,
    size: int,
    blocks: dict[int, tuple[list[int], bytes]],
    *,
    kind: int = 3,
    unique_id: bytes = CHILD_ID,
    parent: bytes = bytes(16),
    name: str = "",
    locators: tuple[tuple[bytes, str], ...] = (),
    order: int = 0,
) -> Path:
    """A dynamic or differencing disk of blocks of 64 KiB: which sectors they have, and their content."""
    count = -(-size // BLOCK)
    at = -(-(1536 + 4 * count) // 512) * 512
    table, body, entries_ = [0xFFFFFFFF] * count, b"", b""
    for code, text in locators:
        encoded = text.encode("utf-16-le")
        entries_ += struct.pack(">4sIIIQ", code, 512, len(encoded), 0, at + len(body))
        body += encoded.ljust(512, b"\0")
    numbers = list(blocks)
    random.Random(order).shuffle(numbers)
    for number in numbers:
        sectors, content = blocks[number]
        bits = sum(1 << (1023 - sector) for sector in sectors).to_bytes(128, "big")
        table[number] = (at + len(body)) // 512
        body += bits.ljust(512, b"\0") + content
    header = struct.pack(
        ">8sQQIIII16sII512s192s256s", b"cxsparse", 2**64 - 1, 1536, 0x10000, count, BLOCK, 0, parent, 0, 0,
        name.encode("utf-16-be"), entries_, b"",
    )  # fmt: skip
    header = with_bytes(header, 36, struct.pack(">I", ~sum(header) & 0xFFFFFFFF))
    footer = footer_of(size, kind, unique_id=unique_id)
    bat = struct.pack(f">{count}I", *table).ljust(at - 1536, b"\xff")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(footer + header + bat + body + footer)
    return path


def layer(size: int, seed: int) -> tuple[dict[int, tuple[list[int], bytes]], dict[int, bytes]]:
    """Blocks for a differencing disk, and the sectors of the disk that it then has."""
    rng = random.Random(seed)
    blocks, sectors = {}, {}
    for number in rng.sample(range(-(-size // BLOCK)), k=size // BLOCK // 2):
        content = rng.randbytes(BLOCK)
        count = BLOCK // 512
        has = rng.choice([list(range(count)), rng.sample(range(count), 40), list(range(17, 60)), [count - 1], []])
        blocks[number] = (has, content)
        for sector in has:
            sectors[number * count + sector] = content[sector * 512 : (sector + 1) * 512]
    return blocks, sectors


def over(below: bytes, size: int, sectors: dict[int, bytes]) -> bytes:
    """A disk of ``size`` bytes with sectors over another disk."""
    disk = bytearray(below[:size].ljust(size, b"\0"))
    for number, content in sectors.items():
        if number * 512 < size:
            disk[number * 512 : number * 512 + 512] = content
    return bytes(disk)


# ---------------------------------------------------------------------- read


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (17 * MiB + 512, "subformat=dynamic,force_size=on"),
        (9 * MiB + 512, "subformat=dynamic"),
        (5 * MiB + 1536, "subformat=fixed,force_size=on"),
        (3 * MiB, "subformat=fixed"),
    ],
)
def test_disks_made_by_qemu(tmp_path: Path, size: int, options: str) -> None:
    path = scattered(tmp_path / "a.vhd", "vpc", size, options, seed=size)
    content = content_of(path, "vpc", tmp_path)
    assert len(content) >= size
    assert ("force_size" in options) == (len(content) == size)
    check_reader(path, content)


@pytest.mark.parametrize("order", range(3))
def test_a_chain_of_differencing_disks(tmp_path: Path, order: int) -> None:
    size = 3 * MiB + 1536
    base = scattered(tmp_path / "base.vhd", "vpc", size - 700 * KiB, "force_size=on", seed=order)
    content = content_of(base, "vpc", tmp_path)
    last, names = base.read_bytes()[68:84], ["base.vhd", "middle.vhd", "top.vhd"]
    for number, name in enumerate(names[1:]):
        blocks, sectors = layer(size, 10 * order + number)
        new = uuid.UUID(int=100 + number).bytes
        parent = names[number]
        built(tmp_path / name, size, blocks, kind=4, unique_id=new, parent=last, name=parent, order=order)
        content = over(content, size, sectors)
        last = new
        check_reader(tmp_path / name, content, rounds=60)
    image = opened(tmp_path / "top.vhd")
    assert image.facts["backing"] == {"name": "middle.vhd", "format": "vhd"}
    assert image.warnings == ()
    image.close()


def test_a_differencing_disk_as_7zip_reads_it(tmp_path: Path) -> None:
    need("7zz")
    size = 2 * MiB
    whole = {number: (list(range(128)), content) for number, (_, content) in layer(size, 1)[0].items()}
    built(tmp_path / "parent.vhd", size, whole, unique_id=PARENT_ID)
    child = built(tmp_path / "child.vhd", size, layer(size, 2)[0], kind=4, parent=PARENT_ID, name="parent.vhd")
    run("7zz", "x", "-tvhd", f"-o{tmp_path / 'out'}", child)
    check_reader(child, (tmp_path / "out" / "child.img").read_bytes(), rounds=20)


@pytest.mark.parametrize(
    ("folder", "name", "locators"),
    [
        ("", "parent.vhd", ()),
        ("", r"D:\disks\old\parent.vhd", ()),
        ("", "", ((b"W2ku", "C:\\vm\\parent.vhd"),)),
        ("", "wrong.vhd", ((b"W2ru", ".\\parent.vhd"),)),
        ("inner", "", ((b"W2ru", ".\\inner\\parent.vhd"), (b"W2ku", "C:\\x\\inner\\parent.vhd"))),
        ("inner", "", ((b"W2ku", "C:\\x\\other.vhd"), (b"MacX", "file:///x"), (b"W2ru", "inner\\parent.vhd"))),
        ("", "", ((b"W2ru", "..\\gone\\parent.vhd"),)),
    ],
)
def test_where_a_parent_is_found(
    tmp_path: Path, folder: str, name: str, locators: tuple[tuple[bytes, str], ...]
) -> None:
    content = random.Random(5).randbytes(BLOCK)
    built(tmp_path / folder / "parent.vhd", BLOCK, {0: (list(range(128)), content)}, unique_id=PARENT_ID)
    built(tmp_path / "wrong.vhd", BLOCK, {}, unique_id=OTHER_ID)
    child = built(tmp_path / "child.vhd", BLOCK, {}, kind=4, parent=PARENT_ID, name=name, locators=locators)
    image = opened(child)
    assert read(image.source, 0, BLOCK) == content
    image.close()


def test_a_parent_must_be_the_one_it_was_and_inside(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    child = built(inner / "child.vhd", BLOCK, {}, kind=4, parent=PARENT_ID, name="parent.vhd")
    with pytest.raises(InvalidImage, match=r"'parent\.vhd' is not there"):
        opened(child)
    built(inner / "parent.vhd", BLOCK, {}, unique_id=OTHER_ID)
    with pytest.raises(InvalidImage, match="is another"):
        opened(child)
    (inner / "parent.vhd").write_bytes(b"no disk at all" * 100)
    with pytest.raises(InvalidImage, match="has no VHD footer"):
        opened(child)
    built(tmp_path / "outside.vhd", BLOCK, {}, unique_id=PARENT_ID)
    outside = [((b"W2ru", "..\\outside.vhd"),), ((b"W2ku", str(tmp_path / "outside.vhd")),)]
    for locators in outside:
        built(inner / "child.vhd", BLOCK, {}, kind=4, parent=PARENT_ID, locators=locators)
        with pytest.raises(NotAllowed):
            opened(child)
        opened(child, allowed=[tmp_path]).close()


def test_a_loop_of_parents(tmp_path: Path) -> None:
    one = built(tmp_path / "one.vhd", BLOCK, {}, kind=4, unique_id=PARENT_ID, parent=CHILD_ID, name="two.vhd")
    built(tmp_path / "two.vhd", BLOCK, {}, kind=4, unique_id=CHILD_ID, parent=PARENT_ID, name="one.vhd")
    with pytest.raises(InvalidImage, match="loop"):
        opened(one)


def test_names_shared_by_many_layers_cost_no_more_than_the_layers(tmp_path: Path) -> None:
    """Each layer names two files that could be its parent: only one of them is followed."""
    ids = [uuid.UUID(int=number + 50).bytes for number in range(41)]
    for number in range(40):
        names = ((b"W2ru", f"a{number + 1}.vhd"), (b"W2ku", f"b{number + 1}.vhd"))
        for letter in "ab":
            path = tmp_path / f"{letter}{number}.vhd"
            built(path, BLOCK, {}, kind=4, unique_id=ids[number], parent=ids[number + 1], locators=names)
    with pytest.raises(InvalidImage, match=r"'a40\.vhd' is not there"):
        opened(tmp_path / "a0.vhd")


@pytest.mark.parametrize(
    ("app", "by_geometry"),
    [(b"vpc ", True), (b"vs  ", True), (b"qemu", True)]
    + [(app, False) for app in (b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS", b"wa\0\0", b"vbox", b"????")],
)
def test_who_goes_by_the_geometry(tmp_path: Path, app: bytes, by_geometry: bool) -> None:
    size, chs = 40_000 * 512, (585, 4, 17)
    path = tmp_path / "a.vhd"

    def size_of(*, current: int = size, chs: tuple[int, int, int] = chs) -> int:
        path.write_bytes(bytes(size) + footer_of(current, 2, app=app, chs=chs))
        image = opened(path)
        image.close()
        return image.source.size

    assert size_of() == (585 * 4 * 17 * 512 if by_geometry else size)
    if app not in (b"wa\0\0", b"vbox", b"????"):  # which qemu 7.2 takes for Virtual PC's
        assert len(content_of(path, "vpc", tmp_path)) == size_of()
    assert size_of(chs=(0, 0, 0)) == size
    assert size_of(chs=(65535, 16, 255)) == size
    assert size_of(chs=(2000, 4, 17)) == size  # rounded up by old programs: the rest is not there
    with pytest.raises(InvalidImage, match="the file ends after"):
        size_of(current=size + 512, chs=(0, 0, 0))


@pytest.mark.parametrize("kind", ["fixed", "dynamic"])
def test_what_stands_behind_the_geometry_is_told(kind: str, tmp_path: Path) -> None:
    size, chs, path = 40_000 * 512, (585, 4, 17), tmp_path / "a.vhd"
    inside = 585 * 4 * 17 * 512
    for data, told in ((b"", False), (b"the last file", True)):
        if kind == "fixed":
            disk = bytearray(size)
            disk[size - 512 : size - 512 + len(data)] = data
            path.write_bytes(bytes(disk) + footer_of(size, 2, app=b"vpc ", chs=chs))
        else:
            blocks = {size // BLOCK: (list(range(128)), data.ljust(BLOCK, b"\0"))}
            raw, footer = built(path, size, blocks).read_bytes(), footer_of(size, 3, app=b"vpc ", chs=chs)
            path.write_bytes(footer + raw[512:-512] + footer)
        image = opened(path)
        image.close()
        assert image.source.size == inside
        assert any("geometry" in sentence for sentence in image.besides) == told
    done = ferrotype("convert", path, tmp_path / "a.img", code=8)
    assert "geometry ends the disk" in done.err


def test_a_disk_too_large_for_its_geometry(tmp_path: Path) -> None:
    size, path = 128 << 30, tmp_path / "a.vhd"
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(size)
        file.write(footer_of(size, 2, app=b"vpc ", chs=(65535, 16, 255)))
    image = opened(path)
    image.close()
    assert image.source.size == size
    assert f'"virtual-size": {size}' in run("qemu-img", "info", "--output=json", "-f", "vpc", path)


def test_a_footer_of_511_bytes(tmp_path: Path) -> None:
    content = random_disk(MiB, seed=1)
    path = tmp_path / "a.vhd"
    path.write_bytes(content + footer_of(MiB, 2)[:511])
    check_reader(path, content, rounds=10)


@pytest.fixture
def dynamic(tmp_path: Path) -> bytes:
    blocks, _ = layer(MiB, 4)
    return built(tmp_path / "dynamic.vhd", MiB, blocks).read_bytes()


def test_the_copy_of_the_footer(tmp_path: Path, dynamic: bytes) -> None:
    good = opened(tmp_path / "dynamic.vhd")
    content = read(good.source, 0, MiB)
    good.close()
    assert good.warnings == ()
    path = tmp_path / "a.vhd"
    damage = {"at the end": len(dynamic) - 400, "at the start": 100}
    for where, at in damage.items():
        path.write_bytes(with_bytes(dynamic, at, b"x"))
        image = opened(path)
        assert read(image.source, 0, MiB) == content
        assert len(image.warnings) == 1
        assert where in image.warnings[0]
        image.close()
    path.write_bytes(dynamic[:-512])
    image = opened(path)
    assert "missing" in image.warnings[0]
    image.close()
    path.write_bytes(with_bytes(with_bytes(dynamic, 100, b"x"), len(dynamic) - 400, b"x"))
    with pytest.raises(InvalidImage, match="Checksum"):
        opened(path)
    # changed by a program that does not sum up: both say the same
    path.write_bytes(with_bytes(with_bytes(dynamic, 100, b"x"), len(dynamic) - 512 + 100, b"x"))
    image = opened(path)
    assert "wrong, and both say the same" in image.warnings[0]
    image.close()
    path.write_bytes(with_bytes(dynamic, 512 + 900, b"x"))
    image = opened(path)
    assert image.warnings == ("the checksum of the dynamic disk header is wrong",)
    image.close()


def test_a_fixed_disk_whose_first_sector_is_a_footer(tmp_path: Path) -> None:
    """Whoever writes the disk does not choose what its file is taken for."""
    content = footer_of(MiB, 3) + bytes(MiB - 512)
    path = tmp_path / "a.vhd"
    path.write_bytes(content + footer_of(MiB, 2))
    image = opened(path)
    assert read(image.source, 0, MiB) == content
    image.close()
    path.write_bytes(with_bytes(path.read_bytes(), MiB + 64, b"1234"))
    with pytest.raises(FormatError):
        opened(path)


# ---------------------------------------------------------------------- hostile


def resummed(image: bytes, at: int, field: int, length: int) -> bytes:
    """With the checksum of the structure at ``at`` made right again."""
    return with_bytes(image, at + field, struct.pack(">I", checksum(image[at : at + length], field)))


def test_every_field_set_to_what_it_must_not_be(tmp_path: Path) -> None:
    built(tmp_path / "parent.vhd", MiB, layer(MiB, 1)[0], unique_id=PARENT_ID)
    image = built(
        tmp_path / "child.vhd", MiB, layer(MiB, 2)[0], kind=4, parent=PARENT_ID, name="parent.vhd",
        locators=((b"W2ru", "parent.vhd"),),
    ).read_bytes()  # fmt: skip
    path, end = tmp_path / "a.vhd", len(image) - 512
    refused = kept = 0
    for field in fields_of(Footer):
        for value in bad_values(field, image[field.offset : field.offset + field.size]):
            changed = resummed(with_bytes(image, field.offset, value), 0, 64, 512)
            path.write_bytes(changed[:end] + changed[:512])
            survived = survives(path, "vhd")
            refused, kept = refused + (not survived), kept + survived
    for field in fields_of(DynamicHeader):
        at = 512 + field.offset
        for value in bad_values(field, image[at : at + field.size]):
            path.write_bytes(resummed(with_bytes(image, at, value), 512, 36, 1024))
            survived = survives(path, "vhd")
            refused, kept = refused + (not survived), kept + survived
    assert refused > 100
    assert kept > 50


def test_entries_of_the_bat(tmp_path: Path, dynamic: bytes) -> None:
    path = tmp_path / "a.vhd"
    for entry in (0, 1, 2, 3, len(dynamic) // 512, 0x7FFFFFFF, 0xFFFFFFFE):
        path.write_bytes(with_bytes(dynamic, 1536, struct.pack(">I", entry)))
        image = opened(path)
        with pytest.raises(InvalidImage):
            read(image.source, 0, BLOCK)
        image.close()


def test_one_block_for_many(tmp_path: Path) -> None:
    """A bitmap of every other sector, used for a whole disk, would be a file of KiB with runs without end."""
    built(tmp_path / "parent.vhd", MiB, {}, unique_id=PARENT_ID)
    blocks = {number: (list(range(0, 128, 2)), bytes(BLOCK)) for number in range(16)}
    child = built(tmp_path / "child.vhd", MiB, blocks, kind=4, parent=PARENT_ID, name="parent.vhd")
    opened(child).close()
    image = child.read_bytes()
    child.write_bytes(with_bytes(image, 1536, image[1536:1540] * 16))
    with pytest.raises(InvalidImage, match="names a block twice"):
        opened(child)


def test_files_cut_short(tmp_path: Path, dynamic: bytes) -> None:
    path = tmp_path / "a.vhd"
    opens = 0
    for length in [*range(0, 2200, 97), *range(2200, len(dynamic), 39_000)]:
        path.write_bytes(dynamic[:length])
        opens += survives(path, "vhd")
    assert opens > 5


@pytest.mark.parametrize(("field", "value"), [(12, 0x20000), (60, 5), (60, 0)])
def test_what_is_not_supported(tmp_path: Path, field: int, value: int) -> None:
    footer = resummed(with_bytes(footer_of(MiB, 2), field, struct.pack(">I", value)), 0, 64, 512)
    path = tmp_path / "a.vhd"
    path.write_bytes(bytes(MiB) + footer)
    with pytest.raises(UnsupportedError):
        opened(path)


# ---------------------------------------------------------------------- written


@pytest.mark.parametrize("make", [make_image, make_image_piecemeal])
@pytest.mark.parametrize("subformat", ["dynamic", "fixed"])
@pytest.mark.parametrize("size", [512, 2 * MiB, 9 * MiB + 1536])
def test_written_disks(tmp_path: Path, make: type, subformat: str, size: int) -> None:
    content = random_disk(size, seed=size)
    path = make(tmp_path / "a.vhd", "vhd", content, f"subformat={subformat}")
    check_written(path, "vpc", content, tmp_path, consistent=False)  # qemu-img cannot check these
    check_reader(path, content, rounds=30)
    image = path.read_bytes()
    footer = Footer.unpack(image[-512:])
    assert checksum(image[-512:], 64) == footer.Checksum
    assert footer.CurrentSize == footer.OriginalSize == size
    assert uuid.UUID(bytes=footer.UniqueId).version == 4
    assert footer.geometry <= size // 512
    if subformat == "dynamic":
        assert image[:512] == image[-512:]
        header = DynamicHeader.unpack(image, 512)
        assert checksum(image[512:1536], 36) == header.Checksum
        assert (header.BlockSize, header.MaxTableEntries) == (2 * MiB, -(-size // (2 * MiB)))
        for entry in struct.unpack_from(f">{header.MaxTableEntries}I", image, header.TableOffset):
            assert entry == 0xFFFFFFFF or image[entry * 512 : entry * 512 + 512] == b"\xff" * 512


def test_libvhdi_reads_written_disks(tmp_path: Path) -> None:
    need("vhdiinfo")
    for subformat, kind in (("dynamic", "Dynamic"), ("fixed", "Fixed")):
        path = make_image(
            tmp_path / f"{subformat}.vhd", "vhd", random_disk(5 * MiB, seed=2), f"subformat={subformat}"
        )
        told = run("vhdiinfo", path)
        assert kind in told
        assert f"({5 * MiB} bytes)" in told


def test_zeros_take_no_blocks(tmp_path: Path) -> None:
    content = bytes(7 * MiB) + os.urandom(MiB) + bytes(32 * MiB)
    path = make_image(tmp_path / "a.vhd", "vhd", content)
    assert path.stat().st_size < 3 * MiB
    image = opened(path)
    assert zero_bytes(image) >= len(content) - 2 * MiB
    image.close()
    path = make_image(tmp_path / "empty.vhd", "vhd", bytes(3 * MiB))
    assert path.stat().st_size == 2560
    check_written(path, "vpc", bytes(3 * MiB), tmp_path, consistent=False)


@pytest.mark.parametrize("size", [0, 513, 2040 * 1024 * MiB + 512])
def test_sizes_that_a_vhd_cannot_have(tmp_path: Path, size: int) -> None:
    from ferrotype.block.outputs import Outputs
    from ferrotype.formats import Spec
    from ferrotype.formats.vhd import create

    with Outputs(tmp_path / "a.vhd") as outputs, pytest.raises(UsageError):
        create(outputs, Spec(size))
    with Outputs(tmp_path / "a.vhd") as outputs, pytest.raises(UsageError):
        create(outputs, Spec(MiB, compress=True))


def test_the_largest_disk(tmp_path: Path) -> None:
    from ferrotype.block.outputs import Outputs
    from ferrotype.formats import Spec
    from ferrotype.formats.vhd import create

    size = 2040 * 1024 * MiB
    with Outputs(tmp_path / "a.vhd") as outputs:
        sink = create(outputs, Spec(size))
        sink.write(size - MiB, memoryview(b"the end".ljust(MiB, b".")))
        sink.finish()
        outputs.commit()
    assert f'"virtual-size": {size}' in run("qemu-img", "info", "--output=json", "-f", "vpc", tmp_path / "a.vhd")
    image = opened(tmp_path / "a.vhd")
    assert image.source.size == size
    assert read(image.source, size - MiB, 8) == b"the end."
    assert image.source.extents(0, size).total(State.ZERO) >= size - 2 * MiB
    image.close()


@pytest.mark.parametrize("sectors", [1, 68, 20_000, 1_000_000, 66_059_279, 66_059_280, 300_000_000])
def test_geometry_is_never_larger_than_the_disk(sectors: int) -> None:
    cylinders, heads, track = geometry(sectors)
    assert cylinders * heads * track <= sectors
    assert cylinders <= 65535
    assert heads <= 16
    assert track <= 255
