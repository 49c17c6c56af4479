"""A repository: snapshots and the chunks they are made of, over one object store.

What a snapshot refers to is durable before the snapshot is put, and putting it is the commit.  Readers go the other
way, from the snapshot to its maps to its chunks, and believe nothing that does not match its keyed hash.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from threading import Lock
from typing import TYPE_CHECKING, Final, Protocol, Self, TypeVar

from ferrotype.errors import (
    FerrotypeError,
    IntegrityError,
    InvalidImage,
    KeyRefused,
    MissingChunk,
    ObjectMissing,
    SnapshotForgotten,
    UsageError,
)
from ferrotype.objects import ObjectStore, SpaceReport
from ferrotype.repository.config import (
    DEFAULT_CHUNK,
    DEFAULT_PACK,
    NAME,
    Config,
    decode_config,
    encode_config,
    new_config,
)
from ferrotype.repository.keys import MASTER_SIZE, Cost, KeySlot, Secret
from ferrotype.repository.sealing import ChunkId, Keys, Sealer
from ferrotype.repository.slots import add_slot, master_key, put_slot, remove_slot
from ferrotype.repository.snapshots import DiskRecord, Region, Snapshot, find_snapshot, read_snapshots
from ferrotype.repository.spare import read_heads
from ferrotype.units import KiB

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ferrotype.repository.chunkmap import ChunkMap
    from ferrotype.repository.index import Index
    from ferrotype.repository.packs import PackTable
    from ferrotype.repository.segments import Location

T = TypeVar("T")

_GAP: Final = 128 * KiB  # bytes of a pack read through rather than asking twice
_MOST_READ: Final = 32 << 20  # bytes of a pack read at once: frames may be far longer than the cells they are for
_STATES: Final = 20  # newer states that one read goes on to before it gives up
_UNLISTED: Final = "the index lacks packs that a snapshot needs; their own tables are read, and a backup mends it"

NOTHING_FOUND: Final = (
    "no snapshot can be found in it, and it is cut short or damaged: `ferrotype verify` says more, and "
    "`ferrotype salvage` saves what is left"
)


class Located(Protocol):
    """A chunk, and where its frame stands."""

    @property
    def chunk_id(self) -> ChunkId: ...

    @property
    def pack(self) -> str: ...

    @property
    def offset(self) -> int: ...

    @property
    def stored(self) -> int:
        """Bytes of the frame."""


class Repository:
    """An opened repository.  Reading is safe from any number of threads."""

    def __init__(self, store: ObjectStore, config: Config, sealer: Sealer, master: bytes) -> None:
        """Use ``create`` or ``open``."""
        self.store = store
        self.config = config
        self.sealer = sealer
        self.warnings: list[str] = []
        self._ahead: tuple[int, list[Snapshot]] | None = None  # a state, and its snapshots
        self.at_end: Callable[[], None] | None = None  # what is done before it is closed, where nothing failed
        self._master = master
        self._index: Index | None = None
        self._state = 0  # how often a newer state was gone on to
        self._told = 0  # what ``refresh`` has told of it
        self._stating = Lock()

    # ------------------------------------------------------------------ opening

    @classmethod
    def create(
        cls,
        store: ObjectStore,
        secret: Secret | None = None,
        *,
        chunk_size: int = DEFAULT_CHUNK,
        pack_size: int = DEFAULT_PACK,
        level: int = 1,
        cost: Cost | None = None,
    ) -> Self:
        """A new repository in an empty store; with a ``secret``, everything in it is encrypted."""
        if chunk_size & (chunk_size - 1) or not 4096 <= chunk_size <= 16 << 20:
            raise UsageError("the chunk size must be a power of two from 4KiB to 16MiB")
        if not 1 << 20 <= pack_size <= 1 << 30:
            raise UsageError("the pack size must be from 1MiB to 1GiB")
        master = os.urandom(MASTER_SIZE)
        config = new_config(master=None if secret else master, chunk_size=chunk_size, pack_size=pack_size)
        store.put(NAME, [encode_config(config)])
        if secret:
            put_slot(store, master, secret, config.id, "first", cost)
        store.flush()
        return cls(store, config, Sealer(Keys.derive(master, encrypted=config.encrypted), level), master)

    @classmethod
    def open(cls, store: ObjectStore, secret: Secret | None = None, *, level: int = 1) -> Self:
        """Raises KeyRefused where ``secret`` is missing, wrong, or given for an image that is not encrypted."""
        for left in reversed(range(_STATES)):
            try:
                return cls._open(store, secret, level)
            except (IntegrityError, ObjectMissing, InvalidImage, KeyRefused):
                if not left or not store.refresh():
                    raise
        raise AssertionError

    @classmethod
    def _open(cls, store: ObjectStore, secret: Secret | None, level: int) -> Self:
        warnings: list[str] = []
        heads = read_heads(store, warnings.append)
        config = decode_config(heads.config)
        master = master_key(config, heads.slots, secret)
        self = cls(store, config, Sealer(Keys.derive(master, encrypted=config.encrypted), level), master)
        self.warnings += warnings
        return self

    def twin(self, store: ObjectStore) -> Self:
        """A new repository in an empty store, with the configuration, master key and key slots of this one."""
        for name, data in sorted(read_heads(self.store).objects.items()):
            store.put(name, [data])
        store.flush()
        return type(self)(store, self.config, self.sealer, self._master)

    def close(self) -> None:
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self.at_end is not None:
                self.at_end()
        finally:
            self.close()

    # ------------------------------------------------------------------ keys

    def add_key(self, secret: Secret, label: str = "", cost: Cost | None = None) -> KeySlot:
        """One more way to open the repository.  Raises UsageError where it is not encrypted."""
        if not self.config.encrypted:
            raise UsageError(
                "the image is not encrypted, so that it has no keys; make an encrypted one with "
                "`ferrotype backup --encrypt`, and `ferrotype copy` takes the snapshots over"
            )
        return add_slot(self.store, self._master, secret, self.config.id, label, cost, self._warn)

    def remove_key(self, slot_id: str) -> tuple[KeySlot, SpaceReport]:
        """Remove a slot by its id or a unique prefix, and overwrite it where nobody reads the store.

        The last one stays.  Raises UsageError.
        """
        return remove_slot(self.store, slot_id, self._warn)

    # ------------------------------------------------------------------ snapshots

    def snapshots(self) -> list[Snapshot]:
        """All snapshots, oldest first.  One that is damaged is left out and warned about."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == self._state:
            return ahead[1]
        for _ in range(_STATES):
            state = self._state
            found, damaged = read_snapshots(self.store, self.sealer)
            if not damaged or not self._is_outdated(state):
                break
        for message in damaged:
            self._warn(message)
        return found

    def snapshots_ahead(self) -> list[Snapshot]:
        """All snapshots of an image that is open for reading; the next call of ``snapshots`` need not read them."""
        found = self.snapshots()
        self._ahead = (self._state, found)
        return found

    def snapshot(self, wanted: str = "latest") -> Snapshot:
        """By id or its unique prefix, name, tag, ``latest`` or ``latest~2``.

        Raises UsageError, InvalidImage where all that there were may be lost.
        """
        known = self.snapshots()
        if not known and self.warnings:
            raise InvalidImage(NOTHING_FOUND)
        return find_snapshot(known, wanted)

    # ------------------------------------------------------------------ chunks

    @property
    def index(self) -> Index:
        """Opened at first use; packs that no segment lists are not in it (``writer`` takes them up)."""
        return self._index or self._retried(self._opened_index)

    def _opened_index(self) -> Index:
        from ferrotype.repository.index import Index

        state = self._state
        index = Index(self.store, self.sealer, self._warn, lambda: self._is_outdated(state))
        with self._stating:
            if state == self._state:
                self._index = index
        return index

    def forget_index(self) -> None:
        """Have the index read anew at its next use: its segments were replaced."""
        self._index = None

    def find(self, chunk_id: ChunkId) -> Location | None:
        """Where a chunk stands; None for one that is not stored."""
        return self._retried(lambda: self.index.find(chunk_id))

    def locate(self, chunk_id: ChunkId) -> Location:
        """Raises MissingChunk."""
        location = self.index.find(chunk_id)
        if location is None:
            raise MissingChunk(chunk_id)
        return location

    def locate_many(
        self, ids: NDArray[np.void]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], list[str]]:
        """For each id: pack number (-1: missing), offset and length in the pack; and the packs the numbers mean."""
        for _ in range(_STATES):
            state = self._state
            found = self._retried(lambda: self.index.find_many(ids))
            if not (found[0] < 0).any() or not self._is_outdated(state):
                break
        return self._with_unlisted(ids, *found)

    def _with_unlisted(
        self,
        ids: NDArray[np.void],
        number: NDArray[np.int64],
        offset: NDArray[np.int64],
        length: NDArray[np.int64],
        packs: list[str],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], list[str]]:
        """What was located, and the missing ones as far as packs have them that no segment lists."""
        import numpy as np

        missing = np.flatnonzero(number < 0)
        if len(missing) and (unlisted := self.index.unlisted()).count:
            found, entries = unlisted.find_many(ids[missing])
            where = missing[found]
            number[where] = entries["pack"].astype(np.int64) + len(packs)
            offset[where], length[where] = entries["offset"], entries["length"]
            packs = [*packs, *unlisted.packs]
            if len(where):
                self._warn(_UNLISTED)
        return number, offset, length, packs

    def _unlisted_chunk(self, chunk_id: ChunkId) -> bytes | None:
        """A chunk from a pack that no segment lists, where one has it."""
        at = self.index.unlisted().find(chunk_id)
        if at is None:
            return None
        self._warn(_UNLISTED)
        return self.sealer.unseal(chunk_id, self.store.get(at.pack, at.offset, at.length))

    def chunk(self, chunk_id: ChunkId, of: DiskRecord | None = None) -> bytes:
        """A chunk's proven plaintext.

        Raises MissingChunk or CorruptChunk; SnapshotForgotten where a disk needs it (``of``) that no snapshot has any
        more.
        """
        try:
            return self._retried(lambda: self._chunk(chunk_id))
        except (IntegrityError, ObjectMissing) as error:
            if isinstance(error, MissingChunk) and (plain := self._unlisted_chunk(chunk_id)) is not None:
                return plain
            raise self.explained(error, of) from error

    def _chunk(self, chunk_id: ChunkId) -> bytes:
        at = self.locate(chunk_id)
        return self.sealer.unseal(chunk_id, self.store.get(at.pack, at.offset, at.length))

    def chunks(self, located: Sequence[Located], of: DiskRecord) -> Iterator[bytes]:
        """Proven plaintexts of chunks that ``locate_many`` found, in order; neighbours in a pack are read at once.

        Raises what ``chunk`` does.
        """
        at = 0
        while at < len(located):
            stop = at + 1
            while (
                stop < len(located)
                and _follows(located[stop - 1], located[stop])
                and located[stop].offset + located[stop].stored - located[at].offset <= _MOST_READ
            ):
                stop += 1
            base, data = located[at].offset, memoryview(b"")
            with suppress(IntegrityError, ObjectMissing):  # each chunk is looked for again below
                end = located[stop - 1].offset + located[stop - 1].stored
                data = memoryview(self.store.get(located[at].pack, base, end - base))
            for place in located[at:stop]:
                try:
                    frame = data[place.offset - base : place.offset - base + place.stored]
                    plain = self.sealer.unseal(place.chunk_id, frame)
                except IntegrityError:  # it was moved since it was located, or it is damaged
                    plain = self.chunk(place.chunk_id, of)
                yield plain
            at = stop

    def map(self, disk: DiskRecord, region: Region) -> ChunkMap:
        """The chunk map of one region."""
        from ferrotype.repository.chunkmap import ChunkMap

        return ChunkMap(region.root, disk.cells(region), lambda chunk_id: self.chunk(chunk_id, disk))

    def pack_table(self, name: str) -> PackTable:
        """Raises CorruptObject."""
        from ferrotype.repository.packs import read_table

        return read_table(self.store, name, self.sealer)

    def packs(self) -> Iterator[str]:
        from ferrotype.repository.packs import PREFIX as PACKS

        return (info.name for info in self.store.list(PACKS))

    # ------------------------------------------------------------------ newer states

    def refresh(self) -> bool:
        """Of an image open for reading: go on to its newest state, index included.

        True where the state is newer than at the last call of this method (or the opening), be it that a read went on
        to it by itself: what was found damaged or missing since then is to be looked at again.  Reads do this on
        their own; only who judges objects by ``store`` calls it.
        """
        self._go_on()
        newer, self._told = self._told != self._state, self._state
        return newer

    def explained(self, error: FerrotypeError, of: DiskRecord | None) -> FerrotypeError:
        """The error, or SnapshotForgotten where that is why something of a disk could not be read."""
        if of is None or not self._state or any(of in snapshot.disks for snapshot in self.snapshots()):
            return error
        return SnapshotForgotten(f"the snapshot of {of.name} was forgotten or moved while it was read; start again")

    def _go_on(self) -> bool:
        """Go on to the newest state; whether there was a newer one."""
        with self._stating:
            newer = self.store.refresh()
            if newer:
                self._state += 1
                self._index = None
        return newer

    def _is_outdated(self, state: int) -> bool:
        """Whether there is a newer state than one that was in use: it is, from now on."""
        return self._go_on() or self._state != state

    def _retried(self, read: Callable[[], T]) -> T:
        """What ``read`` gives, in the newest state if it fails in an older one."""
        for left in reversed(range(_STATES)):
            state = self._state
            try:
                return read()
            except (IntegrityError, ObjectMissing):
                if not left or not self._is_outdated(state):
                    raise
        raise AssertionError

    def _warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)


def _follows(left: Located, right: Located) -> bool:
    """Whether reading on from ``left`` soon comes to ``right``."""
    return left.pack == right.pack and 0 <= right.offset - (left.offset + left.stored) <= _GAP
