"""Targets that are images: containers with their checksums made right, and repositories built by recipe."""

from __future__ import annotations

import functools
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from unittest import mock

import msgspec
import numpy as np

from ferrotype.block.memory import MemoryDisk
from ferrotype.engine.checksum import checksum
from ferrotype.engine.restore import Part, RestoreOptions, restore
from ferrotype.engine.salvage import salvage
from ferrotype.engine.survey import survey
from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.errors import Cancelled, FerrotypeError
from ferrotype.job import NullJob
from ferrotype.objects.container import Container
from ferrotype.objects.holder import Holder, look
from ferrotype.objects.machine import THIS_MACHINE
from ferrotype.objects.memory import MemoryStore
from ferrotype.repository import source, spare
from ferrotype.repository.keys import Cost, encode_slot, lock
from ferrotype.repository.sealing import ID_SIZE
from ferrotype.repository.source import SnapshotSource
from ferrotype.repository.store import Repository
from ferrotype.repository.writer import open_writer
from tests.fuzz import mending, mutate
from tests.fuzz.recipe import CONFIG, build, reference
from tests.fuzz.sparse import Sparse
from tests.repository.small import QUICK, SECRET, back_up, create, disk_content

_MOST_FILE: Final = 1 << 32  # bytes of an image file, holes included
_MOST_STEPS: Final = 60  # a job is stopped after so many steps, as its user might
_MOST_READ: Final = 1 << 20  # bytes of an object that are read
_READS: Final = 12
_MOST_PAGES: Final = 512  # of a map that are looked at for extents: far less than usual, so that the bound is met


class Impatient(NullJob):
    """Stops the work after some steps."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def advance(self, count: int, /) -> None:  # noqa: ARG002
        self.steps += 1
        if self.steps > _MOST_STEPS:
            raise Cancelled


@contextmanager
def _small_bounds() -> Iterator[None]:
    usual = source._MOST_WORK
    source._MOST_WORK = _MOST_PAGES  # type: ignore[misc]
    try:
        yield
    finally:
        source._MOST_WORK = usual  # type: ignore[misc]


@contextmanager
def _suppressed() -> Iterator[None]:
    try:
        yield
    except FerrotypeError:
        return


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """In memory where there is such a place: an image is written for each execution."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(
        prefix=f"ferrotype-fuzz-{os.getpid()}-", dir=memory if os.access(memory, os.W_OK) else None
    )


# ---------------------------------------------------------------------- containers


def mutate_container(rng: random.Random, data: bytes) -> bytes:
    return mutate.disk(rng, data, mending.container, most=_MOST_FILE)


def mutate_damaged(rng: random.Random, data: bytes) -> bytes:
    """Half of them as accidents leave them, with no checksum made right."""
    return mutate.disk(rng, data, mending.container if rng.random() < 0.5 else None, most=_MOST_FILE)


def _image(data: bytes) -> Path:
    path = Path(_folder().name) / f"{os.getpid()}.ferro"
    Sparse.decode(data).save(path, _MOST_FILE)
    return path


def read_container(data: bytes) -> None:
    """Everything that is asked of an image that is opened for reading."""
    store = Container.open(_image(data))
    try:
        for info in list(store.list(""))[:50]:
            with _suppressed():
                store.get(info.name, 0, min(info.size, _MOST_READ))
            if info.size < _MOST_READ:
                with _suppressed():
                    store.check(info.name)
        store.refresh()
        _ = store.live_size, store.file_size
        with _suppressed(), Repository.open(store) as repository:
            _ask(repository)
    finally:
        store.close()


def write_container(data: bytes) -> None:
    """A writer takes up what is there, adds to it and gives space back; then the image can still be opened."""
    path = _image(data)
    store = Container.open(path, writable=True)
    try:
        for info in list(store.list("snapshot/"))[:1]:
            with _suppressed():
                store.delete(info.name)
        with _suppressed():
            store.put("pack/fuzz", [b"some bytes"])
            store.flush()
        with _suppressed():
            store.reclaim()
        with _suppressed():
            store.compact(lambda _: None)
    finally:
        store.close()
    Container.open(path).close()


def salvage_container(data: bytes) -> None:
    """All that is left of it goes into a new image, which holds what salvage says it holds."""
    out = Path(_folder().name) / f"{os.getpid()}-salvaged.ferro"
    try:
        result = salvage(_image(data), lambda _: SECRET, Impatient(), out=out, workers=1)
        store = Container.open(out)
        try:
            opened = Repository.open(store, SECRET if any(store.list("key/")) else None)
            assert {s.id for s in opened.snapshots()} == {s.id for s in result.kept}
        finally:
            store.close()
    finally:
        out.unlink(missing_ok=True)


def read_lock_file(data: bytes) -> None:
    path = Path(_folder().name) / f"{os.getpid()}.lock"
    path.write_bytes(data)
    found = look(path)
    if found is not None and found.holder is not None:
        assert found.holder.words.isprintable()
        _ = found.token, found.holder.runs(THIS_MACHINE)


# ---------------------------------------------------------------------- repositories


def read_repository(data: bytes) -> None:
    """Open an image that matches in every hash, and do with it what people do."""
    with Repository.open(build(data).store) as repository:
        _ask(repository)


def read_objects(data: bytes) -> None:
    """The same objects, one layer further down, and a writer on top of them."""
    made = build(data)
    repository = Repository.open(made.store)
    ids = np.frombuffer(b"".join(made.ids), f"V{ID_SIZE}")
    for ask in _questions(repository, ids):
        with _suppressed():
            ask()
    with _suppressed(), open_writer(repository) as writer:
        writer.add_plain(b"a new chunk")
        writer.checkpoint()
    repository.forget_index()
    _ = repository.index.count


def _questions(repository: Repository, ids: Any) -> Iterator[Callable[[], object]]:
    yield repository.index.packs
    yield lambda: repository.locate_many(ids)
    yield lambda: [repository.index.readable(segment) for segment in list(repository.index.segments)]
    for name in list(repository.packs())[:20]:
        yield functools.partial(repository.pack_table, name)
    for chunk_id in ids[:20]:
        yield functools.partial(repository.chunk, chunk_id.tobytes())


def _ask(repository: Repository) -> None:
    with _small_bounds():
        _ask_all(repository)


def _ask_all(repository: Repository) -> None:
    for snapshot in repository.snapshots()[:3]:
        for disk in snapshot.disks[:3]:
            opened = SnapshotSource(repository, disk)
            for i in range(_READS):
                with _suppressed():
                    at = disk.size * i // _READS
                    opened.read_into(at, memoryview(bytearray(min(10_000, disk.size - at))))
            for ask in (
                lambda opened=opened: checksum(opened, Impatient(), workers=1),
                lambda opened=opened: survey(opened),
                lambda disk=disk: restore(
                    Part(repository, disk, disk.size // 3, min(disk.size - disk.size // 3, 1 << 20)),
                    MemoryDisk(1 << 20, disk.sector_size),
                    RestoreOptions(workers=1),
                    Impatient(),
                ),
            ):
                with _suppressed():
                    ask()
    for deep in (False, True):
        with _suppressed():
            verify(repository, VerifyOptions(workers=1, deep=deep), Impatient())


# ---------------------------------------------------------------------- seeds


@functools.cache
def containers() -> tuple[bytes, ...]:
    """Images with and without encryption, split and whole, with something deleted."""
    made = []
    for secret in (None, SECRET):
        path = Path(_folder().name) / f"seed-{os.getpid()}.ferro"
        with mock.patch("os.urandom", random.Random(1).randbytes):  # the same keys and names each time
            store = Container.create(path)
            with create(store, secret) as repository:
                for day in range(3):
                    back_up(repository, disk_content(6, day), f"day {day}", day=day)
                store.delete(next(store.list("snapshot/")).name)
                store.flush()
                store.reclaim()
        made.append(Sparse.of(path.read_bytes()).encode())
        path.unlink()
    return tuple(made)


def locks() -> tuple[bytes, ...]:
    return (msgspec.json.encode(Holder.here(THIS_MACHINE)),)


def spares() -> tuple[bytes, ...]:
    store = MemoryStore()
    with create(store, SECRET) as repository:
        back_up(repository, disk_content(2, 1), "one")
    return tuple(store.get(info.name) for info in store.list(spare.PREFIX))


def configs() -> tuple[bytes, ...]:
    return (CONFIG, CONFIG.replace(b'"none"', b'"aes-256-gcm"').replace(b'"master"', b'"features":[],"m"'))


@functools.cache
def slots() -> tuple[bytes, ...]:
    return tuple(encode_slot(lock(bytes(32), SECRET, 32 * "0", "first", cost)) for cost in (QUICK, Cost(128, 2, 2)))


def snapshots() -> tuple[bytes, ...]:
    return (_snapshot(3 * 4096, [(0, 4096, bytes(32)), (4096, 2 * 4096, reference(0))]),)


def _snapshot(size: int, regions: list[tuple[int, int, bytes]]) -> bytes:
    disk = {
        "name": "sda",
        "size": size,
        "sector_size": 512,
        "chunk_size": 4096,
        "regions": [
            {"start": start, "length": length, "map": root.hex() if root[:1] != b"@" else (root + b"@hex").decode()}
            for start, length, root in regions
        ],
        "volumes": [{"index": 1, "start": 0, "size": 4096, "filesystem": "ext4"}],
        "unreadable": [[0, 512]],
    }
    facts = {"created": "2026-01-01T00:00:00Z", "host": "h", "name": "n", "tags": ["t"]}
    return msgspec.json.encode({**facts, "disks": [disk]})


@functools.cache
def recipes() -> tuple[bytes, ...]:
    """An honest small image, one of equal pages all the way down, and one of many segments."""
    page = 32768
    honest = [
        CONFIG,
        [[b"abc", 4096], [b"xyz", 4096], [reference(0) + reference(1) + bytes(32 * 1022), page]],
        [[[0, 1], b"", -1, -1], [[2], b"", -1, -1]],
        [[[[0, 0, -1, -1], [1, 0, -1, -1], [2, 1, -1, -1]], -1, [], 1]],
        [_snapshot(3 * 4096, [(0, 4096, bytes(32)), (4096, 2 * 4096, reference(2))])],
    ]
    levels = [[b"abc", 4096], *([reference(i), page] for i in range(4))]
    deep = [
        CONFIG,
        levels,
        [[list(range(5)), b"", -1, -1]],
        [[[[i, 0, -1, -1] for i in range(5)], -1, [], 1]],
        [_snapshot((1 << 42), [(0, 1 << 42, reference(4))])],
    ]
    many = [
        CONFIG,
        [[b"%d" % i, 4096] for i in range(6)],
        [[[i], b"", -1, -1] for i in range(6)],
        [[[[i, i, -1, -1]], -1, [], 1100] for i in range(6)],
        [_snapshot(4096, [(0, 4096, reference(0))])],
    ]
    return tuple(msgspec.msgpack.encode(r) for r in (honest, deep, many))
