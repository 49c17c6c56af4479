"""Sizes as people write them."""

from __future__ import annotations

import pytest

from ferrotype.errors import UsageError
from ferrotype.units import GiB, KiB, MiB, TiB, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("64KiB", 64 * KiB), ("64k", 64 * KiB), (" 1.5 TiB ", 3 * TiB // 2), ("4G", 4 * GiB)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "1 MB", "4kb", "1.0000001KiB", "MiB", "1e3", "nan", "1 KiB KiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KiB, "1 KiB"),
        (9 * GiB // 2, "4.5 GiB"),
        (1000 * MiB, "0.98 GiB"),
        (931 * GiB, "931 GiB"),
    ],
)
def test_sizes_are_shown_in_three_digits(size: int, text: str) -> None:
    assert format_size(size) == text
