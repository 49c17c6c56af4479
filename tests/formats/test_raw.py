"""The raw disk: sparse, preallocated, split."""

from __future__ import annotations

from pathlib import Path

import pytest

from ferrotype.errors import UsageError
from tests.formats.judges import MiB, check_reader, make_image, make_image_piecemeal, opened, random_disk

CONTENT = random_disk(5 * MiB + 1536, seed=3)


@pytest.mark.parametrize("make", [make_image, make_image_piecemeal])
@pytest.mark.parametrize("option", ["preallocation=off", "preallocation=full"])
def test_a_raw_disk_is_the_disk(tmp_path: Path, make: type, option: str) -> None:
    path = make(tmp_path / "a.raw", "raw", CONTENT, option)
    assert path.read_bytes() == CONTENT
    full = path.stat().st_blocks * 512 >= len(CONTENT)
    assert full == (option == "preallocation=full")


def test_a_split_disk_is_read_from_its_first_part(tmp_path: Path) -> None:
    make_image(tmp_path / "a.raw", "raw", CONTENT, "split=2MiB")
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts] == ["a.raw.001", "a.raw.002", "a.raw.003"]
    assert b"".join(part.read_bytes() for part in parts) == CONTENT
    check_reader(parts[0], CONTENT, "raw")
    image = opened(parts[0], "raw")
    assert image.facts == {"subformat": "split", "parts": 3}
    image.close()
    parts[1].unlink()
    image = opened(parts[0], "raw")
    assert image.source.size == 2 * MiB
    image.close()


def test_parts_are_whole_sectors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="whole sectors"):
        make_image(tmp_path / "a.raw", "raw", CONTENT, "split=2000001")
    assert [path.name for path in tmp_path.iterdir()] == ["a.raw.content.raw"]
