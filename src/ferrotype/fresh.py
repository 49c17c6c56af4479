"""New files, made so that nobody else's are touched: every temporary file of the program is one of these.

    .disk.raw.8f3a41c07be2d915.part     made with O_EXCL in an open folder, under a name that cannot be guessed;
                |                       locked (flock) while it is open
                |  the same inode as was made, before and after
                v
    disk.raw

Files of one output share the sign in the middle of their names.  What a killed process left is found by the next that
makes the same: by its name, its owner, and that nobody holds a lock on any file with that sign.

Sources: open(2), rename(2), flock(2), proc(5) (protected_symlinks), proc_pid_mountinfo(5).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ferrotype import linux
from ferrotype.errors import Refused, WriteError

__all__ = ["Fresh", "among_devices", "aside_name", "hidden_path", "permissions_of", "true_name"]

_HEAD: Final = (
    180  # bytes of a name that its hidden one keeps: file systems take 255, and a lock file's is longer still
)
_LINKS: Final = 40  # symbolic links followed in one path, as the kernel does
_TRIES: Final = 10  # names taken from under a new file by somebody who tidies up
_TURN: Final = 10.0  # seconds to wait for another process that makes the same file just now, on a busy machine, too
_TICK: Final = 0.01  # seconds
_NEW: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DEV: Final = Path("/dev")
_FILES_IN_DEV: Final = Path("/dev/shm")  # noqa: S108  where programs keep files in memory on purpose

Identity = tuple[int, int]  # st_dev, st_ino


def hidden_path(final: Path) -> Path:
    """A hidden name beside ``final`` for what makes its file itself; ``Fresh.found`` gives that its name."""
    return final.with_name(f".{_head(final)}.{os.urandom(8).hex()}.part")


def aside_name(path: Path) -> Path:
    """A hidden name for a file that steps aside; nobody takes it for what a killed process has left to be removed."""
    return path.with_name(f".{_head(path)}.{os.urandom(8).hex()}.old")


# ---------------------------------------------------------------------- where a file may be made


def true_name(path: str | os.PathLike[str]) -> Path:
    """The path without symbolic links, in its last part too: a link stays one, and what it points to is written.

    Raises Refused where a link was put there by somebody else: it is followed only where it belongs to this user or
    to root, or stands in a folder of its own owner or one that others may not write to.
    """
    at = Path(os.path.abspath(os.sep))
    parts = os.path.join(os.getcwd(), os.fspath(path)).split("/")[::-1]
    links = 0
    while parts:
        part = parts.pop()
        if part in ("", "."):
            continue
        if part == "..":
            at = at.parent
            continue
        status = _status(at / part)
        if status is None or not stat.S_ISLNK(status.st_mode):
            at /= part
            continue
        links += 1
        if links > _LINKS:
            raise Refused(f"{path} leads through too many symbolic links; name the file itself")
        if not _may_follow(status, at):
            raise Refused(
                f"{at / part} is a symbolic link of another user (uid {status.st_uid}) in a folder that others may "
                "write to, and is not followed; name the file itself"
            )
        with contextlib.suppress(OSError):
            target = os.readlink(at / part)
            at = Path("/") if target.startswith("/") else at
            parts += target.split("/")[::-1]
    return at


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (OSError, ValueError):
        return None


def _may_follow(link: os.stat_result, folder: Path) -> bool:
    """The rule of fs.protected_symlinks, and for every folder that others may write to, not for sticky ones alone."""
    if link.st_uid in (0, os.geteuid()):
        return True
    around = _status(folder)
    return around is not None and (not around.st_mode & 0o022 or link.st_uid == around.st_uid)


def among_devices(path: str | os.PathLike[str]) -> bool:
    """Whether a file at ``path`` would stand among device nodes, in memory: it would be lost with the next start.

    So it is in /dev, but for /dev/shm, and in every devtmpfs, wherever it is mounted.
    """
    real = Path(os.path.realpath(path))
    status = _status(real.parent)
    if status is not None and f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}" in _devtmpfs():
        return True
    return real.is_relative_to(_DEV) and not real.is_relative_to(_FILES_IN_DEV)


def _devtmpfs() -> set[str]:
    """Numbers of the file systems that the kernel keeps device nodes in."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().decode("utf-8", "surrogateescape").split("\n")
    except OSError:
        return set()
    return {line.split(" ")[2] for line in lines if line.partition(" - ")[2].startswith("devtmpfs ")}


def permissions_of(*sources: str | os.PathLike[str]) -> int:
    """Permissions for a new file made of the ``sources``: nobody may read it who may not read all of them.

    The user's umask takes more away.
    """
    mode = 0o666
    for source in sources:
        try:
            own = os.stat(source).st_mode
        except (OSError, ValueError):
            continue
        if not own & stat.S_IRGRP:
            mode &= ~0o060
        if not own & stat.S_IROTH:
            mode &= ~0o006
    return mode


# ---------------------------------------------------------------------- a file that is being made


class Fresh:
    """A file that has a hidden name until ``publish``.  Use ``make``; whoever did closes ``fd``."""

    def __init__(self, fd: int, hidden: Path, final: Path, folder: Identity) -> None:
        self.fd = fd
        self.path = hidden
        self.final = final
        self._published = False
        self._folder = folder
        self._identity: Identity | None = _identity(os.fstat(fd))

    @property
    def sign(self) -> str:
        """What the hidden names of one output have in common."""
        return self.path.name.split(".")[-2]

    @classmethod
    def make(
        cls,
        path: str | os.PathLike[str],
        *,
        mode: int = 0o666,
        kind: str = "part",
        sign: str | None = None,
        held: Callable[[int], None] | None = None,
    ) -> Fresh:
        """An empty file beside ``path``, open for reading and writing and locked, where the file system can.

        Without a ``sign``, those of files that others left are removed first.  ``held`` is told the descriptor of a
        file that another process is making under the same name just now, and may raise.  Raises Refused, OSError.
        """
        final = true_name(path)
        if among_devices(final):
            raise Refused(f"{final} is no device that is there, and files are kept elsewhere; nothing was written")
        with _opened(final.parent) as folder, _turn(folder if held else -1):
            for _ in range(_TRIES):
                name = f".{_head(final)}.{sign or os.urandom(8).hex()}.{kind}"
                fd = os.open(name, _NEW, mode, dir_fd=folder)
                try:
                    found = cls(fd, final.with_name(name), final, _identity(os.fstat(folder)))
                    locked = _lock(fd)
                    if locked is not None and _named(folder, name) == found._identity:
                        if sign is None and locked:
                            _tidy(folder, final, name, held)
                        return found
                except BaseException:
                    with contextlib.suppress(OSError):
                        os.unlink(name, dir_fd=folder)
                    os.close(fd)
                    raise
                os.close(fd)
        raise OSError(errno.EBUSY, "another process removes new files there")

    @classmethod
    def found(cls, hidden: Path, final: Path) -> Fresh:
        """A file that stands under a hidden name, which whoever made it holds the lock of.  Raises OSError."""
        with _opened(final.parent) as folder:
            fd = os.open(hidden.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            return cls(fd, hidden, final, _identity(os.fstat(folder)))

    def let_go(self) -> None:
        """The descriptor is about to be closed; the file keeps its hidden name."""
        if not linux.is_local(self.fd):
            self._identity = None  # numbers of files that nobody has open may change there

    def publish(self, *, replace: bool = False) -> None:
        """The file takes its name.  Raises FileExistsError, OSError, and WriteError where it is no longer there."""
        with self._opened() as folder:
            self._check(folder, self.path.name)
            if replace:
                os.rename(self.path.name, self.final.name, src_dir_fd=folder, dst_dir_fd=folder)
            else:
                linux.rename_new(self.path.name, self.final.name, folder=folder)
            self._published = True
            self._check(folder, self.final.name)
        self.path = self.final

    def remove(self) -> None:
        """Nothing is left of one without a name, if it is still there and nobody else's.  Raises OSError."""
        if self._published:
            return
        with contextlib.suppress(FileNotFoundError, WriteError), self._opened() as folder:
            self._check(folder, self.path.name)
            os.unlink(self.path.name, dir_fd=folder)

    def _check(self, folder: int, name: str) -> None:
        found = _named(folder, name)
        if found is None or found != (self._identity or found):
            raise WriteError(
                f"{self.final}: the new file was deleted or replaced while it was written, so it is not there; "
                "start again, in a folder that nobody else changes"
            )

    @contextmanager
    def _opened(self) -> Iterator[int]:
        with _opened(self.final.parent) as folder:
            if _identity(os.fstat(folder)) != self._folder:
                raise WriteError(f"{self.final.parent} is another folder than before; start again")
            yield folder


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


def _named(folder: int, name: str) -> Identity | None:
    try:
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return _identity(status) if stat.S_ISREG(status.st_mode) else None


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    """The folder of that true name.  Raises Refused where a part of it became a link, OSError."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # it may be written to though not read
        fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            where = os.readlink(f"/proc/self/fd/{fd}")
            if where.startswith("/") and where != str(folder) and os.path.realpath(folder) != str(folder):
                raise Refused(f"{folder} leads elsewhere by now; nothing was written")
        yield fd
    finally:
        os.close(fd)


def _head(final: Path) -> str:
    return os.fsdecode(os.fsencode(final.name)[:_HEAD])


# ---------------------------------------------------------------------- what others left


def _lock(fd: int) -> bool | None:
    """Take the lock of an open file; False where the file system has none, None where another process has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError:
        return False
    return True


@contextmanager
def _turn(folder: int) -> Iterator[None]:
    """One after the other, as far as that goes: two that begin at once would both see the other."""
    fd = -1
    with contextlib.suppress(OSError):
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=folder) if folder >= 0 else -1
    try:
        until = time.monotonic() + _TURN
        while fd >= 0 and _lock(fd) is None and time.monotonic() < until:
            time.sleep(_TICK)
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def _tidy(folder: int, final: Path, own: str, held: Callable[[int], None] | None) -> None:
    """Remove what processes that were killed left beside ``final``.  Where anything is doubtful it stays.

    Only where no other machine can have a file open: its locks may not be seen from here.
    """
    if not linux.is_local(folder):
        return
    head = re.escape(_head(final))
    # What a new backup image is made under has a hidden name and a lock file of its own meanwhile.
    left = re.compile(rf"\.{{1,2}}{head}(?:\.([0-9a-f]{{16}}))?\.(?:part|new)(?:\.[0-9a-f]{{16}}\.new)?(?:\.lock)?")
    try:
        every = os.listdir(folder)
    except OSError:
        return
    signs = {match[1] for name in every if name != own and (match := left.fullmatch(name))}
    for sign in signs:
        group = [name for name in every if name != own and _belongs(name, sign, left)]
        _remove_group(folder, group, held if any(left.fullmatch(name) for name in group) else None)


def _belongs(name: str, sign: str | None, left: re.Pattern[str]) -> bool:
    match = left.fullmatch(name)
    if sign is None:  # of older versions, which made images under one name
        return match is not None and match[1] is None and name.endswith(".new")
    return (match is not None and match[1] == sign) or (
        name.startswith(".") and name.endswith((f".{sign}.part", f".{sign}.new"))
    )


def _remove_group(folder: int, names: list[str], held: Callable[[int], None] | None) -> None:
    """Remove all files of one output, unless one of them is locked or not this user's."""
    with contextlib.ExitStack() as stack:
        ours = []
        for name in names:
            try:
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                fd = os.open(name, flags, dir_fd=folder)
            except OSError:
                continue  # gone by now, or nothing of ours
            stack.callback(os.close, fd)
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                continue
            locked = _lock(fd)
            if locked is None and held is not None:
                held(fd)
            if not locked:
                return
            if status.st_uid == os.geteuid() and status.st_nlink == 1:
                ours.append((name, _identity(status)))
        for name, identity in ours:
            with contextlib.suppress(OSError):
                if _named(folder, name) == identity:
                    os.unlink(name, dir_fd=folder)
