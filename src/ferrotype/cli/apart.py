"""Ending in time though storage does not answer: a second process works where a path leads to a network or FUSE.

    first process     waits; passes signals on; ends as soon as the second says so
    second process    does everything

Linux lets no process end while one of its calls waits for a FUSE server that has taken the request, and none either
while the close of a file waits for it; for some network file systems the same holds.  The second process may stay
behind like that until the storage answers or is unmounted; whoever called the program is told its exit code in time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NoReturn

from ferrotype.cli import exits, output
from ferrotype.errors import DeviceError
from ferrotype.job import leave_signals
from ferrotype.stall import Patience

_AWAY: Final = re.compile(r"fuse|nfs|cifs|smb|9p|virtiofs|ceph|afs|lustre|gfs2|ocfs2|orangefs|coda|ncp")
_NEVER: Final = frozenset({"fusectl", "fuse.lxcfs", "nfsd", "fuse.portal", "fuse.gvfsd-fuse"})
_LINKS: Final = 40  # symbolic links followed in one path, as the kernel does
_PASSED_ON: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_TICK: Final = 0.2  # seconds
_GRACE: Final = 1.0  # seconds between what the second process says and its end, where nothing hangs
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_SI_USER: Final = 0  # asm-generic/siginfo.h: the signal was sent to this process, not typed at its terminal

_to_first: int | None = None  # where the second process says its exit code


def go_apart(words: Sequence[str]) -> None:
    """Where a word leads to storage that may stop answering, return in a second process; the first never returns."""
    global _to_first  # noqa: PLW0603  there is one first process
    if not paths_away(words):
        return
    read_end, write_end = os.pipe()
    output.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*_passed_on(), signal.SIGCHLD))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # who started this program may have had it ignored
    first = os.getpid()
    second = os.fork()
    if second:
        os.close(write_end)
        _wait(second, read_end)
    os.close(read_end)
    import ctypes  # it takes milliseconds, which other runs need not spend

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != first:  # it has ended already
        os._exit(exits.STOPPED)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    _to_first = write_end


def paths_away(words: Sequence[str]) -> list[str]:
    """The paths among the words of a command line that lead to storage which may stop answering; none is touched."""
    mounts = _mounts()
    return [path for word in words for path in _paths(word) if _leads_away(path, mounts)] if mounts else []


def say(code: int) -> None:
    """Tell the first process how it ends, if there is one.

    Whoever reads this program's output is not kept waiting for the end of the second one.
    """
    if _to_first is None:
        return
    output.end()
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nothing, standard)
    os.write(_to_first, bytes([code]))


def watch(paths: Sequence[str], work: Patience, lost: Callable[[DeviceError], int]) -> Callable[[], None]:
    """Ask the storage of the paths for a sign of life from time to time; a function that ends this.

    Where there is none for as long as ``work`` would wait, and nothing else gets on either, the program ends with
    the exit code that ``lost`` returns: some call that nobody watches does not return.
    """
    ended = threading.Event()
    patience = Patience(work.limit)

    def ask(path: str) -> None:
        leave_signals()
        while not ended.wait(_TICK * 5):
            try:
                patience.reach(Path(path))
            except DeviceError as error:
                while not ended.wait(_GRACE):  # who waits for it by itself says more
                    if time.monotonic() - work.heard < work.limit:
                        continue
                    with contextlib.suppress(BlockingIOError):
                        say(lost(error))
                    return
                return

    for path in paths if _to_first is not None and work.limit else ():
        threading.Thread(target=ask, args=(path,), name="ferrotype-watch", daemon=True).start()
    return ended.set


# ---------------------------------------------------------------------- the first process


def _wait(second: int, told: int) -> NoReturn:
    """End as the second process does, or as it says."""
    os.set_blocking(told, False)
    code: int | None = None
    until = 0.0
    asked = 0
    while True:
        number, status = os.waitpid(second, os.WNOHANG)
        if number:
            _end(os.waitstatus_to_exitcode(status))
        if code is None and (code := _said(told)) is not None:
            until = time.monotonic() + _GRACE
        if code is not None and time.monotonic() >= until:
            os._exit(code)
        came = signal.sigtimedwait((*_passed_on(), signal.SIGCHLD), _TICK)
        if came is None or came.si_signo == signal.SIGCHLD:
            continue
        asked += came.si_signo != signal.SIGHUP or not asked  # a closed terminal may send several
        with contextlib.suppress(ProcessLookupError):
            if came.si_code == _SI_USER:  # a terminal sends its signals to both processes itself
                os.kill(second, came.si_signo)
            if asked > 1 and came.si_signo != signal.SIGHUP:
                os.kill(second, signal.SIGKILL)
                os._exit(exits.STOPPED)


def _passed_on() -> tuple[signal.Signals, ...]:
    """The signals that are the second process's: where SIGHUP is ignored, as under nohup, it stays so."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return tuple(number for number in _PASSED_ON if number != signal.SIGHUP or not ignored)


def _said(told: int) -> int | None:
    try:
        data = os.read(told, 1)
    except OSError as error:
        if error.errno != errno.EAGAIN:
            raise
        return None
    return data[0] if data else None


def _end(code: int) -> NoReturn:
    if code < 0:  # a signal: whoever waits for this process should see the same
        signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
        signal.raise_signal(-code)
    os._exit(code)


# ---------------------------------------------------------------------- where paths lead


def _paths(word: str) -> list[str]:
    """The paths that a word of the command line may name: it may be an option with a value, or a reference."""
    value = word.partition("=")[2] if word.startswith("-") else word
    return [path for path in {value, value.partition("::")[0], value.rpartition("#")[0]} if path]


def _mounts() -> dict[str, bool]:
    """Mount points, and whether a call there may wait for another machine or process; empty if there is no such."""
    mounts = {}
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                left, _, right = line.partition(" - ")
                point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), left.split()[4])
                kind = right.split()[0]
                mounts[point] = kind not in _NEVER and _AWAY.match(kind) is not None
    except (OSError, IndexError):
        return {}
    return mounts if any(mounts.values()) else {}


def _leads_away(path: str, mounts: dict[str, bool]) -> bool:
    """Whether a path comes to such a mount; nothing behind the mount point is touched."""
    try:
        parts = os.path.join(os.getcwd(), path).split("/")[::-1]
    except OSError:  # the folder it was started in is gone
        return False
    at = "/"
    links = 0
    while parts:
        part = parts.pop()
        if part in ("", "."):
            continue
        at = os.path.dirname(at) if part == ".." else os.path.join(at, part)
        if mounts.get(at):
            return True
        try:
            target = os.readlink(at)
        except OSError:
            continue
        links += 1
        if links > _LINKS:
            return False
        at = "/" if target.startswith("/") else os.path.dirname(at)
        parts += target.split("/")[::-1]
    return False
