"""Writing into a repository: chunks go into packs, packs into the index, and a snapshot commits it all.

One thread owns the writer.  Packs are put by a second thread, so that sealing goes on while storage is busy.  From
time to time a checkpoint makes what was stored findable, in the index like anything older: a writer that is cut later
leaves its work to the next one, and one that goes on remembers no more than what came after.
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
from ferrotype.job import leave_signals
from ferrotype.objects import Parts, length_of
from ferrotype.repository import snapshots, spare
from ferrotype.repository.merging import EntryRun, MergedSegment, Run, SegmentRun, renumbered
from ferrotype.repository.packs import MAX_FRAMES, PackBuilder
from ferrotype.repository.packs import PREFIX as PACKS
from ferrotype.repository.sealing import ChunkId
from ferrotype.repository.segments import ENTRY, Entries, Keys, Segment, keys_of, only_used, sorted_entries
from ferrotype.repository.selfcheck import UNREADABLE, check_maps, not_read_back, unproven
from ferrotype.repository.snapshots import DiskRecord, Snapshot
from ferrotype.repository.store import Repository
from ferrotype.units import GiB, MiB

_CHECKPOINT: Final = 4 * GiB  # stored bytes between two checkpoints: what a cut writer may have to prove again
_REMEMBERED: Final = 1 << 20  # chunks between two checkpoints: 52 MiB
_NEWEST: Final = 1 << 16  # of them in a dict, which takes five times as much
_FLYING: Final = 48 * MiB  # bytes of packs that wait for storage; more would only use memory
_PACKS: Final = 1 << 13  # packs of one size; the next ones are twice as long
_LONGEST_PACK: Final = 64 * MiB
_ENTRY_STORED: Final = 48  # bytes an entry takes in a stored segment, with its share of the directory


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

    def __len__(self) -> int:
        return len(self.newest) + sum(len(entries) for _, entries in self.runs)

    def add(self, chunk_id: bytes, pack: int, offset: int, length: int) -> None:
        self.newest[chunk_id] = (pack, offset, length)
        if len(self.newest) >= _NEWEST:
            self.settle()

    def settle(self) -> None:
        """Move the newest entries into a sorted run, merging runs of like size."""
        if not self.newest:
            return
        run = np.zeros(len(self.newest), ENTRY)
        run["id"] = np.frombuffer(b"".join(self.newest), run["id"].dtype)
        numbers = np.array(list(self.newest.values()), np.uint32).reshape(-1, 3)
        for column, field in enumerate(("pack", "offset", "length")):
            run[field] = numbers[:, column]
        run = sorted_entries(run)
        runs = list(self.runs)
        while runs and len(runs[-1][1]) <= 2 * len(run):
            run = sorted_entries(np.concatenate([runs.pop()[1], run]))
        self.runs = [*runs, (keys_of(run["id"]), run)]  # first: others look while this thread works
        self.newest = {}

    def all(self) -> Entries:
        return np.concatenate([entries for _, entries in self.runs]) if self.runs else np.zeros(0, ENTRY)


class Writer:
    """Adds chunks and commits snapshots.  Use ``open_writer``."""

    def __init__(self, repository: Repository, pool: ThreadPoolExecutor, *, from_medium: bool = False) -> None:
        self._repository = repository
        self._sealer = repository.sealer
        self._store = repository.store
        self._pool = pool
        self._from_medium = from_medium
        self._flying: list[tuple[Future[None], int]] = []
        self._lost = False  # a pack was not stored: what refers to it must not be either
        self._pack = PackBuilder()
        self._packs: list[str] = []  # names by number; the pack being filled has the number len(self._packs)
        self._starts: list[int] = []  # where the frames of each pack begin
        self._recent = Recent()
        self._claimed: dict[bytes, object] = {}  # chunks that a worker is sealing
        self._since_checkpoint = 0
        self._pack_size = _PackSize(repository)
        self.adopted = 0  # chunks taken over from a writer that was cut
        self.stored = 0  # bytes put
        self._adopt_orphans()

    def __contains__(self, chunk_id: bytes) -> bool:
        """Whether the chunk is stored already.  May be asked from any thread while the owner adds."""
        return chunk_id in self._recent or self._repository.index.find(chunk_id) is not None

    def claim(self, chunk_id: bytes) -> bool:
        """Whether it is for the asking worker to seal the chunk: it is not stored, and no other one is at it.

        Its frame must be given to ``add``.
        """
        mine = object()
        if self._claimed.setdefault(chunk_id, mine) is not mine:
            return False
        if chunk_id in self:  # looked for afterwards: the owner adds a chunk before it lets go of the claim
            self._claimed.pop(chunk_id, None)
            return False
        return True

    def add(self, chunk_id: ChunkId, frame: bytes) -> bool:
        """Store a sealed chunk; False where it was there already."""
        try:
            asked = chunk_id in self._claimed  # then the index was, too
            if chunk_id in self._recent or (not asked and self._repository.index.find(chunk_id) is not None):
                return False
            offset = self._pack.add(chunk_id, frame)
            self._recent.add(chunk_id, len(self._packs), offset, len(frame))
        finally:
            self._claimed.pop(chunk_id, None)
        if self._pack.size >= self._pack_size.now or len(self._pack.ids) >= MAX_FRAMES:
            self._put_pack()
            if self._since_checkpoint >= _CHECKPOINT or len(self._recent) >= _REMEMBERED:
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
        self._put_index()
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
        for future, _ in self._flying:
            future.exception()
        self._store.flush()

    def commit(self, snapshot: Snapshot, parents: Mapping[str, DiskRecord] | None = None) -> Snapshot:
        """Put a snapshot, after everything it refers to is durable; on return it cannot be lost any more.

        Its statistics are completed with the bytes that were stored.  ``parents`` are the disks, by name, of the
        snapshot before, whose part of the maps is taken as it is; the other part is followed down to the index.
        Raises WriteError, and commits nothing, where that fails.
        """
        fresh = self._put_index()
        check_maps(self._repository, snapshot.disks, parents or {}, fresh)
        self._store.flush()
        statistics = msgspec.structs.replace(snapshot.statistics, stored_bytes=self.stored)
        snapshot = msgspec.structs.replace(snapshot, statistics=statistics)
        name, frame = self._sealer.seal_object(snapshots.KIND, snapshots.encode(snapshot))
        self._put_snapshot(name, frame)
        if self._from_medium:
            self._prove([name])
        self._store.flush()
        self._start_over()
        return snapshots.decode(name, snapshots.encode(snapshot))

    def commit_copy(self, snapshot: Snapshot, frame: bytes) -> Snapshot:
        """Commit a snapshot whose sealed record exists already: its record, and so its id, stay as they are."""
        fresh = self._put_index()
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
        """Read objects back from the medium.  What does not stand that is given up; nothing refers to it yet."""
        if not (found := unproven(self._repository, names)):
            return
        for name in found:
            self._store.delete(name)
        raise not_read_back(found)

    def _start_over(self) -> None:
        """Everything is committed and in the index now, which is read anew."""
        spare.bring_forward(self._store)
        self._repository.forget_index()

    # ------------------------------------------------------------------ packs

    def _put_pack(self) -> None:
        if not self._pack.ids:
            return
        name, parts, start = self._pack.build(self._sealer)
        self._packs.append(name)
        self._starts.append(start)
        self._pack = PackBuilder()
        size = length_of(parts)
        self._wait(max(0, _FLYING - size))
        self._flying.append((self._pool.submit(self._put, name, parts), size))
        self._since_checkpoint += size
        self._pack_size.add(size)

    def _put(self, name: str, parts: Parts) -> None:
        self._store.put(name, parts)
        self.stored += length_of(parts)

    def _wait(self, left: int) -> None:
        """Until no more than ``left`` bytes of packs wait for storage."""
        if self._lost:
            raise WriteError("a pack of this backup could not be stored; start it again")
        while sum(size for _, size in self._flying) > left:
            try:
                self._flying.pop(0)[0].result()
            except BaseException:
                self._lost = True
                raise

    # ------------------------------------------------------------------ index

    def _located(self, entries: Entries) -> Entries:
        """Entries with offsets counted from the start of the pack object, not of its frames."""
        located = entries.copy()
        located["offset"] += np.array(self._starts, np.uint32)[entries["pack"]]
        return located

    def _put_index(self) -> str | None:
        """Put what is left, and a segment for it, joined with older ones that are no larger; the segment's name."""
        self._put_pack()
        self._wait(0)
        self._recent.settle()
        index = self._repository.index
        if not len(self._recent) and index.rebuilt is None:
            return None
        if self._from_medium:
            self._prove(self._packs)
        entries, packs = only_used(self._located(self._recent.all()), self._packs)
        absorbed = self._absorbable(len(entries))
        numbers, old_packs = renumbered(absorbed)
        entries["pack"] += len(old_packs)
        runs: list[Run] = [SegmentRun(s, n) for s, n in zip(absorbed, numbers, strict=True)]
        if len(entries):
            runs.append(EntryRun.of(entries))
        segment = MergedSegment(runs, [*old_packs, *packs], self._sealer, os.urandom(16))
        self._put(segment.name, segment.parts())
        if self._from_medium:
            self._prove([segment.name])
        try:
            obsolete = index.renew(segment.name, absorbed)
        except UNREADABLE as error:
            self._store.delete(segment.name)
            raise not_read_back({segment.name: str(error)}) from error
        for name in obsolete:
            self._store.delete(name)
        self._packs, self._starts, self._recent = [], [], Recent()
        return segment.name

    def _absorbable(self, added: int) -> list[Segment]:
        """The mended segment, and those that are no larger than what is written along with them."""
        index = self._repository.index
        absorbed = [index.rebuilt] if index.rebuilt else []
        total = added + sum(segment.count for segment in absorbed)
        for segment in sorted(index.segments, key=lambda s: s.count):
            if segment.count > total or (total + segment.count) * _ENTRY_STORED > self._store.traits.max_object:
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
                    self._recent.add(bytes(chunk_id), number, int(table.offsets[i]) - start, int(table.lengths[i]))
                    self.adopted += 1


class _PackSize:
    """Bytes at which a pack is closed.

    A larger image has longer packs, so that the number of objects, and with it the catalog, grows slower than it.
    """

    def __init__(self, repository: Repository) -> None:
        self._least = repository.config.pack_size
        self._most = max(self._least, min(_LONGEST_PACK, repository.store.traits.max_object // 2))
        self._stored = sum(info.size for info in repository.store.list(PACKS))
        self.now = self._least
        self.add(0)

    def add(self, size: int) -> None:
        """So many bytes more are stored."""
        self._stored += size
        while self._stored > self.now * _PACKS and self.now < self._most:
            self.now = min(2 * self.now, self._most)


@contextmanager
def open_writer(repository: Repository, *, from_medium: bool = False) -> Iterator[Writer]:
    """A writer for the block.  However the block ends, what was stored is made findable for the next one.

    With ``from_medium`` each object is read back from the storage and proven before anything refers to it.
    """
    with ThreadPoolExecutor(1, "ferrotype-packs", leave_signals) as pool:
        writer = Writer(repository, pool, from_medium=from_medium)
        try:
            yield writer
        except BaseException as error:
            with suppress(FerrotypeError, OSError):  # the first error is the one to report
                writer.abandon(whole=isinstance(error, FerrotypeError) and not isinstance(error, WriteError))
            repository.forget_index()  # segments that it knows may have been replaced
            raise
