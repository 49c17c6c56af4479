"""Sources and sinks made of others: a part of one, several in a row, one over another, none.

    Through      |==============|     all of it, for views that change one thing
    Slice        |..[========]......|     a partition of a disk
    Concat       |====|=======|==|        the parts of a split image
    Overlay      |==  ==== ==    =|       what the top has;
                 |================|       the base shows through its holes
    Unavailable  |    error       |       a disk that cannot be read as things are

A view does not own what it is made of: closing it closes nothing, unless ``owned`` says so.  Its traits are those of
what it stands on.  A ReadError or DamagedRange comes out in the view's own offsets; its message keeps the device's.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

from ferrotype.block import Sink, Source, Traits
from ferrotype.block.file import check_read, check_write
from ferrotype.errors import DamagedRange, InvalidImage, ReadError
from ferrotype.extents import ExtentMap, State, overlay

__all__ = [
    "Concat",
    "Overlay",
    "Part",
    "SinkSlice",
    "Slice",
    "Through",
    "Unavailable",
    "padded_extents",
    "read_padded",
]


class Part(NamedTuple):
    """A range of what a view is made of; ``shift`` added to an offset there is the view's."""

    source: Source
    offset: int
    length: int
    shift: int


@contextmanager
def _shifted(delta: int) -> Iterator[None]:
    """Move the range an error names, which is a fact for callers, into the view's offsets."""
    try:
        yield
    except (ReadError, DamagedRange) as error:
        error.start += delta
        raise


def _close_all(sources: Sequence[Source]) -> None:
    """Close every one, in spite of errors; the first error is raised."""
    with ExitStack() as stack:
        for source in reversed(sources):
            stack.callback(source.close)


def _check_inside(what: str, size: int, start: int, length: int) -> None:
    if start < 0 or length < 0 or start + length > size:
        raise InvalidImage(f"{length} bytes at {start} lie outside the {what}, which has {size}", offset=start)


class Through:
    """All of a source, as it is, and nothing that it tells besides; a base for views that change one thing."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def size(self) -> int:
        return self._source.size

    @property
    def traits(self) -> Traits:
        return self._source.traits

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        self._source.read_into(offset, buf)

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return self._source.extents(offset, length)

    def close(self) -> None:
        """Nothing: the source is the caller's."""


class Slice:
    """``length`` bytes of a source from ``start`` on.  Raises InvalidImage where that is not inside it."""

    def __init__(self, source: Source, start: int, length: int) -> None:
        _check_inside("source", source.size, start, length)
        self._source, self._start, self._size = source, start, length

    @property
    def size(self) -> int:
        return self._size

    @property
    def traits(self) -> Traits:
        return self._source.traits

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        check_read("slice", self._size, offset, len(buf))
        with _shifted(-self._start):
            self._source.read_into(self._start + offset, buf)

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        check_read("slice", self._size, offset, length)
        return self._source.extents(self._start + offset, length).shift(-self._start)

    def parts(self, offset: int, length: int) -> Iterator[Part]:
        """What a range stands on."""
        yield Part(self._source, self._start + offset, length, -self._start)

    def close(self) -> None:
        pass


class Concat:
    """Sources one behind the other, as one; the first one's sector size is taken."""

    def __init__(self, sources: Sequence[Source], *, owned: bool = False) -> None:
        self._sources = [source for source in sources if source.size]
        self._closing = list(sources) if owned else []
        self._starts = [0, *accumulate(source.size for source in self._sources)]
        every = [source.traits for source in sources] or [Traits()]
        self.traits = replace(
            every[0],
            align=max(t.align for t in every),
            preferred_size=max(t.preferred_size for t in every),
            parallel=min(t.parallel for t in every),
            ordered=any(t.ordered for t in every),
            sector_known=all(t.sector_known for t in every),
        )

    @property
    def size(self) -> int:
        return self._starts[-1]

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[Source, int, int, int]]:
        """The sources under the range: source, its start here, and the start and end of the piece here."""
        end = offset + length
        number = bisect_right(self._starts, offset) - 1
        while offset < end:
            stop = min(self._starts[number + 1], end)
            yield self._sources[number], self._starts[number], offset, stop
            offset, number = stop, number + 1

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        check_read("concatenation", self.size, offset, len(buf))
        for source, base, start, stop in self._pieces(offset, len(buf)):
            with _shifted(base):
                source.read_into(start - base, buf[start - offset : stop - offset])

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        check_read("concatenation", self.size, offset, length)
        maps = [
            s.extents(start - base, stop - start).shift(base) for s, base, start, stop in self._pieces(offset, length)
        ]
        return ExtentMap.concat(maps) if maps else ExtentMap.uniform(offset, 0)

    def parts(self, offset: int, length: int) -> Iterator[Part]:
        """What a range stands on."""
        for source, base, start, stop in self._pieces(offset, length):
            yield Part(source, start - base, stop - start, base)

    def close(self) -> None:
        _close_all(self._closing)


class Overlay:
    """``top``, with ``base`` showing where the top's extents are a HOLE.

    It has the size of the top.  Behind the end of a shorter base its holes read as zeros.
    """

    def __init__(self, top: Source, base: Source, *, owned: bool = False) -> None:
        self._top, self._base = top, base
        self._closing = [top, base] if owned else []
        self.traits = replace(
            top.traits,
            align=max(top.traits.align, base.traits.align),
            parallel=min(top.traits.parallel, base.traits.parallel),
        )

    @property
    def size(self) -> int:
        return self._top.size

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        check_read("overlay", self.size, offset, len(buf))
        extents = self._top.extents(offset, len(buf))
        for start, end in _pairs(extents, present=False):
            self._top.read_into(start, buf[start - offset : end - offset])
        for start, end in _pairs(extents, present=True):
            read_padded(self._base, start, buf[start - offset : end - offset])

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        check_read("overlay", self.size, offset, length)
        return overlay(self._top.extents(offset, length), padded_extents(self._base, offset, length))

    def close(self) -> None:
        _close_all(self._closing)


class Unavailable:
    """A disk of which no more than the size is known: reading it, and asking where its data is, raise ``error``."""

    def __init__(self, size: int, traits: Traits, error: Exception) -> None:
        self.size, self.traits, self._error = size, traits, error

    def read_into(self, offset: int, buf: memoryview, /) -> None:  # noqa: ARG002  the protocol's signature
        raise self._error

    def extents(self, offset: int, length: int, /) -> ExtentMap:  # noqa: ARG002
        raise self._error

    def close(self) -> None:
        pass


def _pairs(extents: ExtentMap, *, present: bool) -> list[tuple[int, int]]:
    starts, ends = extents.runs(State.HOLE, present=present)
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def read_padded(source: Source, offset: int, buf: memoryview) -> None:
    """Fill ``buf`` from a source that may end before the range does: what lies behind its end reads as zeros."""
    inside = min(max(source.size - offset, 0), len(buf))
    if inside:
        source.read_into(offset, buf[:inside])
    if inside < len(buf):
        buf[inside:] = bytes(len(buf) - inside)


def padded_extents(source: Source, offset: int, length: int) -> ExtentMap:
    """The extents of a range that may reach beyond the source, as ``read_padded`` reads it."""
    inside = min(max(source.size - offset, 0), length)
    behind = ExtentMap.uniform(offset + inside, length - inside, State.ZERO | State.HOLE)
    return ExtentMap.concat([source.extents(offset, inside), behind]) if inside else behind


class SinkSlice:
    """``length`` bytes of a sink from ``start`` on.  Raises InvalidImage where that is not inside it."""

    def __init__(self, sink: Sink, start: int, length: int) -> None:
        _check_inside("sink", sink.size, start, length)
        self._sink, self._start, self._size = sink, start, length

    @property
    def size(self) -> int:
        return self._size

    @property
    def traits(self) -> Traits:
        return self._sink.traits

    def write(self, offset: int, data: memoryview, /) -> None:
        check_write("slice", self._size, offset, len(data))
        self._sink.write(self._start + offset, data)

    def write_zeros(self, offset: int, length: int, /) -> None:
        check_write("slice", self._size, offset, length)
        self._sink.write_zeros(self._start + offset, length)

    def flush(self) -> None:
        self._sink.flush()

    def close(self) -> None:
        pass
