"""Where a benchmark works: a folder on a fast file system for what is timed, one on a disk for what is kept."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from measure import shell
from programs import Store

from disks import Manifest

BENCH = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Workspace:
    """``fast`` holds a disk, a tool's folder and a restored disk; ``kept`` the built disks and finished backups."""

    fast: Path
    kept: Path
    ferrotype: str
    made: set[str] = field(default_factory=set)  # stores that this run made or found right

    def build_disks(self, scale: float, seed: int) -> Manifest:
        """The manifest of the disks of that scale and seed, which are built where they are not there."""
        if not (self.disks / "manifest.json").exists():
            shutil.rmtree(self.kept / "stores", ignore_errors=True)  # they are of other disks
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

    def store(self, store: Store) -> Path:
        """The folder with what a program made of day one; made where it is not there, or must be new in every run."""
        made_by = hashlib.sha256(store.make.encode()).hexdigest()[:8]  # a store of other commands is another one
        folder = self.kept / "stores" / f"{_plain(store.name)}-{made_by}"
        if store.name not in self.made and (store.fresh or not folder.exists()):
            names = self.names(f"store {store.name}")
            self.use(store.day)
            empty(names["at"])
            empty(names["out"])
            shell(store.make.format(**names))
            new = folder.with_name(folder.name + ".new")
            shell(f"mkdir -p {folder.parent} && rm -rf {folder} {new} && mv {names['at']} {new} && mv {new} {folder}")
        self.made.add(store.name)
        return folder

    def names(self, tool: str) -> dict[str, str]:
        """What the commands of programs.py may name."""
        at = self.fast / "tools" / _plain(tool)
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
            "disks": str(self.disks),
            "python": sys.executable,
            "bench": str(BENCH),
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


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def empty(folder: str) -> None:
    shell(f"rm -rf {shlex.quote(folder)} && mkdir -p {shlex.quote(folder)}")
