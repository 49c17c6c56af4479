"""The table of what this machine can do, one library call at a time; see limits.py."""

from __future__ import annotations

import json
import os
from typing import Final

from contest import say
from measure import shell
from programs import FRAMES, LIMITS
from workspace import Workspace, empty

PART: Final = 0.125  # of the data, evenly spread, is enough for a rate
ON_DISK: Final = (
    "read",
    "read+copy",
    "read+write",
    "read+xxh3",
    "read+blake3",
    "read+aes",
    "read+zstd",
    "read+blake3+zstd",
    "read+blake3+zstd+aes",
)
ON_FRAMES: Final = ("frames+unzstd", "frames+unzstd+blake3", "frames+unzstd+write")


def measure_rates(space: Workspace, repetitions: int) -> dict[str, list[float]]:
    """MB of plain data a second, for "threads work"; each turn goes once through all of them."""
    names = space.names("limits")
    stored = space.store(FRAMES)
    space.use("day1")
    empty(names["at"])
    shell(f"cp -a {stored}/. {names['at']}")
    rates: dict[str, list[float]] = {}
    for turn in range(1, repetitions + 1):
        for work in (*ON_DISK, *ON_FRAMES):
            source = "{at}/frames" if work in ON_FRAMES else "{source}"
            for threads in sorted({1, len(os.sched_getaffinity(0))}):
                empty(names["out"])
                options = f"{source} {{out}}/new --disks {{disks}} --threads {threads} --part {PART}"
                said = json.loads(shell(f"{LIMITS} {work} {options}".format(**names)))
                rates.setdefault(f"{threads} {work}", []).append(round(said["plain"] / said["wall"] / 1e6, 1))
        say(f"limits {turn}")
    empty(names["out"])
    shell(f"rm -rf {names['at']}")
    return rates
