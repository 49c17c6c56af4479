"""One connection to an NBD server: the handshake, and requests one after the other.

    server                          client
    NBDMAGIC IHAVEOPT flags  ──>
                             <──    flags
                             <──    IHAVEOPT option length data        structured replies, base:allocation,
    reply magic, option, type,                                         then NBD_OPT_GO, or NBD_OPT_EXPORT_NAME
      length, data           ──>                                       where the server is too old for it
                             <──    request: READ, BLOCK_STATUS, DISC
    simple reply, or chunks  ──>

Source: "The NBD protocol" (doc/proto.md of the NBD project).  The server is believed in nothing: lengths are
bounded before anything is read, and what it sends must be an answer to what was asked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, NoReturn

from ferrotype.errors import DeviceError, InvalidImage, ReadError, UnsupportedError, UsageError
from ferrotype.records import Record, record, u16, u32, u64
from ferrotype.stall import Patience, Storage
from ferrotype.trouble import why

__all__ = ["CAN_MULTI_CONN", "HOLE", "MAX_REQUEST", "ZERO", "Connection", "Export"]

MAX_REQUEST: Final = 32 << 20  # bytes of one read where the server says nothing else ("Block sizes")
MAX_SIZE: Final = 1 << 62  # bytes of an export; beyond it offsets stop being what the kernel and numpy can say
MAX_NAME: Final = 4096  # bytes of an export's name ("String values")
CAN_MULTI_CONN: Final = 1 << 8  # transmission flag: several connections see the same

HOLE, ZERO = 1, 2  # flags of base:allocation

_MAGIC: Final = b"NBDMAGIC"
_OPTIONS: Final = b"IHAVEOPT"
_REPLY: Final = 0x3E889045565A9
_REQUEST: Final = 0x25609513
_SIMPLE, _STRUCTURED = 0x67446698, 0x668E33EF
_FIXED, _NO_ZEROES = 1, 2  # handshake flags

_EXPORT_NAME, _GO, _STRUCTURED_REPLY, _SET_META = 1, 7, 8, 10  # options
_ACK, _INFO, _META = 1, 3, 4  # option replies
_ERROR: Final = 1 << 31
_UNSUPPORTED, _TLS_REQUIRED, _UNKNOWN = _ERROR | 1, _ERROR | 5, _ERROR | 6
_INFO_EXPORT, _INFO_BLOCK_SIZE = 0, 3

_READ, _DISCONNECT, _BLOCK_STATUS = 0, 2, 7  # commands
_DONE: Final = 1  # chunk flag
_NONE, _DATA, _HOLE, _STATUS = 0, 1, 2, 5  # chunk types; errors have the highest bit
_CHUNK_ERROR: Final = 1 << 15

_CONTEXT: Final = b"base:allocation"
_MAX_REPLY: Final = 64 << 10  # bytes of an option's reply, which holds short strings at most
_MAX_REPLIES: Final = 1000  # replies to one option
_MAX_CHUNKS: Final = 1 << 16  # of one answer
_MAX_STATUS: Final = 8 << 20  # bytes of one block status: a million extents
_GONE: Final = frozenset({errno.ESHUTDOWN})  # error numbers of a server that will read nothing more
_TICK: Final = 0.25  # seconds between two looks at whether to go on waiting


@record(endian=">", size=20)
class OptionReply(Record):
    """Fixed newstyle negotiation: what precedes each reply to an option."""

    magic: u64
    option: u32
    type: u32
    length: u32


@record(endian=">", size=28)
class Request(Record):
    """Request message."""

    magic: u32
    flags: u16
    type: u16
    cookie: u64
    offset: u64
    length: u32


@record(endian=">", size=12)
class SimpleReply(Record):
    """Simple reply message, behind its magic number."""

    error: u32
    cookie: u64


@record(endian=">", size=16)
class Chunk(Record):
    """Structured reply chunk message, behind its magic number."""

    flags: u16
    type: u16
    cookie: u64
    length: u32


@dataclass(frozen=True, slots=True)
class Export:
    """What the server says of its export."""

    size: int  # bytes
    flags: int  # "Transmission flags"
    smallest: int = 1  # bytes: requests are multiples of it
    largest: int = MAX_REQUEST


class Connection:
    """A connection that serves one export.  For one thread at a time."""

    def __init__(self, connect: Callable[[], socket.socket], name: str, where: str, patience: Patience) -> None:
        """Raises DeviceError where the server cannot be reached, or does not answer, UsageError where it has no such
        export, UnsupportedError where it wants what this client does not speak, InvalidImage for nonsense.
        """
        self._where = where
        self.patience = patience  # may be another one later
        self.structured = False
        self.context: int | None = None  # of base:allocation, where it was agreed on
        self.broken = False
        self._cookie = 0
        self._socket = self._connected(connect)
        try:
            self._socket.settimeout(_TICK)
            self.export = self._negotiate(name)
        except BaseException:
            self._socket.close()
            raise

    def _connected(self, connect: Callable[[], socket.socket]) -> socket.socket:
        storage = Storage(Path(self._where), self.patience, "nothing was changed")  # names are looked up for long
        try:
            return storage.call(lambda _: connect(), late=lambda made: made.close())
        except OSError as error:
            raise DeviceError(f"{self._where} cannot be reached: {error.strerror or error}") from error
        finally:
            storage.release()

    def close(self) -> None:
        """Say goodbye, without waiting for an answer."""
        if not self.broken:
            with contextlib.suppress(OSError, DeviceError):
                self._send(Request(_REQUEST, 0, _DISCONNECT, 0, 0, 0).pack())
        self._socket.close()

    # ------------------------------------------------------------------ requests

    def read_into(self, offset: int, buf: memoryview) -> None:
        """Raises ReadError where the server cannot read the range; the connection stays usable then."""
        self._ask(_READ, offset, len(buf))
        try:
            self._answer_read(offset, buf)
        except ReadError:
            raise
        except BaseException:
            self.broken = True
            raise

    def _answer_read(self, offset: int, buf: memoryview) -> None:
        if self._magic() == _SIMPLE:
            self._simple(offset, len(buf))
            self._receive_into(buf)
            return
        covered: list[tuple[int, int]] = []
        failure: ReadError | None = None
        for chunk in self._chunks():
            if chunk.type in (_DATA, _HOLE):
                at, length = self._piece(chunk)
                if length < 1 or at < offset or at + length > offset + len(buf):
                    self._nonsense("it answers with bytes that were not asked for")
                piece = buf[at - offset : at - offset + length]
                if chunk.type == _DATA:
                    self._receive_into(piece)
                else:
                    piece[:] = bytes(length)
                covered.append((at, at + length))
            else:
                failure = self._other(chunk, offset, len(buf)) or failure
        if failure is not None:
            raise failure
        at = offset
        for start, end in sorted(covered):
            if start != at:
                self._nonsense("its answer has a gap, or says something twice")
            at = end
        if at != offset + len(buf):
            self._nonsense("its answer has a gap")

    def _piece(self, chunk: Chunk) -> tuple[int, int]:
        """Place and length of what a chunk holds; its data has not been read."""
        if chunk.type == _DATA:
            if chunk.length < 9:
                self._nonsense("a chunk is too short")
            return struct.unpack(">Q", self._receive(8))[0], chunk.length - 8
        if chunk.length != 12:
            self._nonsense("a chunk has the wrong length")
        at, length = struct.unpack(">QI", self._receive(12))
        return at, length

    def block_status(self, offset: int, length: int) -> list[tuple[int, int]] | None:
        """(bytes, flags of base:allocation) of the first extents of the range, at least one; None: it cannot say."""
        self._ask(_BLOCK_STATUS, offset, length)
        found: list[tuple[int, int]] | None = None
        try:
            if self._magic() == _SIMPLE:
                with contextlib.suppress(ReadError):
                    self._simple(offset, length)
                    self._nonsense("its answer is not one to what was asked")
                return None
            for chunk in self._chunks():
                if chunk.type != _STATUS:
                    self._other(chunk, offset, length)
                    continue
                if found is not None or not 12 <= chunk.length <= _MAX_STATUS or chunk.length % 8 != 4:
                    self._nonsense("a chunk has the wrong length")
                data = self._receive(chunk.length)
                if int.from_bytes(data[:4], "big") != self.context:
                    self._nonsense("it describes something that was not asked for")
                found = list(struct.iter_unpack(">II", data[4:]))
        except BaseException:
            self.broken = True
            raise
        return found

    def _ask(self, command: int, offset: int, length: int) -> None:
        self._cookie += 1
        self._send(Request(_REQUEST, 0, command, self._cookie, offset, length).pack())

    def _magic(self) -> int:
        magic = int.from_bytes(self._receive(4), "big")
        if magic != _SIMPLE and not (magic == _STRUCTURED and self.structured):
            self._nonsense("what it sends is no reply")
        return magic

    def _simple(self, offset: int, length: int) -> None:
        reply = SimpleReply.unpack(self._receive(SimpleReply.SIZE))
        if reply.cookie != self._cookie:
            self._nonsense("it answers what was not asked")
        if reply.error:
            raise ReadError(self._where, offset, length, _reason(reply.error), gone=reply.error in _GONE)

    def _chunks(self) -> Iterator[Chunk]:
        """The chunks of an answer, whose first magic number was read; the caller reads their content."""
        for number in range(_MAX_CHUNKS):
            if number and self._magic() != _STRUCTURED:
                self._nonsense("a chunk is missing")
            chunk = Chunk.unpack(self._receive(Chunk.SIZE))
            if chunk.cookie != self._cookie:
                self._nonsense("it answers what was not asked")
            yield chunk
            if chunk.flags & _DONE:
                return
        self._nonsense("its answer has no end")

    def _other(self, chunk: Chunk, offset: int, length: int) -> ReadError | None:
        """A chunk that holds no content: an error, or nothing."""
        if chunk.type == _NONE and chunk.length == 0 and chunk.flags & _DONE:
            return None
        if not chunk.type & _CHUNK_ERROR or not 6 <= chunk.length <= _MAX_REPLY:
            self._nonsense(f"it sends a chunk of the unknown kind {chunk.type}")
        data = self._receive(chunk.length)
        number = int.from_bytes(data[:4], "big")
        return ReadError(self._where, offset, length, _reason(number), gone=number in _GONE)

    # ------------------------------------------------------------------ the handshake

    def _negotiate(self, name: str) -> Export:
        export = os.fsencode(name)
        if len(export) > MAX_NAME:
            raise UsageError(f"the name of an NBD export has at most {MAX_NAME} bytes")
        if self._receive(8) != _MAGIC:
            raise UnsupportedError(f"{self._where} is no NBD server")
        if self._receive(8) != _OPTIONS:
            raise UnsupportedError(f"{self._where} speaks the NBD protocol of before 2011, which ferrotype does not")
        flags = int.from_bytes(self._receive(2), "big")
        self._send(struct.pack(">I", flags & (_FIXED | _NO_ZEROES)))
        if not flags & _FIXED:
            return self._export_name(export, flags)
        if self._option(_STRUCTURED_REPLY, b"")[0] == _ACK:
            self.structured = True
            self._agree_on_context(export)
        words = struct.pack(">I", len(export)) + export + struct.pack(">HH", 1, _INFO_BLOCK_SIZE)
        kind, infos = self._option(_GO, words)
        if kind == _UNSUPPORTED:
            return self._export_name(export, flags)
        if kind == _UNKNOWN:
            raise UsageError(f"{self._where}: the server has no export called {name!r}")
        if kind != _ACK:
            raise DeviceError(f"{self._where}: the server refuses the export {name!r} (reply {kind:#x})")
        return self._told(infos)

    def _agree_on_context(self, export: bytes) -> None:
        words = struct.pack(">I", len(export)) + export + struct.pack(">II", 1, len(_CONTEXT)) + _CONTEXT
        kind, answers = self._option(_SET_META, words)
        for answer_kind, data in answers if kind == _ACK else ():
            if answer_kind == _META and data[4:] == _CONTEXT:
                self.context = int.from_bytes(data[:4], "big")

    def _export_name(self, export: bytes, flags: int) -> Export:
        self._send(_OPTIONS + struct.pack(">II", _EXPORT_NAME, len(export)) + export)
        try:
            size, transmission = struct.unpack(">QH", self._receive(10))
        except DeviceError as error:  # an old server has no other way to say so
            raise DeviceError(f"{error}; it may have no export called {os.fsdecode(export)!r}") from None
        if not flags & _NO_ZEROES:
            self._receive(124)
        return self._checked(Export(size, transmission))

    def _told(self, infos: list[tuple[int, bytes]]) -> Export:
        size, flags, smallest, largest = -1, 0, 1, MAX_REQUEST
        for kind, data in infos:
            topic = int.from_bytes(data[:2], "big")
            if kind == _INFO and topic == _INFO_EXPORT and len(data) == 12:
                size, flags = struct.unpack(">QH", data[2:])
            elif kind == _INFO and topic == _INFO_BLOCK_SIZE and len(data) == 14:
                smallest, _, largest = struct.unpack(">III", data[2:])
        return self._checked(Export(size, flags, smallest, min(largest, MAX_REQUEST)))

    def _checked(self, export: Export) -> Export:
        if not 0 <= export.size <= MAX_SIZE:
            self._nonsense(f"it says that its export has {export.size} bytes")
        smallest, largest = export.smallest, export.largest
        if not 1 <= smallest <= 1 << 16 or smallest & (smallest - 1) or largest < max(smallest, 4096):
            self._nonsense(f"it takes requests from {smallest} to {largest} bytes")
        if export.size % smallest:
            self._nonsense("the size of its export is no multiple of its block size")
        return export

    def _option(self, option: int, data: bytes) -> tuple[int, list[tuple[int, bytes]]]:
        """The kind of the last reply to an option, and (kind, content) of those before."""
        self._send(_OPTIONS + struct.pack(">II", option, len(data)) + data)
        answers: list[tuple[int, bytes]] = []
        for _ in range(_MAX_REPLIES):
            reply = OptionReply.unpack(self._receive(OptionReply.SIZE))
            if reply.magic != _REPLY or reply.option != option or reply.length > _MAX_REPLY:
                self._nonsense("its reply to an option is none")
            content = self._receive(reply.length)
            if reply.type == _TLS_REQUIRED:
                raise UnsupportedError(f"{self._where}: the server demands TLS, which ferrotype does not speak")
            if reply.type == _ACK or reply.type & _ERROR:
                return reply.type, answers
            answers.append((reply.type, content))
        return self._nonsense("its reply to an option has no end")

    # ------------------------------------------------------------------ bytes

    def _nonsense(self, sentence: str) -> NoReturn:
        self.broken = True
        raise InvalidImage(f"{self._where}: the NBD server breaks the protocol: {sentence}")

    def _send(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[self._patiently(partial(self._socket.send, left)) :]
        except OSError as error:
            self.broken = True
            raise DeviceError(f"{self._where}: sending to the server failed: {why(error)}") from error

    def _receive(self, length: int) -> bytes:
        buf = bytearray(length)
        self._receive_into(memoryview(buf))
        return bytes(buf)

    def _receive_into(self, buf: memoryview) -> None:
        done = 0
        while done < len(buf):
            try:
                count = self._patiently(partial(self._socket.recv_into, buf[done:]))
            except OSError as error:
                self.broken = True
                raise DeviceError(f"{self._where}: the connection was lost: {why(error)}") from error
            if count == 0:
                self.broken = True
                raise DeviceError(f"{self._where}: the server has closed the connection")
            done += count

    def _patiently(self, call: Callable[[], int]) -> int:
        """Do it again until it is done; raises DeviceError once the server has not answered for the limit."""
        began = time.monotonic()
        while True:
            try:
                return call()
            except TimeoutError:
                idle = time.monotonic() - began
                try:
                    self.patience.waiting(Path(self._where), idle)
                    if self.patience.limit and idle > self.patience.limit:
                        raise DeviceError(
                            f"{self._where}: the server has not answered for {self.patience.limit:g} s; "
                            "nothing was changed"
                        )
                except BaseException:
                    self.broken = True
                    raise


def _reason(number: int) -> str:
    """NBD's error numbers are those of Linux."""
    return os.strerror(number).lower() if number in errno.errorcode else f"error {number}"
