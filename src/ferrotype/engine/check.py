"""Check: prove the checksums that a disk image of other software carries itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from ferrotype.block.file import FileSource
from ferrotype.block.lenient import known_unreadable
from ferrotype.engine.references import IMAGE_SUFFIX, Access, open_disk, parse
from ferrotype.engine.unreadable import as_json
from ferrotype.errors import UsageError
from ferrotype.formats.registry import recognise, recognise_folder
from ferrotype.job import Job

__all__ = ["Checked", "check", "is_foreign"]


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found; ``damaged`` has a sentence for each damage."""

    format: str
    checked_bytes: int
    damaged: tuple[str, ...]
    unreadable: Sequence[tuple[int, int]] = ()  # (start, length) that the image says could not be read

    @property
    def ok(self) -> bool:
        return not self.damaged

    def as_json(self) -> dict[str, object]:
        return {
            "ok": self.ok,
            "format": self.format,
            "checked_bytes": self.checked_bytes,
            "damaged": [{"problem": sentence} for sentence in self.damaged],
            "problems": list(self.damaged),
            "unreadable": as_json(self.unreadable),
        }


def is_foreign(path: Path) -> bool:
    """Whether this is a disk image of other software, by its content."""
    if path.suffix.lower() == IMAGE_SUFFIX:
        return False
    if path.is_dir():
        return recognise_folder(path) is not None
    if not path.is_file():
        return False
    with FileSource(path) as file:
        return recognise(file) not in (None, "ferro")


def check(text: str, access: Access, job: Job) -> Checked:
    """Run the check of an image's own format.  Raises UsageError where that keeps no checksums of its data."""
    counting = _Counting(job)
    with open_disk(text, access, job) as disk:
        if disk.image is None or disk.image.check is None:
            raise UsageError(
                f"{parse(text).path} is a {disk.format} image, which keeps no checksums of its data; "
                "compare it with a backup, or keep what ferrotype checksum prints"
            )
        job.begin(f"checking {disk.reference.text}", disk.source.size)
        damaged = disk.image.check(counting)
        return Checked(disk.format, counting.done, tuple(damaged), known_unreadable(disk.source))


class _Counting:
    """A job that counts the bytes it hears of."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._lock = Lock()
        self.done = 0

    def begin(self, phase: str, total: int | None = None, /) -> None:
        self._job.begin(phase, total)

    def advance(self, count: int, /) -> None:
        with self._lock:
            self.done += count
        self._job.advance(count)

    def warn(self, message: str, /) -> None:
        self._job.warn(message)

    def note(self, message: str, /) -> None:
        self._job.note(message)
