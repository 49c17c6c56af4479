"""Counts work: what is read, hashed, compressed, stored and looked up while a verb runs.  No clock is asked.

    with counting() as work:
        backup(...)
    work.size("hash", key)          bytes
    work.count("compress")          calls

Every count is taken where the work is really done: at the libraries that hash, compress and encrypt, at the system
calls, and at the seams of the object store and the index.  A new way around a function of ours is still counted.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Final
from unittest import mock

import blake3 as blake3_library
import xxhash
from cryptography.hazmat.primitives.ciphers import aead

from ferrotype import linux
from ferrotype.objects.container import Container
from ferrotype.repository import ciphers, sealing
from ferrotype.repository.index import Index
from ferrotype.repository.sealing import ChunkId, Sealer
from ferrotype.repository.writer import Writer

zstd: Any = vars(sealing)["zstd"]  # the standard library has it from Python 3.14 on

OWNER: Final = "MainThread"
WORKER: Final = "ferrotype_"  # how the names of a verb's workers begin
PACKS: Final = "ferrotype-packs"  # the thread that puts packs
STORAGE: Final = "ferrotype-storage"  # hands that make the calls which may stall


@dataclass(frozen=True, slots=True)
class Call:
    """One piece of work."""

    what: (
        str  # read, write, zero, sync; hash, check, compress, decompress, encrypt, decrypt; get, put, flush; ask, add
    )
    about: str | bytes  # path of the file, key of the hash, name of the object; else nothing
    at: int  # where in the file or object
    size: int  # bytes; of "ask" the number of ids
    thread: str


@dataclass(slots=True)
class Work:
    """All calls, in the order in which they were made."""

    calls: list[Call] = field(default_factory=list, repr=False)
    ids: bytes = b""  # the key that chunks and map pages are hashed with, where the caller has set it
    objects: bytes = b""  # the key that index pages, tables of packs and records of snapshots are hashed with

    def note(self, what: str, size: int, about: str | bytes = "", at: int = 0) -> None:
        self.calls.append(Call(what, about, at, size, threading.current_thread().name))

    def of(self, what: str, about: str | bytes | os.PathLike[str] | None = None, by: str = "") -> list[Call]:
        """Calls of a kind; those about a file, a key, or the objects whose names begin so; those of some threads."""
        wanted = os.fspath(about) if about is not None else None
        return [
            call
            for call in self.calls
            if call.what == what
            and call.thread.startswith(by)
            and (
                wanted is None
                or call.about == wanted
                or (what in _STORE and isinstance(wanted, str) and str(call.about).startswith(wanted))
            )
        ]

    def count(self, what: str, about: str | bytes | os.PathLike[str] | None = None, by: str = "") -> int:
        return len(self.of(what, about, by))

    def size(self, what: str, about: str | bytes | os.PathLike[str] | None = None, by: str = "") -> int:
        return sum(call.size for call in self.of(what, about, by))

    def threads(self, what: str) -> set[str]:
        return {call.thread for call in self.of(what)}


_STORE: Final = ("get", "put", "prove", "delete")


def id_key(sealer: Sealer) -> bytes:
    """The key that chunks and map pages are hashed with, for their ids and to prove them."""
    return sealer._keys.ids


def object_key(sealer: Sealer) -> bytes:
    """The key that index pages, tables of packs and records of snapshots are proven with."""
    return sealer._keys.objects


def ranges(calls: list[Call]) -> list[tuple[int, int]]:
    """(start, end) of what the calls touched, ascending and each on its own: what was touched twice shows."""
    return sorted((call.at, call.at + call.size) for call in calls)


def joined(found: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending ranges with neighbours as one.  Fails where two overlap: those bytes were touched twice."""
    out: list[tuple[int, int]] = []
    for start, end in found:
        assert not out or start >= out[-1][1], f"{out[-1][1] - start} bytes from {start} on were touched twice"
        if out and out[-1][1] == start:
            start = out.pop()[0]
        out.append((start, end))
    return out


@contextmanager
def counting() -> Iterator[Work]:
    """Counts everything that this process does in the block, by whichever thread."""
    work = Work()
    with ExitStack() as stack:
        for owner, name, counted in (*_system_calls(work), *_libraries(work), *_seams(work)):
            for user in (owner, *_users(name, getattr(owner, name))):
                stack.enter_context(mock.patch.object(user, name, counted))
        yield work


def _users(name: str, original: object) -> list[ModuleType]:
    """The modules of ours that have imported a name already."""
    ours = [module for known, module in list(sys.modules.items()) if known.split(".")[0] == "ferrotype"]
    return [module for module in ours if vars(module).get(name) is original]


# ---------------------------------------------------------------------- system calls


def _system_calls(work: Work) -> list[tuple[Any, str, Any]]:
    pread, preadv, pwrite, pwritev = os.pread, os.preadv, os.pwrite, os.pwritev

    def reading(fd: int, length: int, offset: int) -> bytes:
        data = pread(fd, length, offset)
        work.note("read", len(data), _path(fd), offset)
        return data

    def reading_into(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        count = preadv(fd, buffers, offset, flags)
        work.note("read", count, _path(fd), offset)
        return count

    def writing(fd: int, data: Any, offset: int) -> int:
        count = pwrite(fd, data, offset)
        work.note("write", count, _path(fd), offset)
        return count

    def writing_many(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        count = pwritev(fd, buffers, offset, flags)
        work.note("write", count, _path(fd), offset)
        return count

    def syncing(original: Callable[[int], None]) -> Callable[[int], None]:
        def sync(fd: int) -> None:
            work.note("sync", 0, _path(fd))
            original(fd)

        return sync

    def zeroing(original: Callable[[int, int, int], bool]) -> Callable[[int, int, int], bool]:
        def zero(fd: int, offset: int, length: int) -> bool:
            work.note("zero", length, _path(fd), offset)
            return original(fd, offset, length)

        return zero

    return [
        (os, "pread", reading),
        (os, "preadv", reading_into),
        (os, "pwrite", writing),
        (os, "pwritev", writing_many),
        (os, "fsync", syncing(os.fsync)),
        (os, "fdatasync", syncing(os.fdatasync)),
        (linux, "punch_hole", zeroing(linux.punch_hole)),
        (linux, "zero_range", zeroing(linux.zero_range)),
    ]


def _path(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


# ---------------------------------------------------------------------- libraries


def _libraries(work: Work) -> list[tuple[Any, str, Any]]:
    """What hashes, compresses and encrypts, by its home, its name, and with a count."""
    blake3, xxh3_128, xxh3_128_digest = blake3_library.blake3, xxhash.xxh3_128, xxhash.xxh3_128_digest
    compressor, decompressor = zstd.ZstdCompressor, zstd.ZstdDecompressor
    cipher: type[aead.AESGCM] = vars(ciphers)["AESGCM"]  # of a module that plain images do not load
    compress_once, decompress_once = zstd.compress, zstd.decompress

    class Hash:
        """BLAKE3; told by its key, which says what is hashed."""

        def __init__(self, data: Any = b"", /, *, key: bytes = b"", **options: Any) -> None:
            options |= {"key": key} if key else {}
            self._key = key
            self._hash = blake3(**options)
            if len(data):
                self.update(data)

        def update(self, data: Any, /) -> Hash:
            work.note("hash", len(data), self._key)
            self._hash.update(data)
            return self

        def digest(self, **options: Any) -> bytes:
            return self._hash.digest(**options)

        def hexdigest(self) -> str:
            return self._hash.hexdigest()

    class Check:
        """XXH3, which proves stored bytes."""

        def __init__(self, data: Any = b"") -> None:
            self._digest = xxh3_128()
            if len(data):
                self.update(data)

        def update(self, data: Any) -> None:
            work.note("check", len(data))
            self._digest.update(data)

        def digest(self) -> bytes:
            return self._digest.digest()

    class Compressor:
        CONTINUE, FLUSH_BLOCK, FLUSH_FRAME = compressor.CONTINUE, compressor.FLUSH_BLOCK, compressor.FLUSH_FRAME

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._compressor = compressor(*args, **kwargs)

        def compress(self, data: Any, mode: int = compressor.CONTINUE) -> bytes:
            work.note("compress", len(data))
            packed: bytes = self._compressor.compress(data, mode)
            return packed

    class Decompressor:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._decompressor = decompressor(*args, **kwargs)

        def decompress(self, data: Any, max_length: int = -1) -> bytes:
            plain: bytes = self._decompressor.decompress(data, max_length)
            work.note("decompress", len(plain))
            return plain

    class Cipher:
        def __init__(self, key: bytes) -> None:
            self._cipher = cipher(key)

        def encrypt(self, nonce: Any, data: Any, head: Any) -> bytes:
            work.note("encrypt", len(data))
            sealed: bytes = self._cipher.encrypt(nonce, data, head)
            return sealed

        def decrypt(self, nonce: Any, data: Any, head: Any) -> bytes:
            work.note("decrypt", len(data))
            plain: bytes = self._cipher.decrypt(nonce, data, head)
            return plain

    def compress(data: Any, *args: Any, **kwargs: Any) -> bytes:
        work.note("compress", len(data))
        packed: bytes = compress_once(data, *args, **kwargs)
        return packed

    def decompress(data: Any, *args: Any, **kwargs: Any) -> bytes:
        plain: bytes = decompress_once(data, *args, **kwargs)
        work.note("decompress", len(plain))
        return plain

    def digest(data: Any) -> bytes:
        work.note("check", len(data))
        return xxh3_128_digest(data)

    return [
        (blake3_library, "blake3", Hash),
        (xxhash, "xxh3_128", Check),
        (xxhash, "xxh3_128_digest", digest),
        (zstd, "ZstdCompressor", Compressor),
        (zstd, "ZstdDecompressor", Decompressor),
        (zstd, "compress", compress),
        (zstd, "decompress", decompress),
        (aead, "AESGCM", Cipher),
    ]


# ---------------------------------------------------------------------- seams of our own


def _seams(work: Work) -> list[tuple[Any, str, Any]]:
    def counted(owner: type, name: str, note: Callable[..., None]) -> tuple[type, str, Any]:
        original = getattr(owner, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            note(*args, **kwargs)
            return original(self, *args, **kwargs)

        return owner, name, call

    get = Container.get

    def getting(self: Container, name: str, offset: int = 0, length: int | None = None) -> bytes:
        data = get(self, name, offset, length)
        work.note("get", len(data), name, offset)
        return data

    add = Writer.add

    def adding(self: Writer, chunk_id: ChunkId, frame: bytes) -> bool:
        is_new = add(self, chunk_id, frame)
        if is_new:
            work.note("add", len(frame), chunk_id)
        return is_new

    return [
        (Container, "get", getting),
        counted(Container, "put", lambda name, parts: work.note("put", sum(map(len, parts)), name)),
        counted(Container, "check", lambda name, **_: work.note("prove", 0, name)),
        counted(Container, "delete", lambda name: work.note("delete", 0, name)),
        counted(Container, "flush", lambda: work.note("flush", 0)),
        counted(Index, "find", lambda _: work.note("ask", 1)),
        counted(Index, "find_many", lambda ids: work.note("ask", len(ids))),
        (Writer, "add", adding),
    ]
