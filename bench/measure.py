"""One timed command: wall time, CPU time, peak memory, and how busy the machine was with other things meanwhile."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


class CommandError(Exception):
    """A command ended with another code than 0; the message holds the end of what it said."""


@dataclass(frozen=True, slots=True)
class Sample:
    wall: float  # seconds
    cpu: float  # seconds, user and system, of the command and its children
    peak: int  # bytes resident, of the largest single process
    stored: int  # bytes that the result grew by, as allocated
    busy: float  # cores that other processes kept busy; near 0 on a quiet machine


def shell(command: str) -> str:
    """Standard output of a command whose time does not matter; raises CommandError."""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise CommandError(f"{command}\nexit {done.returncode}: {done.stderr[-1500:]}")
    return done.stdout


def timed(command: str, result: Path | None, log: Path) -> tuple[Sample, str]:
    """Run a shell command with its output in ``log``; what it cost, and its standard output.  Raises CommandError.

    A child starts with the peak memory of the process it was forked from, so no peak below that of this process
    can be told apart: keep this process small.
    """
    before, ticks, start = allocated(result), _machine_seconds(), time.monotonic()
    errors = log.with_suffix(".err")
    with log.open("wb") as out, errors.open("wb") as err:
        child = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", command], stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    said = log.read_text(errors="replace")
    if child.returncode:
        raise CommandError(f"{command}\nexit {child.returncode}: {errors.read_text(errors='replace')[-1500:]}")
    cpu = usage.ru_utime + usage.ru_stime
    others = max(0.0, _machine_seconds() - ticks - cpu) / wall
    return Sample(wall, cpu, usage.ru_maxrss * 1024, allocated(result) - before, others), said


def warm(size: int) -> None:
    """Touch ``size`` bytes of memory and free them: a virtual machine's host may have taken away what was free, and
    whoever needs it first would wait until it is back.
    """
    if not size:
        return
    code = f"import mmap; mmap.mmap(-1, {size}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)"
    subprocess.run([sys.executable, "-c", code], check=True)


def allocated(path: Path | None) -> int:
    """Bytes that a file, or all files of a folder, take up; 0 where there is none."""
    if path is None or not path.exists():
        return 0
    return sum(p.lstat().st_blocks * 512 for p in ([path] if path.is_file() else path.rglob("*")))


def _machine_seconds() -> float:
    """CPU seconds that the machine has worked: user, nice, system, irq, softirq (proc(5), /proc/stat)."""
    fields = [int(f) for f in Path("/proc/stat").read_text().splitlines()[0].split()[1:8]]
    return (sum(fields[:3]) + sum(fields[5:7])) / os.sysconf("SC_CLK_TCK")


def median(samples: Sequence[Sample], fact: Callable[[Sample], float]) -> float:
    return statistics.median(fact(s) for s in samples)
