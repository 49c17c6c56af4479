"""Swap: against mkswap, blkid and the running kernel's own view of what it made."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from ferrotype.block.memory import MemoryDisk
from ferrotype.errors import FormatError, InvalidImage
from ferrotype.extents import ExtentMap, State
from ferrotype.filesystems import swap
from ferrotype.units import KiB, MiB
from tests.machine import run


def make(tmp_path: Path, page_size: int, size: int = 2 * MiB) -> bytearray:
    image = tmp_path / "swap.img"
    with image.open("wb") as file:
        file.truncate(size)
    image.chmod(0o600)
    run("mkswap", "-L", "some swap", "-U", "8ff8e77f-8553-485e-8656-58be67a81666", "-p", str(page_size), image)
    return bytearray(image.read_bytes())


def free(data: bytes | bytearray) -> list[tuple[int, int]]:
    starts, ends = swap.open(MemoryDisk(data)).allocation().runs(State.FREE)
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


@pytest.mark.parametrize("page_size", [4 * KiB, 8 * KiB, 16 * KiB, 32 * KiB, 64 * KiB])
def test_all_but_the_header_page_is_free(tmp_path: Path, page_size: int) -> None:
    data = make(tmp_path, page_size)
    facts = swap.open(MemoryDisk(data)).facts
    assert swap.probe(MemoryDisk(data))
    assert (facts.kind, facts.label, facts.unclean) == ("swap", "some swap", None)
    assert facts.uuid == "8ff8e77f-8553-485e-8656-58be67a81666"
    assert (facts.block_size, facts.size) == (page_size, 2 * MiB)
    assert free(data) == [(page_size, 2 * MiB)]
    assert free(data + bytes(100_000)) == [(page_size, 2 * MiB)]
    assert swap.open(MemoryDisk(data)).swap_files() == ExtentMap.uniform(0, len(data))


def test_bad_pages_do_not_matter(tmp_path: Path) -> None:
    data = make(tmp_path, 4 * KiB)
    struct.pack_into("<I", data, 1032, 2)
    struct.pack_into("<II", data, 1536, 7, 9)
    assert free(data) == [(4 * KiB, 2 * MiB)]


def test_a_big_endian_header_is_read(tmp_path: Path) -> None:
    data = make(tmp_path, 16 * KiB)
    numbers = struct.unpack_from("<3I", data, 1024)
    struct.pack_into(">3I", data, 1024, *numbers)
    assert free(data) == [(16 * KiB, 2 * MiB)]


@pytest.mark.parametrize("magic", [b"S1SUSPEND\0", b"S2SUSPEND\0", b"ULSUSPEND\0", b"LINHIB0001"])
def test_a_hibernated_machines_swap_is_kept_whole(tmp_path: Path, magic: bytes) -> None:
    data = make(tmp_path, 4 * KiB)
    data[4086:4096] = magic
    (tmp_path / "swap.img").write_bytes(data)
    facts = swap.open(MemoryDisk(data)).facts
    assert run("blkid", "-p", "-s", "TYPE", "-o", "value", tmp_path / "swap.img").strip() == facts.kind == "swsuspend"
    assert "hibernated" in str(facts.unclean)
    assert facts.label == "some swap"
    assert free(data) == []


def test_tux_on_ice_is_kept_whole(tmp_path: Path) -> None:
    data = make(tmp_path, 4 * KiB)
    data[:8] = bytes.fromhex("edc302e99856e50c")
    assert free(data) == []
    assert "hibernated" in str(swap.open(MemoryDisk(data)).facts.unclean)


@pytest.mark.parametrize("words", ["<Q", ">I", ">Q"])
def test_version_0_has_a_bitmap_of_machine_words(words: str) -> None:
    page_size, pages = 4 * KiB, 300
    usable = sum(1 << n for n in range(1, pages) if n != 17)
    data = bytearray(pages * page_size + 5000)
    width = struct.calcsize(words)
    for at in range(0, 64, width):
        word = usable >> 8 * at & (1 << 8 * width) - 1
        struct.pack_into(words, data, at, word)
    data[page_size - 10 : page_size] = b"SWAP-SPACE"
    assert free(data) == [(page_size, 17 * page_size), (18 * page_size, pages * page_size)]
    facts = swap.open(MemoryDisk(data)).facts
    assert (facts.size, facts.label, facts.uuid, facts.unclean) == (pages * page_size, None, None, None)


def test_a_cut_volume_is_unclean(tmp_path: Path) -> None:
    data = make(tmp_path, 4 * KiB)
    assert "longer" in str(swap.open(MemoryDisk(data[: 1 * MiB])).facts.unclean)
    assert free(data[: 1 * MiB]) == [(4 * KiB, 1 * MiB)]


def test_other_volumes_are_refused() -> None:
    for content in (b"", bytes(100), bytes(4096), bytes(70000)):
        assert not swap.probe(MemoryDisk(content))
        with pytest.raises(InvalidImage):
            swap.open(MemoryDisk(content))
    data = bytearray(64 * KiB)
    data[4086:4096] = b"SWAPSPACE2"
    with pytest.raises(InvalidImage, match="version"):
        swap.open(MemoryDisk(data))
    data[4086:4096] = b"SWAP-SPACE"
    with pytest.raises(InvalidImage, match="bitmap"):
        swap.open(MemoryDisk(data))


def test_flipped_bytes_raise_only_what_is_promised(tmp_path: Path) -> None:
    rng = random.Random(5)
    data = make(tmp_path, 4 * KiB, size=128 * KiB)
    for magic in (b"SWAPSPACE2", b"SWAP-SPACE"):
        for _ in range(300):
            changed = bytearray(data)
            changed[4086:4096] = magic
            for _ in range(3):
                changed[rng.choice((*range(16), *range(1024, 1072)))] = rng.randrange(256)
            try:
                opened = swap.open(MemoryDisk(changed))
            except FormatError:
                continue
            assert opened.allocation().length == len(data)
