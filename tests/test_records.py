"""On-disk structures: laid out once, held against the specified size, refused where cut short."""

from __future__ import annotations

import pytest

from ferrotype.errors import InvalidImage
from ferrotype.records import Record, b4, record, s16, u8, u32, u64


@record(endian="<", size=19)
class Little(Record):
    magic: b4
    flags: u8
    delta: s16
    size: u64
    spare: u32


@record(endian=">", size=4)
class Big(Record):
    value: u32


def test_what_is_packed_is_unpacked() -> None:
    one = Little(b"ABCD", 255, -2, 1 << 63, 7)
    raw = one.pack()
    assert raw == b"ABCD\xff\xfe\xff" + bytes(7) + b"\x80" + b"\x07\0\0\0"
    assert Little.unpack(raw) == one
    assert Little.unpack(memoryview(b"??" + raw), 2) == one
    assert Big.unpack(b"\0\0\1\2").value == 258


@pytest.mark.parametrize("offset", [-1, 1, 19, 1 << 70])
def test_bytes_that_end_too_early_are_an_invalid_image(offset: int) -> None:
    with pytest.raises(InvalidImage, match="Little"):
        Little.unpack(bytes(19), offset)


def test_a_wrong_size_is_found_when_the_class_is_made() -> None:
    with pytest.raises(TypeError, match="4 bytes"):

        @record(endian="<", size=5)
        class Wrong(Record):
            value: u32
