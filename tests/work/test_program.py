"""System calls of the program per MiB of disk, told by strace: by what two sizes differ, without the start.

Calls by which threads wait for each other are left out: how often they do is chance.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path

import pytest

from ferrotype.engine import plan, restore
from ferrotype.objects.reading import READ_SIZE
from ferrotype.units import MiB
from tests.cli.program import PROGRAM, environment
from tests.engine.images import CHUNK
from tests.machine import need
from tests.work.sources import Numbered

SMALL, LARGE = 16, 48  # MiB
SYNCS = ("fsync", "fdatasync", "syncfs", "sync")
READS = ("read", "pread64", "preadv", "preadv2")
WRITES = ("write", "pwrite64", "pwritev", "pwritev2")
OTHERS = ("lseek", "fadvise64", "sync_file_range", "fallocate", "mmap", "munmap", "mremap", "openat", "ioctl")

READ = max(1, plan.BATCH / MiB)  # MiB of a disk that a worker reads in one call; less would be a step back
WRITTEN = max(1, restore._BATCH / MiB)  # MiB of a new disk that a worker writes in one call
STEP = 2  # MiB of an image or of a new file that are written, or waited for, in one call
WINDOW = max(1, READ_SIZE / MiB)  # MiB of a pack that are read and proven in one call
CHUNK_SIZE = 1 / 8  # MiB
PACK = 16  # MiB; for each there are a few small reads or a write more


def calls(*words: str | Path, log: Path) -> Counter[str]:
    """How often the program called what, by itself and by its children."""
    kinds = ",".join((*SYNCS, *READS, *WRITES, *OTHERS))
    strace = ("strace", "-f", "-qq", "--seccomp-bpf", "-c", "-U", "name,calls", "-e", f"trace={kinds}", "-o", log)
    done = subprocess.run([*strace, *PROGRAM, *words], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in log.read_text().splitlines()]
    return Counter({words[0]: int(words[1]) for words in lines if len(words) == 2 and words[1].isdigit()})


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Counter[str], Counter[str]]]:
    """For each verb the calls for a small disk and for a large one."""
    need("strace")
    found: dict[str, list[Counter[str]]] = {}
    for size in (SMALL, LARGE):
        folder = tmp_path_factory.mktemp("counts")
        disk, image, out, log = (folder / name for name in ("disk.img", "a.ferro", "out.img", "log"))
        source, content = Numbered(size * MiB // CHUNK), bytearray(size * MiB)
        source.read_into(0, memoryview(content))
        disk.write_bytes(content)
        verbs: dict[str, tuple[str | Path, ...]] = {
            "first": ("backup", disk, image),
            "again": ("backup", disk, image),
            "verify": ("verify", image),
            "deep": ("verify", "--deep", image),
            "restore": ("restore", image, out),
            "checksum": ("checksum", image),
        }
        for verb, words in verbs.items():
            found.setdefault(verb, []).append(calls(*words, log=log))
        for path in (disk, image, out):
            path.unlink()
    return {verb: (small, large) for verb, (small, large) in found.items()}


MEMORY = 1 / 2  # buffers taken from the system or given back, per MiB: hardly any, since they are used again

BOUNDS: dict[str, tuple[float, float, float]] = {
    # reads, writes, and others (advice to let go of what was read, writing back, memory from the system) per MiB
    "first": (1 / READ + 2 / PACK, 1 / STEP + 2 / PACK, 1 / READ + 1 / STEP + 2 / PACK + MEMORY),
    "again": (1 / READ, 0, 1 / READ + MEMORY),
    "verify": (1 / WINDOW + 5 / PACK, 0, MEMORY),
    "deep": (1 / CHUNK_SIZE + 1 / WINDOW + 8 / PACK, 0, MEMORY),
    "restore": (1 / WRITTEN + 2 / PACK, 1 / WRITTEN + 2 / PACK, 1 / STEP + MEMORY),
    "checksum": (1 + 2 / PACK, 0, MEMORY),  # of a snapshot: a read for the neighbouring frames of each leaf
}


@pytest.mark.parametrize("verb", BOUNDS)
def test_calls_per_mebibyte(counts: dict[str, tuple[Counter[str], Counter[str]]], verb: str) -> None:
    small, large = counts[verb]
    noise = 4  # of a map, a directory or a catalog there may be a page more
    for kinds, bound in zip((READS, WRITES, OTHERS), BOUNDS[verb], strict=True):
        grown = sum(large[kind] - small[kind] for kind in kinds)
        assert grown <= bound * (LARGE - SMALL) + noise, (kinds, small, large)


@pytest.mark.parametrize(("verb", "most"), [("first", 10), ("again", 4), ("verify", 0), ("deep", 0), ("restore", 3)])
def test_syncs_do_not_grow(counts: dict[str, tuple[Counter[str], Counter[str]]], verb: str, most: int) -> None:
    """A new image has its head, its first catalog and its name made durable, and then two flushes of two."""
    small, large = ({kind: count[kind] for kind in SYNCS if count[kind]} for count in counts[verb])
    assert small == large
    assert sum(large.values()) <= most
