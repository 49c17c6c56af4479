"""Where a benchmark works: a folder on a fast file system for what is timed, one on a disk for what is kept."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from measure import shell

from disks import Manifest

BENCH = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Workspace:
    """``fast`` holds a disk, a tool's folder and a restored disk; ``kept`` the built disks and finished backups."""

    fast: Path
    kept: Path
    ferrotype: str

    def build_disks(self, scale: float, seed: int) -> Manifest:
        """The manifest of the disks of that scale and seed, which are built where they are not there."""
        if not (self.disks / "manifest.json").exists():
            shell(f"{sys.executable} {BENCH}/make_disk.py {self.disks} --scale {scale} --seed {seed}")
        manifest = Manifest.load(self.disks)
        if (manifest.scale, manifest.seed) != (scale, seed):
            sys.exit(
                f"{self.disks} holds disks of scale {manifest.scale:g} and seed {manifest.seed}; name another --kept"
            )
        return manifest

    @property
    def disks(self) -> Path:
        return self.kept / "disks"

    @property
    def source(self) -> Path:
        """The disk of the day in use.  Its path stays the same from day to day, as that of a real disk does."""
        return self.fast / "source" / "disk.img"

    def use(self, day: str) -> None:
        """Bring in the disk of a day; '' only takes the present one away, to make room."""
        mark = self.fast / "day"
        if mark.exists() and mark.read_text() == day:
            return
        mark.unlink(missing_ok=True)
        self.source.unlink(missing_ok=True)
        if day:
            self.source.parent.mkdir(parents=True, exist_ok=True)
            shell(f"cp --sparse=always {self.disks}/{day}.img {self.source}")
        mark.write_text(day)

    def names(self, tool: str) -> dict[str, str]:
        """What the commands of jobs.py may name."""
        at = self.fast / "tools" / "".join(c if c.isalnum() else "-" for c in tool)
        password = self.fast / "password"
        password.write_text("a passphrase for the benchmark\n")
        check = f"{sys.executable} {BENCH}/disks.py {self.disks}"
        return {
            "ferrotype": self.ferrotype,
            "source": str(self.source),
            "at": str(at),
            "out": str(self.fast / "out"),
            "password": str(password),
            "check": check,
        }


@contextlib.contextmanager
def workspace(fast: Path, kept: Path, ferrotype: str) -> Iterator[Workspace]:
    """A new folder in ``fast``, gone afterwards; ``kept`` stays."""
    folder = fast / "ferrotype-bench"
    try:
        folder.mkdir()  # one for all, so that two runs at once do not spoil each other's numbers
    except FileExistsError:
        sys.exit(f"{folder} is there: another benchmark is running, or one was killed; remove it in that case")
    try:
        yield Workspace(folder, kept, ferrotype)
    finally:
        shutil.rmtree(folder)


def empty(folder: str) -> None:
    shell(f"rm -rf {shlex.quote(folder)} && mkdir -p {shlex.quote(folder)}")
