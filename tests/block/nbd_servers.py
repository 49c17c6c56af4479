"""NBD servers for tests: qemu-nbd, and one of our own that says whatever a test wants it to say."""

from __future__ import annotations

import contextlib
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.machine import need

MAGIC, OPTIONS, REPLY = b"NBDMAGIC", b"IHAVEOPT", 0x3E889045565A9


@contextlib.contextmanager
def qemu_nbd(path: Path, where: Path, *words: str, format: str = "raw", shared: int = 8) -> Iterator[str]:
    """The address of an image served on a socket in the folder ``where``."""
    need("qemu-nbd")
    place = where / f"{path.name}.sock"
    argv = ["qemu-nbd", "-r", "-t", "-e", str(shared), "-k", str(place), "-f", format, *words, str(path)]
    with _listening(argv, place) as address:
        yield address


@contextlib.contextmanager
def nbdkit(path: Path, where: Path, words: list[str]) -> Iterator[str]:
    """The address of a raw disk served by nbdkit; the ``words`` name the plug-in ``file`` and how it serves."""
    need("nbdkit")
    place = where / f"{path.name}.sock"
    at = words.index("file") + 1
    with _listening(["nbdkit", "-f", "-r", "-U", str(place), *words[:at], str(path), *words[at:]], place) as address:
        yield address


@contextlib.contextmanager
def failing_nbdkit(path: Path, where: Path, start: int, length: int) -> Iterator[str]:
    """The address of a raw disk of which a range cannot be read."""
    need("nbdkit")
    place = where / "failing.sock"
    fails = f"[ $4 -lt {start + length} ] && [ $(($4+$3)) -gt {start} ]"
    reads = f"dd if={path} bs=64K iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none"
    words = [f"get_size=stat -c %s {path}", f"pread=if {fails}; then echo EIO bad >&2; exit 1; fi; {reads}"]
    with _listening(["nbdkit", "-f", "-r", "-U", str(place), "eval", *words], place) as address:
        yield address


@contextlib.contextmanager
def _listening(argv: list[str], place: Path) -> Iterator[str]:
    """The address of a server that is started, once its socket is there."""
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 30
            while not place.exists():
                assert process.poll() is None, argv
                assert time.monotonic() < end
                time.sleep(0.02)
            yield f"nbd+unix:///?socket={place}"
        finally:
            process.terminate()


class Wire:
    """The server's side of one connection."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            more = self._socket.recv(length - len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def option(self) -> tuple[int, bytes]:
        assert self.receive(8) == OPTIONS
        number, length = struct.unpack(">II", self.receive(8))
        return number, self.receive(length)

    def reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.send(struct.pack(">QIII", REPLY, option, kind, len(data)) + data)

    def request(self) -> tuple[int, int, int, int]:
        """Command, cookie, offset, length."""
        magic, _, command, cookie, offset, length = struct.unpack(">IHHQQI", self.receive(28))
        assert magic == 0x25609513
        return command, cookie, offset, length

    def chunk(self, cookie: int, kind: int, data: bytes, *, done: bool = True) -> None:
        self.send(struct.pack(">IHHQI", 0x668E33EF, int(done), kind, cookie, len(data)) + data)

    def simple(self, cookie: int, data: bytes = b"", error: int = 0) -> None:
        self.send(struct.pack(">IIQ", 0x67446698, error, cookie) + data)

    def greet(
        self, size: int, *, flags: int = 1, structured: bool = True, blocks: tuple[int, int, int] | None = None
    ) -> None:
        """The whole handshake, as an honest server does it."""
        self.send(MAGIC + OPTIONS + struct.pack(">H", 3))
        self.receive(4)
        while True:
            option, _ = self.option()
            if option == 8 and structured:
                self.reply(8, 1)
            elif option == 10 and structured:
                self.reply(10, 4, struct.pack(">I", 77) + b"base:allocation")
                self.reply(10, 1)
            elif option == 7:
                self.reply(7, 3, struct.pack(">HQH", 0, size, flags))
                if blocks is not None:
                    self.reply(7, 3, struct.pack(">HIII", 3, *blocks))
                self.reply(7, 1)
                return
            else:
                self.reply(option, (1 << 31) | 1)


@contextlib.contextmanager
def served(behave: Callable[[Wire], None], where: Path) -> Iterator[str]:
    """The address of a server that treats each connection, one after the other, as ``behave`` does."""
    place = where / "fake.sock"
    place.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(place))
    listening.listen(8)
    stopped = threading.Event()

    def serve() -> None:
        while not stopped.is_set():
            try:
                connected, _ = listening.accept()
            except OSError:
                return
            connected.settimeout(20)
            with connected, contextlib.suppress(EOFError, OSError):
                behave(Wire(connected))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"nbd+unix:///?socket={place}"
    finally:
        stopped.set()
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join(25)
