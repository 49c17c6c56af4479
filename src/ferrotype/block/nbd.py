"""A disk served by another program: NBD, read-only.

    nbd://host[:port]/export             TCP, port 10809 unless another is named
    nbd+unix:///export?socket=PATH       a socket of this machine

Source of the addresses: "The NBD Uniform Resource Indicator (URI) format" (doc/uri.md of the NBD project).  Where the
server says that several connections see the same, reads go over as many as are needed, up to ``MAX_CONNECTIONS``;
what it knows to be zeros (base:allocation) is not read.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from ferrotype.block import Traits
from ferrotype.block.file import check_read
from ferrotype.block.nbd_wire import CAN_MULTI_CONN, HOLE, ZERO, Connection
from ferrotype.errors import DeviceError, InvalidImage, UsageError
from ferrotype.extents import ExtentMap, State
from ferrotype.stall import Patience

__all__ = ["Address", "NbdSource"]

PORT: Final = 10809  # of IANA's list
MAX_CONNECTIONS: Final = 8
_FURTHER: Final = 2.0  # seconds that a server may take for a connection that is not the first
_ASKED: Final = 1 << 30  # bytes of one question for extents; its length is a field of 32 bits
_QUESTIONS: Final = 1 << 17  # for one map: 128 TiB are asked for, and a server that answers in crumbs is left alone
_MAX_EXTENTS: Final = 1 << 22  # kept of one map


@dataclass(frozen=True, slots=True)
class Address:
    """Where an export is served."""

    text: str
    export: str
    host: str | None = None  # None: on a socket of this machine
    port: int = PORT
    place: str | None = None  # of the socket

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises UsageError where the address is none, or asks for what ferrotype does not do."""
        try:
            url = urlsplit(text)
            port = url.port
        except ValueError as error:
            raise UsageError(f"{text} is no address: {error}") from None
        export = unquote(url.path.removeprefix("/"), errors="surrogateescape")
        if url.scheme in ("nbds", "nbds+unix"):
            raise UsageError(f"{text}: ferrotype does not speak TLS; let a local program such as stunnel do it")
        if url.scheme == "nbd" and url.hostname and not url.query:
            return cls(text, export, url.hostname, port or PORT)
        if url.scheme == "nbd+unix" and not url.netloc:
            sockets = parse_qs(url.query, errors="surrogateescape").get("socket", [])
            if len(sockets) == 1:
                return cls(text, export, place=sockets[0])
        raise UsageError(f"{text}: write nbd://host[:port]/export or nbd+unix:///export?socket=PATH")

    def connect(self, seconds: float | None) -> socket.socket:
        """A connected socket.  Raises OSError."""
        if self.place is None:
            made = socket.create_connection((self.host, self.port), seconds)
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return made
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            made.settimeout(seconds)
            made.connect(self.place)
        except BaseException:
            made.close()
            raise
        return made


class NbdSource:
    """An export of an NBD server."""

    def __init__(self, address: Address, *, sector_size: int | None = None, patience: Patience | None = None) -> None:
        """Raises DeviceError where the server cannot be reached, UsageError where it has no such export."""
        self._address, self._patience = address, patience or Patience()
        self._lock = threading.Condition()
        self._idle: list[Connection] = []
        self._open = 0  # connections, idle ones included
        first = self._connect()
        self._export = first.export
        self._most = MAX_CONNECTIONS if self._export.flags & CAN_MULTI_CONN else 1
        self._idle.append(first)
        self._open = 1
        self.traits = Traits(sector_size=sector_size or 512, parallel=self._most)

    @property
    def size(self) -> int:
        return self._export.size

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        check_read(self._address.text, self.size, offset, len(buf))
        unit = self._export.smallest
        most = self._export.largest // unit * unit
        at, end = offset, offset + len(buf)
        with self._connection() as connection:
            while at < end:
                low = at // unit * unit
                high = min(low + most, -(-end // unit) * unit)
                stop = min(high, end)
                if (low, high) == (at, stop):
                    connection.read_into(at, buf[at - offset : stop - offset])
                else:  # the server takes whole blocks only
                    blocks = bytearray(high - low)
                    connection.read_into(low, memoryview(blocks))
                    buf[at - offset : stop - offset] = blocks[at - low : stop - low]
                at = stop

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        check_read(self._address.text, self.size, offset, length)
        end = offset + length
        lengths: list[int] = []
        flags: list[int] = []
        at = low = offset // self._export.smallest * self._export.smallest
        with self._connection() as connection:
            for _ in range(_QUESTIONS if connection.context is not None else 0):
                asked = min(_ASKED, -(-(end - at) // self._export.smallest) * self._export.smallest)
                found = connection.block_status(at, asked) if at < end else None
                if not found or len(lengths) + len(found) > _MAX_EXTENTS:
                    break
                if any(count == 0 for count, _ in found):
                    raise InvalidImage(f"{self._address.text}: the NBD server describes an extent of no bytes")
                lengths += [count for count, _ in found]
                flags += [flag for _, flag in found]
                at += sum(count for count, _ in found)
        if not lengths:
            return ExtentMap.uniform(offset, length)
        bounds = low + np.cumsum([0, *lengths], dtype=np.int64)
        states = _STATES[np.array(flags, np.int64) & (HOLE | ZERO)]
        if at < end:
            bounds, states = np.append(bounds, end), np.append(states, np.uint8(State.DATA))
        return ExtentMap.joined(bounds, states).clip(offset, length)

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
            self._open -= len(idle)
        for connection in idle:
            connection.close()

    # ------------------------------------------------------------------ connections

    @contextmanager
    def _connection(self) -> Iterator[Connection]:
        """A connection that nobody else uses meanwhile."""
        connection = self._taken()
        try:
            yield connection
        finally:
            with self._lock:
                if connection.broken:
                    self._open -= 1
                else:
                    self._idle.append(connection)
                self._lock.notify()
            if connection.broken:
                connection.close()

    def _taken(self) -> Connection:
        with self._lock:
            while not self._idle and self._open >= self._most:
                self._lock.wait()
            if self._idle:
                return self._idle.pop()
            self._open += 1
            others = self._open > 1
        try:
            fresh = self._connect(first=not others)
            if (fresh.export.size, fresh.export.smallest) != (self._export.size, self._export.smallest):
                fresh.close()
                raise DeviceError(f"{self._address.text}: the export has changed while it was read")
            return fresh
        except BaseException as error:
            with self._lock:
                self._open -= 1
                if not others or not isinstance(error, DeviceError | InvalidImage):
                    self._lock.notify()
                    raise
                self._most = max(self._open, 1)  # the server takes no more: those that there are have to do
                self._lock.notify()
        return self._taken()

    def _connect(self, *, first: bool = True) -> Connection:
        patience = self._patience
        if not first:  # what is there serves as well, so this one must not keep anybody waiting
            patience = Patience(min(patience.limit or _FURTHER, _FURTHER), patience.waiting)
        address = self._address
        made = Connection(lambda: address.connect(patience.limit or None), address.export, address.text, patience)
        made.patience = self._patience
        return made


_STATES: Final = np.array([State.DATA, State.DATA, State.ZERO, State.ZERO | State.HOLE], np.uint8)  # by HOLE | ZERO
