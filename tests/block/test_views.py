"""Slices, concatenations and overlays against a model in bytes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ferrotype.block import Traits, read
from ferrotype.block.memory import MemoryDisk
from ferrotype.block.views import Concat, Overlay, SinkSlice, Slice
from ferrotype.errors import InvalidImage, ReadError, WriteError
from ferrotype.extents import ExtentMap, State
from ferrotype.testing.sources import check_sink, check_source

STORED, HOLE, ZERO = State.DATA, State.HOLE, State.ZERO


class Layer(MemoryDisk):
    """A disk in memory made of runs (length, state), which tells its extents; holes hold rubbish unless zero."""

    def __init__(self, runs: list[tuple[int, State]], seed: int = 0) -> None:
        rng = random.Random(seed)
        super().__init__(b"".join(bytes(n) if state & ZERO else rng.randbytes(n) for n, state in runs))
        bounds = [0]
        states = []
        for length, state in runs:
            if length:
                bounds.append(bounds[-1] + length)
                states.append(ExtentMap.uniform(bounds[-2], length, state))
        self.map = ExtentMap.concat(states)
        self.closed = 0

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return self.map.clip(offset, length)

    def close(self) -> None:
        self.closed += 1


runs = st.lists(st.tuples(st.integers(0, 3000), st.sampled_from([STORED, ZERO, HOLE, ZERO | HOLE])), max_size=8)
layers = st.builds(Layer, runs, st.integers(0, 99))


@given(layers, st.data())
def test_slice(layer: Layer, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, layer.size))
    length = data.draw(st.integers(0, layer.size - start))
    view = Slice(layer, start, length)
    check_source(lambda: view, bytes(layer.data[start : start + length]), rounds=12)
    inner = data.draw(st.integers(0, length))
    assert view.extents(inner, length - inner).shift(start) == layer.extents(start + inner, length - inner)


@given(st.lists(layers, max_size=5))
def test_concat(parts: list[Layer]) -> None:
    view = Concat(parts)
    check_source(lambda: view, b"".join(bytes(p.data) for p in parts), rounds=12)
    expected = [int(state) for p in parts for e in p.map for state in [e.state] * e.length]
    found = [int(state) for e in view.extents(0, view.size) for state in [e.state] * e.length]
    assert found == expected


@given(layers, layers)
def test_overlay(top: Layer, base: Layer) -> None:
    below = (bytes(base.data) + bytes(top.size))[: top.size]
    expected = bytearray(top.data)
    for extent in top.map:
        if extent.state & HOLE:
            expected[extent.start : extent.end] = below[extent.start : extent.end]
    check_source(lambda: Overlay(top, base), bytes(expected), rounds=12)


@given(layers, layers, st.data())
def test_views_of_views(one: Layer, other: Layer, data: st.DataObject) -> None:
    both = Concat([one, other])
    content = bytes(one.data + other.data)
    start = data.draw(st.integers(0, len(content)))
    length = data.draw(st.integers(0, len(content) - start))
    view = Overlay(Layer([(length, HOLE)]), Slice(both, start, length))
    check_source(lambda: view, content[start : start + length], rounds=12)


def test_an_overlay_shows_the_base_through_holes_only() -> None:
    top, base = Layer([(10, STORED), (10, HOLE), (10, ZERO | HOLE), (10, ZERO)]), Layer([(25, STORED)], seed=5)
    view = Overlay(top, base)
    assert view.size == 40
    assert read(view, 0, 40) == bytes(top.data[:10] + base.data[10:25]) + bytes(15)
    assert [(e.start, e.length, e.state) for e in view.extents(0, 40)] == [
        (0, 25, STORED),
        (25, 5, ZERO | HOLE),
        (30, 10, ZERO),
    ]


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, 101), (100, 1), (50, -1), (1 << 63, 1 << 63)])
def test_a_slice_outside_is_refused(start: int, length: int) -> None:
    for kind in (Slice, SinkSlice):
        with pytest.raises(InvalidImage, match="outside"):
            kind(MemoryDisk(100), start, length)


class Failing(MemoryDisk):
    """Bytes 50 to 60 cannot be read."""

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        if offset < 60 and offset + len(buf) > 50:
            raise ReadError("/dev/failing", 50, 10, "worn out")
        super().read_into(offset, buf)


def test_read_errors_come_in_the_offsets_of_the_view() -> None:
    view = Concat([MemoryDisk(7), Slice(Failing(100), 40, 50), MemoryDisk(3)])
    with pytest.raises(ReadError, match="/dev/failing: reading 10 bytes at 50 failed: worn out") as caught:
        read(view, 0, view.size)
    assert (caught.value.start, caught.value.length) == (17, 10)
    assert read(view, 0, 17) == bytes(17)
    assert read(view, 27, 33) == bytes(33)


def test_traits_are_handed_through() -> None:
    known = MemoryDisk(10, 4096)
    assert Slice(known, 1, 2).traits == known.traits
    assert SinkSlice(known, 1, 2).traits == known.traits
    assert Overlay(known, MemoryDisk(5)).traits == known.traits
    guessing = MemoryDisk(10)
    guessing.traits = replace(guessing.traits, sector_known=False, align=16, parallel=2)
    both = Concat([known, guessing]).traits
    assert (both.sector_size, both.sector_known, both.align, both.parallel) == (4096, False, 16, 2)
    assert Concat([]).traits == Traits()


def test_views_close_what_they_own_only() -> None:
    parts = [Layer([(3, STORED)]), Layer([(0, STORED)])]
    Slice(parts[0], 0, 1).close()
    Concat(parts).close()
    Overlay(*parts).close()
    assert [p.closed for p in parts] == [0, 0]
    Concat(parts, owned=True).close()
    Overlay(*parts, owned=True).close()
    assert [p.closed for p in parts] == [2, 2]


def test_closing_goes_on_after_an_error() -> None:
    class Stuck(MemoryDisk):
        def close(self) -> None:
            raise ReadError("stuck", 0, 0, "will not close")

    last = Layer([(3, STORED)])
    with pytest.raises(ReadError, match="will not close"):
        Concat([Stuck(1), last], owned=True).close()
    assert last.closed == 1


def test_a_slice_of_a_sink() -> None:
    disk = MemoryDisk(random.Random(8).randbytes(70_000))
    before = bytes(disk.data)
    check_sink(lambda: SinkSlice(disk, 1000, 50_001), lambda _: bytes(disk.data[1000:51_001]))
    assert disk.data[:1000] == before[:1000]
    assert disk.data[51_001:] == before[51_001:]
    with pytest.raises(WriteError):
        SinkSlice(disk, 10, 10).write(5, memoryview(bytes(6)))


class Wrong(Layer):
    """Readers with the mistakes the conformance suite is there to find."""

    fault = ""

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        if self.fault == "clamps" and offset + len(buf) > self.size:
            buf = buf[: max(self.size - offset, 0)]
        if self.fault == "sector" and offset % 512 and len(buf) > 512:
            offset -= offset % 512
        if self.fault == "short" and len(buf) > 2000:
            buf = buf[:2000]
        super().read_into(offset, buf)

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        if self.fault == "rounds":
            return super().extents(offset // 512 * 512, length + offset % 512)
        if self.fault == "lies":
            return ExtentMap.uniform(offset, length, ZERO)
        return super().extents(offset, length)


@pytest.mark.parametrize("fault", ["", "clamps", "sector", "short", "rounds", "lies"])
def test_the_suite_finds_wrong_readers(fault: str) -> None:
    layer = Wrong([(9000, STORED), (2000, ZERO)])
    layer.fault = fault
    if fault:
        with pytest.raises(AssertionError):
            check_source(lambda: layer, bytes(layer.data))
    else:
        check_source(lambda: layer, bytes(layer.data))


class WrongSink(MemoryDisk):
    fault = ""

    def write(self, offset: int, data: memoryview, /) -> None:
        if self.fault == "sector" and len(data) > 512:
            data = data[: len(data) // 512 * 512]
        if self.fault == "clamps":
            data = data[: max(self.size - offset, 0)]
        super().write(max(offset, 0) if self.fault == "clamps" else offset, data)

    def write_zeros(self, offset: int, length: int, /) -> None:
        if self.fault == "rounds" and offset >= 0 and offset + length <= self.size:
            length = min(-(-length // 512) * 512, self.size - offset)
        super().write_zeros(offset, length)


@pytest.mark.parametrize("fault", ["", "sector", "clamps", "rounds"])
def test_the_suite_finds_wrong_writers(fault: str) -> None:
    disk = WrongSink(random.Random(9).randbytes(100_000))
    disk.fault = fault
    if fault:
        with pytest.raises(AssertionError):
            check_sink(lambda: disk, lambda _: bytes(disk.data))
    else:
        check_sink(lambda: disk, lambda _: bytes(disk.data))
