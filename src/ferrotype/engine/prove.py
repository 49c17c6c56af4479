"""A second opinion on what a backup leaves out: nothing that a file system needs may stand there.

    the survey's FREE of a volume       from the map of allocation: bitmaps, the FAT
                │  must not meet
    the volume's claims                 from inodes, file records, folders, chains; the map is not asked

Both come from the same bytes, but not from the same structures, nor from the same code: a map that is wrong, and a
mistake in reading it, show.  A volume that cannot be walked to its end is not proven.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from ferrotype.block import Source
from ferrotype.block.views import Slice
from ferrotype.engine.survey import Survey, Volume
from ferrotype.errors import DeviceError, FormatError, InvalidImage
from ferrotype.extents import ExtentMap, State, merge
from ferrotype.filesystems import Claims, FileSystem
from ferrotype.filesystems.registry import identify
from ferrotype.filesystems.remains import Ranges
from ferrotype.job import Job
from ferrotype.units import format_size

__all__ = ["Proof", "believe", "prove", "require"]

_MOST_CONFLICTS: Final = 1 << 16  # pieces that are looked for: with so many a volume needs no longer list
_NAMED: Final = 3  # files in a sentence
_SWAP_FILES: Final = {"pagefile.sys", "hiberfil.sys", "swapfile.sys"}
_CHECKERS: Final = {"ntfs": "chkdsk", "vfat": "fsck.fat", "exfat": "fsck.exfat"}


@dataclass(frozen=True, slots=True)
class Proof:
    """What a second look at a volume says of the space that is left out of it."""

    volume: Volume
    free_bytes: int  # left out
    files: int  # files and folders that were met
    conflicts: tuple[tuple[int, int], ...] = ()  # (start, length), bytes of the disk that are left out and in use
    names: tuple[str, ...] = ()  # whose they are, as far as that is known
    problem: str | None = None  # why the volume could not be walked
    walkable: bool = True  # False: its file system, of a plug-in, has no second way

    @property
    def proven(self) -> bool:
        return not self.conflicts and self.problem is None

    def as_json(self) -> dict[str, Any]:
        return {
            "proven": self.proven,
            "files": self.files,
            "free_bytes": self.free_bytes,
            "conflicts": [{"start": start, "length": length} for start, length in self.conflicts],
            "names": list(self.names),
            "problem": self.problem,
        }


def prove(source: Source, surveyed: Survey, job: Job, *, exclude_swap_files: bool = False) -> tuple[Proof, ...]:
    """A proof, or what there is instead, for each volume of which something is left out.

    Time grows with the structures that are walked: inode tables, $MFT, folders and the FAT are read once.  Memory is
    bounded but for the free runs, which the survey has already, and the pieces that chains of a FAT are in.
    """
    proofs, found = [], 0
    for volume in surveyed.volumes:
        free = surveyed.extents.clip(volume.start, volume.size).shift(-volume.start).masked(State.FREE)
        if not (left_out := free.total(State.FREE)):
            continue
        found += left_out
        view = Slice(source, volume.start, volume.size)
        files = _Count()
        try:
            identified = identify(view)
            filesystem = identified.filesystem if identified else None
            if filesystem is None or not hasattr(filesystem, "claims"):
                problem = "there is no second way to tell what is in use there"
                proofs.append(Proof(volume, left_out, 0, problem=problem, walkable=False))
                continue
            conflicts = _conflicts(filesystem, free, files, job)
            conflicts, names = _named(filesystem, conflicts, exclude_swap_files=exclude_swap_files)
        except (FormatError, DeviceError) as error:
            proofs.append(Proof(volume, left_out, files.total, problem=str(error)))
            continue
        ranges = tuple((volume.start + start, end - start) for start, end in _pairs(conflicts))
        proofs.append(Proof(volume, left_out, files.total, ranges, names))
    if found != surveyed.extents.total(State.FREE):
        raise InvalidImage("space outside all volumes would be left out, and nothing tells what is in use there")
    return tuple(proofs)


def require(proofs: tuple[Proof, ...], name: str, job: Job) -> None:
    """Tell what is proven.  Raises InvalidImage for the first volume that is not."""
    for proof in proofs:
        title, kind = proof.volume.title, proof.volume.filesystem or "its file system"
        if proof.proven:
            job.note(
                f"{name}: what is left out of {title} is proven: {proof.files} files and folders and the structures"
                f" of {kind} touch none of the {format_size(proof.free_bytes)} of free space"
            )
            continue
        why = _why(proof, f"{title}, {kind}")
        raise InvalidImage(
            f"{name}: {why}; nothing was stored: repair it with {_checker(kind)}, or use --all-sectors"
        )


def believe(surveyed: Survey, proofs: tuple[Proof, ...], name: str, job: Job) -> Survey:
    """The survey, with volumes kept whole whose map of free space is wrong, or that cannot be walked; told."""
    doubtful = [proof for proof in proofs if proof.walkable and not proof.proven]
    if not doubtful:
        return surveyed
    notes: dict[int, str] = {}
    for proof in doubtful:
        why = _why(proof, "it")
        notes[id(proof.volume)] = why
        checker = _checker(proof.volume.filesystem or "")
        title = f"{proof.volume.title}, {proof.volume.filesystem or 'its file system'},"
        job.warn(f"{name}: {title} is kept whole: {why}; repair it with {checker}")
    return replace(
        surveyed,
        volumes=tuple(replace(v, note=notes[id(v)]) if id(v) in notes else v for v in surveyed.volumes),
        extents=surveyed.extents.cleared(State.FREE, [(p.volume.start, p.volume.size) for p in doubtful]),
    )


def _why(proof: Proof, volume: str) -> str:
    """What is wrong with the map, not proven, of what the sentence calls ``volume``."""
    if not proof.conflicts:
        return f"what would be left out of {volume} cannot be proven: {proof.problem}"
    start, length = proof.conflicts[0]
    others = f", and {len(proof.conflicts) - 1} more ranges" if len(proof.conflicts) > 1 else ""
    whose = ", ".join(proof.names[:_NAMED]) or "something in use"
    whose += f" and {len(proof.names) - _NAMED} more" if len(proof.names) > _NAMED else ""
    return (
        f"the map of free space of {volume} is wrong: it would leave out {whose}"
        f" ({length} bytes at {start} of the disk{others})"
    )


def _checker(kind: str) -> str:
    return _CHECKERS.get(kind, "e2fsck -f" if kind.startswith("ext") else "its checker")


class _Count:
    """How many files were met, also by a walk that failed."""

    total = 0


def _conflicts(filesystem: FileSystem, free: ExtentMap, files: _Count, job: Job) -> ExtentMap:
    """FREE where something claims what is free.  What is wrong with the walk is raised if there is nothing."""
    ranges = Ranges(*free.runs(State.FREE))
    hits: list[Claims] = []
    count = 0
    problem: Exception | None = None
    try:
        for claims in filesystem.claims():
            job.advance(0)
            files.total += claims.files
            touched = np.flatnonzero(ranges.touch(claims.starts, claims.ends))
            if len(touched):
                hits.append(Claims(claims.starts[touched], claims.ends[touched]))
                count += len(touched)
            if count > _MOST_CONFLICTS:
                break
    except (FormatError, DeviceError) as error:
        problem = error
    if hits:
        return _both(free, hits)
    if problem is not None:
        raise problem
    return ExtentMap.uniform(free.start, free.length)


def _both(free: ExtentMap, hits: list[Claims]) -> ExtentMap:
    """FREE where there is a claim and free space."""
    starts = np.concatenate([hit.starts for hit in hits])
    ends = np.concatenate([hit.ends for hit in hits])
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    apart = starts[1:] > ends[:-1]
    starts, ends = starts[np.append(True, apart)], ends[np.append(apart, True)]
    return _common(free, ExtentMap.from_runs(free.start, free.length, starts, ends, State.FREE))


def _named(
    filesystem: FileSystem, conflicts: ExtentMap, *, exclude_swap_files: bool
) -> tuple[ExtentMap, tuple[str, ...]]:
    """The conflicts, and whose they are.  Paging files that are to be left out are none, unless others are there."""
    if not conflicts.total(State.FREE):
        return conflicts, ()
    if exclude_swap_files:
        swap = filesystem.swap_files()
        names = filesystem.files_at(*_common(conflicts, swap).runs(State.FREE))
        if {name.lower() for name in names} <= _SWAP_FILES:
            conflicts = conflicts.cleared(State.FREE, ((start, end - start) for start, end in _pairs(swap)))
    starts, ends = conflicts.runs(State.FREE)
    return conflicts, filesystem.files_at(starts, ends) if len(starts) else ()


def _common(one: ExtentMap, other: ExtentMap) -> ExtentMap:
    """FREE where both are, and nothing else."""
    marked = merge(one.masked(State.FREE), other.masked(State.FREE).translate({State.FREE: State.CLEAN}))
    return marked.translate({State.FREE: State.DATA, State.CLEAN: State.DATA}).masked(State.FREE)


def _pairs(found: ExtentMap) -> Iterator[tuple[int, int]]:
    starts, ends = found.runs(State.FREE)
    yield from zip(starts.tolist(), ends.tolist(), strict=True)
