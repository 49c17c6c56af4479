"""A repository: snapshots and the chunks they are made of, over one object store.

What a snapshot refers to is durable before the snapshot is put, and putting it is the commit.  Readers go the other
way, from the snapshot to its maps to its chunks, and believe nothing that does not match its keyed hash.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from ferrotype.errors import (
    CorruptObject,
    InvalidImage,
    KeyRefused,
    MissingChunk,
    ObjectMissing,
    UsageError,
)
from ferrotype.objects import ObjectStore
from ferrotype.repository import keys as slots
from ferrotype.repository import snapshots
from ferrotype.repository.chunkmap import ChunkMap
from ferrotype.repository.config import (
    DEFAULT_CHUNK,
    DEFAULT_PACK,
    NAME,
    Config,
    decode_config,
    encode_config,
    new_config,
)
from ferrotype.repository.index import Index, Location
from ferrotype.repository.packs import PREFIX as PACKS
from ferrotype.repository.packs import PackTable, read_table
from ferrotype.repository.sealing import ChunkId, Keys, Sealer
from ferrotype.repository.snapshots import DiskRecord, Region, Snapshot

KEYS: Final = "key/"
_SHORTEST_PREFIX: Final = 4  # characters of a snapshot's id that a user must give


class Repository:
    """An opened repository.  Reading is safe from any number of threads."""

    def __init__(self, store: ObjectStore, config: Config, sealer: Sealer, master: bytes) -> None:
        """Use ``create`` or ``open``."""
        self.store = store
        self.config = config
        self.sealer = sealer
        self.warnings: list[str] = []
        self._master = master
        self._index: Index | None = None

    # ------------------------------------------------------------------ opening

    @classmethod
    def create(
        cls,
        store: ObjectStore,
        secret: slots.Secret | None = None,
        *,
        chunk_size: int = DEFAULT_CHUNK,
        pack_size: int = DEFAULT_PACK,
        level: int = 1,
        cost: slots.Cost | None = None,
    ) -> Self:
        """A new repository in an empty store; with a ``secret``, everything in it is encrypted."""
        if chunk_size & (chunk_size - 1) or not 4096 <= chunk_size <= 16 << 20:
            raise UsageError("the chunk size must be a power of two from 4KiB to 16MiB")
        if not 1 << 20 <= pack_size <= 1 << 30:
            raise UsageError("the pack size must be from 1MiB to 1GiB")
        master = os.urandom(slots.MASTER_SIZE)
        config = new_config(master=None if secret else master, chunk_size=chunk_size, pack_size=pack_size)
        store.put(NAME, [encode_config(config)])
        if secret:
            slot = slots.lock(master, secret, "first", cost)
            store.put(KEYS + slot.id, [slots.encode_slot(slot)])
        store.flush()
        return cls(store, config, Sealer(Keys.derive(master, encrypted=config.encrypted), level), master)

    @classmethod
    def open(cls, store: ObjectStore, secret: slots.Secret | None = None, *, level: int = 1) -> Self:
        """Raises KeyRefused where ``secret`` is missing, wrong, or given for an image that is not encrypted."""
        try:
            config = decode_config(store.get(NAME))
        except ObjectMissing:
            raise InvalidImage("the image holds no configuration: it is damaged beyond what can be opened") from None
        if config.encrypted:
            if secret is None:
                raise KeyRefused("the image is encrypted: give its passphrase or key file")
            master, _ = slots.unlock(read_slots(store), secret)
        else:
            if secret is not None:
                raise KeyRefused(
                    "a passphrase was given, and the image is not encrypted: it may not be the one you mean"
                )
            master = config.clear_master
        return cls(store, config, Sealer(Keys.derive(master, encrypted=config.encrypted), level), master)

    def close(self) -> None:
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ keys

    def add_key(self, secret: slots.Secret, label: str = "", cost: slots.Cost | None = None) -> slots.KeySlot:
        """One more way to open the repository.  Raises UsageError where it is not encrypted."""
        if not self.config.encrypted:
            raise UsageError("the image is not encrypted; encryption is chosen when an image is created")
        slot = slots.lock(self._master, secret, label, cost)
        self.store.put(KEYS + slot.id, [slots.encode_slot(slot)])
        self.store.flush()
        return slot

    def remove_key(self, slot_id: str) -> slots.KeySlot:
        """Remove a slot by its id or a unique prefix.  The last one stays.  Raises UsageError."""
        known = read_slots(self.store)
        chosen = [slot for slot in known if slot.id.startswith(slot_id)]
        if len(chosen) != 1:
            raise UsageError(f"{'no' if not chosen else 'more than one'} key slot starts with {slot_id!r}")
        if len(known) == 1:
            raise UsageError("this is the last key slot; without it nobody could open the image again")
        self.store.delete(KEYS + chosen[0].id)
        self.store.flush()
        self.store.reclaim()
        return chosen[0]

    # ------------------------------------------------------------------ snapshots

    def snapshots(self) -> list[Snapshot]:
        """All snapshots, oldest first.  One that is damaged is left out and warned about."""
        found = []
        for info in self.store.list(snapshots.PREFIX):
            try:
                frame = self.store.get(info.name)
                found.append(snapshots.decode(info.name, self.sealer.unseal_object(info.name, frame)))
            except CorruptObject as error:
                self._warn(str(error))
        return sorted(found, key=lambda s: (s.created, s.id))

    def snapshot(self, wanted: str = "latest") -> Snapshot:
        """By id or its unique prefix, name, tag, ``latest`` or ``latest~2``.  Raises UsageError."""
        return find_snapshot(self.snapshots(), wanted)

    # ------------------------------------------------------------------ chunks

    @property
    def index(self) -> Index:
        """Opened at first use; packs that no segment lists are not in it (``writer`` takes them up)."""
        if self._index is None:
            self._index = Index(self.store, self.sealer, self._warn)
        return self._index

    def forget_index(self) -> None:
        """Have the index read anew at its next use: its segments were replaced."""
        self._index = None

    def locate(self, chunk_id: ChunkId) -> Location:
        """Raises MissingChunk."""
        location = self.index.find(chunk_id)
        if location is None:
            raise MissingChunk(chunk_id)
        return location

    def chunk(self, chunk_id: ChunkId) -> bytes:
        """A chunk's proven plaintext.  Raises MissingChunk or CorruptChunk."""
        at = self.locate(chunk_id)
        return self.sealer.unseal(chunk_id, self.store.get(at.pack, at.offset, at.length))

    def locate_many(
        self, ids: NDArray[np.void]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], list[str]]:
        """For each id: pack number (-1: missing), offset and length in the pack; and the packs the numbers mean."""
        return self.index.find_many(ids)

    def map(self, disk: DiskRecord, region: Region) -> ChunkMap:
        """The chunk map of one region."""
        return ChunkMap(region.root, disk.cells(region), self.chunk)

    def pack_table(self, name: str) -> PackTable:
        """Raises CorruptObject."""
        return read_table(self.store, name, self.sealer)

    def packs(self) -> Iterator[str]:
        return (info.name for info in self.store.list(PACKS))

    def _warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)


def read_slots(store: ObjectStore) -> list[slots.KeySlot]:
    """The readable key slots, oldest first.  Raises where there are some and none can be read."""
    found, damaged = [], None
    for info in store.list(KEYS):
        try:
            found.append(slots.decode_slot(store.get(info.name)))
        except (InvalidImage, CorruptObject) as error:
            damaged = error
    if damaged is not None and not found:
        raise damaged
    return sorted(found, key=lambda slot: (slot.created, slot.id))


def find_snapshot(known: Iterable[Snapshot], wanted: str) -> Snapshot:
    """What a reference means: ``latest``, ``latest~N``, an id's prefix, a name, or a tag (the newest wins)."""
    known = list(known)
    if not known:
        raise UsageError("the image holds no snapshot")
    head, tilde, back = wanted.partition("~")
    if head == "latest":
        if tilde and not back.isdecimal():
            raise UsageError(f"{wanted!r} is no snapshot; write latest~2 for the third newest")
        age = int(back) if tilde else 0
        if age >= len(known):
            raise UsageError(f"{wanted}: the image holds only {len(known)} snapshots")
        return known[-1 - age]
    by_id = [s for s in known if len(wanted) >= _SHORTEST_PREFIX and s.id.startswith(wanted.lower())]
    if len(by_id) == 1:
        return by_id[0]
    if len(by_id) > 1:
        raise UsageError(f"{wanted!r} begins the ids of {len(by_id)} snapshots; give more of it")
    named = [s for s in known if s.name == wanted or wanted in s.tags]
    if not named:
        raise UsageError(f"no snapshot is called {wanted!r}; `ferrotype list` shows what there is")
    return named[-1]
