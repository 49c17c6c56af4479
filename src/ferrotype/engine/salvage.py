"""Salvage: everything that is left of a damaged image, an exact list of what is not, and a new image of it.

    volumes, searched whole  ->  keys  ->  chunks, from every place that may have one  ->  snapshots and their losses
                                                                                      ->  a new image, by ``copy``

Nothing is believed but what proves itself.  The damaged image is opened for reading only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from ferrotype.engine.copy import copy, keep
from ferrotype.engine.damage import Damage, find_damage
from ferrotype.engine.opening import SecretSource
from ferrotype.engine.targets import refuse_no_device
from ferrotype.errors import (
    CorruptObject,
    FormatError,
    IntegrityError,
    InvalidImage,
    KeyRefused,
    Refused,
    UnsupportedError,
)
from ferrotype.job import Job
from ferrotype.objects.container import Container
from ferrotype.objects.rescue import RescueStore
from ferrotype.objects.volumes import Opener, PosixFile
from ferrotype.repository import snapshots as records
from ferrotype.repository.chunkmap import PAGE_SIZE, ChunkMap
from ferrotype.repository.config import DEFAULT_CHUNK, DEFAULT_PACK, Config, decode_config, encode_config, new_config
from ferrotype.repository.config import NAME as CONFIG
from ferrotype.repository.keys import KeySlot, decode_slot, unlock
from ferrotype.repository.remains import Remains
from ferrotype.repository.sealing import ID_SIZE, MAX_PLAIN, ZERO_ID, Keys, Sealer
from ferrotype.repository.slots import NOT_ENCRYPTED
from ferrotype.repository.snapshots import Snapshot
from ferrotype.repository.spare import KEYS, Heads, read_heads
from ferrotype.repository.spare import PREFIX as SPARES
from ferrotype.repository.store import Repository

_NO_KEYS: Final = "every copy of its configuration or of its key slots is lost, and nothing can be read without them"


@dataclass(frozen=True, slots=True)
class Salvaged:
    """A snapshot that could be opened, and what of its disks cannot be given back."""

    snapshot: Snapshot
    lost: tuple[Damage, ...]

    @property
    def complete(self) -> bool:
        return not self.lost


@dataclass(slots=True)
class SalvageResult:
    """What is left."""

    snapshots: list[Salvaged] = field(default_factory=list)  # oldest first
    lost_snapshots: list[str] = field(default_factory=list)  # known by id, and no more than that
    intact: int = 0  # chunks and map pages that the snapshots need: opened and proven
    damaged: int = 0  # found, and not what they were
    missing: int = 0  # found nowhere
    unused: int = 0  # chunks that no snapshot that is left needs
    problems: list[str] = field(default_factory=list)  # what is wrong with the image, in words
    doubts: list[str] = field(default_factory=list)  # those of them by which more may be lost than can be named
    kept: list[Snapshot] = field(default_factory=list)  # what the new image holds
    image: str = ""  # the id in its configuration
    container: str = ""  # the id of the file

    @property
    def complete(self) -> bool:
        """Whether everything that is known to have been there can be given back; ``doubts`` say what is not."""
        return not self.lost_snapshots and all(one.complete for one in self.snapshots)


def salvage(
    image: Path,
    secret: SecretSource,
    job: Job,
    *,
    secret_given: bool = False,
    out: Path | None = None,
    split: int = 0,
    workers: int = 0,
    opener: Opener = PosixFile,
) -> SalvageResult:
    """Find all that is left of an image, of which any volume may be named; with ``out``, make a new image of it.

    In that, snapshots that are complete are what they were.  Of others, lost ranges are zeros and recorded as
    unreadable, and they are tagged ``salvaged``.  Raises InvalidImage where nothing can be opened, KeyRefused,
    Refused where ``out`` exists; a new image that cannot be finished is removed.
    """
    with opened(image, secret, job, secret_given=secret_given, workers=workers, opener=opener) as (
        repository,
        result,
    ):
        if out is not None:
            with _new_image(repository, out, split, opener) as target:
                _keep(repository, result, target, job, workers)
    return result


@contextmanager
def opened(
    image: Path,
    secret: SecretSource,
    job: Job,
    *,
    secret_given: bool = False,
    workers: int = 0,
    opener: Opener = PosixFile,
) -> Iterator[tuple[Repository, SalvageResult]]:
    """A repository, for reading, of all that is left of an image; and what that is."""
    workers = workers or len(os.sched_getaffinity(0))
    store = RescueStore.open(image, job, opener)
    try:
        result = SalvageResult(container=store.uuid.hex())
        heads, config, master = _unlocked(store, image, secret, result)
        if secret_given and not config.encrypted:
            raise KeyRefused(f"{image}: {NOT_ENCRYPTED}")
        result.image = config.id
        sealer = Sealer(Keys.derive(master, encrypted=config.encrypted))
        found = _snapshots(store, sealer, result)
        remains = Remains(store, sealer, job)
        _prove(remains, found, config, job, workers)
        result.intact, result.damaged, result.missing, result.unused = remains.counts
        packs, extra = remains.as_objects()
        snapshots = {name: store.pieces[name] for name in store.pieces if name.startswith(records.PREFIX)}
        known = {records.PREFIX + snapshot.id: data for snapshot, data in found}
        kept_heads = {CONFIG: heads.objects.get(CONFIG, encode_config(config))} | {
            name: data for name, data in heads.objects.items() if name.startswith(KEYS)
        }
        over = store.over({**packs, **snapshots}, extra | known | kept_heads)
        repository = Repository(over, config, sealer, master)
        _judge(repository, [snapshot for snapshot, _ in found], result, job)
        _tell_damage(store, result)
        yield repository, result
    finally:
        store.close()


def _tell_damage(store: RescueStore, result: SalvageResult) -> None:
    """What is wrong with the image, in front of what is known by now."""
    copies = [name for name in store.damaged if name == CONFIG or name.startswith((KEYS, SPARES))]  # one was enough
    others = [name for name in store.damaged if name not in copies]
    result.doubts += [*store.doubts, *_not_whole(others)]
    result.problems[:0] = [*store.problems, *_not_whole(copies), *result.doubts]


def _not_whole(names: list[str]) -> list[str]:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"not whole: {names[0]}{more}"] if names else []


# ---------------------------------------------------------------------- what opens it


def _unlocked(
    store: RescueStore, image: Path, secret: SecretSource, result: SalvageResult
) -> tuple[Heads, Config, bytes]:
    """Configuration and master key, from whatever copy there is; from a deleted one where there is no other."""
    problem: FormatError | None = None
    for pieces in (store.pieces, {**store.deleted, **store.pieces}):
        told: list[str] = []
        heads = read_heads(store.over(pieces), told.append)
        slots = _slots(heads)
        try:
            config = _config(heads, slots)
            result.problems += told
            if not config.encrypted:
                return heads, config, config.clear_master
        except UnsupportedError:
            raise
        except FormatError as error:
            problem = error
            continue
        if not slots:
            continue
        chosen = secret(image)
        if chosen is None:
            raise KeyRefused(f"{image} is encrypted: give its passphrase or key file")
        try:
            return heads, config, unlock(slots, chosen, config.id)[0]
        except (FormatError, KeyRefused) as error:
            raise error.of(str(image)) from None
    raise InvalidImage(f"{image}: {_NO_KEYS}") from problem


def _slots(heads: Heads) -> list[KeySlot]:
    found = []
    for data in heads.slots.values():
        try:
            found.append(decode_slot(data))
        except FormatError:
            continue
    return found


def _config(heads: Heads, slots: list[KeySlot]) -> Config:
    """Raises FormatError.  Of an encrypted image it holds nothing that others do not, but sizes for new chunks."""
    try:
        return decode_config(heads.config)
    except InvalidImage:
        if not slots:
            raise
        heads.objects.pop(CONFIG, None)
        known = next((slot.image for slot in slots if slot.image), None)  # which its slots are bound to
        return new_config(master=None, chunk_size=DEFAULT_CHUNK, pack_size=DEFAULT_PACK, image=known)


# ---------------------------------------------------------------------- what is there


def _snapshots(store: RescueStore, sealer: Sealer, result: SalvageResult) -> list[tuple[Snapshot, bytes]]:
    """The snapshots that can be opened, and their sealed records; oldest first."""
    found, room = [], records.Room()
    for name, pieces in sorted(store.pieces.items()):
        if not name.startswith(records.PREFIX):
            continue
        for piece in pieces:
            if piece.length > MAX_PLAIN + sealer.overhead:
                continue
            frame = store.read(piece, 0, piece.length)
            try:
                plain = sealer.unseal_object(name, frame)
                if len(frame) > len(plain) + sealer.overhead:
                    raise CorruptObject(name, "its frame is longer than what is in it")
                room.take(name, len(frame), len(plain))
                found.append((records.decode(name, plain), frame))
            except CorruptObject:
                continue
            break
        else:
            result.lost_snapshots.append(name.removeprefix(records.PREFIX))
    frames = {snapshot.id: frame for snapshot, frame in found}
    return [(snapshot, frames[snapshot.id]) for snapshot in records.ordered(snapshot for snapshot, _ in found)]


def _prove(remains: Remains, found: list[tuple[Snapshot, bytes]], config: Config, job: Job, workers: int) -> None:
    """Open everything that the snapshots need; where something is lost, look for it by its content, once."""
    for last in (False, True):
        job.begin("finding what snapshots need")
        seen: set[bytes] = set()
        for snapshot, _ in found:
            for disk in snapshot.disks:
                for region in disk.regions:
                    for page in ChunkMap(region.root, disk.cells(region), remains.chunk).walk(seen.__contains__):
                        seen.add(page.page_id)
                        ids = np.frombuffer(page.page_id, f"V{ID_SIZE}")
                        if page.ids is not None:
                            ids = np.concatenate([ids, page.ids[page.ids != np.void(ZERO_ID)]])
                        remains.need(ids)
                        job.advance(0)
        remains.prove(workers)
        _, damaged, missing, _ = remains.counts
        if last or not (damaged or missing) or not remains.look_for_frames(_lengths(found, config)):
            return


def _lengths(found: list[tuple[Snapshot, bytes]], config: Config) -> set[int]:
    """Bytes that a chunk may have."""
    lengths = {PAGE_SIZE, config.chunk_size}
    for snapshot, _ in found:
        for disk in snapshot.disks:
            lengths.add(disk.chunk_size)
            lengths.update(region.length % disk.chunk_size for region in disk.regions)
    return lengths


def _judge(repository: Repository, known: list[Snapshot], result: SalvageResult, job: Job) -> None:
    job.begin("checking snapshots")
    lost: dict[str, list[Damage]] = {}
    for damage in find_damage(repository, set(), known, job):
        lost.setdefault(damage.snapshot, []).append(damage)
    result.snapshots = [Salvaged(snapshot, tuple(lost.get(snapshot.id, ()))) for snapshot in known]


# ---------------------------------------------------------------------- a new image


@contextmanager
def _new_image(repository: Repository, out: Path, split: int, opener: Opener) -> Iterator[Repository]:
    refuse_no_device(out)
    if os.path.lexists(out):
        raise Refused(f"{out} exists; salvage writes into a new file only")
    if not out.parent.is_dir():
        raise Refused(f"the folder {out.parent} does not exist")
    store = Container.create(out, split=split, opener=opener)
    try:
        with repository.twin(store) as target:
            try:
                yield target
            except BaseException:
                store.discard()
                raise
    except BaseException:
        store.discard()
        raise


def _keep(repository: Repository, result: SalvageResult, target: Repository, job: Job, workers: int) -> None:
    complete = [one.snapshot for one in result.snapshots if one.complete]
    result.kept += copy(repository, complete, target, job, workers=workers).copied
    for one in result.snapshots:
        if not one.complete:
            job.begin(f"copying what is left of {one.snapshot.name}")
            result.kept.append(keep(repository, one.snapshot, target, job, workers=workers))
    unread = IntegrityError("the new image cannot be read")
    if {s.id for s in target.snapshots()} != {s.id for s in result.kept}:
        raise unread
