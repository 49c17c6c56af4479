"""Long runs: ``python -m tests.fuzz.run TARGET... --minutes N --jobs J``; without a target, all of them in turns.

    a slice    one process fuzzes one target for a while, on the code as it is then
    engine     atheris where it is installed (``pip install .[fuzz]``): what reaches new code is changed further;
               elsewhere inputs are drawn blindly from the seeds
    out/       findings/TARGET-KEY.bin with a .txt each; corpus/TARGET/; log.jsonl, a line a slice

Each slice prints its line: executions, seconds, coverage (edges of the package, 0 if unknown), findings.  A file
called STOP in the folder ends the run after the slices that are going on.  ``--replay FILE`` runs one input.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import importlib
import importlib.util
import itertools
import json
import mmap
import os
import random
import re
import shutil
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

_SLICE: Final = 120  # seconds
_HANG: Final = 120  # seconds of an execution that no longer answers
_MOST_INPUT: Final = 1 << 20  # bytes
_MOST_KEPT: Final = 2 << 30  # bytes: atheris loses the result of each comparison of arrays, and the slice ends here
_HEAD: Final = 16  # of the shared page: executions u64, length of the input u64; then the input


class Bench:
    """Runs inputs in this process and keeps what they find."""

    def __init__(self, name: str, out: Path, seconds: float) -> None:
        from tests.fuzz import limits
        from tests.fuzz.targets import TARGETS

        self.target = TARGETS[name]
        self.out = out
        self._execute = limits.execute
        self._seconds = seconds
        self._shared = mmap.mmap(os.open(_page(out, os.getpid()), os.O_RDWR | os.O_CREAT, 0o600), 0)
        self._count = 0

    def __call__(self, data: bytes) -> None:
        self._count += 1
        kept = data[: _MOST_INPUT - _HEAD]
        head = self._count.to_bytes(8, "little") + len(kept).to_bytes(8, "little")
        self._shared[: _HEAD + len(kept)] = head + kept
        faulthandler.dump_traceback_later(_HANG, exit=True)
        finding = self._execute(self.target.run, data, self._seconds)
        faulthandler.cancel_dump_traceback_later()
        if finding is not None:
            keep(self.out, self.target.name, finding.key, data, "".join(traceback.format_exception(finding.error)))


def keep(out: Path, target: str, key: str, data: bytes, why: str) -> None:
    """Save a finding, the smallest input of each key."""
    path = out / "findings" / f"{target}-{key}.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size <= len(data):
        return
    path.write_bytes(data)
    path.with_suffix(".txt").write_text(f"python -m tests.fuzz.run {target} --replay {path}\n\n{why}")


def _page(out: Path, pid: int) -> Path:
    path = out / f"page-{pid}"
    if not path.exists():
        with path.open("wb") as file:
            file.truncate(_MOST_INPUT)
    return path


# ---------------------------------------------------------------------- a slice, in a process of its own


def _blindly(bench: Bench, seconds: float, seed: int) -> None:
    seeds = [*bench.target.seeds(), *bench.target.more()]
    rng = random.Random(seed)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        data = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 2, 4))):
            data = bench.target.mutate(rng, data)
        bench(data)


def _guided(name: str, out: Path, seconds: float, seed: int, limit: float) -> None:
    """By coverage.  Does not return: the engine ends the process."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["ferrotype"]):
        bench = Bench(name, out, limit)
        for module in ("fat", "swap", "ext", "ntfs", "exfat"):
            importlib.import_module(f"ferrotype.filesystems.{module}")
    folder = out / "corpus" / name
    folder.mkdir(parents=True, exist_ok=True)
    more = bench.target.more() if not any(folder.iterdir()) else ()
    for data in itertools.chain(bench.target.seeds(), more):
        path = folder / hashlib.sha256(data).hexdigest()[:24]
        if len(data) < _MOST_INPUT // 2 and not path.exists():
            path.write_bytes(data)

    def change(data: bytes, most: int, number: int) -> bytes:
        changed = bench.target.mutate(random.Random(number), data)
        return changed if len(changed) <= most else data[:most]

    flags = [f"-max_total_time={seconds:.0f}", f"-seed={seed}", f"-max_len={_MOST_INPUT}", "-len_control=0"]
    flags += ["-rss_limit_mb=3000", f"-timeout={2 * _HANG}", "-verbosity=1", f"-artifact_prefix={out}/crash-{name}-"]

    def once(data: bytes) -> None:
        bench(data)
        if _resident() > _MOST_KEPT:
            os._exit(0)  # as the engine does; what it found is stored

    atheris.Setup(["fuzz", *flags, str(folder)], once, custom_mutator=change)
    atheris.Fuzz()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def _slice(name: str, out: Path, seconds: float, seed: int, *, blind: bool) -> dict[str, object]:
    """One slice in a child; what it did.  A child that dies leaves its last input as a finding."""
    argv = [sys.executable, "-m", "tests.fuzz.run", name, "--worker", "--out", str(out), "--seed", str(seed)]
    argv += ["--minutes", str(seconds / 60), *(["--blind"] if blind else [])]
    before = set((out / "findings").glob("*.bin"))
    began = time.monotonic()
    environment = os.environ | {"MALLOC_ARENA_MAX": "2", "PYTHONUNBUFFERED": "1"}
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    try:
        _, told = child.communicate(timeout=seconds + 4 * _HANG)
    except subprocess.TimeoutExpired:
        child.kill()
        _, told = child.communicate()
    for left in Path("/dev/shm").glob(f"ferrotype-fuzz-{child.pid}-*"):  # the engine ends without a farewell
        shutil.rmtree(left, ignore_errors=True)
    page, text = _page(out, child.pid), told.decode("utf-8", "replace")
    raw = page.read_bytes()
    page.unlink()
    executions, length = int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:16], "little")
    if child.returncode != 0 and executions:
        keep(out, name, f"died-{child.returncode}", raw[_HEAD : _HEAD + length], text[-8000:])
    covered = re.findall(r"cov: (\d+)", text)
    return {
        "target": name,
        "engine": "blind" if blind else "atheris",
        "executions": executions,
        "seconds": round(time.monotonic() - began, 1),
        "coverage": int(covered[-1]) if covered else 0,
        "found": sorted(p.stem for p in set((out / "findings").glob("*.bin")) - before),
        "exit": child.returncode,
        **({"why": text[-600:]} if child.returncode and not executions else {}),
    }


# ---------------------------------------------------------------------- the run


def _run(names: list[str], options: argparse.Namespace) -> None:
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + options.minutes * 60
    order = random.Random(options.seed).sample(names, len(names))  # runs that are cut short leave out different ones
    seeds, turns = itertools.count(options.seed), itertools.cycle(order)

    def go_on(_: int) -> None:
        while not (out / "STOP").exists() and (left := end - time.monotonic()) > 1:
            line = _slice(next(turns), out, min(options.slice, left), next(seeds), blind=options.blind)
            line["at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            print(json.dumps(line), flush=True)  # noqa: T201  what a run is for
            with (out / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            if not line["executions"]:
                time.sleep(5)  # it does not start: the code is being changed

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(go_on, range(options.jobs)))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.fuzz.run", description="Fuzz what reads untrusted bytes.")
    parser.add_argument("targets", nargs="*", help="names of targets; all of them if none is given")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--slice", type=float, default=_SLICE, help="seconds a target is fuzzed before the next one")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--limit", type=float, default=5, help="processor seconds an execution may take")
    parser.add_argument("--blind", action="store_true", help="without atheris")
    parser.add_argument("--replay", type=Path, help="run this input once and show what it does")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = _arguments()
    options.blind = options.blind or importlib.util.find_spec("atheris") is None
    if options.worker and options.blind:
        _blindly(Bench(options.targets[0], options.out, options.limit), options.minutes * 60, options.seed)
    elif options.worker:
        _guided(options.targets[0], options.out, options.minutes * 60, options.seed, options.limit)
    elif options.replay is not None:
        from tests.fuzz.limits import execute
        from tests.fuzz.targets import TARGETS

        finding = execute(TARGETS[options.targets[0]].run, options.replay.read_bytes(), options.limit)
        if finding is not None:
            raise finding.error
    else:
        from tests.fuzz.targets import TARGETS

        unknown = sorted(set(options.targets) - set(TARGETS))
        if unknown:
            sys.exit(f"no such target: {', '.join(unknown)}; there are: {', '.join(TARGETS)}")
        _run(options.targets or list(TARGETS), options)


if __name__ == "__main__":
    main()
