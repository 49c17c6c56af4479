"""Verifying in turns: a share of the packs each run, until every one was checked; then the next round begins.

What was checked in the round stands in a small file of the machine that verifies, never in the image:

    {"version": 1, "image": id, "since": time, "share": 0.3, "checked": marks, "damaged": marks}     JSON

A *mark* is eight bytes made of a pack's name; marks stand one behind the other, as base64.  A file that is damaged,
belongs to another image, or makes no sense begins a new round: at worst something is checked twice.
"""

from __future__ import annotations

import contextlib
import math
import os
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Final

import msgspec

from ferrotype.errors import FerrotypeError
from ferrotype.fresh import Fresh
from ferrotype.job import Job
from ferrotype.units import MiB

__all__ = ["Progress", "Round", "begin_or_resume", "replace_file", "state_file"]

_MARK: Final = 8  # bytes; two of a million packs share one with a probability of 1 in 40 million
_MAX_FILE: Final = 128 * MiB  # six million packs


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a round has come: of ``bytes`` in packs, ``proven_bytes`` were found whole at or after ``since``."""

    since: datetime
    proven_bytes: int
    bytes: int
    packs: int
    proven_packs: int
    complete: bool  # every pack was checked; the next run begins a new round

    @property
    def share(self) -> float:
        """Of the stored bytes, from 0 to 1."""
        return self.proven_bytes / self.bytes if self.bytes else 1.0


class _Stored(msgspec.Struct, frozen=True, kw_only=True):
    """The file."""

    version: int
    image: str
    since: Annotated[datetime, msgspec.Meta(tz=True)]
    share: float
    checked: str
    damaged: str = ""


@dataclass(slots=True)
class Round:
    """What has been checked since ``since``, by marks."""

    image: str
    since: datetime
    share: float = 0.0  # of a whole walk, as the runs asked for it; 1: the round is over
    checked: set[bytes] = field(default_factory=set)
    damaged: set[bytes] = field(default_factory=set)  # checked, and not whole: looked at in every run

    def choose(self, names: Sequence[str], share: float) -> list[str]:
        """The packs of this run: the next ones in the order of ``names``, and those that were found damaged.

        A share is of the whole image: ten runs of 0.1 reach every pack.  At least one is chosen where any is left.
        """
        left = [name for name in names if _mark(name) not in self.checked]
        part = min(1.0, share / (1 - self.share)) if share < 1 else 1.0
        count = math.ceil(round(len(left) * part, 6))
        again = [name for name in names if _mark(name) in self.damaged]
        return sorted({*left[:count], *again})

    def note(self, name: str, *, good: bool) -> None:
        """A pack was checked."""
        mark = _mark(name)
        self.checked.add(mark)
        (self.damaged.discard if good else self.damaged.add)(mark)

    def settle(self, file: Path, sizes: Mapping[str, int], share: float, chosen: Sequence[str], job: Job) -> Progress:
        """Write down where the round stands, given the packs there are now; a warning where that fails."""
        marks = {name: _mark(name) for name in sizes}
        self.checked &= set(marks.values())
        self.damaged &= self.checked
        done = sum(_mark(name) in self.checked for name in chosen) / len(chosen) if chosen else 1.0
        complete = all(mark in self.checked for mark in marks.values())
        self.share = 1.0 if complete else min(self.share + share * done, 1 - 1e-9)
        proven = [name for name, mark in marks.items() if mark in self.checked and mark not in self.damaged]
        self._save(file, job)
        proven_bytes = sum(sizes[name] for name in proven)
        return Progress(self.since, proven_bytes, sum(sizes.values()), len(sizes), len(proven), complete)

    def _save(self, file: Path, job: Job) -> None:
        stored = _Stored(
            version=1,
            image=self.image,
            since=self.since,
            share=self.share,
            checked=_joined(self.checked),
            damaged=_joined(self.damaged),
        )
        try:
            replace_file(file, msgspec.json.encode(stored))
        except (OSError, FerrotypeError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            job.warn(f"{file}: what was checked cannot be kept for the next run: {why}")


def state_file(folder: Path, image_id: str, image: Path, *, deep: bool) -> Path:
    """Where the rounds over one image are kept: copies of it, and deep rounds, have their own."""
    where = blake2b(f"{image_id}\0{image.absolute().resolve()}".encode(errors="surrogateescape"), digest_size=16)
    return folder / "verify" / f"{where.hexdigest()}{'-deep' if deep else ''}.json"


def begin_or_resume(file: Path, image_id: str, now: datetime, job: Job) -> Round:
    """The round that the file tells of, or a new one."""
    fresh = Round(image_id, now)
    try:
        with file.open("rb") as opened:
            data = opened.read(_MAX_FILE + 1)
    except FileNotFoundError:
        return fresh
    except OSError as error:
        job.warn(f"{file}: what was checked before cannot be read: {error.strerror}; a new round begins")
        return fresh
    found = _resumed(data, image_id, now)
    if found is None:
        job.note(f"{file} makes no sense; a new round begins")
        return fresh
    return found if found.share < 1 else fresh


def _resumed(data: bytes, image_id: str, now: datetime) -> Round | None:
    try:
        if len(data) > _MAX_FILE:
            return None
        stored = msgspec.json.decode(data, type=_Stored)
        checked, damaged = _split(stored.checked), _split(stored.damaged)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    if stored.version != 1 or stored.image != image_id or stored.since > now or not 0 <= stored.share <= 1:
        return None
    return Round(image_id, stored.since, stored.share, checked, damaged & checked)


def _mark(name: str) -> bytes:
    return blake2b(name.encode(errors="surrogateescape"), digest_size=_MARK).digest()


def _joined(marks: Iterable[bytes]) -> str:
    return b64encode(b"".join(sorted(marks))).decode("ascii")


def _split(text: str) -> set[bytes]:
    """Raises ValueError."""
    raw = b64decode(text, validate=True)
    if len(raw) % _MARK:
        raise ValueError("marks are cut short")
    return {raw[at : at + _MARK] for at in range(0, len(raw), _MARK)}


def replace_file(file: Path, data: bytes) -> None:
    """The file has the new content, or the old one; never a part of either."""
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = Fresh.make(file, mode=0o600, kind="new")
    try:
        with os.fdopen(fresh.fd, "wb") as opened:
            opened.write(data)
            opened.flush()
            os.fsync(opened.fileno())
            fresh.publish(replace=True)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.remove()
        raise
