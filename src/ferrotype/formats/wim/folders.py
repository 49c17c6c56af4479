"""The folders of one image in a WIM: its metadata resource.

    | security data: length, count, sizes, descriptors | root entry | end | entries of a folder ... | end | ...
    entry: | 102 bytes | name, UTF-16 | short name | to a multiple of 8 | alternate streams ... |

Source: Microsoft, "Windows Imaging File Format (WIM)", section "Metadata Resource" (DIRENTRY, STREAMENTRY).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

from ferrotype.errors import InvalidImage, UsageError
from ferrotype.formats import TreeEntry
from ferrotype.records import Record, record, s32, u16, u32, u64

__all__ = ["Folders"]

MAX_ENTRIES: Final = 1_000_000  # of one folder
MAX_DEPTH: Final = 1000  # folders in each other
_FOLDER, _REPARSE = 0x10, 0x400  # attributes
_EPOCH: Final = datetime(1601, 1, 1, tzinfo=UTC)

Digest = Annotated[bytes, "20s"]


@record(endian="<", size=102)
class DirEntry(Record):
    """DIRENTRY, up to its names."""

    length: u64  # bytes, without the alternate streams
    attributes: u32
    security: s32
    children: u64  # offset of the folder's first entry
    unused1: u64
    unused2: u64
    created: u64
    accessed: u64
    written: u64
    digest: Digest
    unknown: u32
    reparse: u64  # or the group of hard links
    streams: u16
    short_name: u16  # bytes
    name: u16  # bytes


@record(endian="<", size=38)
class StreamEntry(Record):
    """STREAMENTRY, up to its name."""

    length: u64
    unused: u64
    digest: Digest
    name: u16  # bytes


@dataclass(frozen=True, slots=True)
class Found:
    """A file or folder as it stands in the metadata."""

    name: str
    entry: DirEntry
    digest: bytes
    streams: dict[str, bytes]

    def shown(self) -> TreeEntry:
        attributes = self.entry.attributes
        kind = "link" if attributes & _REPARSE else "folder" if attributes & _FOLDER else "file"
        digest = self.digest.hex() if self.digest.strip(b"\0") else ""
        return TreeEntry(self.name, kind, 0, _time(self.entry.written), digest, tuple(sorted(self.streams)))


def _time(ticks: int) -> str | None:
    """100 ns since 1601 as RFC 3339."""
    try:
        return (_EPOCH + timedelta(microseconds=ticks // 10)).isoformat().replace("+00:00", "Z")
    except OverflowError:
        return None


class Folders:
    """Reads folders when they are asked for; a path walks down from the root, so no loop is ever followed."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        length = max(int.from_bytes(data[:4], "little"), 8)
        root = next(self._entries(-(-length // 8) * 8), None)
        if root is None:
            raise InvalidImage("an image has no root folder")
        self._root = root
        self._known: tuple[str, dict[str, Found]] = ("", {})

    def list(self, path: str) -> Iterator[TreeEntry]:
        """What lies in a folder.  Raises UsageError where there is no such folder."""
        found = self._walk(path)
        if not found.entry.attributes & _FOLDER or found.entry.attributes & _REPARSE:
            raise UsageError(f"{path!r} is no folder")
        return (inner.shown() for inner in self._inside(found))

    def walk(self, path: str) -> Iterator[tuple[str, TreeEntry]]:
        """Everything below a folder, each with its path; no folder is ever entered twice."""
        start = self._walk(path)
        entered = {start.entry.children}
        waiting = [(path, self._inside(start))]
        while waiting:
            folder, entries = waiting[-1]
            found = next(entries, None)
            if found is None:
                waiting.pop()
                continue
            below = f"{folder}/{found.name}" if folder else found.name
            yield below, found.shown()
            children = found.entry.children
            if not children or not found.entry.attributes & _FOLDER:
                continue
            if children in entered or len(waiting) > MAX_DEPTH:
                raise InvalidImage(f"the folder {below!r} is part of another one", offset=children)
            entered.add(children)
            waiting.append((below, self._inside(found)))

    def digest(self, path: str) -> bytes:
        """SHA-1 of what a file, or an alternate stream of one, holds; all 0 where it is empty.  Raises UsageError."""
        try:
            found, stream = self._walk(path), ""
        except UsageError:
            path, colon, stream = path.rpartition(":")
            if not colon or "/" in stream:
                raise
            found = self._walk(path)
        if stream:
            if stream not in found.streams:
                raise UsageError(f"{path!r} has no stream {stream!r}")
            return found.streams[stream]
        if found.entry.attributes & _FOLDER and not found.entry.attributes & _REPARSE:
            raise UsageError(f"{path!r} is a folder")
        return found.digest

    def _walk(self, path: str) -> Found:
        found = self._root
        parent, _, last = path.rpartition("/")
        if path and self._known[0] == parent and self._known[1]:
            names = self._known[1]  # of the folder that was asked last: files are read one after the other
        else:
            for name in parent.split("/") if parent else ():
                inner = next((one for one in self._inside(found) if one.name == name), None)
                if inner is None:
                    raise UsageError(f"there is no {path!r} in the image")
                found = inner
            if not path:
                return found
            names = {one.name: one for one in self._inside(found)}
            self._known = (parent, names)
        if last not in names:
            raise UsageError(f"there is no {path!r} in the image")
        return names[last]

    def _inside(self, folder: Found) -> Iterator[Found]:
        at = folder.entry.children
        return self._entries(at) if at and folder.entry.attributes & _FOLDER else iter(())

    def _entries(self, at: int) -> Iterator[Found]:
        """The entries of a folder from its first one on, up to the one without a length."""
        for _ in range(MAX_ENTRIES):
            if int.from_bytes(self._data[at : at + 8], "little") <= 8:
                if at + 8 > len(self._data):
                    raise InvalidImage("a folder goes beyond its metadata", offset=at)
                return
            entry = DirEntry.unpack(self._data, at)
            name = self._text(at + DirEntry.SIZE, entry.name, at + entry.length)
            if "/" in name or "\0" in name or name in (".", ".."):
                raise InvalidImage(f"an entry is called {name!r}", offset=at)
            digest, streams = entry.digest, {}
            here, at = at, at + -(-entry.length // 8) * 8
            for _ in range(entry.streams):
                stream = StreamEntry.unpack(self._data, at)
                label = self._text(at + StreamEntry.SIZE, stream.name, at + stream.length)
                if label:
                    streams[label] = stream.digest
                elif not digest.strip(b"\0"):
                    digest = stream.digest  # what the file holds, where the entry itself does not say
                at += max(-(-stream.length // 8) * 8, 8)
            if at <= here:
                raise InvalidImage("an entry has no length", offset=here)
            yield Found(name, entry, digest, streams)
        raise InvalidImage(f"a folder has more than {MAX_ENTRIES} entries", offset=at)

    def _text(self, at: int, length: int, end: int) -> str:
        if length % 2 or at + length > min(end, len(self._data)):
            raise InvalidImage("a name goes beyond its entry", offset=at, field="name")
        return self._data[at : at + length].decode("utf-16-le", "surrogatepass")
