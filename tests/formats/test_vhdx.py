"""VHDX: read as qemu-img reads it, and as the specification says where qemu cannot; written so that both agree."""

from __future__ import annotations

import hashlib
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from ferrotype.block import read
from ferrotype.errors import FormatError, InvalidImage, NotAllowed, UnsupportedError, UsageError
from ferrotype.extents import State
from ferrotype.formats.crc32c import crc32c
from ferrotype.formats.mapped import shortfalls
from ferrotype.job import NullJob
from tests.formats import vhdx_by_hand as hand
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
    scattered,
    zero_bytes,
)
from tests.formats.vhdx_by_hand import NOT_PRESENT, PARTIAL, PRESENT, UNDEFINED, UNMAPPED, ZERO, Disk
from tests.machine import corpus, need, run, unpack

GUID = "11111111-2222-3333-4444-555555555555"
LOG_GUID = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"


# ---------------------------------------------------------------------- made by others


@pytest.mark.parametrize(
    "options",
    [
        "subformat=dynamic,block_size=1M",
        "subformat=dynamic,block_size=2M,block_state_zero=off",
        "subformat=dynamic,block_size=16M,log_size=2M",
        "subformat=fixed,block_size=1M",
        "subformat=fixed,block_size=8M",
    ],
)
def test_reads_what_qemu_writes(tmp_path: Path, options: str) -> None:
    need("qemu-img", "qemu-io")
    path = scattered(tmp_path / "a.vhdx", "vhdx", 21 * MiB + 1536, options, seed=len(options), writes=30)
    check_reader(path, content_of(path, "vhdx", tmp_path))
    facts, said = facts_of(path), dict(text.split("=") for text in options.split(","))
    assert facts["subformat"] == said["subformat"]
    assert facts["unit"] == int(said["block_size"].removesuffix("M")) * MiB
    assert not facts["dirty"]


_ENTRIES = [entry for entry in corpus() if entry["format"] == "vhdx"]


@pytest.mark.parametrize("entry", _ENTRIES, ids=[entry["id"] for entry in _ENTRIES])
def test_the_corpus(tmp_path: Path, entry: dict[str, Any]) -> None:
    path = unpack(entry, tmp_path)
    if entry["expect"].startswith("refuse"):
        with pytest.raises(FormatError):
            opened(path)
        return
    image = opened(path)
    truth = entry["virtual_disk"]
    assert image.source.size == truth["size"]
    digest = hashlib.sha256()
    for extent in image.source.extents(0, image.source.size):
        if extent.state & State.ZERO:
            continue
        for start in range(extent.start // MiB * MiB, extent.end, MiB):  # blocks are whole MiB
            piece = read(image.source, start, min(MiB, extent.end - start))
            for at in range(0, len(piece), 64 * KiB):
                block = piece[at : at + 64 * KiB]
                if block.count(0) != len(block):
                    digest.update((start + at).to_bytes(8, "little") + block)
    digest.update(truth["size"].to_bytes(8, "little"))
    assert digest.hexdigest() == truth["sparse64k_sha256"]
    assert image.check is not None
    assert image.check(NullJob()) == []
    assert not image.warnings
    image.close()


# ---------------------------------------------------------------------- written


CONTENT = random_disk(17 * MiB + 2560, seed=11)


@pytest.mark.parametrize("make", [make_image, make_image_piecemeal])
@pytest.mark.parametrize(
    "texts",
    [
        (),
        ("subformat=fixed",),
        ("subformat=dynamic", "block_size=1MiB"),
        ("subformat=fixed", "block_size=16MiB", "physical_sector_size=512"),
    ],
)
def test_writes_what_qemu_reads(tmp_path: Path, make: Any, texts: tuple[str, ...]) -> None:
    need("qemu-img")
    path = make(tmp_path / "a.vhdx", "vhdx", CONTENT, *texts)
    check_written(path, "vhdx", CONTENT, tmp_path)
    items, disk = hand.take_apart(path)
    assert disk == CONTENT
    assert struct.unpack("<I", items[hand.PHYSICAL])[0] == (512 if "physical_sector_size=512" in texts else 4096)
    image = opened(path)
    assert image.facts["subformat"] == ("fixed" if "subformat=fixed" in texts else "dynamic")
    assert image.check is not None
    assert image.check(NullJob()) == []
    image.close()


@pytest.mark.parametrize("texts", [("subformat=fixed",), ("block_size=2MiB",)])
def test_sectors_of_4096_bytes_are_written_and_read(tmp_path: Path, texts: tuple[str, ...]) -> None:
    content = random_disk(9 * MiB + 4096, seed=12)
    path = make_image(tmp_path / "a.vhdx", "vhdx", content, *texts, sector_size=4096)
    items, disk = hand.take_apart(path)
    assert disk == content
    assert items[hand.LOGICAL] == struct.pack("<I", 4096)
    check_reader(path, content)
    image = opened(path)
    assert image.source.traits.sector_size == 4096
    image.close()


def test_an_empty_dynamic_disk_takes_no_blocks(tmp_path: Path) -> None:
    content = bytes(64 * MiB)
    path = make_image(tmp_path / "a.vhdx", "vhdx", content)
    assert path.stat().st_size == 4 * MiB
    image = opened(path)
    assert zero_bytes(image) == len(content)
    image.close()


def test_a_disk_of_64_tib_is_written_and_mapped(tmp_path: Path) -> None:
    """With blocks between which the entries of sector bitmaps stand."""
    from ferrotype.block.outputs import Outputs
    from ferrotype.formats import Spec
    from ferrotype.formats.registry import writer

    need("qemu-img")
    size, marks = 64 << 40, [0, (4 << 30) - 512, 4 << 30, (33 << 40) + 512, (64 << 40) - 512]
    path = tmp_path / "a.vhdx"
    with Outputs(path) as outputs:
        sink = writer("vhdx").create(outputs, Spec(size))
        for mark in marks:
            sink.write(mark, memoryview(mark.to_bytes(8, "little") * 64))
        sink.finish()
        outputs.commit()
        sink.close()
    image = opened(path)
    assert image.source.size == size
    assert 0 < size - zero_bytes(image) <= len(marks) * 64 * MiB
    for mark in marks:
        assert read(image.source, mark, 512) == mark.to_bytes(8, "little") * 64
    image.close()
    out = run("qemu-io", "-r", "-f", "vhdx", "-c", f"read -v {marks[3]} 512", path)
    assert marks[3].to_bytes(8, "little").hex(" ") in out


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    for content, texts, words in [
        (bytes(MiB + 100), (), "whole sectors"),
        (b"", (), "whole sectors"),
        (bytes(MiB), ("block_size=3MiB",), "blocks have"),
        (bytes(MiB), ("block_size=512MiB",), "blocks have"),
        (bytes(MiB), ("subformat=odd",), "dynamic or fixed"),
        (bytes(MiB), ("physical_sector_size=1024",), "512 or 4096"),
    ]:
        with pytest.raises(UsageError, match=words):
            make_image(tmp_path / "a.vhdx", "vhdx", content, *texts)
    with pytest.raises(UsageError, match="compressed"):
        make_image(tmp_path / "a.vhdx", "vhdx", bytes(MiB), compress=True)
    assert not (tmp_path / "a.vhdx").exists()


# ---------------------------------------------------------------------- block states, parents


def test_block_states_without_a_parent(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(MiB)
    states = [NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, PRESENT, 5]
    payload = {number: (state, data) for number, state in enumerate(states)}
    path = hand.write(tmp_path / "a.vhdx", Disk(6 * MiB, payload=payload))
    check_reader(path, bytes(4 * MiB) + data + bytes(MiB))
    facts = facts_of(path)
    assert facts["creator"] == "by hand"
    assert facts["disk_id"] == "12345678-9abc-def0-1234-56789abcdef0"
    assert facts["physical_sector_size"] == 4096


def test_an_unmapped_block_that_keeps_its_place_is_zeros(tmp_path: Path) -> None:
    path = hand.write(
        tmp_path / "a.vhdx", Disk(2 * MiB, payload={0: (PRESENT, b"x" * MiB), 1: (PRESENT, b"y" * MiB)})
    )
    entry = path.read_bytes()[MiB : MiB + 8]
    hand.poke(path, MiB, bytes([entry[0] & ~7 | UNMAPPED]) + entry[1:])
    check_reader(path, bytes(MiB) + b"y" * MiB)


@pytest.mark.parametrize("sector", [512, 4096])
def test_a_chain_with_partially_present_blocks(tmp_path: Path, sector: int) -> None:
    """Three layers; the disk is longer than its parents, and its blocks stand on both sides of a chunk's end."""
    rng = random.Random(sector)
    chain = tmp_path / "deep" / "chain"
    chain.mkdir(parents=True)
    block = 2 * MiB
    ratio = (1 << 23) * sector // block
    size = (ratio + 3) * block + 5 * sector
    base = {number: (PRESENT, rng.randbytes(block)) for number in (0, 1, 2, 3, ratio - 1, ratio, ratio + 1)}
    hand.write(chain / "base.vhdx", Disk(size - 3 * block, block, sector, payload=base))
    expected = dict.fromkeys(range(ratio + 4), bytes(block)) | {number: data for number, (_, data) in base.items()}
    expected[ratio] = expected[ratio][: 5 * sector].ljust(block, b"\0")  # behind the end of the base
    expected[ratio + 1] = bytes(block)
    names = [("base.vhdx", "mid.vhdx", ".\\base.vhdx"), ("mid.vhdx", "top.vhdx", "..\\chain\\mid.vhdx")]
    for layer, (_, name, relative) in enumerate(names):
        payload: dict[int, tuple[int, bytes]] = {}
        bitmaps = {0: bytearray(MiB), 1: bytearray(MiB)}
        for number in (0, 1, 2, 3, ratio - 1, ratio, ratio + 2, ratio + 3):
            state = rng.choice([NOT_PRESENT, ZERO, PRESENT, PARTIAL, PARTIAL, PARTIAL, UNMAPPED])
            data = rng.randbytes(block)
            payload[number] = (state, data)
            if state == PARTIAL:
                chunk, inside = divmod(number, ratio)
                expected[number] = _merged(rng, bitmaps[chunk], inside, data, expected[number], sector)
            elif state == PRESENT:
                expected[number] = data
            elif state != NOT_PRESENT:
                expected[number] = bytes(block)
        parent = {
            "parent_linkage": "{" + _layer_guid(layer) + "}",
            "relative_path": relative,
            "volume_path": "\\\\?\\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\\chain\\" + relative[-8:],
            "absolute_win32_path": "\\\\?\\c:\\chain\\" + relative[-8:],
        }
        disk = Disk(size, block, sector, payload=payload, parent=parent, data_guid=_layer_guid(layer + 1))
        disk.bitmaps = {chunk: bytes(bits) for chunk, bits in bitmaps.items()}
        hand.write(chain / name, disk)
    hand.poke(chain / "base.vhdx", 64 * KiB, hand.header(Disk(0, data_guid=_layer_guid(0)), 9))
    image = opened(chain / "top.vhdx")
    assert image.facts["subformat"] == "differencing"
    assert image.facts["backing"] == {"name": "../chain/mid.vhdx", "format": "vhdx"}
    for number in (0, 1, 2, 3, 4, ratio - 1, ratio, ratio + 1, ratio + 2, ratio + 3):
        length = min(block, size - number * block)
        assert read(image.source, number * block, length) == expected[number][:length], number
    for _ in range(100):  # at any cut
        number = rng.choice([0, 1, 2, ratio - 1, ratio, ratio + 1])
        at, length = rng.randrange(block), rng.randrange(1, 100 * KiB)
        both = expected[number] + expected[number + 1]
        assert read(image.source, number * block + at, length) == both[at : at + length]
    zeros = image.source.extents(0, size).masked(State.ZERO)
    for extent in zeros:
        if extent.state & State.ZERO and extent.start < 4 * block:
            piece = read(image.source, extent.start, min(extent.length, 4 * block - extent.start))
            assert piece.count(0) == len(piece)
    image.close()


@pytest.mark.parametrize("block", [MiB, 2 * MiB])
def test_7zip_reads_a_differencing_disk_in_the_same_way(tmp_path: Path, block: int) -> None:
    need("7zz")
    rng = random.Random(block)
    states = [PARTIAL, PRESENT, PARTIAL, NOT_PRESENT, PARTIAL, ZERO]
    below = {
        number: (PRESENT, rng.randbytes(block)) for number in (0, 3, 4)
    }  # 7zip blocks files of one length as a loop
    hand.write(tmp_path / "parent.vhdx", Disk(6 * block, block, payload=below))
    bits = bytearray(MiB)
    payload = {number: (state, rng.randbytes(block)) for number, state in enumerate(states)}
    for number, (state, data) in payload.items():
        if state == PARTIAL:
            _merged(rng, bits, number, data, bytes(block), 512)
    parent = {"parent_linkage": "{" + GUID + "}", "relative_path": "parent.vhdx"}
    path = tmp_path / "child.vhdx"
    child = Disk(6 * block, block, payload=payload, bitmaps={0: bytes(bits)}, parent=parent, data_guid=LOG_GUID)
    hand.write(path, child)
    run("7zz", "e", "-tVHDX", "-y", f"-o{tmp_path / 'out'}", path)
    (found,) = (tmp_path / "out").iterdir()
    check_reader(path, found.read_bytes(), rounds=60)


def _layer_guid(layer: int) -> str:
    return f"{layer:08}-2222-3333-4444-abcdef012345"


def _merged(rng: random.Random, bits: bytearray, inside: int, data: bytes, below: bytes, sector: int) -> bytes:
    """Set bits of a block's sectors by chance; what the block then holds."""
    merged = bytearray(below)
    count = len(data) // sector
    number = 0
    while number < count:
        run_length, here = rng.choice([1, 1, 2, 3, 8, 13, 300]), rng.random() < 0.5
        for one in range(number, min(number + run_length, count) if here else number):
            place = inside * count + one
            bits[place // 8] |= 1 << place % 8
            merged[one * sector : (one + 1) * sector] = data[one * sector : (one + 1) * sector]
        number += run_length
    return bytes(merged)


def _child(folder: Path, **texts: str) -> Path:
    """A disk of one MiB that is all its parent's."""
    folder.mkdir(parents=True, exist_ok=True)
    return hand.write(folder / "child.vhdx", Disk(MiB, parent={"parent_linkage": "{" + GUID + "}", **texts}))


def _base(path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = random.Random(5).randbytes(MiB)
    hand.write(path, Disk(MiB, payload={0: (PRESENT, data)}))
    return data


@pytest.mark.parametrize(
    "texts",
    [
        {"relative_path": ".\\parent.vhdx"},
        {"relative_path": "parent.vhdx", "absolute_win32_path": "D:\\elsewhere\\other.vhdx"},
        {"relative_path": "..\\..\\gone\\parent.vhdx"},
        {"absolute_win32_path": "\\\\?\\C:\\disks\\parent.vhdx"},
        {"absolute_win32_path": "C:\\disks\\parent.vhdx", "volume_path": "\\\\?\\Volume{1}\\parent.vhdx"},
        {"volume_path": "\\\\?\\Volume{26A21BDA-A627-11D7-9931-806E6F6E6963}\\disks\\parent.vhdx"},
        {"absolute_win32_path": "/disks/parent.vhdx"},
        {"parent_linkage": "{99999999-2222-3333-4444-555555555555}", "parent_linkage2": "{" + GUID.upper() + "}",
         "relative_path": "parent.vhdx"},
    ],
)  # fmt: skip
def test_a_parent_is_found_beside_its_child(tmp_path: Path, texts: dict[str, str]) -> None:
    data = _base(tmp_path / "here" / "parent.vhdx")
    check_reader(_child(tmp_path / "here", **texts), data, rounds=5)


def test_a_parent_elsewhere_is_opened_only_where_that_is_allowed(tmp_path: Path) -> None:
    data = _base(tmp_path / "other" / "parent.vhdx")
    for texts in [
        {"relative_path": "..\\other\\parent.vhdx"},
        {"absolute_win32_path": str(tmp_path / "other" / "parent.vhdx")},
    ]:
        path = _child(tmp_path / "here", **texts)
        with pytest.raises(NotAllowed):
            opened(path)
        image = opened(path, allowed=[tmp_path / "other"])
        assert read(image.source, 0, MiB) == data
        image.close()


@pytest.mark.parametrize(
    ("texts", "error", "words"),
    [
        ({"relative_path": "gone.vhdx"}, InvalidImage, "gone.vhdx"),
        ({"relative_path": "child.vhdx"}, InvalidImage, "loop"),
        ({"relative_path": "parent.vhdx", "parent_linkage": "{" + LOG_GUID + "}"}, InvalidImage, "was made on it"),
        ({"relative_path": "parent.vhdx", "parent_linkage": "none"}, InvalidImage, "no GUID"),
        ({"relative_path": "/etc/passwd"}, NotAllowed, "passwd"),
        ({"relative_path": "nbd:localhost:10809"}, NotAllowed, "address"),
        ({"relative_path": "\ud800.vhdx"}, InvalidImage, "no UTF-16"),
        ({"relative_path": "a\0b"}, InvalidImage, "NUL"),
        ({"relative_path": ".."}, InvalidImage, "names no file"),
        ({"volume_path": "\\\\?\\Volume{1}\\.."}, InvalidImage, "names no file"),
    ],
)
def test_a_wrong_parent_is_refused(tmp_path: Path, texts: dict[str, str], error: type, words: str) -> None:
    _base(tmp_path / "parent.vhdx")
    if "\ud800" in texts.get("relative_path", ""):
        path = _child(tmp_path, relative_path="X.vhdx")
        content = path.read_bytes()
        path.write_bytes(content.replace("X.vhdx".encode("utf-16-le"), b"\0\xd8" + ".vhdx".encode("utf-16-le")))
    else:
        path = _child(tmp_path, **texts)
    with pytest.raises(error, match=words):
        opened(path)


# ---------------------------------------------------------------------- the log


def _bat_sector(path: Path, entries: dict[int, int]) -> bytes:
    """The first 4 KiB of the BAT with some entries changed."""
    with path.open("rb") as file:
        file.seek(MiB)
        table = bytearray(file.read(4096))
    for index, entry in entries.items():
        struct.pack_into("<Q", table, index * 8, entry)
    return bytes(table)


DATA = [random.Random(number).randbytes(MiB) for number in range(3)]
SIX_MIB = 6 * MiB  # the file: heads, BAT, log, metadata, blocks 1 and 0


def _logged(path: Path, log: bytes, *, at: int = 0, log_guid: str = LOG_GUID) -> Path:
    """A disk of 4 MiB with two blocks, and that log from byte ``at`` of the ring on."""
    ring = bytearray(MiB)
    ring[at : at + len(log)] = log[: MiB - at]
    ring[: len(log[MiB - at :])] = log[MiB - at :]
    payload = {0: (PRESENT, DATA[0]), 1: (PRESENT, DATA[1])}
    return hand.write(path, Disk(4 * MiB, payload=payload, log=bytes(ring), log_guid=log_guid))


def _swapped(path: Path) -> bytes:
    return _bat_sector(path, {0: 4 * MiB | PRESENT, 1: 0, 2: 5 * MiB | PRESENT})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same disk with nothing in its log."""
    return _logged(tmp_path_factory.mktemp("plain") / "plain.vhdx", b"", log_guid=Disk.log_guid)


def _logs(plain: Path) -> dict[str, tuple[bytes, int, bytes]]:
    """Logs, where they begin in the ring, and the disk after each."""
    before = DATA[0] + DATA[1] + bytes(2 * MiB)
    after = DATA[1] + bytes(MiB) + DATA[0] + bytes(MiB)
    none = bytes(MiB) + DATA[0] + bytes(2 * MiB)
    swap, odd = _swapped(plain), _bat_sector(plain, {0: 0, 1: 5 * MiB | PRESENT})
    size = {"flushed": SIX_MIB, "last": SIX_MIB}

    def entry(number: int, tail: int, *changes: tuple[int, bytes | int], guid: str = LOG_GUID) -> bytes:
        return hand.log_entry(number, tail, changes, guid, **size)

    one = entry(1 << 40 | 5, 0, (MiB, swap))
    two = entry(1 << 40 | 6, 0, (MiB, odd))
    torn = bytearray(two)
    torn[5000] ^= 1
    end = MiB - 4096
    many = entry(3, 0, *[(SIX_MIB - MiB + number * 4096, 4096) for number in range(200)], (MiB, swap))
    holes = bytearray(after)
    holes[2 * MiB : 2 * MiB + 200 * 4096] = bytes(200 * 4096)
    return {
        "one entry": (one, 0, after),
        "the later entry counts": (one + two, 0, none),
        "it wraps": (entry(5, end, (MiB, swap)) + entry(6, end, (MiB, odd)), end, none),
        "a torn entry is left out": (one + bytes(torn), 0, after),
        "an entry of another log is left out": (one + entry(1 << 40 | 6, 0, (MiB, odd), guid=GUID), 0, after),
        "a number is missing": (entry(5, 0, (MiB, odd)) + entry(7, 8192, (MiB, swap)), 0, after),
        "before the tail nothing counts": (
            entry(5, 0, (MiB, 4096)) + entry(6, 4096, (MiB + 4096, swap)) + entry(7, 4096, (MiB + 8192, 4096)),
            0,
            before,
        ),
        "the tail is gone": (entry(9, 64 * KiB, (MiB, odd)) + bytes(4096) + entry(4, 12288, (MiB, swap)), 0, after),
        "zeros of the whole BAT": (entry(2, 0, (MiB, MiB)), 0, bytes(4 * MiB)),
        "more than a sector of descriptors": (many, 0, bytes(holes)),
        "a sector of data": (
            entry(0xF1F2F3F4F5F6F7F8, 0, (5 * MiB + 8192, DATA[2][:4096])),
            0,
            before[:8192] + DATA[2][:4096] + before[12288:],
        ),
    }


# It does not look for the tail (section 2.3.1.1: where the sequence begins), and fails on more than 126 descriptors.
_NOT_BY_QEMU = ("the tail is gone", "before the tail nothing counts", "more than a sector of descriptors")
_LOGS = [
    "one entry",
    "the later entry counts",
    "it wraps",
    "a torn entry is left out",
    "an entry of another log is left out",
    "a number is missing",
    "before the tail nothing counts",
    "the tail is gone",
    "zeros of the whole BAT",
    "more than a sector of descriptors",
    "a sector of data",
]


@pytest.mark.parametrize("name", _LOGS)
def test_the_log_is_replayed_in_memory(tmp_path: Path, plain: Path, name: str) -> None:
    """As the specification says, and as qemu does it in the file."""
    need("qemu-img")
    log, at, expected = _logs(plain)[name]
    path = _logged(tmp_path / "a.vhdx", log, at=at)
    before = path.read_bytes()
    check_reader(path, expected, rounds=20)
    image = opened(path)
    assert image.facts["dirty"]
    assert any("not closed properly" in warning for warning in image.warnings)
    image.close()
    assert path.read_bytes() == before
    if name in _NOT_BY_QEMU:
        return
    other = tmp_path / "replayed.vhdx"
    shutil.copy(path, other)
    run("qemu-img", "check", "-r", "all", "-f", "vhdx", other)
    assert content_of(other, "vhdx", tmp_path) == expected


def test_a_log_that_makes_the_file_longer(tmp_path: Path, plain: Path) -> None:
    new = _bat_sector(plain, {0: 4 * MiB | PRESENT, 1: 6 * MiB | PRESENT})
    log = hand.log_entry(9, 0, [(MiB, new)], LOG_GUID, flushed=SIX_MIB, last=SIX_MIB + MiB)
    path = _logged(tmp_path / "a.vhdx", log)
    check_reader(path, DATA[1] + bytes(3 * MiB), rounds=10)


def test_a_file_that_was_cut_after_its_log_was_written_is_refused(tmp_path: Path, plain: Path) -> None:
    log = hand.log_entry(9, 0, [(MiB, _swapped(plain))], LOG_GUID, flushed=7 * MiB, last=7 * MiB)
    with pytest.raises(InvalidImage, match="when its log was written"):
        opened(_logged(tmp_path / "a.vhdx", log))


def test_a_log_that_qemu_left(tmp_path: Path) -> None:
    """The BAT cannot be written while qemu runs, so the change stays in the log."""
    need("qemu-img", "qemu-io")
    path = tmp_path / "a.vhdx"
    run("qemu-img", "create", "-q", "-f", "vhdx", "-o", "block_size=1M", path, "8M")
    run("qemu-io", "-f", "vhdx", "-c", "write -P 1 0 1M", path)
    content = path.read_bytes()
    entry = content.index(hand.guid(hand.BAT), 192 * KiB)
    (bat,) = struct.unpack_from("<Q", content, entry + 16)
    rules = ",".join(
        f"file.inject-error.{number}.event=none,file.inject-error.{number}.iotype=write,"
        f"file.inject-error.{number}.sector={bat // 512 + number},file.inject-error.{number}.errno=5"
        for number in range(1)
    )
    spec = f"driver=vhdx,file.driver=blkdebug,file.image.driver=file,file.image.filename={path},{rules}"
    run("qemu-io", "--image-opts", spec, "-c", "write -P 2 3M 1M", ok=(0, 1))
    image = opened(path)
    assert image.facts["dirty"]
    found = read(image.source, 0, 8 * MiB)
    image.close()
    assert found == b"\1" * MiB + bytes(2 * MiB) + b"\2" * MiB + bytes(4 * MiB)
    run("qemu-img", "check", "-r", "all", "-f", "vhdx", path)
    assert content_of(path, "vhdx", tmp_path) == found


def test_a_log_full_of_entries_is_read_at_once(tmp_path: Path) -> None:
    entries = b"".join(hand.log_entry(number + 1, 0, [], LOG_GUID) for number in range(256))
    check_reader(_logged(tmp_path / "a.vhdx", entries), DATA[0] + DATA[1] + bytes(2 * MiB), rounds=5)


def test_crc32c() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    rng = random.Random(3)
    for length in [4, 5, 7, 8, 9, 63, 64, 65, 1000, 4096, 5001]:
        data = rng.randbytes(length)
        assert crc32c(data) == hand.crc(data), length


# ---------------------------------------------------------------------- damaged and hostile


def _tried(path: Path) -> bytes | None:
    """The disk, or None where it was refused; anything else is a mistake."""
    try:
        image = opened(path, "vhdx")
    except FormatError:
        return None
    try:
        size = image.source.size
        for start, length in [(0, min(size, 8 * MiB)), (max(0, size - MiB), min(size, MiB))]:
            image.source.extents(start, length)
            content = read(image.source, start, length)
        if image.check is not None and size <= 1 << 40:
            image.check(NullJob())
        return content
    except FormatError:
        return None
    finally:
        image.close()


def _small(path: Path) -> Path:
    """A child whose blocks are present in all the ways, and its parent."""
    _base(path.with_name("parent.vhdx"))
    parent = {"parent_linkage": "{" + GUID + "}", "relative_path": "parent.vhdx"}
    payload = {0: (PARTIAL, DATA[0]), 1: (PRESENT, DATA[1])}
    bitmaps = {0: b"\xf0\xff\x01\x00" * 32}
    return hand.write(path, Disk(3 * MiB, payload=payload, bitmaps=bitmaps, parent=parent))


_FIELDS = {  # name: offset, bytes, the structure whose checksum is to be right
    "identifier": (0, 8, None),
    **{
        f"header {name}": (64 * KiB + at, size, (64 * KiB, 4096))
        for name, at, size in [
            ("signature", 0, 4), ("sequence", 8, 8), ("data guid", 32, 8), ("log guid", 48, 8),
            ("log version", 64, 2), ("version", 66, 2), ("log length", 68, 4), ("log offset", 72, 8),
        ]
    },
    **{
        f"region {name}": (192 * KiB + at, size, (192 * KiB, 64 * KiB))
        for name, at, size in [
            ("signature", 0, 4), ("count", 8, 4), ("BAT guid", 16, 8), ("BAT offset", 32, 8), ("BAT length", 40, 4),
            ("BAT required", 44, 4), ("metadata guid", 48, 8), ("metadata offset", 64, 8), ("metadata length", 72, 4),
        ]
    },
    **{
        f"metadata {name}": (3 * MiB + at, size, None)
        for name, at, size in [("signature", 0, 8), ("count", 10, 2)]
    },
    **{
        f"item {item} {name}": (3 * MiB + 32 + 32 * item + at, size, None)
        for item in range(6)
        for name, at, size in [("guid", 0, 8), ("offset", 16, 4), ("length", 20, 4), ("flags", 24, 4)]
    },
    **{
        f"value {name}": (3 * MiB + 64 * KiB + at, size, None)
        for name, at, size in [
            ("physical", 0, 4), ("size", 4, 8), ("logical", 28, 4), ("block", 32, 4), ("flags", 36, 4),
            ("locator type", 40, 8), ("locator count", 58, 2), ("key offset", 60, 4), ("value offset", 64, 4),
            ("key length", 68, 2), ("value length", 70, 2),
        ]
    },
    "BAT 0": (MiB, 8, None),
    "BAT 1": (MiB + 8, 8, None),
    "BAT bitmap": (MiB + 4096 * 8, 8, None),
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _small(tmp_path_factory.mktemp("small") / "child.vhdx")


@pytest.mark.parametrize("name", _FIELDS)
def test_a_wrong_field_is_refused_or_harmless(small: Path, name: str) -> None:
    at, size, structure = _FIELDS[name]
    with small.open("rb") as file:
        file.seek(at)
        old = file.read(size)
        start, length = structure or (0, 0)
        file.seek(start)
        whole = file.read(length)
    rng = random.Random(name)
    top = (1 << size * 8) - 1
    was = int.from_bytes(old, "little")
    values = {0, 1, 2, 4, 6, 7, top, top >> 1, top >> 12, MiB & top, was + 1 & top, was ^ 1 << size * 8 - 1}
    values |= {rng.randrange(top + 1), was ^ MiB & top, was & ~7 | 3, was | 7}
    try:
        for value in sorted(values - {was}):
            hand.poke(small, at, value.to_bytes(size, "little"))
            if structure:
                hand.reseal(small, *structure)
                if start == 192 * KiB:
                    hand.poke(small, 256 * KiB, bytes(16))
            _tried(small)
    finally:
        hand.poke(small, at, old)
        if structure:
            hand.poke(small, start, whole)
            hand.poke(small, 256 * KiB, whole[:16])
    assert _tried(small) is not None


def test_a_file_cut_anywhere_is_refused_or_tells_no_lies(tmp_path: Path) -> None:
    path = _logged(tmp_path / "a.vhdx", b"", log_guid="0" * 8 + "-0000-0000-0000-" + "0" * 12)
    content = path.read_bytes()
    whole = _tried(path)
    assert whole is not None
    early = [0, 7, 8, 600, 64 * KiB, 68 * KiB, 200 * KiB, MiB, MiB + 8]
    for length in [*early, 3 * MiB - 1, 3 * MiB + 80 * KiB, 4 * MiB, 5 * MiB]:
        path.write_bytes(content[:length])
        assert _tried(path) is None, length
    for length in (5 * MiB + 4096, 6 * MiB - 1):  # inside the last block
        path.write_bytes(content[:length])
        image = opened(path)
        read(image.source, 0, image.source.size)
        assert len(list(shortfalls(image.source))) == 1
        image.close()


@pytest.mark.parametrize(
    ("disk", "error", "words"),
    [
        (Disk(MiB, extra_items=[(LOG_GUID, 4, b"x")]), UnsupportedError, "required and unknown"),
        (Disk(MiB, extra_items=[(hand.SIZE, 6, bytes(8))]), InvalidImage, "twice"),
        (Disk(MiB, extra_regions=[(LOG_GUID, 8 * MiB, MiB, 1)]), UnsupportedError, "required and unknown"),
        (Disk(MiB, extra_regions=[(hand.BAT, 3 * MiB, MiB, 1)]), InvalidImage, "twice"),
        (Disk(65 << 40), InvalidImage, "VirtualDiskSize"),
        (Disk(MiB + 100), InvalidImage, "VirtualDiskSize"),
        (Disk(1 << 40), InvalidImage, "BAT has room"),
        (Disk((31 * 4096 + 4066) * MiB), InvalidImage, "BAT has room"),
        (Disk((31 * 4096 + 4065) * MiB, parent={}), InvalidImage, "BAT has room"),  # for the last sector bitmap
        (Disk(MiB, block=3 * MiB), InvalidImage, "BlockSize"),
        (Disk(MiB, sector=1024), InvalidImage, "LogicalSectorSize"),
        (Disk(MiB, payload={0: (PARTIAL, b"")}), InvalidImage, "state that is none"),
        (Disk(MiB, payload={0: (4, b"")}), InvalidImage, "state that is none"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, disk: Disk, error: type, words: str) -> None:
    path = hand.write(tmp_path / "a.vhdx", disk)
    with pytest.raises(error, match=words):
        image = opened(path)
        try:
            read(image.source, 0, 512)
        finally:
            image.close()


def test_a_bat_without_room_to_spare(tmp_path: Path) -> None:
    path = hand.write(tmp_path / "a.vhdx", Disk((31 * 4096 + 4065) * MiB))
    hand.poke(path, 2 * MiB - 8, struct.pack("<Q", 4 * MiB | PRESENT))
    with path.open("r+b") as file:
        file.truncate(5 * MiB)
    hand.poke(path, 4 * MiB, b"at the end")
    image = opened(path)
    assert read(image.source, image.source.size - MiB, 10) == b"at the end"
    image.close()


def test_unknown_items_that_are_not_required_are_left_alone(tmp_path: Path) -> None:
    disk = Disk(MiB, extra_items=[(LOG_GUID, 1, b"x")], extra_regions=[(LOG_GUID, 8 * MiB, MiB, 0)])
    check_reader(hand.write(tmp_path / "a.vhdx", disk), bytes(MiB), rounds=3)


def test_blocks_over_the_tables_are_refused(tmp_path: Path) -> None:
    for place in (0, MiB, 2 * MiB, 3 * MiB, 5 * MiB, 1 << 63):
        path = hand.write(tmp_path / "a.vhdx", Disk(2 * MiB, payload={0: (PRESENT, b"x")}))
        hand.poke(path, MiB, struct.pack("<Q", place | PRESENT))
        image = opened(path)
        with pytest.raises(InvalidImage, match=r"block 0 .*BAT entry"):
            read(image.source, 0, 512)
        assert read(image.source, MiB, 512) == bytes(512)
        image.close()


def test_the_other_copies_serve_where_one_is_damaged(tmp_path: Path) -> None:
    for at, words in [(64 * KiB, "header 1"), (128 * KiB, "header 2"), (192 * KiB, "region table"), (256 * KiB, "")]:
        path = hand.write(tmp_path / "a.vhdx", Disk(MiB, payload={0: (PRESENT, DATA[0])}))
        hand.poke(path, at + 20, b"\xff")
        check_reader(path, DATA[0], rounds=3)
        image = opened(path)
        assert any(words in warning for warning in image.warnings) == bool(words)
        image.close()


def test_blocks_that_share_their_place_are_found_by_the_check(tmp_path: Path) -> None:
    path = hand.write(tmp_path / "a.vhdx", Disk(2 * MiB, payload={0: (PRESENT, b"x"), 1: (PRESENT, b"y")}))
    hand.poke(path, MiB, struct.pack("<QQ", 4 * MiB | 6, 4 * MiB | 6))
    image = opened(path)
    assert image.check is not None
    assert ["overlap" in damage for damage in image.check(NullJob())] == [True]
    image.close()
