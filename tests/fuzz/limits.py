"""What one execution may cost: processor time, memory, depth of calls.  What goes beyond is a finding."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

from ferrotype.errors import FerrotypeError
from ferrotype.units import MiB

SECONDS: Final = 5.0  # of processor time, all threads together
MEMORY: Final = 500 * MiB  # of address space beyond what the process has before
DEPTH: Final = 400  # calls below the target: far from Python's own limit of 1,000


class TooLong(Exception):
    """The execution used more processor time than it may."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What an input did that it must not."""

    error: BaseException

    @property
    def key(self) -> str:
        """The same for the same defect: kind of error and the innermost place in the package."""
        place = "?"
        at = self.error.__traceback__
        while at is not None:
            name = at.tb_frame.f_code.co_filename
            if "/ferrotype/" in name and "/tests/" not in name:
                place = f"{Path(name).parent.name}.{Path(name).stem}.{at.tb_frame.f_code.co_name}"
            at = at.tb_next
        return f"{type(self.error).__name__}-{place}"


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _depth() -> int:
    frame, depth = sys._getframe(), 0
    while frame.f_back is not None:
        frame, depth = frame.f_back, depth + 1
    return depth


def _too_long(_: int, __: FrameType | None) -> None:
    raise TooLong("more processor time than an input may take")


@contextmanager
def limited(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Raises TooLong, MemoryError or RecursionError inside the block where its main thread goes beyond its limits."""
    depth = sys.getrecursionlimit()
    old = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGPROF, _too_long)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + memory, old[1]))
    sys.setrecursionlimit(_depth() + DEPTH)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.setrecursionlimit(depth)
        resource.setrlimit(resource.RLIMIT_AS, old)
        signal.signal(signal.SIGPROF, handler)


def execute(target: Callable[[bytes], None], data: bytes, seconds: float = SECONDS) -> Finding | None:
    """Run a target once.  Errors that ferrotype raises on purpose are what hostile input should end in."""
    try:
        with limited(seconds):
            target(data)
    except FerrotypeError:
        return None
    except Exception as error:  # noqa: BLE001  everything else is what we look for
        return Finding(error)
    return None
