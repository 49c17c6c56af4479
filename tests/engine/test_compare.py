"""Compare: what differs is found to the byte, and what is known to be zeros is never read."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from ferrotype.block.memory import MemoryDisk
from ferrotype.engine.compare import MAX_RANGES, Comparison, compare
from ferrotype.errors import Cancelled, ReadError
from ferrotype.extents import ExtentMap, State
from ferrotype.job import NullJob
from ferrotype.units import KiB, MiB, TiB


class Known(MemoryDisk):
    """Knows some aligned stretches of zeros, and must never be asked to read them."""

    def __init__(self, content: bytes | bytearray, unit: int = 0) -> None:
        super().__init__(content)
        self.read = 0
        self._starts = [
            at for at in range(0, len(content), unit or len(content)) if unit and not any(content[at : at + unit])
        ]
        self._ends = [min(at + unit, len(content)) for at in self._starts]

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        for start, end in zip(self._starts, self._ends, strict=True):
            assert end <= offset or start >= offset + len(buf), f"reads {offset}, which is known to be zeros"
        self.read += len(buf)
        super().read_into(offset, buf)

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return ExtentMap.from_runs(offset, length, *self._clipped(offset, length), State.ZERO | State.HOLE)

    def _clipped(self, offset: int, length: int) -> tuple[list[int], list[int]]:
        inside = [
            (max(start, offset), min(end, offset + length))
            for start, end in zip(self._starts, self._ends, strict=True)
            if end > offset and start < offset + length
        ]
        return [start for start, _ in inside], [end for _, end in inside]


def by_definition(one: bytes, other: bytes) -> tuple[int | None, list[tuple[int, int]]]:
    """The first byte that differs, and the sectors that do."""
    whole = max(len(one), len(other))
    one, other = one.ljust(whole, b"\0"), other.ljust(whole, b"\0")
    first = next((at for at in range(whole) if one[at] != other[at]), None)
    ranges: list[tuple[int, int]] = []
    for at in range(0, whole, 512):
        if one[at : at + 512] != other[at : at + 512]:
            length = min(512, whole - at)
            if ranges and sum(ranges[-1]) == at:
                at, before = ranges.pop()
                length += before
            ranges.append((at, length))
    return first, ranges


def disk(size: int, seed: int) -> bytearray:
    rng = random.Random(seed)
    content = bytearray(size)
    for _ in range(12):
        at = rng.randrange(size)
        length = min(rng.choice([1, 700, 9000, 60_000]), size - at)
        content[at : at + length] = rng.randbytes(length)
    return content


@pytest.mark.parametrize("seed", range(12))
def test_what_differs(seed: int) -> None:
    rng = random.Random(seed)
    size = rng.choice([1, 511, 70_000, 300_001, 400 * KiB])
    one = disk(size, seed)
    other = bytearray(one)
    for _ in range(rng.choice([0, 1, 5, 40])):
        at = rng.randrange(size)
        other[at] ^= rng.choice([1, 0x80, 0xFF])
    other += bytes(rng.choice([0, 1, 5000]))
    if seed % 4 == 3:
        other[-1] = 7
    units = [(0, 0), (4096, 0), (0, 512), (4096, 8192)]
    for mine, theirs in units:
        for first, second in ((Known(one, mine), Known(other, theirs)), (Known(other, theirs), Known(one, mine))):
            found = compare(first, second, NullJob(), workers=2)
            assert (found.first_difference, found.differences) == by_definition(bytes(one), bytes(other))
            assert found.identical == (found.first_difference is None)
            assert found.compared_bytes == first.read + second.read


def test_differences_join_across_batches_and_end_with_the_disk() -> None:
    one, other = bytearray(5 * MiB + 100), bytearray(5 * MiB + 100)
    other[2 * MiB - 1] = other[2 * MiB] = 1
    other[-1] = 1
    found = compare(MemoryDisk(one), MemoryDisk(other), NullJob())
    assert found.first_difference == 2 * MiB - 1
    assert found.differences == [(2 * MiB - 512, 1024), (5 * MiB, 100)]


def test_zeros_on_one_side_only() -> None:
    content = bytearray(3 * MiB)
    content[MiB + 5] = 1
    empty = Known(bytes(3 * MiB), MiB)
    found = compare(empty, MemoryDisk(content), NullJob())
    assert found.first_difference == MiB + 5
    assert empty.read == 0
    assert compare(Known(bytes(MiB), MiB), Known(bytes(MiB), 4096), NullJob()).compared_bytes == 0


def test_sizes() -> None:
    content = bytes(disk(100_000, 4))
    job = NullJob()
    assert compare(MemoryDisk(content), MemoryDisk(content + bytes(70_000)), job).identical
    assert any("sizes differ" in note for note in job.notes)
    assert not job.warnings
    found = compare(MemoryDisk(content + bytes(69_999) + b"x"), MemoryDisk(content), NullJob())
    assert found.first_difference == 169_999
    strict = compare(MemoryDisk(content), MemoryDisk(content + bytes(70_000)), NullJob(), strict=True)
    assert (strict.identical, strict.first_difference, strict.differences) == (False, 100_000, [])
    assert compare(MemoryDisk(b""), MemoryDisk(b""), NullJob(), strict=True).identical
    assert compare(MemoryDisk(b""), MemoryDisk(b"\0\0"), NullJob()).identical


def test_strict_is_about_what_is_stored() -> None:
    content = bytearray(8 * 4096)
    content[0:4096] = content[5 * 4096 : 6 * 4096] = b"\1" * 4096
    full, sparse = Known(content), Known(content, 4096)
    assert compare(full, sparse, NullJob()).identical
    found = compare(full, sparse, NullJob(), strict=True)
    assert not found.identical
    assert found.first_difference == 4096
    assert found.differences == []
    assert found.allocation == [(4096, 4 * 4096), (6 * 4096, 2 * 4096)]
    assert compare(sparse, Known(content, 4096), NullJob(), strict=True).identical
    document = found.as_json()
    assert document["allocation_differences"][0] == {"start": 4096, "length": 16384}  # type: ignore[index]


def test_a_list_that_is_too_long() -> None:
    one, other = bytearray(12 * MiB), bytearray(12 * MiB)
    other[:: 2 * 512] = b"\1" * (12 * MiB // 1024)
    job = NullJob()
    found = compare(MemoryDisk(one), MemoryDisk(other), job)
    assert found.truncated
    assert len(found.differences) == MAX_RANGES
    assert all(b[0] - a[0] == 1024 for a, b in pairwise(found.differences))
    assert len(job.warnings) == 1
    other = bytearray(12 * MiB)
    for at in range(MAX_RANGES):
        other[at * 1024] = 1
    exact = compare(MemoryDisk(one), MemoryDisk(other), NullJob())
    assert (len(exact.differences), exact.truncated) == (MAX_RANGES, False)


class Huge:
    """64 TiB that are known to be zeros but for some MiB."""

    size = 64 * TiB

    def __init__(self, at: int) -> None:
        self.traits = MemoryDisk(b"").traits
        self._at = at

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        assert self._at <= offset
        assert offset + len(buf) <= self._at + MiB
        buf[:] = b"\7" * len(buf)

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        low = min(max(self._at, offset), offset + length)
        high = min(max(self._at + MiB, offset), offset + length)
        return ExtentMap.from_runs(offset, length, [low], [high], State.DATA, State.ZERO)

    def close(self) -> None:
        pass


def test_nothing_is_done_for_what_is_empty() -> None:
    found = compare(Huge(40 * TiB + 4096), Huge(40 * TiB + 4096), NullJob())
    assert found.identical
    assert found.compared_bytes == 2 * MiB
    found = compare(Huge(40 * TiB), Huge(50 * TiB), NullJob(), strict=True)
    assert found.differences == found.allocation == [(40 * TiB, MiB), (50 * TiB, MiB)]


def test_it_is_told_to_stop_and_says_how_far_it_is() -> None:
    class Stopping(NullJob):
        done = 0
        total: int | None = None

        def begin(self, phase: str, total: int | None = None, /) -> None:  # noqa: ARG002  the protocol's
            self.total = total

        def advance(self, count: int, /) -> None:
            self.done += count
            super().advance(count)

    content = bytes(5 * MiB)
    job = Stopping()
    compare(MemoryDisk(content), Known(content, MiB), job)
    assert job.done == job.total == 5 * MiB
    job = Stopping(stop=True)
    with pytest.raises(Cancelled):
        compare(MemoryDisk(content), MemoryDisk(content), job)


def test_what_cannot_be_read_is_no_difference() -> None:
    class Bad(MemoryDisk):
        def read_into(self, offset: int, buf: memoryview, /) -> None:
            raise ReadError("bad", offset, len(buf), "no")

    result = compare(MemoryDisk(bytes(MiB)), Bad(bytes(MiB)), NullJob())
    assert result.differences == []
    assert result.first_difference is None
    assert not result.identical  # and no equality either
    assert result.unreadable == ([], [(0, MiB)])


def test_the_document() -> None:
    assert Comparison((5, 5)).as_json() == {
        "identical": True,
        "first_difference": None,
        "differences": [],
        "truncated": False,
        "sizes": [5, 5],
        "read_bytes": 0,
        "unreadable": [],
    }
