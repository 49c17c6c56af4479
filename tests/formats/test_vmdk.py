"""Reading VMDK: images by qemu, by hand-laid builders, and from the corpus."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path
from typing import Any

import pytest

from ferrotype.errors import FormatError, InvalidImage, NotAllowed, UnsupportedError
from ferrotype.extents import State
from tests.formats import vmdk_builders as build
from tests.formats.judges import MiB, check_reader, content_of, facts_of, opened, random_disk, scatter, scattered
from tests.formats.vmdk_builders import patch, refused, warnings_of, whole
from tests.machine import corpus, need, run, unpack

SIZE = 5 * MiB + 1536
CONTENT = random_disk(SIZE, seed=11)
ENTRIES = [entry for entry in corpus() if entry["format"] in ("vmdk", "vmdk-sesparse")]


# ---------------------------------------------------------------------- made by qemu


@pytest.mark.parametrize(
    ("subformat", "options"),
    [
        ("monolithicSparse", ""),
        ("monolithicSparse", "zeroed_grain=on"),
        ("monolithicFlat", ""),
        ("twoGbMaxExtentSparse", "zeroed_grain=on"),
        ("twoGbMaxExtentFlat", ""),
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
def test_disks_written_in_shuffled_order(tmp_path: Path, subformat: str, options: str, seed: int) -> None:
    need("qemu-img", "qemu-io")
    chosen = f"subformat={subformat}" + (f",{options}" if options else "")
    path = scattered(tmp_path / "a.vmdk", "vmdk", SIZE, chosen, seed=seed)
    check_reader(path, content_of(path, "vmdk", tmp_path), rounds=60, seed=seed)
    assert facts_of(path)["subformat"] == subformat


def test_zeroed_grains_are_known_zeros(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    path = scattered(tmp_path / "a.vmdk", "vmdk", SIZE, "subformat=monolithicSparse,zeroed_grain=on", writes=0)
    run("qemu-io", "-f", "vmdk", "-c", "write -P 7 0 1M", "-c", "write -z 128k 128k", path)
    image = opened(path)
    extents = image.source.extents(0, 1 * MiB)
    assert [(extent.start, extent.state) for extent in extents] == [
        (0, State.DATA), (128 << 10, State.ZERO), (256 << 10, State.DATA),
    ]  # fmt: skip
    image.close()


def test_a_stream_by_qemu(tmp_path: Path) -> None:
    need("qemu-img")
    (tmp_path / "a.raw").write_bytes(CONTENT)
    run(
        "qemu-img",
        "convert",
        "-O",
        "vmdk",
        "-o",
        "subformat=streamOptimized",
        tmp_path / "a.raw",
        tmp_path / "a.vmdk",
    )
    check_reader(tmp_path / "a.vmdk", CONTENT)


def test_a_chain_of_three(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    base = scattered(tmp_path / "base.vmdk", "vmdk", SIZE, "zeroed_grain=on", seed=5, writes=25)
    middle = scattered(
        tmp_path / "middle.vmdk",
        "vmdk",
        SIZE,
        "zeroed_grain=on",
        seed=6,
        writes=25,
        backing=(Path("base.vmdk"), "vmdk"),
    )
    top = scattered(
        tmp_path / "top.vmdk",
        "vmdk",
        SIZE,
        "zeroed_grain=on",
        seed=7,
        writes=25,
        backing=(Path("middle.vmdk"), "vmdk"),
    )
    check_reader(top, content_of(top, "vmdk", tmp_path))
    assert facts_of(top)["backing"] == {"name": "middle.vmdk", "format": "vmdk"}
    # a parent that was written to afterwards is no longer the one
    cid = facts_of(middle)["parent_cid"]
    scatter(base, "vmdk", SIZE, seed=8, writes=3, zeros=False)
    refused(top, f"{cid}.*base.vmdk.*{facts_of(base)['cid']}")


# ---------------------------------------------------------------------- laid out by hand


@pytest.mark.parametrize("holes", [True, False])
@pytest.mark.parametrize("grain", [512, 8192])
def test_cowd(tmp_path: Path, grain: int, *, holes: bool) -> None:
    need("qemu-img")
    content = CONTENT[:MiB] + bytes(4 * MiB) + CONTENT[: MiB + 1536]  # the second table has nothing
    path = tmp_path / "a-delta.vmdk"
    path.write_bytes(build.cowd(content, grain=grain, holes=holes))
    disk = build.write_descriptor(
        tmp_path / "a.vmdk", [f'RW {len(content) // 512} VMFSSPARSE "a-delta.vmdk"'], "vmfsSparse"
    )
    assert content_of(disk, "vmdk", tmp_path) == content
    for one in (path, disk):
        check_reader(one, content, rounds=40)
    assert "without its descriptor" in warnings_of(path)
    assert warnings_of(disk) == ""
    patch(path, 8, struct.pack("<I", 6) + path.read_bytes()[12:32] + b"base.vmdk")
    refused(path, "open its descriptor", UnsupportedError)
    assert whole(disk) == content
    assert facts_of(disk)["dirty"] is True


def test_sesparse(tmp_path: Path) -> None:
    need("qemu-img")
    content = CONTENT + bytes(16 * MiB - SIZE) + CONTENT[: 4 * MiB] + bytes(8192 + 20 * MiB) + CONTENT[: MiB + 512]
    path = tmp_path / "a-sesparse.vmdk"
    path.write_bytes(build.sesparse(content, {5120: 1, 5121: 2}, skip=4000))
    sectors = len(content) // 512
    disk = build.write_descriptor(tmp_path / "a.vmdk", [f'RW {sectors} SESPARSE "a-sesparse.vmdk"'], "seSparse")
    assert content_of(disk, "vmdk", tmp_path) == content
    for one in (path, disk):
        check_reader(one, content, rounds=25)
    image = opened(disk)
    assert image.source.extents(20 << 20, 8192).total(State.ZERO) == 8192
    assert image.facts["unit"] == 4096
    image.close()


def test_sesparse_over_a_parent(tmp_path: Path) -> None:
    lower, upper = random_disk(2 * MiB, seed=1), random_disk(3 * MiB, seed=2)
    (tmp_path / "base-flat.vmdk").write_bytes(lower)
    lower = lower.ljust(3 * MiB, b"\0")  # a parent that is shorter shows zeros behind its end
    build.write_descriptor(tmp_path / "base.vmdk", [f'RW {2 * 2048} VMFS "base-flat.vmdk"'], "vmfs", CID="00000abc")
    (tmp_path / "top-sesparse.vmdk").write_bytes(build.sesparse(upper, {3: 2}))
    more = {"parentCID": "abc", "parentFileNameHint": '"base.vmdk"'}
    top = build.write_descriptor(tmp_path / "top.vmdk", ['RW 6144 SESPARSE "top-sesparse.vmdk"'], "seSparse", **more)
    grains = [
        bytes(4096) if at == 3 else upper[at * 4096 : (at + 1) * 4096]
        if any(upper[at * 4096 : (at + 1) * 4096])
        else lower[at * 4096 : (at + 1) * 4096]
        for at in range(3 * 256)
    ]  # fmt: skip
    check_reader(top, b"".join(grains))


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("version", 0x200000002, UnsupportedError),
        ("grain_size", 16, UnsupportedError),
        ("grain_table_size", 32, UnsupportedError),
        ("flags", 1, UnsupportedError),
        ("reserved3", 1, UnsupportedError),
        ("replay_journal", 1, UnsupportedError),
        ("volatile_magic", 0xCAFEBABE, InvalidImage),
        ("capacity", 0, InvalidImage),
        ("capacity", 1 << 56, InvalidImage),
        ("capacity", 1 << 50, InvalidImage),
        ("grain_dir_size", 0, InvalidImage),
        ("grain_dir_offset", 1 << 40, InvalidImage),
        ("grain_tables_offset", (1 << 64) - 1, InvalidImage),
        ("grain_tables_size", 0, InvalidImage),
        ("grains_offset", 1 << 63, InvalidImage),
        ("grains_size", 8, InvalidImage),
        ("volatile_header_offset", 0, InvalidImage),
    ],
)
def test_hostile_sesparse(tmp_path: Path, field: str, value: int, kind: type[FormatError]) -> None:
    extra = {"grain_dir_size": 1 << 48} if value == 1 << 50 else {}
    (tmp_path / "a.vmdk").write_bytes(build.sesparse(random_disk(3 * MiB, 1), None, **{field: value} | extra))
    refused(tmp_path / "a.vmdk", kind=kind)


@pytest.mark.parametrize("whole_last", [True, False])
@pytest.mark.parametrize("footer", [True, False])
def test_streams_with_all_their_markers(tmp_path: Path, *, whole_last: bool, footer: bool) -> None:
    need("qemu-img")
    content = CONTENT[: 2 * MiB] + bytes(31 * MiB) + CONTENT[: MiB + 1536] + b"end".ljust(512, b"!")
    path = tmp_path / "a.vmdk"
    path.write_bytes(build.stream(content, whole_last=whole_last, footer=footer))
    assert content_of(path, "vmdk", tmp_path) == content
    check_reader(path, content, rounds=25)
    assert facts_of(path)["compression"] == "deflate"


def test_extents_of_every_kind_in_a_row(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    sparse = scattered(tmp_path / "s.vmdk", "vmdk", 2 * MiB + 512, "subformat=monolithicSparse", seed=3)
    first = content_of(sparse, "vmdk", tmp_path)
    (tmp_path / "f.bin").write_bytes(CONTENT)
    (tmp_path / "c.bin").write_bytes(build.cowd(CONTENT[:MiB]))
    lines = [
        f'RW {2 * 2048 + 1} SPARSE "s.vmdk"',
        'RW 2048 FLAT "f.bin" 7',
        f'rw {2 * 2048}\tFlat "f.bin"   4096',
        'RW 2000 VMFSSPARSE "c.bin"',
    ]
    path = build.write_descriptor(tmp_path / "a.vmdk", lines, "twoGbMaxExtentSparse")
    parts = [first, CONTENT[7 * 512 : 7 * 512 + MiB], CONTENT[2 * MiB : 4 * MiB], CONTENT[: 2000 * 512]]
    check_reader(path, b"".join(parts))
    assert facts_of(path)["files"] == ["s.vmdk", "f.bin", "c.bin"]
    lines.insert(1, "RW 63 ZERO")
    path = build.write_descriptor(tmp_path / "a.vmdk", lines, "custom")
    parts.insert(1, bytes(63 * 512))
    check_reader(path, b"".join(parts))
    image = opened(path)
    assert image.source.extents(len(first), 63 * 512).total(State.ZERO) == 63 * 512
    image.close()


def test_a_parent_shows_through_every_extent(tmp_path: Path) -> None:
    lower = random_disk(3 * MiB, seed=21)
    (tmp_path / "p-flat.vmdk").write_bytes(lower)
    build.write_descriptor(tmp_path / "p.vmdk", ['RW 6144 FLAT "p-flat.vmdk" 0'], "monolithicFlat")
    upper = [random_disk(2 * MiB, seed=22), random_disk(2 * MiB, seed=23)]
    for number, content in enumerate(upper):
        (tmp_path / f"c{number}.vmdk").write_bytes(build.cowd(content, grain=4096))
    path = build.write_descriptor(
        tmp_path / "a.vmdk",
        ['RW 4096 VMFSSPARSE "c0.vmdk"', 'RW 4096 VMFSSPARSE "c1.vmdk"'],
        "vmfsSparse",
        parentCID="12345678",
        parentFileNameHint='"p.vmdk"',
    )
    pieces = build.grains_of(b"".join(upper), 4096)
    below = build.grains_of(lower.ljust(4 * MiB, b"\0"), 4096)
    check_reader(path, b"".join(piece if any(piece) else under for piece, under in zip(pieces, below, strict=True)))


def test_a_descriptor_inside_a_sparse_file_may_name_other_files(tmp_path: Path) -> None:
    (tmp_path / "f.bin").write_bytes(CONTENT)
    text = build.descriptor_text([f'RW {SIZE // 512} FLAT "f.bin" 0'], "monolithicFlat").encode()
    head = bytearray(build.hosted_header(0, 0, 2, flags=1))
    struct.pack_into("<H", head, 77, 0)
    (tmp_path / "a.vmdk").write_bytes(bytes(head) + text.ljust(1024, b"\0"))
    assert whole(tmp_path / "a.vmdk") == CONTENT


# ---------------------------------------------------------------------- descriptors


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    (tmp_path / "f.bin").write_bytes(CONTENT)
    return tmp_path / "a.vmdk"


@pytest.mark.parametrize(
    "text",
    [
        '# Disk DescriptorFile\r\nversion = 1\r\nCID=1\r\nCREATETYPE = "MonolithicFlat"\r\nRW {n} FLAT "f.bin"\r\n',
        "# disk descriptorfile\n  version=1\ncreatetype=monolithicflat \n rdonly {n}  flat  f.bin 0 \n\n\n",
        '# Disk DescriptorFile\nversion="1"\nencoding="GBK"\ncreateType="vmfs"\nRW {n} VMFS "f.bin"\n#\xbd\n\0rubbis',
        '# Disk DescriptorFile\rversion=2\rencoding=zip\rcreateType="vmfs"\rRW {n} FLAT "f.bin"\rddb.x="a"\rddb.x=b',
        '#Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\nRW {n} FLAT "f.bin" 0',
        '# Disk Descriptor File\nversion=1\ncreateType="monolithicFlat"\nRW {n} FLAT "f.bin" 0',
        '\n\r\n  # DISK DESCRIPTORFILE\nversion=1\ncreateType="monolithicFlat"\nRW {n} FLAT "f.bin" 0',
        '\xef\xbb\xbf# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\nRW {n} FLAT "f.bin" 0',
        '# made by hand\n\nversion=1\nCID=1\ncreateType="monolithicFlat"\nRW {n} FLAT "f.bin" 0',  # as QEMU has it
        '# Disk DescriptorFile\nversion=1\ncreateType="fullDevice"\nRW {n} FLAT "f.bin" 0',  # VirtualBox
        '# Disk DescriptorFile\nversion=1\ncreateType=fulldevice\nRW 63 FLAT "f.bin" 0\nRW {m} FLAT "f.bin" 63',
        '# Disk DescriptorFile\nversion=1\ncreateType="nobody knows"\nRW {n} FLAT "f.bin" 0',
        '# Disk DescriptorFile\nversion=1\ncreateType="vmfs"\nRW {n} FLAT "f.bin" 0 4e9ec2ad-8a1b-11ee-b9d1 1234abcd',
    ],
)
def test_descriptors_as_they_come(flat: Path, text: str) -> None:
    flat.write_bytes(text.format(n=SIZE // 512, m=SIZE // 512 - 63).encode("latin-1"))
    assert whole(flat) == CONTENT
    image = opened(flat)  # by what the content shows
    assert (image.format, image.warnings) == ("vmdk", ())
    image.close()


def test_a_text_that_is_no_descriptor_is_none(flat: Path) -> None:
    for text in ("# Disk\nversion=1\n", "version=1\nname=x\n", "#\n", "# Descriptor File\nCID=1\nversion=1"):
        flat.write_text(text)
        with pytest.raises(UnsupportedError, match="no disk image that ferrotype knows"):
            opened(flat)


def test_names_in_the_encoding_of_the_descriptor(tmp_path: Path) -> None:
    (tmp_path / "Gerät.bin").write_bytes(CONTENT)
    text = build.descriptor_text([f'RW {SIZE // 512} FLAT "Gerät.bin" 0'], "vmfs", encoding="windows-1252")
    (tmp_path / "a.vmdk").write_bytes(text.encode("cp1252"))
    assert whole(tmp_path / "a.vmdk") == CONTENT


@pytest.mark.parametrize(
    ("lines", "create_type", "more", "kind", "words"),
    [
        (['RW 1 FLAT "\\\\.\\PhysicalDrive0" 0'], "fullDevice", {}, UnsupportedError, "device"),
        (['RW 1 FLAT "/dev/sda" 0'], "partitionedDevice", {}, NotAllowed, "/dev/sda"),
        (['RW 1 VMFSRDM "f.bin"'], "vmfsRawDeviceMap", {}, UnsupportedError, "device"),
        (['RW 1 VMFSRDM "f.bin"'], "vmfs", {}, UnsupportedError, "device"),
        (['RW 1 WEIRD "f.bin"'], "vmfs", {}, UnsupportedError, "WEIRD"),
        (['NOACCESS 1 FLAT "f.bin" 0'], "vmfs", {}, UnsupportedError, "denies"),
        (['RW 1 FLAT "f.bin" 0'], "vmfs", {"encryption.keySafe": "x"}, UnsupportedError, "encrypted"),
        (['RW 1 FLAT "/dev/sda" 0'], "monolithicFlat", {}, NotAllowed, "/dev/sda"),
        (['RW 1 FLAT "../../etc/passwd" 0'], "monolithicFlat", {}, NotAllowed, "passwd"),
        (['RW 1 SPARSE "nbd://x/y"'], "monolithicFlat", {}, NotAllowed, "address"),
        (['RW 1 FLAT "missing.bin" 0'], "monolithicFlat", {}, InvalidImage, "missing.bin"),
        (['RW 1 SPARSE "f.bin"'], "monolithicFlat", {}, InvalidImage, "no sparse extent"),
        (['RW 99999 FLAT "f.bin" 0'], "monolithicFlat", {}, InvalidImage, "cut short"),
        (['RW 1 FLAT "f.bin" 99999'], "monolithicFlat", {}, InvalidImage, "cut short"),
        (['RW 9223372036854775807 FLAT "f.bin" 0'], "monolithicFlat", {}, InvalidImage, "sectors"),
        (['RW 0 FLAT "f.bin" 0'], "monolithicFlat", {}, InvalidImage, "sectors"),
        (["RW 1 FLAT"], "monolithicFlat", {}, InvalidImage, "names no file"),
        (["RW 4611686018427387904 ZERO"], "custom", {}, InvalidImage, "sectors"),
        (["RW 9007199254740992 ZERO"] * 2, "custom", {}, InvalidImage, "bytes"),
        ([], "monolithicFlat", {}, InvalidImage, "no extents"),
        (["gibberish"], "monolithicFlat", {}, InvalidImage, "means nothing"),
        (['RW 1 FLAT "f.bin" 0', "version=2"], "vmfs", {}, InvalidImage, "another version"),
        (['RW 1 FLAT "f.bin" 0'], "vmfs", {"CID": "12345678z"}, InvalidImage, "identifier"),
        (['RW 1 FLAT "f.bin" 0'], "vmfs", {"parentCID": "5"}, InvalidImage, "does not say which"),
        (['RW 1 FLAT "f.bin" 0'], "vmfs", {"parentCID": "5", "parentFileNameHint": '"a.vmdk"'}, InvalidImage, "loop"),
        (
            ['RW 1 FLAT "f.bin" 0'],
            "vmfs",
            {"parentCID": "5", "parentFileNameHint": '"/x.vmdk"'},
            NotAllowed,
            "x.vmdk",
        ),
        (["x" * 9000], "vmfs", {}, InvalidImage, "9000 characters"),
        ([f"RW 1 WEIRD # {' ' * 7000}x" for _ in range(100)], "custom", {}, UnsupportedError, "WEIRD"),
    ],
)
def test_descriptors_that_are_refused(
    flat: Path, lines: list[str], create_type: str, more: dict[str, str], kind: type[FormatError], words: str
) -> None:
    build.write_descriptor(flat, lines, create_type, **more)
    refused(flat, words, kind)


def test_too_many_extents_and_too_long_descriptors(flat: Path) -> None:
    build.write_descriptor(flat, ["RW 1 ZERO"] * 10_001, "custom")
    refused(flat, "more than 10000 extents")
    flat.write_text(flat.read_text() + "#" * MiB)
    refused(flat, "no descriptor")


# ---------------------------------------------------------------------- the corpus


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry["id"] for entry in ENTRIES])
def test_the_corpus(tmp_path: Path, entry: dict[str, Any]) -> None:
    path = unpack(entry, tmp_path / "image")
    if entry["expect"] == "read":
        content = whole(path)
        truth = entry["virtual_disk"]
        assert (len(content), hashlib.sha256(content).hexdigest()) == (truth["size"], truth["sha256"])
    elif entry["expect"].startswith("refuse"):
        kind = NotAllowed if "no-file-access" in entry["expect"] else FormatError
        refused(path, kind=kind)
