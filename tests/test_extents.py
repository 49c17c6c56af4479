"""Extent maps against a model of one flag byte for each byte."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from ferrotype.extents import BitmapRuns, Extent, ExtentMap, State, merge, overlay

Model = NDArray[np.uint8]
STATES = [State.DATA, State.ZERO, State.HOLE, State.FREE, State.ZERO | State.FREE, State.CLEAN]


def some_map(rng: random.Random, start: int, length: int) -> tuple[ExtentMap, Model]:
    model = np.zeros(length, np.uint8)
    for _ in range(rng.randrange(8)):
        low, high = sorted((rng.randint(0, length), rng.randint(0, length)))
        model[low:high] = rng.choice(STATES)
    return of_model(start, model), model


def of_model(start: int, model: Model) -> ExtentMap:
    return ExtentMap.from_extents([Extent(start + i, 1, State(int(s))) for i, s in enumerate(model)]).shift(
        start if len(model) == 0 else 0
    )


def check(found: ExtentMap, start: int, model: Model) -> None:
    assert (found.start, found.end) == (start, start + len(model))
    assert (np.diff(found.bounds) > 0).all()
    assert (found.states[1:] != found.states[:-1]).all(), "neighbours of one state"
    assert np.array_equal(np.repeat(found.states, found.lengths), model)


@pytest.mark.parametrize("seed", range(150))
def test_every_operation_agrees_with_the_model(seed: int) -> None:
    rng = random.Random(seed)
    start, length = rng.randrange(50), rng.randrange(1, 120)
    a, model_a = some_map(rng, start, length)
    b, model_b = some_map(rng, start, length)
    check(a, start, model_a)
    check(merge(a, b), start, model_a | model_b)
    check(overlay(a, b), start, np.where(model_a & State.HOLE, model_b, model_a).astype(np.uint8))
    low, high = sorted((rng.randint(0, length), rng.randint(0, length)))
    check(a.clip(start + low, high - low), start + low, model_a[low:high])
    check(a.masked(State.ZERO), start, model_a & np.uint8(State.ZERO))
    check(ExtentMap.concat([a.clip(start, low), a.clip(start + low, length - low)]), start, model_a)
    size, origin = rng.randint(1, 20), rng.randrange(-30, 60)
    cells = (np.arange(start, start + length) - origin) // size
    expected = model_a.copy()
    for cell in np.unique(cells):
        expected[cells == cell] = np.bitwise_and.reduce(model_a[cells == cell])
    check(a.cut(size, origin), start, expected)
    for flags in (State.ZERO, State.FREE | State.HOLE):
        hit = (model_a & flags) != 0
        assert a.total(flags) == hit.sum()
        for present in (True, False):
            starts, ends = a.runs(flags, present=present)
            check(
                ExtentMap.from_runs(start, length, starts, ends, State.CLEAN), start, (hit == present) * np.uint8(8)
            )


@pytest.mark.parametrize("seed", range(60))
def test_bitmap_runs_agree_with_the_bits(seed: int) -> None:
    rng = random.Random(seed)
    bits: list[int] = []
    runs = BitmapRuns()
    for piece in range(4):
        count = rng.randrange(1, 30) * 8 if piece < 3 else rng.randrange(1, 200)
        if rng.random() < 0.3:
            value = rng.random() < 0.5
            runs.add_run(count, value=value)
            bits += [int(value)] * count
        else:
            density = rng.choice([0.02, 0.5, 0.98])
            new = [int(rng.random() < density) for _ in range(count)]
            runs.add(np.packbits(np.array(new, np.uint8), bitorder="little"), count)
            bits += new
    starts, ends = runs.finish()
    found = np.zeros(len(bits), np.uint8)
    for low, high in zip(starts, ends, strict=True):
        assert low < high
        found[low:high] = 1
    assert found.tolist() == bits
    assert (starts[1:] > ends[:-1]).all()


def test_a_map_of_a_million_runs_is_exact() -> None:
    count = 1_000_000
    starts = np.arange(count, dtype=np.int64) * 10_000 + 100
    m = ExtentMap.from_runs(0, count * 10_000, starts, starts + 5000, State.ZERO)
    assert len(m) == 2 * count + 1
    assert m.total(State.ZERO) == 5000 * count
    # of the two cells of 5,000 bytes, neither is zero all over; of cells of 100, fifty are
    assert m.cut(5000).total(State.ZERO) == 0
    assert m.cut(100).total(State.ZERO) == 5000 * count
    assert merge(m, m) == m


def test_what_does_not_fit_together_is_refused() -> None:
    m = ExtentMap.uniform(0, 10)
    calls: list[Callable[[], object]] = [
        lambda: merge(m, m.shift(1)),
        lambda: m.clip(5, 6),
        lambda: ExtentMap.concat([m, m]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"maps|range"):
            call()
    with pytest.raises(ValueError, match="touch"):
        ExtentMap.from_extents([Extent(0, 1), Extent(2, 1)])
