"""VHDX, rule by rule: what [MS-VHDX] says must be, and files that break it."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

from ferrotype.block import read
from ferrotype.errors import InvalidImage, UnsupportedError, UsageError
from ferrotype.job import NullJob
from tests.formats import vhdx_by_hand as hand
from tests.formats.judges import KiB, MiB, check_reader, facts_of, make_image, opened
from tests.formats.vhdx_by_hand import NOT_PRESENT, PARTIAL, PRESENT, Disk

GUID, OTHER = "11111111-2222-3333-4444-555555555555", "77777777-6666-5555-4444-333333333333"
LOG_GUID = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee"
DATA = [random.Random(number).randbytes(MiB) for number in range(2)]
BEFORE, SWAPPED, EMPTY = DATA[0] + DATA[1], DATA[1] + DATA[0], bytes(2 * MiB)
SWAP = struct.pack("<QQ", 4 * MiB | PRESENT, 5 * MiB | PRESENT).ljust(4096, b"\0")
SIX = 6 * MiB  # the file: heads, BAT, log, metadata, blocks 1 and 0


def disk(**about: Any) -> Disk:
    return Disk(2 * MiB, payload={0: (PRESENT, DATA[0]), 1: (PRESENT, DATA[1])}, **about)


def logged(path: Path, *entries: bytes, at: int = 0) -> Path:
    """A disk of two blocks, whose log has the entries from byte ``at`` of the ring on."""
    log, ring = b"".join(entries), bytearray(MiB)
    ring[at : at + len(log)] = log[: MiB - at]
    ring[: len(log[MiB - at :])] = log[MiB - at :]
    return hand.write(path, disk(log=bytes(ring), log_guid=LOG_GUID))


def change(number: int, tail: int, what: bytes | int, *, flushed: int = SIX, last: int = SIX) -> bytes:
    """An entry that writes the first sectors of the BAT."""
    return hand.log_entry(number, tail, [(MiB, what)], LOG_GUID, flushed=flushed, last=last)


def patched(entry: bytes, at: int, code: str, value: int) -> bytes:
    """The entry with one field changed, and its checksum right."""
    changed = bytearray(entry)
    struct.pack_into(code, changed, at, value)
    return hand.seal(bytes(changed))


# ---------------------------------------------------------------------- the log: section 2.3


@pytest.mark.parametrize(
    ("what", "at", "code", "value"),
    [
        (4096, 12, "<I", 100),  # Tail
        (4096, 16, "<Q", 0),  # SequenceNumber
        (4096, 28, "<I", 1),  # Reserved
        (4096, 64, "<I", 0x6F72657B),  # ZeroSignature
        (4096, 68, "<I", 1),  # Reserved
        (4096, 72, "<Q", 4096 + 512),  # ZeroLength
        (4096, 80, "<Q", MiB - 512),  # FileOffset
        (4096, 88, "<Q", 3),  # SequenceNumber
        (bytes(4096), 80, "<Q", MiB - 512),
        (bytes(4096), 88, "<Q", 1),
        (bytes(4096), 4096, "<I", 0),  # DataSignature
        (bytes(4096), 4100, "<I", 1),  # SequenceHigh
        (bytes(4096), 8188, "<I", 1),  # SequenceLow
    ],
)
def test_an_entry_with_a_wrong_field_is_not_valid(
    tmp_path: Path, what: bytes | int, at: int, code: str, value: int
) -> None:
    """So the sequence before it is the one in force."""
    second = change(2, 0, what)
    check_reader(logged(tmp_path / "a.vhdx", change(1, 0, SWAP), second), EMPTY, rounds=2)
    check_reader(logged(tmp_path / "a.vhdx", change(1, 0, SWAP), patched(second, at, code, value)), SWAPPED, rounds=2)


def test_of_two_sequences_the_one_with_the_higher_number_counts(tmp_path: Path) -> None:
    for first, second in [
        (change(9, 0, SWAP), change(7, 64 * KiB, 4096)),
        (change(7, 0, 4096), change(9, 64 * KiB, SWAP)),
    ]:
        log = first.ljust(64 * KiB, b"\0") + second
        check_reader(logged(tmp_path / "a.vhdx", log), SWAPPED, rounds=2)


def test_a_sequence_whose_entries_and_tail_lie_across_the_end_of_the_ring(tmp_path: Path) -> None:
    at = MiB - 2 * 4096  # the second entry lies on both sides
    entries = [change(5, at, 4096), change(6, at, bytes(4096)), change(7, at, SWAP)]
    assert [len(entry) for entry in entries] == [4096, 8192, 8192]
    check_reader(logged(tmp_path / "a.vhdx", *entries, at=at), SWAPPED, rounds=2)


def test_a_log_in_use_without_a_valid_sequence_is_refused(tmp_path: Path) -> None:
    whole = change(5, 0, SWAP)
    torn = whole[:5000] + b"?" + whole[5001:]
    foreign = hand.log_entry(5, 0, [(MiB, SWAP)], GUID)
    for entries in [(), (torn,), (foreign,), (patched(whole, 12, "<I", 4096),)]:
        with pytest.raises(InvalidImage, match=r"no whole sequence .*LogGuid"):
            opened(logged(tmp_path / "a.vhdx", *entries))
    with pytest.raises(InvalidImage, match="no whole sequence"):
        opened(hand.write(tmp_path / "a.vhdx", disk(log_guid=LOG_GUID, log_length=0)))


def test_the_sizes_that_the_last_entry_states_are_those_that_count(tmp_path: Path) -> None:
    """The file may have been made shorter meanwhile.  That it is whole MiB does not matter to qemu, nor here."""
    shrunk = (change(1, 0, 4096, flushed=9 * MiB, last=9 * MiB), change(2, 0, SWAP))
    check_reader(logged(tmp_path / "a.vhdx", *shrunk), SWAPPED, rounds=2)
    odd = change(1, 0, SWAP, flushed=SIX - 512, last=SIX - 512)
    check_reader(logged(tmp_path / "a.vhdx", odd), SWAPPED, rounds=2)
    with pytest.raises(InvalidImage, match="FlushedFileOffset"):
        opened(logged(tmp_path / "a.vhdx", shrunk[1], change(3, 0, SWAP, flushed=7 * MiB, last=7 * MiB)))


def test_an_entry_may_have_room_behind_its_data(tmp_path: Path) -> None:
    """As one has that is aligned to more than 4 KiB; the next one stands behind that room."""
    first = patched(change(1, 0, 4096) + bytes(12 * KiB), 8, "<I", 16 * KiB)
    check_reader(logged(tmp_path / "a.vhdx", first, change(2, 0, SWAP)), SWAPPED, rounds=2)


def test_the_version_of_the_log_matters_where_there_is_one(tmp_path: Path) -> None:
    path = logged(tmp_path / "a.vhdx", change(1, 0, SWAP))
    for at in (64 * KiB, 128 * KiB):
        hand.poke(path, at + 64, b"\1\0")
        hand.reseal(path, at, 4096)
    with pytest.raises(UnsupportedError, match="LogVersion"):
        opened(path)
    for at in (64 * KiB, 128 * KiB):
        hand.poke(path, at + 48, bytes(16))
        hand.reseal(path, at, 4096)
    check_reader(path, BEFORE, rounds=2)


# ---------------------------------------------------------------------- headers: section 2.2.2


def test_the_header_with_the_higher_number_is_in_force(tmp_path: Path) -> None:
    path = hand.write(tmp_path / "a.vhdx", disk())
    for number, guid in [(6, GUID), (8, OTHER), ((1 << 64) - 1, OTHER)]:
        hand.poke(path, 128 * KiB, hand.header(disk(data_guid=OTHER), number))
        assert facts_of(path)["data_write_guid"] == guid


def test_headers_of_one_number_must_be_one(tmp_path: Path) -> None:
    path = hand.write(tmp_path / "a.vhdx", disk())
    hand.poke(path, 128 * KiB, hand.header(disk(), 7))
    check_reader(path, BEFORE, rounds=2)
    hand.poke(path, 128 * KiB, hand.header(disk(data_guid=OTHER), 7))
    with pytest.raises(InvalidImage, match="contradict"):
        opened(path)
    hand.poke(path, 128 * KiB + 4, b"????")  # the first one is the only valid one
    check_reader(path, BEFORE, rounds=2)


# ---------------------------------------------------------------------- regions: section 2.2.3


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        ([(OTHER, 8 * MiB, MiB, 0), (OTHER, 9 * MiB, MiB, 0)], "listed twice"),
        ([(OTHER, 8 * MiB + 4096, MiB, 0)], "whole MiB"),
        ([(OTHER, 8 * MiB, MiB + 4096, 0)], "whole MiB"),
        ([(OTHER, 0, MiB, 0)], "whole MiB"),
        ([(OTHER, 2 * MiB, MiB, 0)], f"overlaps the region {OTHER}|{OTHER} overlaps"),  # the log
        ([(OTHER, 8 * MiB, 3 * MiB, 0), (GUID, 10 * MiB, MiB, 0)], f"region {OTHER} overlaps the region {GUID}"),
        ([(OTHER, 1 << 63, MiB, 0)], "outside the file"),
    ],
)
def test_regions_that_need_not_be_known_keep_to_the_rules(tmp_path: Path, regions: Any, words: str) -> None:
    with pytest.raises(InvalidImage, match=words):
        opened(hand.write(tmp_path / "a.vhdx", disk(extra_regions=regions)))


def test_blocks_keep_off_regions_that_are_not_known(tmp_path: Path) -> None:
    path = hand.write(tmp_path / "a.vhdx", disk(extra_regions=[(OTHER, 4 * MiB, MiB, 0)]))
    image = opened(path)
    assert read(image.source, 0, MiB) == DATA[0]
    with pytest.raises(InvalidImage, match=f"block 1 .*overlaps the region {OTHER}"):
        read(image.source, MiB, 512)
    with pytest.raises(InvalidImage, match=f"block 1 .*overlaps the region {OTHER}"):
        read(image.source, MiB - 512, 1024)
    image.close()


# ---------------------------------------------------------------------- metadata: section 2.6


def entry_at(number: int) -> int:
    """Where entry ``number`` of the metadata table stands; the disk's own are five."""
    return 3 * MiB + 32 + 32 * number


def test_items_do_not_overlap(tmp_path: Path) -> None:
    for item, flags in [(OTHER, 0), (OTHER, 1)]:
        path = hand.write(tmp_path / "a.vhdx", disk(extra_items=[(item, flags, bytes(100))]))
        check_reader(path, BEFORE, rounds=2)
        hand.poke(path, entry_at(5) + 16, struct.pack("<I", 64 * KiB + 10))
        with pytest.raises(InvalidImage, match="overlaps another"):
            opened(path)


def test_items_are_unique_among_users_and_among_the_systems(tmp_path: Path) -> None:
    both = [(OTHER, 0, b"x"), (OTHER, 1, b"x"), (hand.SIZE, 1, b"a user's, with a known name")]
    check_reader(hand.write(tmp_path / "a.vhdx", disk(extra_items=both)), BEFORE, rounds=2)
    for flags in (0, 1):
        with pytest.raises(InvalidImage, match="listed twice"):
            opened(hand.write(tmp_path / "a.vhdx", disk(extra_items=[(OTHER, flags, b"x"), (OTHER, flags, b"y")])))


def test_items_of_users_are_at_most_1024(tmp_path: Path) -> None:
    items = [(f"{number:08}{OTHER[8:]}", 1, b"x") for number in range(1025)]
    check_reader(hand.write(tmp_path / "a.vhdx", disk(extra_items=items[1:])), BEFORE, rounds=2)
    with pytest.raises(InvalidImage, match="too many user items"):
        opened(hand.write(tmp_path / "a.vhdx", disk(extra_items=items)))


def test_an_item_may_be_empty(tmp_path: Path) -> None:
    for item in (OTHER, hand.LOCATOR):  # a parent locator means nothing without a parent
        path = hand.write(tmp_path / "a.vhdx", disk(extra_items=[(item, 0, b"x")]))
        hand.poke(path, entry_at(5) + 16, bytes(8))
        check_reader(path, BEFORE, rounds=2)
        hand.poke(path, entry_at(5) + 16, struct.pack("<I", 64 * KiB))
        with pytest.raises(InvalidImage, match="outside its region"):
            opened(path)
    path = hand.write(tmp_path / "a.vhdx", disk())
    hand.poke(path, entry_at(1) + 16, bytes(8))
    with pytest.raises(InvalidImage, match="VirtualDiskSize"):
        opened(path)


def test_items_longer_than_a_mib_are_refused(tmp_path: Path) -> None:
    path = hand.write(tmp_path / "a.vhdx", disk(extra_items=[(OTHER, 0, b"x")]))
    hand.poke(path, entry_at(5) + 20, struct.pack("<I", MiB + 1))
    with pytest.raises(InvalidImage, match="outside its region"):
        opened(path)


# ---------------------------------------------------------------------- parents: section 2.6.2.6


def child(folder: Path, texts: dict[str, str], **about: Any) -> Path:
    hand.write(folder / "parent.vhdx", disk())
    return hand.write(folder / "child.vhdx", Disk(2 * MiB, parent=texts, **about))


LINK = {"parent_linkage": "{" + GUID + "}", "relative_path": "parent.vhdx"}


def test_a_child_and_its_parent_have_sectors_of_one_size(tmp_path: Path) -> None:
    check_reader(child(tmp_path, LINK), BEFORE, rounds=2)
    with pytest.raises(InvalidImage, match="sectors of 512 bytes, and this image of 4096"):
        opened(child(tmp_path, LINK, sector=4096))


def test_parent_linkage_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidImage, match="names no parent"):
        opened(child(tmp_path, {"parent_linkage2": LINK["parent_linkage"], "relative_path": "parent.vhdx"}))


@pytest.mark.parametrize("field", [0, 4])  # KeyOffset, ValueOffset
def test_texts_of_the_locator_do_not_stand_at_its_start(tmp_path: Path, field: int) -> None:
    path = child(tmp_path, LINK)
    at = path.read_bytes().index(hand.guid(hand.LOCATOR_TYPE)) + 20 + field
    hand.poke(path, at, bytes(4))
    with pytest.raises(InvalidImage, match="outside the parent locator"):
        opened(path)


def test_a_nul_ends_no_text(tmp_path: Path) -> None:
    for texts in [{"relative_path": "parent.vhdx\0"}, {"relative_path\0": "parent.vhdx"}]:
        with pytest.raises(InvalidImage, match="NUL"):
            opened(child(tmp_path, {"parent_linkage": "{" + GUID + "}", **texts}))


def test_keys_are_case_sensitive(tmp_path: Path) -> None:
    with pytest.raises(InvalidImage, match="names no file"):
        opened(child(tmp_path, {"parent_linkage": "{" + GUID + "}", "Relative_Path": "parent.vhdx"}))


# ---------------------------------------------------------------------- the BAT: section 2.5


def test_partially_present_blocks_need_a_bitmap_that_is_there(tmp_path: Path) -> None:
    payload = {0: (PARTIAL, DATA[0]), 1: (NOT_PRESENT, b"")}
    path = child(tmp_path, LINK, payload=payload, bitmaps={0: b"\xff" * 256})
    check_reader(path, BEFORE, rounds=2)
    at = MiB + 4096 * 8  # the entry of the sector bitmap: a chunk has 4096 blocks of 1 MiB
    wrong = [(4 * MiB, "no sector bitmap"), (3 * MiB | 6, "overlaps the metadata"), (9 << 40 | 6, "sector bitmap")]
    for entry, words in wrong:
        hand.poke(path, at, struct.pack("<Q", entry))
        image = opened(path)
        with pytest.raises(InvalidImage, match=words):
            read(image.source, 0, 512)
        image.close()


def test_bits_that_are_reserved_are_left_alone_and_told(tmp_path: Path) -> None:
    path = hand.write(tmp_path / "a.vhdx", disk())
    hand.poke(path, MiB, struct.pack("<Q", 5 * MiB | 0x800F8 | PRESENT))
    image = opened(path)
    assert read(image.source, 0, 2 * MiB) == BEFORE
    assert image.check is not None
    assert ["mean nothing" in damage for damage in image.check(NullJob())] == [True]
    image.close()


# ---------------------------------------------------------------------- written


def test_physical_sectors_hold_logical_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot hold"):
        make_image(tmp_path / "a.vhdx", "vhdx", bytes(MiB), "physical_sector_size=512", sector_size=4096)
