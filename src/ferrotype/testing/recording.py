"""Power cuts without end: a life of an image is run once and recorded, then cut after each of its operations.

    recording = Recording(folder)                        the files that are there when the life begins
    Container.open(path, writable=True, opener=recording.opener)     ... all that is ever done to them
    for cut in power_cuts(recording, seed=1):            every state that a machine may find after its restart
        write_files(cut.files, elsewhere)

Between two syncs a kernel writes pages back in any order, or not at all; so do truncations, holes and new lengths
reach storage, and a name only when its folder was synced.  What a sync has covered is there.
"""

from __future__ import annotations

import enum
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ferrotype.errors import WriteError
from ferrotype.objects import Bytes
from ferrotype.objects.volumes import PosixFile

__all__ = ["Cut", "Files", "Operation", "Recording", "Step", "power_cuts", "read_files", "write_files"]

Files = dict[str, bytes]  # name in the folder -> content

_PAGE: Final = 4096  # bytes: what a kernel writes back as a whole
_SECTOR: Final = 512  # bytes: what a disk writes as a whole
_PATIENCE: Final = 0.01  # seconds a held operation waits for one that may never come


class Step(enum.Enum):
    """What an operation does."""

    WRITE = "write"
    TRUNCATE = "truncate"
    PUNCH = "punch"
    SYNC = "sync"
    CREATE = "create"
    NAME = "name"  # rename what was created to its own name
    REMOVE = "remove"
    SYNC_FOLDER = "sync folder"


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing done to storage."""

    step: Step
    file: int  # number of the file; -1: the folder
    offset: int = 0  # bytes; of a truncation the new size
    data: bytes = b""  # of a write; of a hole the zeros that are read there
    name: str = ""


class Recording:
    """The operations on the files of one folder, in the order in which they took effect.

    ``held`` is the number of one that a second thread does: it waits until the first thread has done another, or
    waits for it.
    """

    def __init__(self, folder: Path, *, held: int = -1) -> None:
        self.before = read_files(folder)
        self.operations: list[Operation] = []
        self.others: set[int] = set()  # numbers of operations that were not done by the thread that made this
        self.numbers = {name: number for number, name in enumerate(sorted(self.before))}
        self._names = dict(self.numbers)  # as they are now
        self._count = len(self._names)
        self._held = held
        self._moved_on = threading.Event()
        self._owner = threading.get_ident()
        self._lock = threading.Lock()

    def opener(self, path: Path, /, *, writable: bool, create: bool = False) -> RecordedFile:
        """An ``Opener`` for a container."""
        file = RecordedFile(self, path, writable=writable, create=create)
        if create:
            name, file.number, self._count = file.hidden_name, self._count, self._count + 1
            self.add(Operation(Step.CREATE, file.number, name=name))
        else:
            file.number = self._names[path.name]
        return file

    def add(self, operation: Operation) -> None:
        """Note what is about to be done, by whichever thread."""
        if threading.get_ident() == self._owner:
            if self._held >= 0 and len(self.operations) >= self._held:
                self._moved_on.set()
        else:
            if len(self.operations) == self._held:
                self._moved_on.wait(_PATIENCE)
            self.others.add(len(self.operations))
        with self._lock:
            self.operations.append(operation)
            if operation.step is Step.NAME:
                self._names[operation.name] = operation.file
            elif operation.step is Step.REMOVE:
                self._names.pop(operation.name, None)


class RecordedFile(PosixFile):
    """A plain file that tells a recording what it does.  Its syncs cost nothing: they are only noted."""

    def __init__(self, recording: Recording, path: Path, *, writable: bool, create: bool) -> None:
        super().__init__(path, writable=writable, create=create)
        self.number = -1
        self._recording = recording

    def write(self, offset: int, parts: Sequence[Bytes], /) -> None:
        data = b"".join(parts)
        self._recording.add(Operation(Step.WRITE, self.number, offset, data))
        super().write(offset, [data])

    def sync(self) -> None:
        self._recording.add(Operation(Step.SYNC, self.number))

    def truncate(self, size: int, /) -> None:
        self._recording.add(Operation(Step.TRUNCATE, self.number, size))
        super().truncate(size)

    def punch(self, offset: int, length: int, /) -> bool:
        self._recording.add(Operation(Step.PUNCH, self.number, offset, bytes(length)))
        return super().punch(offset, length)

    def publish(self, path: Path, /) -> None:
        if self._unpublished is not None:
            self._recording.add(Operation(Step.NAME, self.number, name=path.name))
            self._recording.add(Operation(Step.SYNC_FOLDER, -1))
        super().publish(path)

    def remove(self) -> None:
        self._recording.add(Operation(Step.REMOVE, self.number, name=self.path.name))
        self._recording.add(Operation(Step.SYNC_FOLDER, -1))
        super().remove()


# ---------------------------------------------------------------------- what a cut leaves


@dataclass(frozen=True, slots=True)
class Cut:
    """What a machine finds if the power went at an operation: before it, or in the middle of it."""

    number: int  # operations that had returned
    how: str
    files: Files

    @property
    def words(self) -> str:
        return f"cut at operation {self.number}, {self.how}"


@dataclass(slots=True)
class _File:
    """One file as programs see it, and as it would come back."""

    seen: bytearray = field(default_factory=bytearray)
    kept: bytes = b""
    since: list[Operation] = field(default_factory=list)  # done and not yet synced


@dataclass(frozen=True, slots=True)
class _Luck:
    """What of the unsynced is stored."""

    share: float  # of pages
    unit: int = _PAGE  # bytes that are stored as a whole
    lengths: bool = False  # files have the length that programs saw; what was not stored reads as zeros


_LUCK: Final = (
    _Luck(0.0),
    _Luck(0.0, lengths=True),
    _Luck(0.5),
    _Luck(0.5, _SECTOR),
    _Luck(0.5, lengths=True),
    _Luck(0.85),
    _Luck(0.15),
)


class _Storage:
    """A folder on a disk: what is seen, and what would survive."""

    def __init__(self, before: Mapping[str, bytes], numbers: Mapping[str, int]) -> None:
        self.files = {number: _File(bytearray(before[name]), before[name]) for name, number in numbers.items()}
        self.names = dict(numbers)
        self.kept_names = dict(numbers)

    def do(self, operation: Operation) -> None:
        step = operation.step
        if step is Step.SYNC_FOLDER:
            self.kept_names = dict(self.names)
            return
        if step is Step.CREATE:
            self.files[operation.file] = _File()
            self.names[operation.name] = operation.file
            self.kept_names[operation.name] = operation.file
            return
        file = self.files[operation.file]
        if step is Step.SYNC:
            file.kept, file.since = bytes(file.seen), []
        elif step is Step.NAME:
            self.names = {name: number for name, number in self.names.items() if number != operation.file}
            self.names[operation.name] = operation.file
        elif step is Step.REMOVE:
            del self.names[operation.name]
        else:
            _carry_out(file.seen, operation)
            file.since.append(operation)

    def seen(self) -> Files:
        """Everything that was done, and nothing else."""
        return {name: bytes(self.files[number].seen) for name, number in self.names.items()}

    def torn(self, operation: Operation) -> Iterator[tuple[str, Files]]:
        """Everything before, and a part of one write."""
        for length in _tears(operation):
            files = {name: self.files[number].seen for name, number in self.names.items()}
            for name, number in self.names.items():
                if number == operation.file:
                    files[name] = bytearray(files[name])
                    _lay(files[name], operation.offset, operation.data[:length])
            yield f"torn after {length} of {len(operation.data)} bytes", {n: bytes(f) for n, f in files.items()}

    def survivors(self, rng: random.Random, luck: _Luck, flying: Operation | None) -> Files:
        """What is stored of all that no sync has covered; ``flying`` is being done when the power goes."""
        names = self.names if self.names != self.kept_names and rng.random() < luck.share else self.kept_names
        out = {}
        for name, number in names.items():
            file = self.files[number]
            content = bytearray(file.kept)
            pending = [*file.since, *([flying] if flying is not None and flying.file == number else [])]
            for operation in pending:
                _carry_out_by_chance(content, operation, rng, luck)
            if luck.lengths:
                content[len(file.seen) :] = bytes(max(0, len(file.seen) - len(content)))
            out[name] = bytes(content)
        return out


def power_cuts(recording: Recording, *, seed: int, first: int = 0) -> Iterator[Cut]:
    """All cuts from operation number ``first`` on, several for each, and those behind the last one."""
    storage = _Storage(recording.before, recording.numbers)
    for number, operation in enumerate([*recording.operations, None]):
        if number >= first:
            yield Cut(number, "lost", storage.seen())
            flying = None
            if operation is not None and operation.step in (Step.WRITE, Step.TRUNCATE, Step.PUNCH):
                flying = operation
                if operation.step is Step.WRITE:
                    for how, files in storage.torn(operation):
                        yield Cut(number, how, files)
            for which, luck in enumerate(_LUCK):
                rng = random.Random(f"{seed} {number} {which}")  # noqa: S311  repeatable
                how = f"in a sync, {which}" if operation and operation.step is Step.SYNC else f"reordered, {which}"
                yield Cut(number, how, storage.survivors(rng, luck, flying))
        if operation is not None:
            storage.do(operation)


def _tears(operation: Operation) -> list[int]:
    """Where a write breaks: behind its first byte, in the middle, before the last, at borders of sectors, pages."""
    length = len(operation.data)
    middle = operation.offset + length // 2
    borders = [middle // unit * unit - operation.offset for unit in (_SECTOR, _PAGE)]
    last = (operation.offset + length - 1) // _PAGE * _PAGE - operation.offset
    return sorted({at for at in (1, length // 2, length - 1, last, *borders) if 0 < at < length})


def _carry_out(content: bytearray, operation: Operation) -> None:
    if operation.step is Step.TRUNCATE:
        content[operation.offset :] = bytes(max(0, operation.offset - len(content)))
    elif operation.step is Step.PUNCH:
        inside = operation.data[: max(0, len(content) - operation.offset)]  # a hole makes no file longer
        _lay(content, operation.offset, inside)
    else:
        _lay(content, operation.offset, operation.data)


def _carry_out_by_chance(content: bytearray, operation: Operation, rng: random.Random, luck: _Luck) -> None:
    if operation.step is Step.TRUNCATE:
        if rng.random() < luck.share:
            _carry_out(content, operation)
        return
    data = operation.data
    if operation.step is Step.PUNCH:
        data = data[: max(0, len(content) - operation.offset)]
    for at in range(0, len(data), luck.unit):
        if rng.random() < luck.share:
            _lay(content, operation.offset + at, data[at : at + luck.unit])


def _lay(content: bytearray, offset: int, data: Bytes) -> None:
    if data:
        content.extend(bytes(max(0, offset - len(content))))
        content[offset : offset + len(data)] = data


# ---------------------------------------------------------------------- files


def read_files(folder: Path) -> Files:
    """The content of all files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_files(files: Files, folder: Path) -> None:
    """Make a folder hold these files and no others.  Raises WriteError."""
    try:
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if path.name not in files:
                path.unlink()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise WriteError(f"{folder} cannot be written: {error.strerror}") from error
