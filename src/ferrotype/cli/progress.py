"""Progress on standard error: a bar for people, JSON lines for programs, or nothing."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol, TextIO

import click

from ferrotype.cli.output import draw, shown
from ferrotype.errors import Cancelled
from ferrotype.units import format_size

_EVERY: Final = 0.2  # seconds between two signs of progress
_WINDOW: Final = 15.0  # seconds the rate is taken over: the time left follows what happens now


class Display(Protocol):
    """Shows the state of a phase."""

    def show(self, phase: str, done: int, total: int | None, rate: float, left: float | None, /) -> None: ...

    def clear(self) -> None: ...


class Silent:
    """Shows nothing."""

    def show(self, phase: str, done: int, total: int | None, rate: float, left: float | None, /) -> None:
        pass

    def clear(self) -> None:
        pass


class Bar:
    """One line that is drawn over itself."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._width = 0

    def show(self, phase: str, done: int, total: int | None, rate: float, left: float | None, /) -> None:
        parts = [shown(phase)]
        if total:
            share = min(1.0, done / total)
            parts.append("█" * int(20 * share) + "░" * (20 - int(20 * share)))
            parts.append(f"{100 * share:3.0f} %  {format_size(done)} of {format_size(total)}")
        elif done:
            parts.append(format_size(done))
        if rate > 0:
            parts.append(f"{format_size(int(rate))}/s")
        if left is not None:
            parts.append(f"{_clock(left)} left")
        line = "  ".join(parts)
        draw(self._out, "\r" + line.ljust(self._width))
        self._width = len(line)

    def clear(self) -> None:
        if self._width:
            draw(self._out, "\r" + " " * self._width + "\r")
            self._width = 0


class JsonLines:
    """One JSON object a line."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def show(self, phase: str, done: int, total: int | None, rate: float, left: float | None, /) -> None:
        document = {"phase": phase, "done": done, "total": total, "rate": int(rate)}
        document["seconds_left"] = None if left is None else round(left, 1)
        draw(self._out, json.dumps(document) + "\n")

    def clear(self) -> None:
        pass


def display_for(kind: str, out: TextIO | None) -> Display:
    """The display that ``--progress`` names; ``auto`` is a bar on a terminal and nothing elsewhere."""
    if out is None:  # the caller closed it
        return Silent()
    if kind == "json":
        return JsonLines(out)
    if kind == "bar" or (kind == "auto" and out.isatty()):
        return Bar(out)
    return Silent()


class CliJob:
    """The command line's Job: shows progress, gathers warnings, stops when a signal asked for it."""

    def __init__(
        self,
        display: Display,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        *,
        verbose: bool = False,
        alarm: Callable[[str], None] | None = None,
    ) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []
        self.stop = False
        self._display = display
        self._say = say
        self._alarm = alarm or say
        self._verbose = verbose  # name each phase as it begins
        self._clock = clock
        self._lock = threading.Lock()
        self._phase = ""
        self._done = 0
        self._total: int | None = None
        self._began = 0.0
        self._shown = 0.0
        self._marks: deque[tuple[float, int]] = deque()

    def begin(self, phase: str, total: int | None = None, /) -> None:
        with self._lock:
            self._phase, self._total, self._done = phase, total, 0
            self._began = self._shown = self._clock()
            self._marks = deque([(self._began, 0)])
            if self._verbose:
                self._display.clear()
                self._say(phase + (f": {format_size(total)}" if total else ""))
            self._display.show(phase, 0, total, 0.0, None)
        self.advance(0)

    def advance(self, count: int, /) -> None:
        if self.stop:
            raise Cancelled
        with self._lock:
            self._done += count
            now = self._clock()
            if now - self._shown >= _EVERY:
                self._shown = now
                self._marks.append((now, self._done))
                while len(self._marks) > 2 and now - self._marks[0][0] > _WINDOW:
                    self._marks.popleft()
                rate, left = self._pace(now)
                self._display.show(self._phase, self._done, self._total, rate, left)

    def _pace(self, now: float) -> tuple[float, float | None]:
        """Bytes a second over the last seconds, and the seconds left; None until there is something to judge by."""
        since, done = self._marks[0]
        if now <= since or self._done <= done:
            return 0.0, None
        rate = (self._done - done) / (now - since)
        if self._total is None or now - self._began < 2:
            return rate, None
        return rate, max(0, self._total - self._done) / rate

    def warn(self, message: str, /) -> None:
        with self._lock:
            if message in self.warnings:
                return
            self.warnings.append(message)
            self._display.clear()
            self._alarm(f"warning: {message}")

    def note(self, message: str, /) -> None:
        with self._lock:
            if message in self.notes:
                return
            self.notes.append(message)
            self._display.clear()
            self._say(message)

    def finish(self) -> None:
        self._display.clear()


def _stops() -> list[signal.Signals]:
    """The signals that ask for an end.  Where SIGHUP is ignored, as under nohup, it stays so."""
    hangs_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hangs_up else [])]


@contextmanager
def stopping(job: CliJob) -> Iterator[None]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP into a clean stop; a second one ends the process at once.

    A closed terminal may send several SIGHUP: another one of those changes nothing.
    """

    def ask(number: int, _frame: object) -> None:
        if job.stop and number != signal.SIGHUP:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        job.stop = True

    before = {number: signal.signal(number, ask) for number in _stops()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def asking() -> Iterator[None]:
    """While the user is asked something, Ctrl-C ends the question, and the work with it.  Raises Cancelled."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in _stops()}
    try:
        yield
    except (click.Abort, KeyboardInterrupt):
        raise Cancelled from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _clock(seconds: float) -> str:
    """``45 s``, ``3:20 min``, ``2:05 h``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
