"""File systems, as far as imaging needs them: which one it is, what it calls itself, and what it does not use.

Each file system is one module with a class that satisfies ``FileSystem`` and two functions:

    probe(source) -> bool            cheap, never raises on content: does the superblock say it is ours?
    open(source) -> FileSystem       raises InvalidImage or UnsupportedError

``source`` is the volume: byte 0 is the first byte of the partition.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ferrotype.block import Source
from ferrotype.extents import ExtentMap, Offsets

__all__ = ["Claims", "Facts", "FileSystem", "Module"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file system says of itself."""

    kind: str  # blkid's name: ext2 ext3 ext4 ntfs vfat exfat swap ...
    label: str | None
    uuid: str | None  # as blkid prints it
    block_size: int  # bytes of one allocation unit (ext: block, or cluster with bigalloc; NTFS, FAT, exFAT: cluster)
    size: int  # bytes the file system spans, from the start of the volume
    unclean: str | None  # None: cleanly unmounted; else why its map cannot be trusted, for the user
    written: int | None = None  # seconds since 1970 of what was written to it last, as far as it tells
    besides: str | None = None  # what its free space holds that somebody may want, for the user


@dataclass(frozen=True, slots=True, eq=False)
class Claims:
    """Some of what a file system occupies: bytes of its volume, starts[i] up to ends[i], in any order."""

    starts: Offsets
    ends: Offsets
    files: int = 0  # files and folders that were met on the way to them


class FileSystem(Protocol):
    """An opened file system."""

    @property
    def facts(self) -> Facts: ...

    def allocation(self) -> ExtentMap:
        """The whole volume: FREE where the file system does not use it, DATA (no flag) everywhere else.

        Exact to the file system's own unit.  What lies behind the end of the file system is not FREE.  Raises
        InvalidImage where the map contradicts itself; it is called for unclean file systems too.
        """

    def swap_files(self) -> ExtentMap:
        """The whole volume: FREE where the contents of paging and hibernation files lie (Windows' pagefile.sys,
        hiberfil.sys and swapfile.sys in the root folder), DATA everywhere else."""

    def files_at(self, starts: Offsets, ends: Offsets, /) -> tuple[str, ...]:
        """Which files have content, or a folder its list of names, in any of the ranges: paths from the root, sorted.

        The ranges are bytes of the volume, ascending and apart: starts[i] up to ends[i].  A file whose name cannot be
        found stands as ``<inode 12>`` or what its file system calls that; the file system's own structures stand as
        such, ``<inode table>``.  Free space belongs to nobody.  Meant for damaged volumes: what cannot be read or
        contradicts itself is left out, and never raised.  A file with several names stands under one of them at
        least.
        """

    def claims(self) -> Iterator[Claims]:
        """All that is in use, found without the map of free space: a second opinion on ``allocation``.

        Structures and their copies, and every file's content, by whole units, from whatever says who owns what:
        inodes, file records, folders, chains.  Something may come twice.  Raises InvalidImage where the walk meets
        what it cannot follow or believe, and ReadError: then nothing is proven.
        """


class Module(Protocol):
    """What a file system's module offers; the table in ``registry`` names the modules."""

    def probe(self, source: Source, /) -> bool: ...

    def open(self, source: Source, /) -> FileSystem: ...
