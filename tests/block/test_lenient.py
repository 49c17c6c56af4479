"""Sources that cannot be read in places: all that can be is, and no sector more is lost; and nothing is worn out."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from ferrotype.block import Source
from ferrotype.block.lenient import Lenient, Limits, clipped, joined, known_unreadable
from ferrotype.block.memory import MemoryDisk
from ferrotype.block.views import Concat, Slice
from ferrotype.errors import Cancelled, DamagedRange, DeviceError, ReadError
from ferrotype.job import NullJob
from ferrotype.testing.faults import FailingDisk
from ferrotype.units import KiB, MiB

Ranges = list[tuple[int, int]]  # start and length

SIZE = 8 * MiB
CONTENT = random.Random(7).randbytes(SIZE)


def read_all(source: Source, step: int, lenient: Lenient) -> bytes:
    found = bytearray(source.size)
    for at in range(0, source.size, step):
        lenient.read_into(at, memoryview(found)[at : at + step])
    return bytes(found)


def without(bad: Ranges, content: bytes = CONTENT) -> bytes:
    left = bytearray(content)
    for start, length in bad:
        left[start : start + length] = bytes(length)
    return bytes(left)


SPOTS = random.Random(5)
BAD: list[tuple[str, Ranges]] = [
    ("one sector", [(5 * MiB + 512, 512)]),
    ("one page", [(3 * MiB + 4096, 4096)]),
    ("the first", [(0, 512)]),
    ("the last", [(SIZE - 512, 512)]),
    ("over an edge", [(4 * MiB - 1024, 3072)]),
    ("many", [(2 * MiB + at * 1024, 512) for at in range(60)]),
    ("odd and long", [(MiB + 1536, 2 * MiB + 512)]),
    ("scattered", joined((SPOTS.randrange(SIZE // 512) * 512, 512) for _ in range(40))),
]


@pytest.mark.parametrize("step", [SIZE, 4 * MiB, 300_000])
@pytest.mark.parametrize("bad", [bad for _, bad in BAD], ids=[name for name, _ in BAD])
def test_no_sector_more_is_lost(bad: Ranges, step: int) -> None:
    disk = FailingDisk(CONTENT, bad)
    lenient = Lenient(disk)
    assert read_all(disk, step, lenient) == without(bad)
    assert lenient.unreadable == joined(bad)
    assert "medium error" in lenient.reason


def test_good_parts_are_read_first() -> None:
    """What fails is not asked for again until everything around it is there."""
    disk = FailingDisk(CONTENT, [(MiB, 4096)])
    Lenient(disk).read_into(0, memoryview(bytearray(4 * MiB)))
    failed = [i for i, (start, length) in enumerate(disk.reads) if start < MiB + 4096 and start + length > MiB]
    assert any(start + length == 4 * MiB for start, length in disk.reads[: failed[2]])


def test_a_dead_stretch_is_not_worn_out() -> None:
    disk = FailingDisk(CONTENT, [(0, SIZE)])
    lenient = Lenient(disk)
    assert read_all(disk, 4 * MiB, lenient) == bytes(SIZE)
    assert lenient.unreadable == [(0, SIZE)]
    assert disk.failures < 2 * 60  # of 16384 sectors


def test_tries_are_bounded_where_every_other_sector_fails() -> None:
    bad = [(at, 512) for at in range(0, 4 * MiB, 1024)]
    disk = FailingDisk(CONTENT[: 4 * MiB], bad)
    lenient = Lenient(disk, limits=Limits(tries=50))
    found = read_all(disk, 4 * MiB, lenient)
    assert disk.failures < 50 + 100
    lost = without([*lenient.unreadable], CONTENT[: 4 * MiB])
    assert found == lost  # all that is not said to be lost is there
    assert all(clipped(lenient.unreadable, start, 512) == [(start, 512)] for start, _ in bad)


@pytest.mark.parametrize("limits", [Limits(seconds=20.0), Limits(total=20.0)], ids=["one stretch", "all"])
def test_time_is_bounded(limits: Limits) -> None:
    """A drive that takes seven seconds to say that a sector is bad."""
    now = 0.0

    def clock() -> float:
        return now

    class Slow(FailingDisk):
        def read_into(self, offset: int, buf: memoryview, /) -> None:
            nonlocal now
            try:
                super().read_into(offset, buf)
            except ReadError:
                now += 7.0
                raise

    disk = Slow(CONTENT, [(at, 512) for at in range(MiB, 2 * MiB, 65536)])
    lenient = Lenient(disk, limits=limits, clock=clock)
    assert read_all(disk, SIZE, lenient) == without([*lenient.unreadable])
    assert disk.failures < 40


def test_it_may_be_stopped() -> None:
    disk = FailingDisk(CONTENT, [(0, SIZE)])
    with pytest.raises(Cancelled):
        Lenient(disk, NullJob(stop=True)).read_into(0, memoryview(bytearray(SIZE)))
    assert disk.failures < 4


@pytest.mark.parametrize(
    "error", [lambda: ReadError("disk", 0, 1, "no device", gone=True), lambda: DeviceError("it does not answer")]
)
def test_what_is_gone_is_not_asked_again(error: Callable[[], DeviceError]) -> None:
    class Gone(MemoryDisk):
        asked = 0

        def read_into(self, offset: int, buf: memoryview, /) -> None:  # noqa: ARG002
            self.asked += 1
            raise error()

    disk = Gone(CONTENT)
    with pytest.raises(DeviceError):
        Lenient(disk).read_into(0, memoryview(bytearray(SIZE)))
    assert disk.asked == 1


def test_a_sector_that_reads_the_second_time() -> None:
    class Once(FailingDisk):
        def read_into(self, offset: int, buf: memoryview, /) -> None:
            if self.failures >= 5:
                self.bad = []
            super().read_into(offset, buf)

    disk = Once(CONTENT, [(MiB, 512)])
    lenient = Lenient(disk)
    assert read_all(disk, SIZE, lenient) == CONTENT
    assert lenient.unreadable == []


def test_what_does_not_decode_is_lost_as_it_is() -> None:
    """A unit of an image that is packed is tried once; its neighbours are there."""

    class Packed(MemoryDisk):
        asked = 0

        def read_into(self, offset: int, buf: memoryview, /) -> None:
            self.asked += 1
            for at in (96 * KiB, 5 * MiB):
                start, end = max(offset, at), min(offset + len(buf), at + 32 * KiB)
                if start < end:
                    raise DamagedRange("it does not decode", start, end - start)
            super().read_into(offset, buf)

    disk = Packed(CONTENT)
    lenient = Lenient(disk)
    bad = [(96 * KiB, 32 * KiB), (5 * MiB, 32 * KiB)]
    assert read_all(disk, SIZE, lenient) == without(bad)
    assert lenient.unreadable == bad
    assert disk.asked == 5


class Remembering(MemoryDisk):
    unreadable = ((512, 1024), (MiB, 512))


def test_what_was_unreadable_before_shows_through_views() -> None:
    disk = Remembering(CONTENT)
    assert known_unreadable(disk) == [(512, 1024), (MiB, 512)]
    assert known_unreadable(Slice(disk, 1024, MiB)) == [(0, 512), (MiB - 1024, 512)]
    assert known_unreadable(Concat([MemoryDisk(CONTENT), Slice(disk, 0, 4096)])) == [(SIZE + 512, 1024)]
    assert Lenient(Slice(disk, 1024, 512)).unreadable == [(0, 512)]
