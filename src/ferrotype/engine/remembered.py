"""What this machine remembers of images, outside of them: so it can say that one was replaced, or went back in time.

    FOLDER/images/HASH.json     {"version": 1, "path", "seen": [{"image", "container", "catalog", "snapshot", ...}]}

There is a file for each place where an image was seen, with the last few images that stood there: disks are put in
by turns.  An image that is opened goes on from one of them where it has the same id, and its newest catalog is not
older than the one that was seen; the numbers of catalogs only ascend, whoever writes to the image, forgets or prunes.
A copy of the image in its place counts its own catalogs; there the snapshot that was seen has to be there.

What is read here only ever makes a warning, and a folder that cannot be written changes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Final

import msgspec

from ferrotype.engine.turns import replace_file
from ferrotype.errors import FerrotypeError
from ferrotype.objects.container import Container
from ferrotype.repository.store import Repository
from ferrotype.units import KiB

_VERSION: Final = 1
_IMAGES: Final = 8  # that are remembered for one place
_PLACES: Final = 1000  # files; those that were written longest ago go
_MAX_FILE: Final = 64 * KiB
_LONGEST: Final = 200  # characters of a snapshot's name


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """An image as it was left."""

    image: str  # the id in its configuration
    container: str  # the id of the file, which a copy made by `ferrotype copy` does not have
    catalog: int  # sequence number of the newest one
    snapshot: str = ""  # id of the newest one; empty where there was none
    name: str = ""
    when: Annotated[datetime, msgspec.Meta(tz=True)]

    @property
    def title(self) -> str:
        """What a message calls it."""
        newest = f"its newest snapshot was {self.snapshot[:8]} ({self.name})" if self.snapshot else "it was empty"
        return f"on {_local(self.when)} {newest}"


class _File(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    path: str
    seen: tuple[Seen, ...]  # the last one to be seen is the last one here


@dataclass(slots=True)
class Memory:
    """Where things are remembered, and who is told of what does not fit."""

    folder: Path
    warn: Callable[[str], None]

    def before(self, image: Path) -> Place:
        """What is remembered of this place; to be asked for before the image is opened, which others may write to."""
        path = str(image.absolute().resolve())
        name = blake2b(path.encode(errors="surrogateescape"), digest_size=16).hexdigest()
        file = self.folder / "images" / f"{name}.json"
        return Place(self, image, path, file, _read(file))


@dataclass(slots=True)
class Place:
    """A place where an image stands, and those that stood there before."""

    memory: Memory
    image: Path
    path: str
    file: Path
    seen: tuple[Seen, ...]
    _told: bool = False
    _state: tuple[Seen | None, frozenset[str]] | None = None  # as it was when it was opened

    def made(self) -> None:
        """There is no image any more, and a new one is being made."""
        if self.seen:
            last = self.seen[-1]
            self._tell(
                f"{self.image} was not there, and a new image was made: {last.title}, in the image {last.image[:8]}; "
                f"if you did not remove that one, look whether its disk is mounted"
            )

    def opened(self, repository: Repository, *, writable: bool) -> None:
        """Say whether the image that was opened does not go on from what was seen."""
        with contextlib.suppress(FerrotypeError, OSError):  # the verb says so, if it needs them
            self._state = _now(repository, ahead=not writable)
        now, known = self._state or (None, frozenset[str]())
        if now is None or not self.seen or _continued(self.seen, now, known):
            return
        same = [one for one in self.seen if one.image == now.image]
        if not same:
            last = self.seen[-1]
            self._tell(
                f"{self.image} was replaced by another image, {now.image[:8]}: {last.title}, in the image "
                f"{last.image[:8]}; if you did not put it there, look for the other one ({self._until})"
            )
            return
        last = same[-1]
        gone = ", which it does not hold now" if last.snapshot and last.snapshot not in known else ""
        self._tell(
            f"{self.image} went back in time: {last.title}{gone}, and now it is an older state; if you did not put "
            f"an old copy there, look for the newer one, and keep both ({self._until})"
        )

    def lacks(self, image: str, container: str, found: Collection[str]) -> str:
        """Of a damaged image: what to say where the newest snapshot that was seen of it is not ``found``; else ""."""
        last = next((one for one in reversed(self.seen) if (one.image, one.container) == (image, container)), None)
        if last is None or not last.snapshot or last.snapshot in found:
            return ""
        return (
            f"{self.image}: {last.title}, of which nothing is found: if nobody forgot it, it is lost, and so may be "
            "others of that time"
        )

    def left(self, repository: Repository, *, written: bool) -> None:
        """Remember the image as it is now; one that did not fit only where it was written to."""
        if self._told and not written:
            return
        with contextlib.suppress(FerrotypeError, OSError, ValueError):
            now, known = self._state if self._state and not written else _now(repository)
            others = _read(self.file)
            if now is None or (not written and others != self.seen):  # another run was here meanwhile, and knows more
                return
            passed = [] if self._told else _continued(others, now, known)
            if any(_same_state(one, now) for one in passed[-1:]) and others[-1] in passed:
                return
            kept = [one for one in others if one not in passed][-(_IMAGES - 1) :]
            fresh = _File(version=_VERSION, path=_text(self.path), seen=(*kept, now))
            replace_file(self.file, msgspec.json.encode(fresh))
            _drop_oldest(self.file.parent)

    @property
    def _until(self) -> str:
        return f"this is said until something is written to it, or {self.file} is removed"

    def _tell(self, sentence: str) -> None:
        self._told = True
        self.memory.warn(sentence)


def _now(repository: Repository, *, ahead: bool = False) -> tuple[Seen | None, frozenset[str]]:
    """The image as it is, and the ids of its snapshots; None for what is kept in memory only."""
    store = repository.store
    if not isinstance(store, Container):
        return None, frozenset()
    container, catalog = store.state
    known = repository.snapshots_ahead() if ahead else repository.snapshots()
    seen = Seen(
        image=repository.config.id,
        container=container,
        catalog=catalog,
        snapshot=known[-1].id if known else "",
        name=_text(known[-1].name)[:_LONGEST] if known else "",
        when=datetime.now(UTC),
    )
    return seen, frozenset(snapshot.id for snapshot in known)


def _continued(seen: tuple[Seen, ...], now: Seen, known: frozenset[str]) -> list[Seen]:
    """What was seen of the image that it goes on from; none where it is another one, or went back."""
    same = [one for one in seen if one.image == now.image]
    later = [one for one in same if one.container == now.container and one.catalog <= now.catalog]
    if holding := [one for one in later if not one.snapshot or one.snapshot in known]:
        return holding
    if changed := [one for one in later if one.catalog < now.catalog]:  # others may have forgotten the snapshot
        return [max(changed, key=lambda one: one.catalog)]
    return [one for one in same if one.container != now.container and one.snapshot in known]


def _same_state(one: Seen, now: Seen) -> bool:
    return (one.container, one.catalog, one.snapshot) == (now.container, now.catalog, now.snapshot)


def _read(file: Path) -> tuple[Seen, ...]:
    """What the file holds; nothing where it is not there, cannot be read, or makes no sense."""
    try:
        with file.open("rb") as opened:
            data = opened.read(_MAX_FILE + 1)
        found = msgspec.json.decode(data, type=_File)
    except (OSError, msgspec.DecodeError, ValueError, RecursionError):
        return ()
    return found.seen[-_IMAGES:] if len(data) <= _MAX_FILE and found.version == _VERSION else ()


def _drop_oldest(folder: Path) -> None:
    files = list(folder.glob("*.json"))
    if len(files) > _PLACES:
        for file in sorted(files, key=lambda file: file.stat().st_mtime)[: len(files) - _PLACES]:
            file.unlink(missing_ok=True)


def _text(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _local(when: datetime) -> str:
    with contextlib.suppress(OverflowError, ValueError, OSError):
        when = when.astimezone()
    return f"{when:%Y-%m-%d %H:%M}"
