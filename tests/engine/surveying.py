"""Survey disk images, each in a process of its own: ``python -m tests.engine.surveying SECONDS < LIST > RESULTS``.

A line of the list is JSON, ``[path, sector size or null]``; a line of the results too, see ``Result``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import msgspec

from ferrotype.block.device import open_source
from ferrotype.block.memory import MemoryDisk
from ferrotype.engine.survey import survey
from ferrotype.extents import State


class Result(msgspec.Struct):
    """What became of one survey."""

    path: str
    seconds: float = 0
    grown: int = 0  # bytes of memory it took at its peak
    error: str = ""
    free: int = 0
    volumes: int = 0


def memory(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def one(path: str, sector_size: int | None) -> Result:
    result = Result(path)
    before, began = memory("VmRSS"), time.monotonic()
    try:
        source = open_source(path, sector_size=sector_size)
        found = survey(source, exclude_swap_files=True)
        result.free, result.volumes = found.extents.total(State.FREE), len(found.volumes)
        assert (found.extents.start, found.extents.end) == (0, source.size)
        assert sum(length for _, length in found.regions) == source.size
        [volume.as_json() for volume in found.volumes]
    except BaseException as error:  # noqa: BLE001  whatever it is, it is a finding
        result.error = repr(error)
    result.seconds, result.grown = time.monotonic() - began, max(0, memory("VmHWM") - before)
    return result


def apart(path: str, sector_size: int | None, limit: int) -> Result:
    """``one`` in a fork of its own, killed at the limit."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(limit)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        os.write(writing, msgspec.json.encode(one(path, sector_size)))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    return (
        msgspec.json.decode(told, type=Result) if told else Result(path, limit, error=f"ended with status {status}")
    )


def main() -> None:
    survey(MemoryDisk(1 << 20))  # imports what it needs, once for all forks
    for line in sys.stdin:
        path, sector_size = json.loads(line)
        print(msgspec.json.encode(apart(path, sector_size, int(sys.argv[1]))).decode(), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
