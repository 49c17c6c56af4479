"""Parallel work in order: threads do the heavy calls, results come out as the items went in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ferrotype.job import leave_signals

T = TypeVar("T")
R = TypeVar("R")


def map_ordered(fn: Callable[[T], R], items: Iterable[T], *, workers: int, depth: int | None = None) -> Iterator[R]:
    """Results of ``fn`` in the order of ``items``, at most ``depth`` items in flight (default: twice the workers).

    Items are taken only as results are consumed, so memory is bounded by ``depth``.  The first error stops the
    intake, waits for what is running, and is raised; so does closing the iterator early.
    """
    depth = depth or 2 * workers
    with ThreadPoolExecutor(workers, "ferrotype", leave_signals) as pool:
        flying: deque[Future[R]] = deque()
        try:
            for item in items:
                flying.append(pool.submit(fn, item))
                if len(flying) >= depth:
                    yield flying.popleft().result()
            while flying:
                yield flying.popleft().result()
        finally:
            for future in flying:
                future.cancel()
