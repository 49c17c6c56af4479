"""Every byte of a small image, changed in four ways: none passes, and what does not need it stays readable.

Each change of each byte meets the opening and the objects' checksums; one of the four, in turn, also goes the whole
way (in the encrypted image that of every other byte): reading every snapshot, and verify.  With
FERROTYPE_TEST_EXHAUSTIVE=1 all of them do.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

from ferrotype.objects import heads, opening
from ferrotype.objects.layout import BLOCK, RECORDS_AT, CatalogEntry, RecordHeader, VolumeHeader
from ferrotype.objects.reading import Records
from ferrotype.objects.volumes import VolumeFile
from tests.rot.small_image import EXHAUSTIVE, MemoryVolume, SmallImage, noticed, outcome


def changes(whole: bytes, at: int) -> Iterator[int]:
    """Other values for a byte: one bit flipped, all bits flipped, zero, and what stands in some other place."""
    old = whole[at]
    yield old ^ 1 << at % 8
    yield old ^ 0xFF
    yield 0
    yield elsewhere(whole, at)


def elsewhere(whole: bytes, at: int) -> int:
    """A byte of some other place that is another value."""
    start = at * 7919
    return next(found for i in range(start, start + len(whole)) if (found := whole[i % len(whole)]) != whole[at])


def test_the_undamaged_image_is_whole(image: SmallImage) -> None:
    assert outcome(image.whole, image, frozenset()) == "ok"
    assert not any(noticed(image.whole, image, live) for live in image.live)
    kinds = {live.what for live in image.live} - {"key", "spare"}
    assert kinds == {"volume header", "anchor", "catalog", "config", "pack", "index", "snapshot"}
    assert len([live for live in image.live if live.what == "catalog"]) > 2
    assert len(image.meaningless) == 1
    assert {len(live.needed_by) for live in image.live if live.what == "pack"} == {1, 2}


def test_a_change_of_any_live_byte_is_told(image: SmallImage) -> None:
    content = bytearray(image.whole)
    told = 0
    for live in image.live:
        for at in range(live.offset, live.offset + live.used):
            for number, new in enumerate(changes(image.whole, at)):
                if new == image.whole[at]:
                    continue
                content[at] = new
                where = f"byte {at - live.offset} of {live.what} at {live.offset} made {new:#04x}"
                if EXHAUSTIVE or (number == at % 4 and (image.secret is None or at % 2)):
                    assert outcome(content, image, live.needed_by) != "ok", where
                else:
                    assert noticed(content, image, live), where
                told += 1
            content[at] = image.whole[at]
    assert told > 13_000
    print(f"{told} changes of live bytes, all told")  # noqa: T201


def test_a_change_of_any_byte_of_padding_is_told(plain: SmallImage) -> None:
    """The loop asks what opening and verify ask of each; the ends and the middle of each padding go the whole way."""
    content = bytearray(plain.whole)
    volume = MemoryVolume(content)
    records = Records(Path("image.ferro"), files=[cast("VolumeFile", volume)])
    uuid = VolumeHeader.read(plain.whole).uuid
    for live in plain.live:
        padding = range(live.offset + live.used, live.end)
        entry = CatalogEntry("", 0, live.offset, live.used - RecordHeader.SIZE, 0)
        for at in padding:
            content[at] = 1 << at % 8
            if live.offset >= RECORDS_AT:
                assert not records.padding_is_zero(entry), at
            else:
                block = bytes(content[live.offset : live.end])
                assert not heads._is_clean_header(block), at
                assert not opening._is_clean(block, uuid), at
            if EXHAUSTIVE or at in (padding[0], padding[len(padding) // 2], padding[-1]):
                assert outcome(content, plain, frozenset()) == "told", at
            content[at] = 0
    volume.close()


def test_bytes_that_belong_to_nothing_mean_nothing(image: SmallImage) -> None:
    """The only bytes that may change unnoticed: fillers, which are dead space, and what lies behind them."""
    live = sum(live.span for live in image.live)
    assert live + sum(end - start for start, end in image.meaningless) == len(image.whole)
    content = bytearray(image.whole)
    for start, end in image.meaningless:
        header = RecordHeader.unpack(image.whole, start)
        assert (header.kind, header.span) == (3, end - start)
        for at in range(start, end, 1):
            if not EXHAUSTIVE and at - start >= RecordHeader.SIZE and at % 97 and end - at > 2:
                continue
            content[at] ^= 0x5A
            assert outcome(content, image, frozenset()) == "ok", at
            content[at] = image.whole[at]
        content[start:end] = b"\xa5" * (end - start)
        assert outcome(content, image, frozenset()) == "ok"
        content[start:end] = image.whole[start:end]


def test_any_block_overwritten_is_told_and_hits_only_its_own(image: SmallImage) -> None:
    content = bytearray(image.whole)
    for live in image.live:
        for junk in (bytes(BLOCK), b"\xff" * BLOCK, image.whole[-BLOCK:], image.whole[:BLOCK]):
            if image.whole[live.offset : live.offset + BLOCK] == junk:
                continue
            content[live.offset : live.offset + BLOCK] = junk
            assert outcome(content, image, live.needed_by) != "ok", (live.what, live.offset)
            content[live.offset : live.offset + BLOCK] = image.whole[live.offset : live.offset + BLOCK]
