"""What is fuzzed: each target takes any bytes, and may only return or raise what ferrotype raises on purpose."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Final

import numpy as np

from ferrotype.block import Source
from ferrotype.engine.references import parse
from ferrotype.engine.survey import survey
from ferrotype.errors import FerrotypeError
from ferrotype.filesystems import Module
from ferrotype.filesystems.registry import FILESYSTEMS, identify
from ferrotype.repository import spare
from ferrotype.repository.config import decode_config
from ferrotype.repository.keys import decode_slot
from ferrotype.repository.snapshots import decode
from ferrotype.units import format_size, parse_size
from ferrotype.volumes import apm, gpt, mbr
from ferrotype.volumes.relocate import moved_backup
from ferrotype.volumes.scan import scan
from tests.fuzz import hostile, images, mending, mutate, seeds
from tests.fuzz.sparse import Sparse, SparseDisk

Seeds = Callable[[], tuple[bytes, ...]]
Mutate = Callable[[random.Random, bytes], bytes]


@dataclass(frozen=True, slots=True)
class Target:
    """One thing that reads what it cannot trust."""

    name: str
    run: Callable[[bytes], None]
    seeds: Seeds
    mutate: Mutate
    more: Seeds = tuple  # seeds for long runs only


_RANGES: Final = 64  # of bytes that are asked for their files


def _disk(data: bytes, sector_size: int = 512) -> SparseDisk:
    content = Sparse.decode(data)
    content.size = min(content.size, mutate.MOST_SIZE)
    return SparseDisk(content, sector_size)


# ---------------------------------------------------------------------- partition tables


def _table(read: Callable[[Source, int], object], data: bytes) -> None:
    disk = _disk(data)
    for sector_size in (512, 4096):
        try:
            read(disk, sector_size)
        except FerrotypeError:
            continue


def _gpt(data: bytes) -> None:
    _table(gpt.read, data)
    disk = _disk(data)
    moved_backup(disk, disk.size + (1 << 20), 512)


def _scan(data: bytes) -> None:
    scan(_disk(data))
    scan(_disk(data), sector_size=4096)


# ---------------------------------------------------------------------- file systems


def _filesystem(kind: str, data: bytes) -> None:
    """All that a file system is asked, whatever the answer before was."""
    module: Module = import_module(FILESYSTEMS[kind])
    disk = _disk(data)
    module.probe(disk)
    opened = module.open(disk)
    for ask in (opened.allocation, opened.swap_files, partial(opened.files_at, *_everywhere(disk.size))):
        try:
            ask()
        except FerrotypeError:
            continue


def _everywhere(size: int) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], ...]:
    """Ranges all over a volume, each half of what lies to the next."""
    edges = np.unique(np.linspace(0, size, 2 * _RANGES + 1, dtype=np.int64))
    edges = edges[: len(edges) // 2 * 2]
    return edges[0::2].copy(), edges[1::2].copy()


def _identify(data: bytes) -> None:
    found = identify(_disk(data))
    if found is not None and found.filesystem is not None:
        assert found.filesystem.facts.kind == found.kind


def _survey(data: bytes) -> None:
    """A whole disk.  Content never makes a survey fail, and its map is complete."""
    disk = _disk(data)
    try:
        found = survey(disk, exclude_swap_files=True)
    except FerrotypeError as error:
        raise AssertionError("a survey fails on content") from error
    assert (found.extents.start, found.extents.end) == (0, disk.size)
    assert sum(length for _, length in found.regions) == disk.size


# ---------------------------------------------------------------------- words and records


def _reference(data: bytes) -> None:
    parse(data.decode("utf-8", "replace"))


def _size(data: bytes) -> None:
    format_size(abs(parse_size(data.decode("utf-8", "replace"))))


def _record(read: Callable[[bytes], object], data: bytes) -> None:
    read(data)


# ---------------------------------------------------------------------- the table


def _disks(
    name: str, run: Callable[[bytes], None], made: Seeds, kind: str, mend: mutate.Mend | None = None
) -> Target:
    return Target(name, run, made, partial(mutate.disk, mend=mend), partial(seeds.from_corpus, kind))


def _every_filesystem() -> tuple[bytes, ...]:
    return tuple(disk for kind in FILESYSTEMS for disk in seeds.filesystem(kind)[:1])


def _tables() -> tuple[bytes, ...]:
    return tuple(disk for kind in ("mbr", "gpt", "apm") for disk in seeds.table(kind))


_TEXTS: Final = (b"disk.img", b"a.ferro::latest~2/sda#1", b"/dev/sda#EFI", b"x::y::z/#")
_SIZES: Final = (b"4096", b"64KiB", b"1.5 TiB", b"4G", b"12 EiB")

TARGETS: Final[dict[str, Target]] = {
    target.name: target
    for target in (
        _disks("mbr", partial(_table, mbr.read), partial(seeds.table, "mbr"), "table"),
        _disks("gpt", _gpt, partial(seeds.table, "gpt"), "table", mending.gpt),
        _disks("apm", partial(_table, apm.read), partial(seeds.table, "apm"), "table"),
        _disks("scan", _scan, _tables, "table", mending.gpt),
        *(
            _disks(kind, partial(_filesystem, kind), partial(seeds.filesystem, kind), kind, mending.MENDS.get(kind))
            for kind in FILESYSTEMS
        ),
        _disks("identify", _identify, _every_filesystem, "other"),
        _disks("survey", _survey, seeds.whole_disks, "table", mending.gpt),
        *(
            Target(
                f"image-{name}",
                partial(images.run, name),
                partial(images.seeds, name),
                partial(mutate.disk, mend=images.mend(name)),
            )
            for name in images.NAMES
        ),
        Target("reference", _reference, lambda: _TEXTS, mutate.text),
        Target("size", _size, lambda: _SIZES, mutate.text),
        Target("config", partial(_record, decode_config), hostile.configs, mutate.text),
        Target("slot", partial(_record, decode_slot), hostile.slots, mutate.text),
        Target("snapshot", partial(_record, partial(decode, "snapshot/00")), hostile.snapshots, mutate.text),
        Target("spare", partial(_record, spare.decode), hostile.spares, mutate.text),
        Target("lock", hostile.read_lock_file, hostile.locks, mutate.text),
        Target("container", hostile.read_container, hostile.containers, hostile.mutate_container),
        Target("writer", hostile.write_container, hostile.containers, hostile.mutate_container),
        Target("salvage", hostile.salvage_container, hostile.containers, hostile.mutate_damaged),
        Target("repository", hostile.read_repository, hostile.recipes, mutate.tree),
        Target("objects", hostile.read_objects, hostile.recipes, mutate.tree),
    )
}
