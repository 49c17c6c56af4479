"""A small image in memory, all its live bytes known by what they belong to; and what a damaged one does.

Everything about it is as small as it can be: chunks that compress to a few bytes, so each record is one block, most
of it padding.  A damaged copy is opened from memory, which makes a hundred thousand of them affordable.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast
from unittest import mock

from ferrotype.engine import verify as verify_module
from ferrotype.engine.forget import forget
from ferrotype.engine.prune import prune
from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.errors import FerrotypeError
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.objects.layout import ANCHORS_AT, BLOCK, RECORDS_AT, Anchor, RecordHeader, VolumeHeader
from ferrotype.objects.volumes import Opener
from ferrotype.repository.keys import Secret
from ferrotype.repository.sealing import ChunkId
from ferrotype.repository.store import Repository
from tests.repository.small import CHUNK, SECRET, back_up, create, restored

EXHAUSTIVE: Final = bool(os.environ.get("FERROTYPE_TEST_EXHAUSTIVE"))
QUICK: Final = VerifyOptions(workers=1)
ALL: Final = frozenset({"all"})  # any snapshot may be hit
SECRETS: Final = {"plain": None, "encrypted": SECRET}


class MemoryVolume:
    """What a reader asks of a ``VolumeFile``, over bytes that a test changes at will."""

    def __init__(self, content: bytearray) -> None:
        self.content = content
        self._fd = os.memfd_create("volume", os.MFD_CLOEXEC)  # what locks are asked of

    def read(self, offset: int, length: int, /) -> bytes:
        return bytes(self.content[offset : offset + length])

    def size(self) -> int:
        return len(self.content)

    def data_from(self, offset: int, /) -> int:
        return offset

    def allocated(self) -> int:
        return len(self.content)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def distrust(self) -> None:
        pass


@dataclass(frozen=True)
class Live:
    """A structure that counts: what it is, where it stands, how long it is without and with its padding."""

    what: str
    offset: int
    used: int
    span: int
    needed_by: frozenset[str] = frozenset()  # snapshots that cannot be read without it
    name: str = ""  # of an object

    @property
    def end(self) -> int:
        return self.offset + self.span


@dataclass(frozen=True)
class SmallImage:
    """The bytes of an image, what is in them, and what must come out of it."""

    whole: bytes
    secret: Secret | None
    live: tuple[Live, ...]
    truth: dict[str, bytes]  # the snapshots there are, by name
    states: tuple[bytes, ...] = ()  # the whole file as it was after each step of its life, oldest first

    @property
    def records(self) -> tuple[Live, ...]:
        return tuple(live for live in self.live if live.offset >= RECORDS_AT)

    @property
    def meaningless(self) -> list[tuple[int, int]]:
        """The (start, end) of what no live structure takes up: fillers, and what lies behind them."""
        out, at = [], 0
        for live in self.live:
            if live.offset > at:
                out.append((at, live.offset))
            at = live.offset + live.span
        return [*out, (at, len(self.whole))] if at < len(self.whole) else out


@contextmanager
def opened(content: bytearray | bytes, secret: Secret | None) -> Iterator[Repository]:
    """The image that these bytes are, for reading."""
    volume = MemoryVolume(content if isinstance(content, bytearray) else bytearray(content))

    def opener(path: Path, /, *, writable: bool, create: bool = False) -> MemoryVolume:
        assert not writable
        assert not create
        return volume

    try:
        store = Container.open(Path("image.ferro"), opener=cast("Opener", opener))
        try:
            repository = Repository.open(store, secret)
            repository.warnings += store.warnings
            yield repository
        finally:
            store.close()
    finally:
        volume.close()


def outcome(content: bytearray | bytes, image: SmallImage, hit: frozenset[str] = ALL) -> str:
    """What reading and verifying a damaged image does.

    ``refused``: a clear error instead of an image.  ``told``: verify calls it damaged.  ``ok``: verify finds nothing,
    and every snapshot is there and right.  Wrong bytes, a snapshot missing without a word, one lost that is not
    among those that may be ``hit``, and exceptions that are not ours fail the test.
    """
    spared = set() if hit is ALL else set(image.truth) - hit
    refused = ""
    try:
        with opened(content, image.secret) as repository, sequential():
            right = read_all(repository)
            result = verify(repository, QUICK, NullJob())
    except FerrotypeError as error:
        refused = f"{type(error).__name__}: {error}"
    if refused:
        assert not spared, f"the image is refused, and {spared} does not need what was hit: {refused}"
        return "refused"
    assert right >= spared, f"{spared - right} cannot be read, and does not need what was hit"
    if not result.ok:
        return "told"
    assert right == set(image.truth), "verify says it is whole, and it is not"
    return "ok"


def noticed(content: bytearray | bytes, image: SmallImage, hit: Live) -> bool:
    """The first things that verify does, and nothing more: opening, and an object against its checksum.

    Where this is True, verify says so too: it counts every warning and every such failure.
    """
    try:
        with opened(content, image.secret) as repository:
            if repository.warnings:
                return True
            if hit.name:
                repository.store.check(hit.name)
    except FerrotypeError:
        return True
    return False


def read_all(repository: Repository) -> set[str]:
    """The snapshots that can be read, each with the right bytes."""
    right = set()
    for snapshot in repository.snapshots():
        try:
            content = restored(repository, snapshot)
        except FerrotypeError:
            continue
        assert content == CONTENTS[snapshot.name], "wrong bytes came out"
        right.add(snapshot.name)
    return right


@contextmanager
def sequential() -> Iterator[None]:
    """Verify without threads: the same calls in the same order."""
    with mock.patch.object(verify_module, "map_ordered", lambda function, items, **_: map(function, items)):
        yield


# ---------------------------------------------------------------------- making one


def text(word: str) -> bytes:
    """A chunk that compresses well."""
    return (word.encode() * CHUNK)[:CHUNK]


FIRST: Final = text("one") + text("two") + bytes(CHUNK)
SECOND: Final = text("one") + text("three") + text("four")
THIRD: Final = text("one") + text("three") + text("five")
FORKED: Final = text("one") + text("other") + text("way")
CONTENTS: Final = {"gone": FIRST, "second": SECOND, "third": THIRD, "forked": FORKED}  # of every snapshot ever


def make(path: Path, secret: Secret | None) -> SmallImage:
    """A life in small: backups, one forgotten and pruned away, fillers, catalogs that add to others."""
    store = Container.create(path)
    repository = create(store, secret)
    states = [path.read_bytes()]
    for day, (name, content) in enumerate({"gone": FIRST, "second": SECOND}.items()):
        back_up(repository, content, name, day=day)
        states.append(path.read_bytes())
    store.compact(lambda _: None)
    states.append(path.read_bytes())
    forget(repository, [repository.snapshot("gone")])
    prune(repository, NullJob())
    states.append(path.read_bytes())
    back_up(repository, THIRD, "third", day=2)
    live = live_structures(repository, store)
    repository.close()
    whole = path.read_bytes()
    path.unlink()
    return SmallImage(whole, secret, live, {"second": SECOND, "third": THIRD}, tuple(states))


def live_structures(repository: Repository, store: Container) -> tuple[Live, ...]:
    """What the newest state of a container needs, in the order of the file, and who needs it."""
    needs = needed_objects(repository)
    everyone = frozenset(needs)
    found = [Live("volume header", 0, VolumeHeader.SIZE, BLOCK, everyone)]
    found += [Live("anchor", at, Anchor.SIZE, BLOCK) for at in ANCHORS_AT]
    found += [Live("catalog", e.offset, RecordHeader.SIZE + e.length, e.span) for e in store.catalogs()]
    for entry in store.live():
        kind = entry.name.split("/")[0]
        users = frozenset(name for name, objects in needs.items() if entry.name in objects)
        users = everyone if kind in ("config", "key") else users
        found.append(Live(kind, entry.offset, RecordHeader.SIZE + entry.length, entry.span, users, entry.name))
    return tuple(sorted(found, key=lambda live: live.offset))


def needed_objects(repository: Repository) -> dict[str, set[str]]:
    """For each snapshot the names of its own object and of the packs that its maps and chunks stand in."""
    out: dict[str, set[str]] = {}
    for snapshot in repository.snapshots():
        out[snapshot.name] = {f"snapshot/{snapshot.id}"}
        for disk in snapshot.disks:
            for region in disk.regions:
                for page in repository.map(disk, region).walk(lambda _: False):
                    assert page.ids is not None
                    used = {bytes(page.page_id), *(i.tobytes() for i in page.ids if any(i.tobytes()))}
                    out[snapshot.name] |= {repository.locate(ChunkId(i)).pack for i in used}
    return out
