"""Parallel work in order: bounded, stopped by the first error or by closing, and no thread is left."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator

import pytest

from ferrotype.pipeline import map_ordered


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ferrotype")]


def test_results_come_in_the_order_of_the_items() -> None:
    def late(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    assert list(map_ordered(late, range(60), workers=4)) == [n * n for n in range(60)]
    assert list(map_ordered(late, [], workers=4)) == []
    assert not ours()


def test_no_more_items_are_taken_than_fit_in_flight() -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield number

    results = map_ordered(lambda n: n, items(), workers=2, depth=5)
    for done in range(20):
        assert next(results) == done
        assert taken <= done + 6
    results.close()  # type: ignore[attr-defined]
    assert taken < 30
    assert not ours()


def test_the_first_error_in_order_is_raised_and_intake_stops() -> None:
    taken: list[int] = []

    def fail(number: int) -> int:
        if number >= 5:
            raise ValueError(number)
        return number

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    got: list[int] = []
    with pytest.raises(ValueError, match="5"):
        got.extend(map_ordered(fail, items(), workers=4))
    assert len(taken) < 20
    assert not ours()


def test_signals_are_left_to_the_thread_that_hears_them() -> None:
    masks = map_ordered(lambda _: signal.pthread_sigmask(signal.SIG_BLOCK, ()), range(4), workers=2)
    assert all({signal.SIGINT, signal.SIGTERM, signal.SIGHUP} <= mask for mask in masks)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
