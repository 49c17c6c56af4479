"""The files that one disk image stands in, beside its first and numbered: any number of them, a few open at a time.

disk.E01  disk.E02  disk.E03 ...        segments of an EWF image
disk.raw.001  disk.raw.002 ...          parts of a raw disk
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Final

from ferrotype.block import Source, Traits
from ferrotype.errors import InvalidImage
from ferrotype.extents import ExtentMap
from ferrotype.formats.related import Related

__all__ = ["Numbered", "NumberedSource"]

_OPEN: Final = 64  # files held open at once; an image may have thousands


class Numbered:
    """The files of one image, numbered from 0 as they were added, opened when they are read.  For many threads."""

    def __init__(self, first: Source, related: Related) -> None:
        """``first`` stays the caller's until ``close``, which closes it as well."""
        self._related = related
        self.names = [related.path.name if related.path is not None else "the first file"]
        self.sizes = [first.size]  # bytes
        self._first = first
        self._open: OrderedDict[int, _Opened] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self.names)

    def add(self, name: str, what: str) -> Source | None:
        """Open the next file, which has this name, beside the first; it stays the set's.  None: it is not there."""
        source = self._related.sibling(name, what)
        if source is None:
            return None
        with self._lock:
            self._open[len(self.names)] = _Opened(source)
            self.names.append(name)
            self.sizes.append(source.size)
        self._shut_some()
        return source

    @contextmanager
    def using(self, number: int) -> Iterator[Source]:
        """A file, open for the block.  Raises InvalidImage where it was changed since it was added."""
        if number == 0:
            yield self._first
            return
        with self._lock:
            opened = self._open.get(number)
            if opened is not None:
                opened.users += 1
                self._open.move_to_end(number)
        if opened is None:
            opened = self._reopen(number)
        try:
            yield opened.source
        finally:
            with self._lock:
                opened.users -= 1

    def _reopen(self, number: int) -> _Opened:
        source = self._related.sibling(self.names[number], "next file")
        if source is None or source.size != self.sizes[number]:
            if source is not None:
                source.close()
            raise InvalidImage(f"{self.names[number]} was removed or changed while the image was open")
        with self._lock:
            found = self._open.get(number)  # another thread may have been faster
            opened = found or self._open.setdefault(number, _Opened(source))
            opened.users += 1
        if found is not None:
            source.close()
        self._shut_some()
        return opened

    def _shut_some(self) -> None:
        with self._lock:
            oldest = list(self._open.items())[: max(0, len(self._open) - _OPEN)]
            idle = [self._open.pop(number) for number, opened in oldest if not opened.users]
        for opened in idle:
            opened.source.close()

    def close_rest(self) -> None:
        """Close all but the first."""
        with ExitStack() as stack, self._lock:
            while self._open:
                stack.callback(self._open.popitem()[1].source.close)

    def close(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._first.close)
            self.close_rest()


class _Opened:
    """A file that is open, and how many are reading from it."""

    __slots__ = ("source", "users")

    def __init__(self, source: Source) -> None:
        self.source = source
        self.users = 0


class NumberedSource:
    """One of the files, as a source that is open only while it is read.  Closing it closes nothing."""

    def __init__(self, files: Numbered, number: int, traits: Traits) -> None:
        self._files, self._number = files, number
        self.traits = traits

    @property
    def size(self) -> int:
        return self._files.sizes[self._number]

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        with self._files.using(self._number) as file:
            file.read_into(offset, buf)

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        with self._files.using(self._number) as file:
            return file.extents(offset, length)

    def close(self) -> None:
        pass
