# ruff: noqa: ARG002  the operations have the parameters that mfusepy gives them
"""A file system in trouble: full, over quota, read-only, failing, slow, stalled, or without power.

    with troubled(tmp_path) as disk:
        disk.behave(space=MiB)                   from now on there is room for 1 MiB in all
        run(... disk.path / "laptop.ferro")      through the kernel, as any program uses it
        disk.behave()                            all is well again
        disk.backing / "laptop.ferro"            the same file without the trouble

It is a FUSE file system over a folder, run by a process of its own.  With ``lossy`` it knows what a power cut may
lose: of what was written since the last fsync of a file, and of the names that changed since the last fsync of their
folder, ``cut`` keeps what chance keeps, in any order, and nothing that is still open works any more.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
_HUGE: Final = 1 << 40
_BLOCK: Final = 4096
_PUNCH: Final = 0x03  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


@dataclass(frozen=True)
class Behaviour:
    """What is wrong with the file system; by default nothing."""

    space: int | None = None  # bytes of storage in all
    quota: int | None = None  # bytes this user may store; the file system itself has room
    largest: int | None = None  # bytes a file may have
    read_only: bool = False
    broken: bool = False  # every operation fails with EIO, as on a stick that was pulled out
    bad: tuple[tuple[int, int], ...] = ()  # (start, length): reads of any file that touch it fail with EIO
    slow: float = 0.0  # seconds each operation takes
    stall: tuple[str, ...] = ()  # operations that do not return ...
    after: int = 0  # ... once so many of them did
    lossy: bool = False  # remember what is durable, for a power cut
    cut_at: int = -1  # number of the operation before which the power goes
    seed: int = 0  # of what the cut keeps


# ---------------------------------------------------------------------- what tests use


class Trouble:
    """A mounted file system and the way to change its behaviour."""

    def __init__(self, backing: Path, path: Path, process: subprocess.Popen[str]) -> None:
        self.backing = backing
        self.path = path
        self._process = process

    def behave(self, **behaviour: Any) -> None:
        """Change everything at once; what is not named is well.  Stalled operations go on."""
        self._ask({"behave": dataclasses.asdict(Behaviour(**behaviour))})

    def operations(self) -> int:
        """Operations on files and names since the last ``behave``."""
        return int(self._ask({})["operations"])

    def stalled(self) -> int:
        """Operations that have not returned."""
        return int(self._ask({})["stalled"])

    def is_cut(self) -> bool:
        """Whether the power went."""
        return bool(self._ask({})["cut"])

    def cut(self, seed: int) -> None:
        """The power goes now; ``backing`` is what is left."""
        self._ask({"cut": seed})

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


@contextlib.contextmanager
def troubled(folder: Path, **behaviour: Any) -> Iterator[Trouble]:
    """Mount one below ``folder``; unmounted and its process gone at the end, whatever has happened."""
    needed()
    backing, path = folder / "backing", folder / "mount"
    backing.mkdir()
    path.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "tests.troubled", backing, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"FUSE_LIBRARY_NAME": "fuse3"},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", "the file system could not be mounted"
        trouble = Trouble(backing, path, process)
        trouble.behave(**behaviour)
        yield trouble
    finally:
        subprocess.run(["fusermount3", "-u", "-z", path], capture_output=True, check=False)
        process.kill()  # frees everybody who waits for an answer
        process.communicate()


def needed() -> None:
    """Skip the test where FUSE cannot be used; in CI, fail it."""
    import pytest

    from tests.machine import IN_CI, need

    need("fusermount3")
    try:
        with open("/dev/fuse", "rb+", buffering=0):
            pass
        os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")
        import mfusepy  # type: ignore[import-untyped]  # noqa: F401
    except (OSError, ImportError, AttributeError) as error:
        (pytest.fail if IN_CI else pytest.skip)(f"no FUSE here: {error}")


# ---------------------------------------------------------------------- what a power cut leaves


@dataclass(eq=False)
class Node:
    """A file: what is durable of it, and what was done to it since."""

    durable: bytearray | None = None  # None: all that is in it
    since: list[tuple[int, bytes] | int] = field(default_factory=list)  # writes, and truncations as the new size

    def after_cut(self, whole: bytes, rng: random.Random, share: float) -> bytes:
        """The content that chance leaves, sector by sector or page by page."""
        if self.durable is None:
            return whole
        content = bytearray(self.durable)
        for change in self.since:
            if isinstance(change, int):
                if rng.random() < share:
                    content[change:] = bytes(max(0, change - len(content)))
                continue
            offset, data = change
            unit = rng.choice((512, _BLOCK))
            for at in range(0, len(data), unit):
                if rng.random() < share:
                    piece = data[at : at + unit]
                    content.extend(bytes(max(0, offset + at - len(content))))
                    content[offset + at : offset + at + len(piece)] = piece
        if rng.random() < 0.2:  # the new size came through, the data did not
            content.extend(bytes(max(0, len(whole) - len(content))))
        return bytes(content)


class Names:
    """Which file each name means: what is durable of that, and what was changed since."""

    def __init__(self) -> None:
        self.live: dict[str, Node] = {}
        self.durable: dict[str, Node] = {}
        self.since: list[dict[str, Node | None]] = []

    def node(self, path: str) -> Node:
        """The file's node; one that was there before is durable."""
        if path not in self.live:
            self.live[path] = self.durable[path] = Node()
        return self.live[path]

    def assign(self, names: dict[str, Node | None]) -> None:
        for name, node in names.items():
            if node is None:
                self.live.pop(name, None)
            else:
                self.live[name] = node
        self.since.append(names)

    def sync(self, folder: str) -> None:
        """Everything in a folder is durable."""
        left = []
        for names in self.since:
            if os.path.dirname(next(iter(names))) == folder:
                _assign(self.durable, names)
            else:
                left.append(names)
        self.since = left

    def after_cut(self, rng: random.Random, share: float) -> dict[str, Node]:
        found = dict(self.durable)
        for names in self.since:
            if rng.random() < share:
                _assign(found, names)
        return found


def _assign(table: dict[str, Node], names: dict[str, Node | None]) -> None:
    for name, node in names.items():
        if node is None:
            table.pop(name, None)
        else:
            table[name] = node


# ---------------------------------------------------------------------- the file system


@dataclass(eq=False)
class Handle:
    """An open file."""

    fd: int
    node: Node | None
    life: int  # the power cut before which it was opened


class FileSystem:
    """The operations, as mfusepy calls them: from several threads, by path and handle."""

    use_ns = True

    def __init__(self, backing: Path) -> None:
        self.backing = backing
        self.behaviour = Behaviour()
        self.released = threading.Event()
        self.state = threading.RLock()
        self.handles: dict[int, Handle] = {}
        self.names = Names()
        self.counted = self.matched = self.waiting = self.life = self.numbers = 0
        self.cut_off = False
        self.fallocate_call = ctypes.CDLL(None, use_errno=True).fallocate
        self.fallocate_call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

    # ------------------------------------------------------------------ control

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        if "behave" in question:
            with self.state:
                before, self.released = self.released, threading.Event()
                self.behaviour = Behaviour(**question["behave"])
                self.counted = self.matched = 0
                self.names = Names()
                self.cut_off = False
            before.set()
        if "cut" in question:
            with self.state:
                self.power_cut(question["cut"])
        return {"operations": self.counted, "stalled": self.waiting, "cut": self.cut_off}

    def enter(self, operation: str, *, changes: bool = False, handle: Handle | None = None) -> None:
        """Behave before an operation.  Raises OSError, or does not return for a long time."""
        behaviour = self.behaviour
        if behaviour.slow:
            time.sleep(behaviour.slow)
        if operation in behaviour.stall:
            with self.state:
                self.matched += 1
                stalled = self.matched > behaviour.after
                released = self.released
                self.waiting += stalled
            if stalled:
                released.wait()
                with self.state:
                    self.waiting -= 1
        with self.state:
            if changes:
                if self.counted == behaviour.cut_at and not self.cut_off:
                    self.power_cut(behaviour.seed)
                self.counted += 1
            if self.behaviour.broken or self.cut_off or (handle is not None and handle.life != self.life):
                raise OSError(errno.EIO, "broken")
            if self.behaviour.read_only and changes and operation not in ("fsync", "fsyncdir"):
                raise OSError(errno.EROFS, "read-only")

    def power_cut(self, seed: int) -> None:
        """Leave in the folder what a machine would find after its restart."""
        rng = random.Random(seed)
        share = rng.choice((0.0, 0.2, 0.5, 0.5, 0.8, 1.0))
        found = self.names.after_cut(rng, rng.choice((0.0, 0.5, 0.5, 1.0)))
        contents = {}
        whole = {id(node): self.real(path).read_bytes() for path, node in self.names.live.items()}
        for path, node in found.items():
            contents[path] = node.after_cut(whole.get(id(node), b""), rng, share)
        for path in self.names.live:
            self.real(path).unlink()
        for path, content in contents.items():
            self.real(path).write_bytes(content)
        self.names = Names()
        self.cut_off = True
        self.life += 1

    # ------------------------------------------------------------------ remembering

    def real(self, path: str) -> Path:
        return self.backing / path.lstrip("/")

    def note(self, handle: Handle, change: tuple[int, bytes] | int) -> None:
        node = handle.node
        if node is not None:
            self.keep(node, handle.fd)
            node.since.append(change)

    def keep(self, node: Node, fd: int) -> None:
        """Before a change: what is in the file is durable, where nothing was changed since the last sync."""
        if node.durable is None:
            node.durable = bytearray(os.pread(fd, os.fstat(fd).st_size, 0))

    def add(self, fd: int, path: str) -> int:
        with self.state:
            self.numbers += 1
            node = self.names.node(path) if self.behaviour.lossy else None
            self.handles[self.numbers] = Handle(fd, node, self.life)
            return self.numbers

    # ------------------------------------------------------------------ space

    def room(self, offset: int, length: int, fd: int) -> int:
        """How many of the bytes may be written.  Raises OSError where none may."""
        b = self.behaviour
        if b.largest is not None and offset + length > b.largest:
            if offset >= b.largest:
                raise OSError(errno.EFBIG, "too large")
            length = b.largest - offset
        limit = b.space if b.space is not None else b.quota
        if limit is None:
            return length
        new = max(0, offset + length - os.fstat(fd).st_size)  # what lies inside the file has its storage already
        left = limit - self.used()
        if new > left:
            length -= new - max(0, left) // _BLOCK * _BLOCK
            if length <= 0:
                raise OSError(errno.ENOSPC if b.space is not None else errno.EDQUOT, "full")
        return length

    def used(self) -> int:
        return sum(file.stat().st_blocks * 512 for file in self.backing.rglob("*") if file.is_file())

    def statfs(self, path: str) -> dict[str, int]:
        self.enter("statfs")
        space = _HUGE if self.behaviour.space is None else self.behaviour.space
        free = max(0, space - self.used()) // _BLOCK
        return {"f_bsize": _BLOCK, "f_frsize": _BLOCK, "f_blocks": space // _BLOCK, "f_bfree": free, "f_bavail": free}

    # ------------------------------------------------------------------ names

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        self.enter("getattr")
        found = os.fstat(self.handles[fh].fd) if fh else os.lstat(self.real(path))
        names = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_blocks")
        times = {f"st_{kind}time": getattr(found, f"st_{kind}time_ns") for kind in "amc"}
        return {name: getattr(found, name) for name in names} | times

    def readdir(self, path: str, fh: int) -> list[str]:
        self.enter("readdir")
        return [".", "..", *os.listdir(self.real(path))]

    def mkdir(self, path: str, mode: int) -> int:
        self.enter("mkdir", changes=True)
        os.mkdir(self.real(path), mode)
        return 0

    def rmdir(self, path: str) -> int:
        self.enter("rmdir", changes=True)
        os.rmdir(self.real(path))
        return 0

    def unlink(self, path: str) -> int:
        self.enter("unlink", changes=True)
        with self.state:
            self.forget(path, {path: None})
            os.unlink(self.real(path))
        return 0

    def rename(self, old: str, new: str) -> int:
        self.enter("rename", changes=True)
        with self.state:
            if self.behaviour.lossy:
                self.forget(new, {old: None, new: self.names.node(old)})
            os.rename(self.real(old), self.real(new))
        return 0

    def forget(self, path: str, names: dict[str, Node | None]) -> None:
        """Before a name is given away: what it stood for may come back."""
        if not self.behaviour.lossy:
            return
        if self.real(path).exists():
            node = self.names.node(path)
            if node.durable is None:
                node.durable = bytearray(self.real(path).read_bytes())
        self.names.assign(names)

    def create(self, path: str, mode: int) -> int:
        self.enter("create", changes=True)
        with self.state:
            fd = os.open(self.real(path), os.O_RDWR | os.O_CREAT, mode)
            if self.behaviour.lossy:
                self.names.assign({path: Node(bytearray())})
        return self.add(fd, path)

    def chmod(self, path: str, mode: int) -> int:
        self.enter("chmod", changes=True)
        os.chmod(self.real(path), mode)
        return 0

    def utimens(self, path: str, times: tuple[int, int] | None = None) -> int:
        return 0

    # ------------------------------------------------------------------ content

    def open(self, path: str, flags: int) -> int:
        self.enter("open")
        if self.behaviour.read_only and flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "read-only")
        with self.state:
            return self.add(os.open(self.real(path), flags & ~(os.O_CREAT | os.O_EXCL)), path)

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        handle = self.handles[fh]
        self.enter("read", handle=handle)
        if any(start < offset + size and start + length > offset for start, length in self.behaviour.bad):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.pread(handle.fd, size, offset)

    def write(self, path: str, data: bytes, offset: int, fh: int) -> int:
        handle = self.handles[fh]
        self.enter("write", changes=True, handle=handle)
        with self.state:
            count = self.room(offset, len(data), handle.fd)
            self.note(handle, (offset, data[:count]))
            return os.pwrite(handle.fd, data[:count], offset)

    def truncate(self, path: str, length: int, fh: int | None = None) -> int:
        if fh is None:
            fh = self.open(path, os.O_RDWR)
            try:
                return self.truncate(path, length, fh)
            finally:
                self.release(path, fh)
        handle = self.handles[fh]
        self.enter("truncate", changes=True, handle=handle)
        if self.behaviour.largest is not None and length > self.behaviour.largest:
            raise OSError(errno.EFBIG, "too large")
        with self.state:
            self.note(handle, length)
            os.ftruncate(handle.fd, length)
        return 0

    def fallocate(self, path: str, mode: int, offset: int, size: int, fh: int) -> int:
        handle = self.handles[fh]
        self.enter("fallocate", changes=True, handle=handle)
        if mode != _PUNCH:
            raise OSError(errno.EOPNOTSUPP, "only holes")
        with self.state:
            self.note(handle, (offset, bytes(max(0, min(size, os.fstat(handle.fd).st_size - offset)))))
            if self.fallocate_call(handle.fd, mode, offset, size):
                raise OSError(ctypes.get_errno(), "fallocate")
        return 0

    def fsync(self, path: str, datasync: int, fh: int) -> int:
        handle = self.handles[fh]
        self.enter("fsync", changes=True, handle=handle)
        with self.state:
            if handle.node is not None:
                handle.node.durable, handle.node.since = None, []
        return 0

    def fsyncdir(self, path: str, datasync: int, fh: int) -> int:
        self.enter("fsyncdir", changes=True)
        with self.state:
            self.names.sync(path)
        return 0

    def flush(self, path: str, fh: int) -> int:
        self.enter("flush")
        return 0

    def release(self, path: str, fh: int) -> int:
        if "release" in self.behaviour.stall:
            self.enter("release")
        with self.state:
            os.close(self.handles.pop(fh).fd)
        return 0


def _obey(file_system: FileSystem, mount: str, questions: IO[str]) -> None:
    """Answer the test until it ends; then nobody needs the mount any more."""
    for line in questions:
        print(json.dumps(file_system.answer(json.loads(line))), flush=True)  # noqa: T201
    subprocess.run(["fusermount3", "-u", "-z", mount], capture_output=True, check=False)
    os._exit(0)


def _main() -> None:
    os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")
    import mfusepy

    backing, mount = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    file_system = FileSystem(Path(backing))

    def ready(_: str) -> None:
        print("ready", flush=True)  # noqa: T201
        threading.Thread(target=_obey, args=(file_system, mount, sys.stdin), daemon=True).start()

    file_system.init = ready  # type: ignore[attr-defined]
    mfusepy.FUSE(
        file_system,
        mount,
        foreground=True,
        fsname="troubled",
        attr_timeout=0,
        entry_timeout=0,
        negative_timeout=0,
        hard_remove=True,
    )


if __name__ == "__main__":
    _main()
