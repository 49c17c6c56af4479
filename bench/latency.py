"""How long a read of 4 KiB at a random place of an image takes, through the Python interface.

    latency.py IMAGE DISK DISKS_DIR COUNT      prints {"median": µs, "95th": µs}

Every read lies in bytes that were in use on day two, and is compared with the disk that was backed up.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import ferrotype
from disks import Manifest, in_use, load_free

BLOCK = 4096


def random_blocks(folder: Path, count: int) -> list[int]:
    """Offsets of whole blocks in use, each as likely as any other; the unallocated tail is not in use."""
    manifest = Manifest.load(folder)
    last = manifest.partitions[-1]
    runs = [(start, size // BLOCK) for start, size in in_use(load_free(folder, "day2"), last.start + last.size)]
    ends = list(accumulate(blocks for _, blocks in runs))
    rng = random.Random(4096)
    offsets = []
    for number in (rng.randrange(ends[-1]) for _ in range(count)):
        run = bisect_right(ends, number)
        offsets.append(runs[run][0] + (ends[run] - 1 - number) * BLOCK)
    return offsets


def read_times(image: Path, disk: Path, offsets: list[int]) -> list[float]:
    """Seconds for each read."""
    times = []
    buffer = bytearray(BLOCK)
    with ferrotype.open_disk(str(image)) as source, disk.open("rb") as truth:
        for offset in offsets:
            start = time.perf_counter()
            source.read_into(offset, memoryview(buffer))
            times.append(time.perf_counter() - start)
            truth.seek(offset)
            if truth.read(BLOCK) != buffer:
                sys.exit(f"{image} differs from the disk at {offset}")
    return times


def main() -> None:
    image, disk, folder = (Path(a) for a in sys.argv[1:4])
    times = read_times(image, disk, random_blocks(folder, int(sys.argv[4])))
    twentieths = statistics.quantiles(times, n=20)
    print(json.dumps({"median": statistics.median(times) * 1e6, "95th": twentieths[-1] * 1e6}))


if __name__ == "__main__":
    main()
