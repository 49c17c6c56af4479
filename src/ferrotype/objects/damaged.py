"""The volumes that are left of a damaged container: which files they are, and what of them can be read.

    laptop.ferro, .001, .002 ...   any may be missing, any may be the one that is named
    bytes                          zeros where the medium does not give them; which those are is kept

Files are opened for reading only, and no lock is taken.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ferrotype.errors import DeviceError, FormatError, UsageError
from ferrotype.objects.layout import BLOCK, VolumeHeader
from ferrotype.objects.volumes import Opener, VolumeFile, volume_path

_NUMBERED: Final = re.compile(r"(.+)\.(\d{3,})")


def volumes_of(path: Path) -> tuple[Path, dict[int, Path]]:
    """The name of volume 0, and the files by number: any may be missing, and ``path`` may be any of them.

    Raises UsageError where there is none.
    """
    for base in _bases(path):
        found = {0: base} if base.is_file() else {}
        for other in base.parent.glob(f"{_quoted(base.name)}.*") if base.parent.is_dir() else ():
            match = _NUMBERED.fullmatch(other.name)
            if match and match[1] == base.name and int(match[2]) and other.is_file():
                found[int(match[2])] = other
        if path in found.values() or (found and path == base):
            return base, dict(sorted(found.items()))
    raise UsageError(f"{path} does not exist")


def _bases(path: Path) -> Iterator[Path]:
    """What volume 0 may be called: something else than ``path`` only where that says so, or cannot say anything."""
    match = _NUMBERED.fullmatch(path.name)
    if match and int(match[2]) and path.is_file() and _number(path) not in (0, None):
        yield path.with_name(match[1])
    elif match and int(match[2]) and path.is_file() and _number(path) is None:
        base = path.with_name(match[1])
        if any(volume_path(base, number).exists() for number in range(int(match[2]) + 2) if number != int(match[2])):
            yield base
    yield path


def _number(path: Path) -> int | None:
    """What a volume's own header says; None where it is damaged."""
    try:
        with path.open("rb") as file:
            return VolumeHeader.read(file.read(BLOCK).ljust(BLOCK, b"\0")).volume
    except (OSError, FormatError):
        return None


def _quoted(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


class DamagedVolume:
    """One file, in which what cannot be read is zeros."""

    def __init__(self, path: Path, opener: Opener) -> None:
        self.path = path
        self.file: VolumeFile = opener(path, writable=False)
        self.size = self.file.size()
        self.bad: list[tuple[int, int]] = []  # start, end; ascending

    @property
    def stored(self) -> int:
        """Bytes of storage it takes up: what it says about more is a hole.  Its size where that is not known."""
        return self.file.allocated() or self.size

    def read(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self.size)
        if offset < 0 or end <= offset:
            return b""
        if not self.bad:
            try:
                return self.file.read(offset, end - offset)
            except DeviceError:
                pass
        out = bytearray(end - offset)
        pieces = [(offset, end)]
        while pieces:
            low, high = pieces.pop()
            if bad := self._known_bad(low, high):
                pieces += [(a, b) for a, b in ((bad[1], high), (low, bad[0])) if a < b]
                continue
            try:
                data = self.file.read(low, high - low)
                out[low - offset : low - offset + len(data)] = data
            except DeviceError:
                first, behind = low // BLOCK, -(-high // BLOCK)  # sectors never reach across a block's edge
                if behind - first == 1:
                    bisect.insort(self.bad, (first * BLOCK, min(behind * BLOCK, self.size)))
                    continue
                middle = (first + behind) // 2 * BLOCK
                pieces += [(middle, high), (low, middle)]
        return bytes(out)

    def _known_bad(self, low: int, high: int) -> tuple[int, int] | None:
        at = max(bisect.bisect_right(self.bad, (low, low)) - 1, 0)
        return next(((a, b) for a, b in self.bad[at : at + 2] if a < high and b > low), None)
