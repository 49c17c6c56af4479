"""Writing into a repository: chunks go into packs, packs into the index, and a snapshot commits it all.

One thread owns the writer.  Packs are put by a second thread, so that sealing goes on while storage is busy.  From
time to time a checkpoint makes what was stored findable: a writer that is cut later leaves its work to the next one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Final

import msgspec
import numpy as np

from ferrotype.errors import CorruptObject, FerrotypeError, WriteError
from ferrotype.repository import snapshots, spare
from ferrotype.repository.packs import MAX_FRAMES, PackBuilder
from ferrotype.repository.sealing import ChunkId
from ferrotype.repository.segments import (
    ENTRY,
    Entries,
    Keys,
    Segment,
    build_segment,
    keys_of,
    merged,
    only_used,
    sorted_entries,
)
from ferrotype.repository.selfcheck import check_maps, not_read_back, unproven
from ferrotype.repository.snapshots import DiskRecord, Snapshot
from ferrotype.repository.store import Repository
from ferrotype.units import GiB

_CHECKPOINT: Final = 4 * GiB  # stored bytes between two checkpoints: what a cut writer may have to prove again
_QUEUE: Final = 2  # packs waiting for storage; more would only use memory


class Recent:
    """Index entries a writer has added: a dict for the newest, sorted runs for the rest (52 bytes a chunk)."""

    def __init__(self) -> None:
        self.newest: dict[bytes, tuple[int, int, int]] = {}
        self.runs: list[tuple[Keys, Entries]] = []

    def __contains__(self, chunk_id: bytes) -> bool:
        return chunk_id in self.newest or (bool(self.runs) and self._in_runs(chunk_id))

    def _in_runs(self, chunk_id: bytes) -> bool:
        key = np.uint64(int.from_bytes(chunk_id[:8], "big"))
        for keys, entries in self.runs:
            at = int(np.searchsorted(keys, key))
            while at < len(keys) and keys[at] == key:
                if entries["id"][at].tobytes() == chunk_id:
                    return True
                at += 1
        return False

    def settle(self) -> Entries:
        """Move the newest entries into a sorted run, merging runs of like size; the entries that were moved."""
        entries = np.zeros(len(self.newest), ENTRY)
        entries["id"] = np.frombuffer(b"".join(self.newest), entries["id"].dtype)
        numbers = np.array(list(self.newest.values()), np.uint32).reshape(-1, 3)
        for column, field in enumerate(("pack", "offset", "length")):
            entries[field] = numbers[:, column]
        self.newest = {}
        run = entries = sorted_entries(entries)
        while self.runs and len(self.runs[-1][1]) <= 2 * len(run):
            run = sorted_entries(np.concatenate([self.runs.pop()[1], run]))
        self.runs.append((keys_of(run["id"]), run))
        return entries

    def all(self) -> Entries:
        return np.concatenate([entries for _, entries in self.runs]) if self.runs else np.zeros(0, ENTRY)


class Writer:
    """Adds chunks and commits snapshots.  Use ``open_writer``."""

    def __init__(self, repository: Repository, pool: ThreadPoolExecutor) -> None:
        self._repository = repository
        self._sealer = repository.sealer
        self._store = repository.store
        self._pool = pool
        self._flying: list[Future[None]] = []
        self._lost = False  # a pack was not stored: what refers to it must not be either
        self._pack = PackBuilder()
        self._packs: list[str] = []  # names by number; the pack being filled has the number len(self._packs)
        self._starts: list[int] = []  # where the frames of each pack begin
        self._recent = Recent()
        self._segments: list[str] = []  # this writer's own checkpoints
        self._since_checkpoint = 0
        self.adopted = 0  # chunks taken over from a writer that was cut
        self.stored = 0  # bytes put
        self._adopt_orphans()

    def __contains__(self, chunk_id: bytes) -> bool:
        """Whether the chunk is stored already.  May be asked from any thread while the owner adds."""
        return chunk_id in self._recent or self._repository.index.find(chunk_id) is not None

    def add(self, chunk_id: ChunkId, frame: bytes) -> bool:
        """Store a sealed chunk; False where it was there already."""
        if chunk_id in self:
            return False
        number = len(self._packs)
        offset = self._pack.add(chunk_id, frame)
        self._recent.newest[chunk_id] = (number, offset, len(frame))
        if self._pack.size >= self._repository.config.pack_size or len(self._pack.ids) >= MAX_FRAMES:
            self._put_pack()
            if self._since_checkpoint >= _CHECKPOINT:
                self.checkpoint()
        return True

    def add_plain(self, plain: bytes) -> ChunkId:
        """Store a plaintext as a chunk: a page of a chunk map."""
        chunk_id = self._sealer.id_of(plain)
        if chunk_id not in self:
            self.add(chunk_id, self._sealer.seal(chunk_id, plain))
        return chunk_id

    def checkpoint(self) -> None:
        """A barrier: on return every chunk added so far is durable and is found by the next writer."""
        self._put_pack()
        self._wait(0)
        if self._recent.newest:
            self._put_segment(self._recent.settle())
        self._store.flush()
        self._since_checkpoint = 0

    def abandon(self, *, whole: bool) -> None:
        """Keep what can be kept after an error.

        Where it is not certain that all was stored (not ``whole``), nothing is said to be: the next writer looks for
        itself which packs are there.
        """
        if whole and not self._lost:
            self.checkpoint()
            return
        for future in self._flying:
            future.exception()
        self._store.flush()

    def commit(
        self, snapshot: Snapshot, parents: Mapping[str, DiskRecord] | None = None, *, from_medium: bool = False
    ) -> Snapshot:
        """Put a snapshot, after everything it refers to is durable; on return it cannot be lost any more.

        Its statistics are completed with the bytes that were stored.  ``parents`` are the disks, by name, of the
        snapshot before, whose part of the maps is taken as it is; the other part is followed down to the index.  With
        ``from_medium`` each object that this writer put is read back and proven.  Raises WriteError, and commits
        nothing, where that fails.
        """
        self._put_pack()
        self._wait(0)
        if from_medium:
            self._prove(self._packs)
        fresh = self._put_index(from_medium=from_medium)
        check_maps(self._repository, snapshot.disks, parents or {}, fresh)
        self._store.flush()
        statistics = msgspec.structs.replace(snapshot.statistics, stored_bytes=self.stored)
        snapshot = msgspec.structs.replace(snapshot, statistics=statistics)
        name, frame = self._sealer.seal_object(snapshots.KIND, snapshots.encode(snapshot))
        self._put_snapshot(name, frame)
        if from_medium:
            self._prove([name])
        self._store.flush()
        self._start_over()
        return snapshots.decode(name, snapshots.encode(snapshot))

    def commit_copy(self, snapshot: Snapshot, frame: bytes) -> Snapshot:
        """Commit a snapshot whose sealed record exists already: its record, and so its id, stay as they are."""
        self._put_pack()
        self._wait(0)
        fresh = self._put_index(from_medium=False)
        check_maps(self._repository, snapshot.disks, {}, fresh)
        self._store.flush()
        name = snapshots.PREFIX + snapshot.id
        if any(info.name == name for info in self._store.list(name)):  # it is there, and damaged
            self._store.delete(name)
        self._put_snapshot(name, frame)
        self._store.flush()
        self._start_over()
        return snapshot

    def _put_snapshot(self, name: str, frame: bytes) -> None:
        """The snapshot, and before it a spare copy of what opens the image, where one is due."""
        if self.stored or next(self._store.list(spare.PREFIX), None) is None:
            spare.settle(self._store)
        self._put(name, [frame])

    def _prove(self, names: Sequence[str]) -> None:
        """Read objects back from the medium.  What does not stand that is given up, with all that refers to it."""
        if not (found := unproven(self._repository, names)):
            return
        for name in [*found, *self._segments]:
            self._store.delete(name)
        self._segments = []
        raise not_read_back(found)

    def _start_over(self) -> None:
        """Everything is in the index now, which is read anew."""
        self._repository.forget_index()
        self._packs, self._starts, self._segments, self._recent = [], [], [], Recent()

    # ------------------------------------------------------------------ packs

    def _put_pack(self) -> None:
        if not self._pack.ids:
            return
        name, parts, start = self._pack.build(self._sealer)
        self._packs.append(name)
        self._starts.append(start)
        self._pack = PackBuilder()
        self._wait(_QUEUE - 1)
        self._flying.append(self._pool.submit(self._put, name, parts))
        self._since_checkpoint += sum(map(len, parts))

    def _put(self, name: str, parts: list[bytes]) -> None:
        self._store.put(name, parts)
        self.stored += sum(map(len, parts))

    def _wait(self, left: int) -> None:
        if self._lost:
            raise WriteError("a pack of this backup could not be stored; start it again")
        while len(self._flying) > left:
            try:
                self._flying.pop(0).result()
            except BaseException:
                self._lost = True
                raise

    # ------------------------------------------------------------------ index

    def _located(self, entries: Entries) -> Entries:
        """Entries with offsets counted from the start of the pack object, not of its frames."""
        located = entries.copy()
        located["offset"] += np.array(self._starts, np.uint32)[entries["pack"]]
        return located

    def _put_segment(self, entries: Entries) -> None:
        located, packs = only_used(self._located(entries), self._packs)
        name, parts = build_segment(located, packs, self._sealer, os.urandom(16))
        self._put(name, parts)
        self._segments.append(name)

    def _put_index(self, *, from_medium: bool) -> str | None:
        """One segment for all this writer added, joined with older ones that are no larger; its name."""
        if self._recent.newest:
            self._recent.settle()
        entries = self._recent.all()
        index = self._repository.index
        if not len(entries) and index.rebuilt is None:
            return None
        absorbed = self._absorbable(len(entries))
        old, old_packs = merged(absorbed)
        entries = self._located(entries)
        entries["pack"] += len(old_packs)
        name, parts = build_segment(
            np.concatenate([old, entries]), [*old_packs, *self._packs], self._sealer, os.urandom(16)
        )
        self._put(name, parts)
        if from_medium:
            self._prove([name])
        stored = [segment.name for segment in absorbed if segment is not index.rebuilt]
        for obsolete in [*self._segments, *stored, *index.damaged]:
            self._store.delete(obsolete)
        self._segments = []
        return name

    def _absorbable(self, added: int) -> list[Segment]:
        """The mended segment, and those that are no larger than what is written along with them."""
        index = self._repository.index
        absorbed = [index.rebuilt] if index.rebuilt else []
        total = added + sum(segment.count for segment in absorbed)
        for segment in sorted(index.segments, key=lambda s: s.count):
            if segment.count > total:
                break
            if segment is index.rebuilt:
                continue
            if not index.readable(segment):
                return self._absorbable(added)  # the mended one holds more now
            absorbed.append(segment)
            total += segment.count
        return absorbed

    def _adopt_orphans(self) -> None:
        """Take up packs that no index segment lists: a writer was cut.  Table and stored bytes are proven first."""
        listed = self._repository.index.packs()
        for name in [pack for pack in self._repository.packs() if pack not in listed]:
            try:
                table = self._repository.pack_table(name)
                self._store.check(name)
            except CorruptObject:
                continue  # never durable, so nothing refers to it; prune takes it away
            number = len(self._packs)
            start = int(table.offsets[0]) if len(table) else 0
            self._packs.append(name)
            self._starts.append(start)
            for i in range(len(table)):
                chunk_id = table.id(i)
                if chunk_id not in self:
                    entry = (number, int(table.offsets[i]) - start, int(table.lengths[i]))
                    self._recent.newest[bytes(chunk_id)] = entry
                    self.adopted += 1


@contextmanager
def open_writer(repository: Repository) -> Iterator[Writer]:
    """A writer for the block.  However the block ends, what was stored is made findable for the next one."""
    with ThreadPoolExecutor(1, "ferrotype-packs") as pool:
        writer = Writer(repository, pool)
        try:
            yield writer
        except BaseException as error:
            with suppress(FerrotypeError, OSError):  # the first error is the one to report
                writer.abandon(whole=isinstance(error, FerrotypeError) and not isinstance(error, WriteError))
            repository.forget_index()  # segments that it knows may have been replaced
            raise
