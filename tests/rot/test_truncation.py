"""An image cut at every length: what is left is right, and that something is missing is said."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from ferrotype.objects.layout import BLOCK, RECORDS_AT, CatalogEntry, RecordHeader
from ferrotype.objects.reading import Records
from ferrotype.objects.volumes import VolumeFile
from tests.rot.small_image import EXHAUSTIVE, MemoryVolume, SmallImage, noticed, outcome


def test_a_cut_inside_a_structure_is_told(image: SmallImage) -> None:
    """Every length that cuts header or payload meets the opening; every sixteenth goes the whole way."""
    for live in image.live:
        intact = {other.name or other.what for other in image.live if other.end <= live.offset}
        for size in range(live.offset, live.offset + live.used):
            content = bytearray(image.whole[:size])
            assert noticed(content, image, live), size
            if EXHAUSTIVE or size % 16 == 0:
                assert outcome(content, image, cut_off(image, intact)) != "ok", size


def test_a_cut_inside_padding_is_told(image: SmallImage) -> None:
    """The loop asks what opening and verify ask of each; three lengths of each padding go the whole way."""
    content = bytearray(image.whole)
    volume = MemoryVolume(content)
    records = Records(Path("image.ferro"), files=[cast("VolumeFile", volume)])
    for live in reversed(image.live):
        entry = CatalogEntry("", 0, live.offset, live.used - RecordHeader.SIZE, 0)
        intact = {other.name or other.what for other in image.live if other.end <= live.offset + BLOCK}
        lengths = range(live.offset + live.used, live.end)
        for size in reversed(lengths):
            del content[size:]
            if live.offset >= RECORDS_AT:
                assert not records.padding_is_zero(entry), size
            if EXHAUSTIVE or size in (lengths[0], lengths[len(lengths) // 2], lengths[-1]):
                assert outcome(content, image, cut_off(image, intact)) != "ok", size
    volume.close()


def test_a_cut_inside_a_filler_is_told(image: SmallImage) -> None:
    for start, end in image.meaningless:
        for size in range(start, end, 1 if EXHAUSTIVE else 127):
            assert outcome(image.whole[:size], image) != "ok", size


def test_an_empty_file_and_a_longer_one(image: SmallImage) -> None:
    assert outcome(b"", image) == "refused"
    for tail in (b"\0", bytes(BLOCK), b"x" * 5000, image.whole[RECORDS_AT:], image.whole):
        assert outcome(image.whole + tail, image, frozenset()) in ("ok", "told")


def cut_off(image: SmallImage, intact: set[str]) -> frozenset[str]:
    """The snapshots that need something which is not among the intact structures."""
    return frozenset().union(*(live.needed_by for live in image.live if (live.name or live.what) not in intact))
