"""What every Source and every Sink must do, as two functions a test calls.

    def test_my_source() -> None:
        check_source(lambda: MySource("disk.img"), expected)

Readers that are right from front to back and wrong elsewhere are common: everything here is cut at random, in any
order, by several threads.  A failed check raises AssertionError with the range; the same ``seed`` cuts the same way.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

from ferrotype.block import Sink, Source, Traits
from ferrotype.errors import ReadError, WriteError
from ferrotype.extents import State
from ferrotype.testing.claims import must_raise, require

__all__ = ["check_sink", "check_source"]

_THREADS = 8


# ---------------------------------------------------------------------- sources


def check_source(make: Callable[[], Source], content: bytes, *, rounds: int = 200, seed: int = 0) -> None:
    """Hold a source against its content: any split, any thread, extents that tell the truth, errors out of range."""
    source = make()
    try:
        _check_traits(source.traits)
        require(source.size == len(content), f"size is {source.size}, not {len(content)}")
        rng = random.Random(seed)  # noqa: S311  repeatable
        _check_ranges(source, content, [(0, len(content))])
        _check_ranges(source, content, _split(rng, len(content), source.traits.align, rounds))
        ranges = [_range(rng, len(content), source.traits.align) for _ in range(rounds)]
        _check_ranges(source, content, ranges)
        with ThreadPoolExecutor(_THREADS) as pool:
            for done in [pool.submit(_check_ranges, source, content, ranges[i::_THREADS]) for i in range(_THREADS)]:
                done.result()
        for offset, length in [(0, len(content)), (0, 0), (len(content), 0), *ranges]:
            _check_extents(source, content, offset, length)
        _check_outside(source)
    finally:
        source.close()


def _check_traits(traits: Traits) -> None:
    size = traits.sector_size
    require(size >= 512 and size & (size - 1) == 0, f"a sector of {size} bytes")
    require(traits.align >= 1 and traits.preferred_size >= 1 and traits.parallel >= 1, f"traits {traits}")


def _range(rng: random.Random, size: int, align: int) -> tuple[int, int]:
    """A range inside ``size`` bytes: short and long ones, on sectors and off them."""
    longest = rng.choice([16, 512, 4096, 70_000, max(size, 1)])
    start = rng.randrange(size + 1)
    if rng.random() < 0.5:
        start -= start % 512
    length = rng.randint(0, min(longest, size - start))
    if rng.random() < 0.5:
        length -= length % 512
    return start - start % align, length - length % align


def _split(rng: random.Random, size: int, align: int, pieces: int) -> list[tuple[int, int]]:
    """All of ``size`` bytes, cut at random, in random order."""
    cuts = sorted({0, size, *(rng.randrange(size + 1) // align * align for _ in range(pieces))})
    ranges = [(start, end - start) for start, end in pairwise(cuts)]
    rng.shuffle(ranges)
    return ranges


def _check_ranges(source: Source, content: bytes, ranges: list[tuple[int, int]]) -> None:
    for offset, length in ranges:
        # Not zeros: a source that leaves the buffer alone must not pass where the content is zero.
        guarded = bytearray(b"\xa5" * (length + 2))
        source.read_into(offset, memoryview(guarded)[1:-1])
        require(guarded[1:-1] == content[offset : offset + length], f"wrong bytes in {length} at {offset}")
        require(guarded[0] == guarded[-1] == 0xA5, f"reading {length} at {offset} wrote outside the buffer")


def _check_extents(source: Source, content: bytes, offset: int, length: int) -> None:
    extents = source.extents(offset, length)
    covered = (extents.start, extents.length)
    require(covered == (offset, length), f"extents of {length} at {offset} cover {covered}")
    require(length > 0 or len(extents) == 0, f"an empty range at {offset} has {len(extents)} extents")
    require(bool((extents.lengths > 0).all()), f"extents of {length} at {offset} do not ascend")
    for extent in extents:
        if extent.state & State.ZERO:
            part = content[extent.start : extent.end]
            require(part.count(0) == len(part), f"{extent} is not zero")


def _check_outside(source: Source) -> None:
    size, align = source.size, source.traits.align
    starts_behind = [(start, align) for start in (size, size + (1 << 40), 1 << 63)]
    for offset, length in [*starts_behind, (size - align, 2 * align), (-align, align)]:
        call = _reading(source, offset, length)
        must_raise(ReadError, call, f"reading {length} at {offset} of {size}")


def _reading(source: Source, offset: int, length: int) -> Callable[[], None]:
    return lambda: source.read_into(offset, memoryview(bytearray(length)))


# ---------------------------------------------------------------------- sinks


def check_sink(
    make: Callable[[], Sink], read_back: Callable[[Sink], bytes], *, rounds: int = 200, seed: int = 0
) -> None:
    """Hold a sink against a model: writes and zeros anywhere, by several threads; errors out of range.

    ``read_back`` gives all its bytes by another way; it is called after a flush, and for a sink that is not blank
    before the first write.
    """
    sink = make()
    try:
        _check_traits(sink.traits)
        model = bytearray(sink.size if sink.traits.blank else read_back(sink))
        require(len(model) == sink.size, f"size is {sink.size}, not {len(model)}")
        rng = random.Random(seed)  # noqa: S311  repeatable
        if sink.traits.ordered:
            _write_some(sink, model, sorted(_split(rng, sink.size, sink.traits.align, rounds)), rng)
        else:
            _write_everywhere(sink, model, rounds, rng)
        for offset, length in [(sink.size, 1), (sink.size - 1, 2), (-1, 1), (1 << 63, 1)]:
            write, zero = _writing(sink, offset, length)
            must_raise(WriteError, write, f"writing {length} at {offset} of {sink.size}")
            must_raise(WriteError, zero, f"zeroing {length} at {offset} of {sink.size}")
        sink.flush()
        _same(read_back(sink), model)
    finally:
        sink.close()


def _write_everywhere(sink: Sink, model: bytearray, rounds: int, rng: random.Random) -> None:
    _write_some(sink, model, [_range(rng, sink.size, sink.traits.align) for _ in range(rounds)], rng)
    # Threads write side by side, down to the byte; never to the same one, which would mean nothing.
    ranges = _split(rng, sink.size, sink.traits.align, rounds)
    seeds = [rng.randrange(1 << 32) for _ in range(_THREADS)]
    with ThreadPoolExecutor(min(_THREADS, sink.traits.parallel)) as pool:
        running = [
            pool.submit(_write_some, sink, model, ranges[i::_THREADS], random.Random(seeds[i]))  # noqa: S311
            for i in range(_THREADS)
        ]
        for done in running:
            done.result()


def _write_some(sink: Sink, model: bytearray, ranges: list[tuple[int, int]], rng: random.Random) -> None:
    for offset, length in ranges:
        what = rng.random()
        if what < 0.2:
            continue
        if what < 0.5:
            sink.write_zeros(offset, length)
            model[offset : offset + length] = bytes(length)
        else:
            data = rng.randbytes(length)
            sink.write(offset, memoryview(data))
            model[offset : offset + length] = data


def _writing(sink: Sink, offset: int, length: int) -> tuple[Callable[[], None], Callable[[], None]]:
    return lambda: sink.write(offset, memoryview(bytes(length))), lambda: sink.write_zeros(offset, length)


def _same(found: bytes, model: bytearray) -> None:
    require(len(found) == len(model), f"{len(found)} bytes are read back, not {len(model)}")
    if found != model:
        first = next(i for i in range(len(model)) if found[i] != model[i])
        raise AssertionError(f"byte {first} is {found[first]}, not {model[first]}")
