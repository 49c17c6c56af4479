"""Files that somebody split into parts: which parts there are, and all of them as one file.

    img.001  img.002 ...   img.000 ...   img.0001   img.01      numbered from 1 or 0
    img.aa   img.ab ...    img.yz  img.zaaa                     as split(1) names them
    disk.raw1  disk.raw2 ...                                    numbered behind the suffix of a raw disk

Any part stands for all.  What was split may be a raw disk or any container.  A part that is not there is an error:
without it all that lies behind is in the wrong place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ferrotype.block import Source, Traits
from ferrotype.block.views import Concat, Part
from ferrotype.errors import InvalidImage
from ferrotype.extents import ExtentMap
from ferrotype.formats.numbered import Numbered, NumberedSource
from ferrotype.formats.related import Related

__all__ = ["MAX_PARTS", "SplitFile", "joined", "name_of_whole"]

MAX_PARTS: Final = 10_000  # files of one disk
_DIGITS, _LETTERS = "0123456789", "abcdefghijklmnopqrstuvwxyz"
_NAMES: Final = (
    (re.compile(r"(.*\.)([0-9]{1,6})", re.DOTALL), True),
    (re.compile(r"(.*\.)([a-z]{2,8})", re.DOTALL), True),
    (re.compile(r"(.*\.(?:raw|img|dd|iso|bin))([0-9]{1,5})", re.DOTALL | re.IGNORECASE), False),
)
_OTHER_ENDS: Final = frozenset(("bz", "dd", "gz", "lz", "md", "xz"))  # letters that are no part's
_LOOKED_AHEAD: Final = 26  # letters: parts behind the last one that would tell of a hole


class SplitFile:
    """The parts of a file, one behind the other.  ``parts`` and ``extents`` as those of ``Concat``."""

    def __init__(self, files: Numbered, order: list[int], first: Source, warnings: tuple[str, ...]) -> None:
        self._files, self._first = files, first
        self.warnings = warnings
        self.count = len(order)
        self._whole = Concat([first if n == 0 else NumberedSource(files, n, Traits()) for n in order])
        self.traits = self._whole.traits

    @property
    def size(self) -> int:
        return self._whole.size

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        self._whole.read_into(offset, buf)

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return self._whole.extents(offset, length)

    def parts(self, offset: int, length: int) -> Iterator[Part]:
        return self._whole.parts(offset, length)

    def close_rest(self) -> None:
        """Close all but the part that it was made of."""
        self._files.close_rest()

    def close(self) -> None:
        self._files.close()


@dataclass(frozen=True, slots=True)
class _Name:
    """The name of a part."""

    head: str
    end: str  # what tells the parts apart
    dotted: bool

    @property
    def first(self) -> bool:
        """Whether the parts may begin with this one."""
        return self.end.strip("0") in ("", "1") if self.end.isdigit() else not self.end.strip("a")

    @property
    def padded(self) -> bool:
        return self.end.isdigit() and self.end[0] == "0" and len(self.end) > 1

    @property
    def weak(self) -> bool:
        """Whether files that are no parts are often called so: disk.1 and disk.2, disk.img1 and disk.img2."""
        return not self.dotted or (self.end.isdigit() and len(self.end) == 1)


def _named(name: str) -> _Name | None:
    for pattern, dotted in _NAMES:
        if found := pattern.fullmatch(name):
            return _Name(found[1], found[2], dotted)
    return None


def name_of_whole(path: Path) -> Path:
    """What the whole of a part was called, as far as that shows; the path itself where it names no part."""
    found = _named(path.name)
    if found is None or not found.end.isdigit():
        return path
    return path.with_name(found.head.rstrip(".") or path.name)


# ---------------------------------------------------------------------- the order of names


def _after(end: str) -> list[str]:
    """What the next part may be called."""
    if end.isdigit():
        return [str(int(end) + 1).zfill(len(end)), *_widened(end, _DIGITS)]
    rest = end.rstrip("z")
    grown = [rest[:-1] + chr(ord(rest[-1]) + 1) + "a" * (len(end) - len(rest))] if rest else []
    return [*grown, *_widened(end, _LETTERS)]


def _before(end: str) -> list[str]:
    """What the part before may be called."""
    narrow = _narrowed(end, _DIGITS if end.isdigit() else _LETTERS)
    if end.isdigit():
        number = int(end) - 1
        plain = [] if number < 0 else list(dict.fromkeys((str(number).zfill(len(end)), str(number))))
        return [one for one in plain if one[0] != "0" or len(one) == len(end)] + narrow
    rest = end.rstrip("a")
    return ([rest[:-1] + chr(ord(rest[-1]) - 1) + "z" * (len(end) - len(rest))] if rest else []) + narrow


def _widened(end: str, letters: str) -> list[str]:
    """yz, zaaa; zyzz, zzaaaa: how split(1) goes on where it was told no width."""
    low, late, high = letters[0], letters[-2], letters[-1]
    level = len(end) // 2 - 1
    return [high * (level + 1) + low * (level + 3)] if end == high * level + late + high * (level + 1) else []


def _narrowed(end: str, letters: str) -> list[str]:
    low, late, high = letters[0], letters[-2], letters[-1]
    level = len(end) // 2 - 1
    return [high * (level - 1) + late + high * level] if level > 0 and end == high * level + low * (level + 2) else []


# ---------------------------------------------------------------------- finding the parts


def joined(file: Source, related: Related) -> Source:
    """All parts of what ``file`` is one of, which own it from then on; itself where it stands alone.

    Raises InvalidImage where parts are missing.
    """
    own = _named(related.path.name) if related.path is not None else None
    if own is None or isinstance(file, SplitFile):
        return file
    ends = _ends(own, related)
    if not _belong(own, ends, related):
        return file
    files = Numbered(file, related)
    try:
        order = []
        for end in ends:
            if end != own.end:
                files.add(own.head + end, "next part")
            order.append(0 if end == own.end else len(files) - 1)
        if len(order) > 1 and _apart(file, files):
            files.close_rest()
            return file
        if own.weak and not _even(files, order):
            files.close_rest()
            doubt = f"{files.names[1]} beside it is of another size, and so was not taken for a part of the same disk"
            return SplitFile(files, [0], file, (doubt,))
        return SplitFile(files, order, file, _doubts(files, order))
    except BaseException:
        files.close_rest()
        raise


def _ends(own: _Name, related: Related) -> list[str]:
    """The ends of the names of the parts that follow each other without a hole, this one among them."""

    def walk(step: Callable[[str], list[str]]) -> Iterator[str]:
        end = own.end
        for _ in range(MAX_PARTS):
            found = next((one for one in step(end) if related.is_beside(own.head + one)), None)
            if found is None:
                return
            yield found
            end = found

    return [*list(walk(_before))[::-1], own.end, *walk(_after)]


def _belong(own: _Name, ends: list[str], related: Related) -> bool:
    """Whether the file is a part.  Raises InvalidImage where it is, and others are missing."""
    lowest = _Name(own.head, ends[0], own.dotted)
    numbers = own.end.isdigit()
    if lowest.first:
        if len(ends) >= MAX_PARTS:
            raise InvalidImage(f"a file in {MAX_PARTS} parts or more is not read")
        if not own.weak and (beyond := _beyond(own, ends[-1], related)):
            raise _missing(own, _after(ends[-1])[0], beyond)
        return len(ends) > 1 or numbers
    if numbers:
        later = lowest.padded or (own.dotted and len(own.end) == 3 and len(ends) > 1)
    else:
        start = related.is_beside(own.head + "a" * len(own.end))
        later = own.end not in _OTHER_ENDS and (start or (own.end[0] == "a" and len(ends) > 1))
    if later:
        raise _missing(own, _before(ends[0])[0])
    return False  # backup.2026, disk.raw2, disk.dd


def _missing(own: _Name, end: str, seen: str | None = None) -> InvalidImage:
    why = f"{own.head}{seen} stands beside it" if seen else f"{own.head}{own.end} is called like a later one"
    return InvalidImage(
        f"part {own.head}{end} of a split file is missing, and {why}: bring all parts together, or give a file that "
        "is no part another name"
    )


def _beyond(own: _Name, last: str, related: Related) -> str | None:
    """The end of a part behind a hole."""
    if not own.end.isdigit():
        end = last
        for _ in range(_LOOKED_AHEAD):
            following = _after(end)
            if not following:
                return None
            end = following[0]
            if end not in _OTHER_ENDS and related.is_beside(own.head + end):
                return end
        return None
    for name in related.beside():
        end = name.removeprefix(own.head)
        if name.startswith(own.head) and len(end) == len(last) and end.isascii() and end.isdigit() and end > last:
            return end
    return None


def _apart(file: Source, files: Numbered) -> bool:
    """Whether the parts are images of their own, such as older ones of a disk."""
    from ferrotype.formats.registry import recognise

    return recognise(file) is not None and recognise(NumberedSource(files, 1, Traits())) is not None


def _even(files: Numbered, order: list[int]) -> bool:
    sizes = [files.sizes[n] for n in order]
    return set(sizes[:-1]) <= {sizes[0]} and sizes[-1] <= sizes[0]


def _doubts(files: Numbered, order: list[int]) -> tuple[str, ...]:
    """What speaks for parts that were cut short."""
    if len(order) == 1:
        return ()
    first, last = order[0], order[-1]
    odd = next((n for n in order[1:-1] if files.sizes[n] != files.sizes[first]), None)
    if odd is not None:
        sizes = f"{files.names[odd]} has {files.sizes[odd]} bytes and {files.names[first]} {files.sizes[first]}"
        return (f"the parts differ in size, {sizes}: if one is cut short, all behind it is in the wrong place",)
    if files.sizes[last] > files.sizes[first]:
        return (f"the last part, {files.names[last]}, is larger than the others: one of them may be cut short",)
    if not files.sizes[last]:
        return (f"the last part, {files.names[last]}, is empty: the end of the disk may be missing",)
    return ()
