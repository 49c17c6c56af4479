"""Aged file systems of 4 TB, and how long it takes to know what they do not use: ferrotype beside partclone.

    python bench/maps.py make FOLDER [ext4 ntfs exfat fat32]     sparse files, up to 900 MB of memory together
    python bench/maps.py compare FOLDER [--repetitions 3]        wall, CPU, memory in turn; with --json for programs
    python bench/maps.py check FOLDER                            our map against partclone's, sector by sector
    python bench/maps.py map FILE                                our side: one process, what it took as JSON
    python bench/maps.py scan FILE KIND                          partclone's side: what its scan took as JSON
    python bench/maps.py sparse FOLDER                           plan a 64 TiB file of which 1 % is data, as JSON

For other programs: ``aging.make(folder, kind)`` returns the volume's path, ``compare(path, kind, repetitions)`` a
``Comparison`` with the samples of both.

What the volumes are like is said in aging.py.  What is timed:

    ferrotype     a whole Python process that imports what it needs, opens the volume and builds its map of extents
    partclone     its scan alone: ``-c`` with the output to /dev/null, from its start until its progress of the
                  bitmap reaches 100 %, and killed then.  Counting the used blocks, which it does next, and copying
                  are left out.  (``-D``, its log of used ranges, would add both the count and the text of the log.)

partclone counts blocks of the file system on ext4 and NTFS, and sectors on FAT and exFAT.

``sparse`` makes its file on an XFS of its own (root, a loop device, 200 MB in FOLDER), by cloning one extent of 1 MiB
655,360 times, has it planned by a new process, and removes it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aging import RUNS, SIZE, make, shell

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KINDS: Final = ("ext4", "ntfs", "exfat", "fat32")


# ---------------------------------------------------------------------- what is compared


@dataclass(frozen=True, slots=True)
class Cost:
    """What one program took until the map stood."""

    wall: float  # seconds
    cpu: float  # seconds, user and system
    peak: int  # bytes resident


@dataclass(frozen=True, slots=True)
class Comparison:
    """Samples of both programs, taken in turn on one volume."""

    kind: str
    extents: int  # of our map
    inner: tuple[float, ...]  # seconds of opening and mapping alone, without the start of Python
    ours: tuple[Cost, ...]
    scan: tuple[Cost, ...]  # partclone, its bitmap read

    def line(self) -> str:
        ours, scan = (statistics.median(c.wall for c in side) for side in (self.ours, self.scan))
        cpu = [statistics.median(c.cpu for c in side) for side in (self.ours, self.scan)]
        peak = [max(c.peak for c in side) >> 20 for side in (self.ours, self.scan)]
        ratio = statistics.median(a.wall / b.wall for a, b in zip(self.ours, self.scan, strict=True))
        return (
            f"{self.kind}: {self.extents} extents; ferrotype {ours:.2f} s "
            f"({statistics.median(self.inner):.2f} s inside), {cpu[0]:.2f} s CPU, {peak[0]} MiB; "
            f"partclone {scan:.2f} s, {cpu[1]:.2f} s CPU, {peak[1]} MiB; "
            f"ferrotype / partclone {ratio:.3f}"
        )


def compare(path: Path, kind: str, repetitions: int = 3) -> Comparison:
    """Both programs in turn; the first run of ours warms up and is dropped."""
    map_once(path)
    ours, inner, scan, extents = [], [], [], 0
    for _ in range(repetitions):
        cost, said = map_once(path)
        ours.append(cost)
        inner.append(said["seconds"])
        extents = said["extents"]
        scan.append(partclone(path, kind))
    return Comparison(kind, extents, tuple(inner), tuple(ours), tuple(scan))


def map_once(path: Path) -> tuple[Cost, dict[str, Any]]:
    """Our map of a volume, built by a new process; and what that process said."""
    import subprocess

    started = time.monotonic()
    child = subprocess.Popen([sys.executable, __file__, "map", path], stdout=subprocess.PIPE, env=_environment())
    assert child.stdout is not None
    said = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.monotonic() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    child.stdout.close()
    if child.returncode:
        raise SystemExit(f"the map of {path} failed with exit code {child.returncode}")
    told = json.loads(said)
    return Cost(wall, usage.ru_utime + usage.ru_stime, told["peak"]), told


def partclone(path: Path, kind: str) -> Cost:
    """partclone until its bitmap is read."""
    import subprocess

    log = path.with_suffix(".log")
    command = [f"partclone.{kind}", "-c", "-F", "-d0", "-a0", "-L", str(log), "-s", str(path), "-O", "/dev/null"]
    environment = os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}
    started = time.monotonic()
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment)
    assert child.stderr is not None
    said = b""
    try:
        while b"Completed: 100.00%" not in said:
            piece = os.read(child.stderr.fileno(), 1 << 16)
            if not piece:
                raise SystemExit(f"{' '.join(command)} failed: {said.decode(errors='replace')[-800:]}")
            said += piece
        return _so_far(child.pid, started)
    finally:
        child.kill()
        child.wait()
        child.stderr.close()
        log.unlink(missing_ok=True)


def _so_far(pid: int, started: float) -> Cost:
    """What a running process has taken (proc(5))."""
    wall, process = time.monotonic() - started, Path(f"/proc/{pid}")
    ticks = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
    peak = (process / "status").read_text().partition("VmHWM:")[2].split()[0]
    return Cost(wall, sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"), int(peak) << 10)


def _environment() -> dict[str, str]:
    """Of this process, with this checkout's package first."""
    source = str(Path(__file__).resolve().parents[1] / "src")
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))}


def _map(path: Path) -> None:
    """Build the map of a volume and say what it took."""
    started = time.monotonic()
    from ferrotype.block.file import FileSource
    from ferrotype.extents import State
    from ferrotype.filesystems.registry import identify

    with FileSource(path) as source:
        found = identify(source)
        if found is None or found.filesystem is None:
            raise SystemExit(f"{path}: no file system with a map: {found}")
        extents = found.filesystem.allocation()
    taken = time.monotonic() - started
    # Not getrusage: a child starts with the peak of the process it was forked from.
    peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    said = {"kind": found.kind, "extents": len(extents), "free": extents.total(State.FREE), "seconds": taken}
    print(json.dumps(said | {"peak": int(peak) << 10}))


# ---------------------------------------------------------------------- whether it is right


def check(path: Path, kind: str) -> str:
    """What partclone's log of used and unused ranges says that our map does not; raises SystemExit.

    The log stays beside the volume, since partclone may need minutes for it.
    """
    import numpy as np

    from ferrotype.block.file import FileSource
    from ferrotype.extents import State
    from ferrotype.filesystems.registry import identify

    theirs = _partclones(path, kind)
    with FileSource(path) as source:
        found = identify(source)
        assert found is not None
        assert found.filesystem is not None
        ours = found.filesystem.allocation().runs(State.FREE)
    if kind == "exfat":
        # It frees all from the last used run on, where that reaches the last cluster, and what lies behind the
        # clusters: up to there the two must agree.
        last = theirs[0][-1]
        ours, theirs = (tuple(column[side[0] < last] for column in side) for side in (ours, theirs))
    for mine, other, what in zip(ours, theirs, ("starts", "ends"), strict=True):
        if not np.array_equal(mine, other):
            raise SystemExit(f"{path}: the {what} of the free runs differ: {len(mine)} and {len(other)}")
    return f"{kind}: {len(ours[0])} free runs, the same as partclone's"


def _partclones(path: Path, kind: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Starts and ends of partclone's free runs.  They are kept beside the volume: to have them takes minutes."""
    import numpy as np

    kept, domain, log = (path.with_suffix(suffix) for suffix in (".free.npy", ".domain", ".log"))
    if not kept.exists() or kept.stat().st_mtime < path.stat().st_mtime:
        shell(f"partclone.{kind} -D -q -F -d0 -L {log} -s {path} -O {domain} >{log}.out")
        found = array("q")
        with domain.open() as lines:
            for line in lines:  # start, length, "+" or "?"
                if line.endswith("?\n") and line.count("0x") == 2:
                    found.extend(int(number, 16) for number in line.split()[:2])
        np.save(kept, np.array(found, np.int64).reshape(-1, 2))
        for file in (domain, log, Path(f"{log}.out")):
            file.unlink(missing_ok=True)
    runs: NDArray[np.int64] = np.load(kept)
    return runs[:, 0], runs[:, 0] + runs[:, 1]


# ---------------------------------------------------------------------- planning a sparse disk


def sparse(folder: Path, size: int = 64 << 40, pieces: int = 655_360) -> dict[str, Any]:
    """What planning took for a file of ``size`` bytes with that many pieces of 1 MiB of data, evenly spread."""
    disk, mount = folder / "sparse.xfs", folder / "sparse"
    mount.mkdir()
    try:
        shell(f"truncate -s 300G {disk} && mkfs.xfs -q -m reflink=1 {disk} && mount -o loop {disk} {mount}")
        try:
            _clone(mount / "disk.raw", size, pieces)
            child = [sys.executable, __file__, "plan", str(mount / "disk.raw")]
            said: dict[str, Any] = json.loads(_said(child))
        finally:
            shell(f"umount {mount} || true")
    finally:
        disk.unlink(missing_ok=True)
        mount.rmdir()
    return said


def _said(command: list[str]) -> str:
    import subprocess

    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=_environment()).stdout


def _clone(path: Path, size: int, pieces: int) -> None:
    """Clone what the file has behind itself until it has enough (ioctl_ficlonerange(2))."""
    import fcntl
    import struct

    stride, done = size // pieces >> 20 << 20, 1
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(fd, size)
        os.pwrite(fd, os.urandom(1 << 20), 0)
        os.fsync(fd)
        while done < pieces:
            more = min(done, pieces - done)
            fcntl.ioctl(fd, 0x4020940D, struct.pack("=qQQQ", fd, 0, more * stride, done * stride))
            done += more
    finally:
        os.close(fd)


def _plan(path: Path) -> None:
    """Survey and plan a disk as a backup does, and say what it took."""
    import resource

    started = time.monotonic()
    from ferrotype.block.device import open_source
    from ferrotype.engine.plan import plan
    from ferrotype.engine.survey import survey

    ready = time.monotonic()
    source = open_source(path)
    planned = plan(survey(source), 128 << 10, all_sectors=False)
    taken, usage = time.monotonic() - ready, resource.getrusage(resource.RUSAGE_SELF)
    peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
    said = {"size": planned.size, "data": planned.data_bytes, "extents": len(planned.data[0]), "seconds": taken}
    said |= {"imports": ready - started, "cpu": usage.ru_utime + usage.ru_stime, "peak": int(peak) << 10}
    print(json.dumps(said))


# ---------------------------------------------------------------------- command line


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("make", "compare", "check"):
        one = verbs.add_parser(verb)
        one.add_argument("folder", type=Path)
        one.add_argument("kinds", nargs="*", default=[])
        one.add_argument("--size", type=int, default=SIZE, help="bytes of a volume")
        one.add_argument("--runs", type=int, default=RUNS, help="free runs of a volume")
        one.add_argument("--repetitions", type=int, default=3)
        one.add_argument("--json", action="store_true")
    for verb in ("map", "plan"):
        verbs.add_parser(verb).add_argument("file", type=Path)
    verbs.add_parser("sparse").add_argument("folder", type=Path)
    scan = verbs.add_parser("scan")
    scan.add_argument("file", type=Path)
    scan.add_argument("kind", choices=KINDS)
    given = parser.parse_args()
    if given.verb == "map":
        _map(given.file)
        return
    if given.verb == "plan":
        _plan(given.file)
        return
    if given.verb == "sparse":
        print(json.dumps(sparse(given.folder)))
        return
    if given.verb == "scan":
        print(json.dumps(asdict(partclone(given.file, given.kind))))
        return
    for kind in given.kinds or KINDS:
        path = given.folder / f"{kind}.img"
        if given.verb == "make":
            made = make(given.folder, kind, given.size, given.runs)
            print(f"{made}: {made.stat().st_blocks >> 11} MiB allocated")
        elif given.verb == "check":
            print(check(path, kind))
        else:
            result = compare(path, kind, given.repetitions)
            print(json.dumps(asdict(result)) if given.json else result.line(), flush=True)


if __name__ == "__main__":
    main()
