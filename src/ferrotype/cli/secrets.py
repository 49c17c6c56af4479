"""Where secrets are read from: files, pipes and commands, none of which is read beyond what a secret can be.

A file is opened without waiting.  A pipe is one, too (``--password-file <(pass laptop)``): who writes to it is waited
for as long as storage is.
"""

from __future__ import annotations

import contextlib
import os
import select
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ferrotype.errors import KeyRefused
from ferrotype.stall import Patience
from ferrotype.trouble import why

LARGEST: Final = 1 << 20  # bytes of a key file, or of a passphrase
_PIECE: Final = 1 << 16
_TICK: Final = 0.2  # seconds between two looks whether the user has stopped it

End = Callable[[bytes], bool]  # whether what was read is all that is wanted


def key_file(path: Path, patience: Patience) -> bytes:
    """All of a file.  Raises KeyRefused."""
    return _content(path, patience, lambda _: False, "larger than a key file can be (1 MiB)")


def password_file(path: Path, patience: Patience) -> bytes:
    """The first line of a file; what follows is not read.  Raises KeyRefused."""
    found = _content(
        path, patience, lambda piece: b"\n" in piece, "no passphrase: its first line has more than 1 MiB"
    )
    return _first_line(found)


def password_command(command: str) -> bytes:
    """The first line of what a command prints; it may ask somebody, and take its time.  Raises KeyRefused."""
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE) as process:  # noqa: S602  the user's own
        said = process.stdout.read(LARGEST + 1) if process.stdout is not None else b""
        if len(said) > LARGEST:
            process.kill()
            raise KeyRefused("the password command prints more than a passphrase can have (1 MiB)")
    if process.returncode:
        raise KeyRefused(f"the password command ended with code {process.returncode}")
    return _first_line(said)


def _first_line(data: bytes) -> bytes:
    return data.split(b"\n", 1)[0].removesuffix(b"\r")


def _content(path: Path, patience: Patience, is_all: End, too_large: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise KeyRefused(f"{path} cannot be read: {why(error) if isinstance(error, OSError) else error}") from error
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            raise KeyRefused(f"{path} is a folder; name a file that holds the secret")
        if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise KeyRefused(f"{path} is a device; name a file that holds the secret")
        found = bytearray()
        while piece := _next(fd, path, patience, stat.S_ISREG(mode)):
            found += piece
            if is_all(piece):
                break
            if len(found) > LARGEST:
                raise KeyRefused(f"{path} is {too_large}")
        if len(_first_line(bytes(found)) if is_all(b"\n") else found) > LARGEST:
            raise KeyRefused(f"{path} is {too_large}")
        return bytes(found)
    except OSError as error:
        raise KeyRefused(f"{path} cannot be read: {why(error)}") from error
    finally:
        os.close(fd)


def _next(fd: int, path: Path, patience: Patience, regular: bool) -> bytes:
    """What comes next; nothing at the end.  Raises KeyRefused where nobody writes to a pipe."""
    began = time.monotonic()
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while True:
        if regular or poll.poll(1000 * _TICK):
            with contextlib.suppress(BlockingIOError):
                return os.read(fd, _PIECE)
        waited = time.monotonic() - began
        patience.waiting(path, waited)
        if patience.limit and waited > patience.limit:
            raise KeyRefused(f"nothing was written to {path} for {patience.limit:g} s; it is a pipe, and not a file")
