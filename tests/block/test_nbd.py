"""The NBD client: against qemu-nbd at any cut and from many threads, and against servers that lie."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from ferrotype.block import read
from ferrotype.block.nbd import Address, NbdSource
from ferrotype.errors import (
    Cancelled,
    DeviceError,
    FerrotypeError,
    InvalidImage,
    ReadError,
    UnsupportedError,
    UsageError,
)
from ferrotype.extents import State
from ferrotype.stall import Patience
from ferrotype.testing.sources import check_source
from ferrotype.units import MiB
from tests.block.nbd_servers import MAGIC, OPTIONS, Wire, nbdkit, qemu_nbd, served
from tests.machine import run

SIZE = 6 * MiB


def opened(address: str, **words: object) -> NbdSource:
    return NbdSource(Address.parse(address), **words)  # type: ignore[arg-type]


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Data at odd places, holes between."""
    rng = random.Random(5)
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(SIZE)
        for _ in range(20):
            file.seek(rng.randrange(SIZE - 70_000) // 512 * 512)
            file.write(rng.randbytes(rng.choice([512, 5000, 60_000])))
    return path


# ---------------------------------------------------------------------- another program's server


@pytest.mark.parametrize("shared", [1, 8])
def test_a_served_disk_is_the_disk(disk: Path, tmp_path: Path, shared: int) -> None:
    with qemu_nbd(disk, tmp_path, shared=shared) as address:
        check_source(lambda: opened(address), disk.read_bytes(), rounds=60)


def test_what_the_server_knows_to_be_zeros(disk: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, image)
    with qemu_nbd(image, tmp_path, format="qcow2") as address:
        source = opened(address)
        extents = source.extents(0, SIZE)
        content = disk.read_bytes()
        assert SIZE / 4 < extents.total(State.ZERO) < SIZE
        for extent in extents:
            if extent.state & State.ZERO:
                assert not any(content[extent.start : extent.end])
        check_source(lambda: source, content, rounds=40)


def test_reads_go_over_several_connections(disk: Path, tmp_path: Path) -> None:
    with qemu_nbd(disk, tmp_path) as address:
        source = opened(address)
        assert source.traits.parallel > 1
        content = disk.read_bytes()
        with ThreadPoolExecutor(8) as pool:
            pieces = list(pool.map(lambda at: read(source, at, MiB // 2), range(0, SIZE, MiB // 2)))
        assert b"".join(pieces) == content
        assert 1 <= source._open <= 8
        source.close()


def test_exports_have_names(disk: Path, tmp_path: Path) -> None:
    with qemu_nbd(disk, tmp_path, "-x", "my disk/1") as address:
        named = address.replace("///?", "///my%20disk/1?")
        source = opened(named)
        assert source.size == SIZE
        source.close()
        with pytest.raises(UsageError, match="no export called 'other'"):
            opened(address.replace("///?", "///other?"))


def test_over_tcp(disk: Path, tmp_path: Path) -> None:
    import socket
    import subprocess
    import time

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with subprocess.Popen(["qemu-nbd", "-r", "-t", "-b", "127.0.0.1", "-p", str(port), "-f", "raw", disk]) as server:
        try:
            for _ in range(200):
                try:
                    source = opened(f"nbd://127.0.0.1:{port}/")
                    break
                except DeviceError:
                    time.sleep(0.05)
            assert read(source, 0, SIZE) == disk.read_bytes()
            source.close()
        finally:
            server.terminate()


@pytest.mark.parametrize(
    "words",
    [
        ["file"],
        ["--no-sr", "file"],
        ["--mask-handshake=0", "file"],
        ["--filter=blocksize-policy", "file", "blocksize-minimum=4096", "blocksize-error-policy=error"],
        ["--filter=noparallel", "file", "serialize=connections"],
    ],
    ids=["plain", "no structured replies", "old handshake", "whole blocks", "one connection at a time"],
)
def test_another_server(disk: Path, tmp_path: Path, words: list[str]) -> None:
    with nbdkit(disk, tmp_path, words) as address:
        check_source(lambda: opened(address), disk.read_bytes(), rounds=30)


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="cannot be reached"):
        opened(f"nbd+unix:///?socket={tmp_path / 'nothing'}")
    with pytest.raises(DeviceError, match="cannot be reached"):
        opened("nbd://127.0.0.1:1/")


@pytest.mark.parametrize(
    ("text", "export", "host", "port", "place"),
    [
        ("nbd://server", "", "server", 10809, None),
        ("nbd://server/", "", "server", 10809, None),
        ("nbd://server:7/a/b%20c", "a/b c", "server", 7, None),
        ("nbd://[::1]:9/x", "x", "::1", 9, None),
        ("nbd+unix:///?socket=/run/s", "", None, 10809, "/run/s"),
        ("nbd+unix:///e?socket=/a%20b", "e", None, 10809, "/a b"),
    ],
)
def test_addresses(text: str, export: str, host: str | None, port: int, place: str | None) -> None:
    found = Address.parse(text)
    assert (found.export, found.host, found.port, found.place) == (export, host, port, place)


@pytest.mark.parametrize(
    "text",
    [
        "nbd://",
        "nbd:///x",
        "nbd://h:port/x",
        "nbd://h:99999/x",
        "nbd://h/x?y=1",
        "nbds://h/x",
        "nbds+unix:///x?socket=/s",
        "nbd+unix:///x",
        "nbd+unix://h/x?socket=/s",
        "nbd+unix:///x?socket=/s&socket=/t",
        "nbd+vsock:///x",
        "nbd://[::1/x",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        Address.parse(text)


# ---------------------------------------------------------------------- honest servers of other kinds

CONTENT = random.Random(9).randbytes(200_000)


def simple_replies(wire: Wire) -> None:
    wire.greet(len(CONTENT), structured=False)
    while True:
        command, cookie, offset, length = wire.request()
        if command == 2:
            return
        wire.simple(cookie, CONTENT[offset : offset + length])


def scattered_chunks(wire: Wire) -> None:
    """Answers in pieces, the last one first, holes between; extents one at a time, beyond what was asked for."""
    wire.greet(len(CONTENT))
    while True:
        command, cookie, offset, length = wire.request()
        if command == 2:
            return
        if command == 7:
            wire.chunk(cookie, 5, struct.pack(">III", 77, 30_000, 0))
            continue
        cuts = sorted({offset, offset + length, *range(offset, offset + length, max(1, length // 3))})
        for start, end in reversed(list(pairwise(cuts))):
            wire.chunk(cookie, 1, struct.pack(">Q", start) + CONTENT[start:end], done=False)
        wire.chunk(cookie, 0, b"")


def old_server(wire: Wire) -> None:
    """Knows no option but NBD_OPT_EXPORT_NAME."""
    wire.send(MAGIC + OPTIONS + struct.pack(">H", 0))
    wire.receive(4)
    option, name = wire.option()
    assert (option, name) == (1, b"")
    wire.send(struct.pack(">QH", len(CONTENT), 1) + bytes(124))
    while True:
        command, cookie, offset, length = wire.request()
        if command == 2:
            return
        wire.simple(cookie, CONTENT[offset : offset + length])


@pytest.mark.parametrize("behave", [simple_replies, scattered_chunks, old_server])
def test_ways_to_answer(behave: Callable[[Wire], None], tmp_path: Path) -> None:
    with served(behave, tmp_path) as address:
        check_source(lambda: opened(address), CONTENT, rounds=20)


def test_only_whole_blocks_are_asked_for(tmp_path: Path) -> None:
    size = 200_704  # of blocks of 4 KiB
    content = CONTENT.ljust(size, b"\1")
    lengths: list[int] = []

    def blocks(wire: Wire) -> None:
        wire.greet(size, blocks=(4096, 4096, 16384))
        while True:
            command, cookie, offset, length = wire.request()
            if command == 2:
                return
            assert offset % 4096 == length % 4096 == 0
            if command == 7:
                wire.chunk(cookie, 5, struct.pack(">III", 77, length, 0))
                continue
            lengths.append(length)
            wire.chunk(cookie, 1, struct.pack(">Q", offset) + content[offset : offset + length])

    with served(blocks, tmp_path) as address:
        check_source(lambda: opened(address), content, rounds=15)
    assert max(lengths) == 16384


@pytest.mark.parametrize("structured", [True, False])
def test_what_the_server_cannot_read(tmp_path: Path, structured: bool) -> None:
    """An error of one range; the others are read over the same connection."""
    connections = 0

    def bad_middle(wire: Wire) -> None:
        nonlocal connections
        connections += 1
        wire.greet(len(CONTENT), structured=structured)
        while True:
            command, cookie, offset, length = wire.request()
            if command == 2:
                return
            if offset < 100_000 < offset + length and structured:
                wire.chunk(cookie, 1, struct.pack(">Q", offset) + CONTENT[offset : offset + 512], done=False)
                wire.chunk(cookie, 0x8001, struct.pack(">IH", 5, 3) + b"bad")
            elif offset < 100_000 < offset + length:
                wire.simple(cookie, error=5)
            elif structured:
                wire.chunk(cookie, 1, struct.pack(">Q", offset) + CONTENT[offset : offset + length])
            else:
                wire.simple(cookie, CONTENT[offset : offset + length])

    with served(bad_middle, tmp_path) as address:
        source = opened(address)
        with pytest.raises(ReadError) as caught:
            read(source, 99_000, 4096)
        assert (caught.value.start, caught.value.length) == (99_000, 4096)
        assert read(source, 150_000, 999) == CONTENT[150_000:150_999]
        source.close()
    assert connections == 1


# ---------------------------------------------------------------------- servers that lie

# ruff: noqa: ARG005

REFUSED: list[tuple[str, type[FerrotypeError], Callable[[Wire], None]]] = [
    ("nothing", DeviceError, lambda wire: None),
    ("another protocol", UnsupportedError, lambda wire: wire.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")),
    (
        "the old protocol",
        UnsupportedError,
        lambda wire: wire.send(MAGIC + struct.pack(">Q", 0x420281861253) + bytes(200)),
    ),
    ("TLS only", UnsupportedError, lambda wire: _replies(wire, (1 << 31) | 5)),
    ("a reply of 4 GiB", InvalidImage, lambda wire: _replies(wire, 1, length=(1 << 32) - 1)),
    ("a reply to something else", InvalidImage, lambda wire: _replies(wire, 1, option=6)),
    ("endless replies", InvalidImage, lambda wire: _replies(wire, 3, times=2000)),
    ("no size", InvalidImage, lambda wire: _go(wire, b"")),
    ("a size of 2^63", InvalidImage, lambda wire: wire.greet(1 << 63)),
    ("a size off the blocks", InvalidImage, lambda wire: wire.greet(5000, blocks=(4096, 4096, 65536))),
    ("blocks of 3 bytes", InvalidImage, lambda wire: wire.greet(4096, blocks=(3, 4096, 65536))),
    ("blocks of nothing", InvalidImage, lambda wire: wire.greet(4096, blocks=(0, 4096, 65536))),
    ("blocks of 2 GiB", InvalidImage, lambda wire: wire.greet(4096, blocks=(1 << 31, 1 << 31, 1 << 31))),
    ("requests of nothing", InvalidImage, lambda wire: wire.greet(4096, blocks=(1, 4096, 0))),
]


def _replies(wire: Wire, kind: int, *, option: int = 8, length: int = 0, times: int = 1) -> None:
    wire.send(MAGIC + OPTIONS + struct.pack(">H", 3))
    wire.receive(4)
    wire.option()
    for _ in range(times):
        wire.send(struct.pack(">QIII", 0x3E889045565A9, option, kind, length))
    wire.receive(1)


def _go(wire: Wire, info: bytes) -> None:
    wire.send(MAGIC + OPTIONS + struct.pack(">H", 3))
    wire.receive(4)
    while True:
        option, _ = wire.option()
        wire.reply(option, 1 if option == 7 else (1 << 31) | 1)


@pytest.mark.parametrize(("what", "error", "behave"), REFUSED, ids=[what for what, _, _ in REFUSED])
def test_handshakes_that_lead_nowhere(
    what: str, error: type[FerrotypeError], behave: Callable[[Wire], None], tmp_path: Path
) -> None:
    with served(behave, tmp_path) as address, pytest.raises(error):
        opened(address, patience=Patience(5))


def _word(number: int) -> bytes:
    return struct.pack(">Q", number)


LIES: dict[str, Callable[[Wire, int, int, int], None]] = {
    "no reply at all": lambda wire, cookie, offset, length: wire.send(b"\xff" * 64),
    "another cookie": lambda wire, cookie, offset, length: wire.chunk(cookie + 1, 1, _word(offset) + bytes(length)),
    "less": lambda wire, cookie, offset, length: wire.chunk(cookie, 1, _word(offset) + bytes(length - 1)),
    "more": lambda wire, cookie, offset, length: wire.chunk(cookie, 1, _word(offset) + bytes(length + 1)),
    "elsewhere": lambda wire, cookie, offset, length: wire.chunk(cookie, 1, _word(offset - 1) + bytes(length)),
    "nothing": lambda wire, cookie, offset, length: wire.chunk(cookie, 0, b""),
    "no bytes": lambda wire, cookie, offset, length: wire.chunk(cookie, 1, _word(offset)),
    "an empty chunk": lambda wire, cookie, offset, length: wire.chunk(cookie, 1, b""),
    "a hole too long": lambda wire, cookie, offset, length: wire.chunk(
        cookie, 2, _word(offset) + struct.pack(">I", length + 1)
    ),
    "an unknown chunk": lambda wire, cookie, offset, length: wire.chunk(cookie, 99, bytes(length)),
    "an error of 4 GiB": lambda wire, cookie, offset, length: wire.send(
        struct.pack(">IHHQI", 0x668E33EF, 1, 0x8001, cookie, (1 << 32) - 1)
    ),
    "an end in the middle": lambda wire, cookie, offset, length: wire.send(
        struct.pack(">IHHQI", 0x668E33EF, 1, 1, cookie, length + 8) + _word(offset)
    ),
}


def _twice(wire: Wire, cookie: int, offset: int, length: int) -> None:
    half = bytes(length // 2)
    wire.chunk(cookie, 1, _word(offset) + half, done=False)
    wire.chunk(cookie, 1, _word(offset) + half)


def _overlapping(wire: Wire, cookie: int, offset: int, length: int) -> None:
    wire.chunk(cookie, 1, _word(offset) + bytes(length - 1000), done=False)
    wire.chunk(cookie, 1, _word(offset + 1000) + bytes(length - 1000))


def _gap(wire: Wire, cookie: int, offset: int, length: int) -> None:
    wire.chunk(cookie, 1, _word(offset) + bytes(1000), done=False)
    wire.chunk(cookie, 1, _word(offset + 1001) + bytes(length - 1001))


def _hole_of_nothing(wire: Wire, cookie: int, offset: int, length: int) -> None:
    wire.chunk(cookie, 2, _word(offset) + struct.pack(">I", 0), done=False)
    wire.chunk(cookie, 1, _word(offset) + bytes(length))


LIES |= {"the same twice": _twice, "overlapping": _overlapping, "a gap": _gap, "a hole of nothing": _hole_of_nothing}


@pytest.mark.parametrize("lie", LIES)
def test_answers_that_are_none(lie: str, tmp_path: Path) -> None:
    def behave(wire: Wire) -> None:
        wire.greet(len(CONTENT))
        _, cookie, offset, length = wire.request()
        LIES[lie](wire, cookie, offset, length)

    with served(behave, tmp_path) as address:
        source = opened(address, patience=Patience(5))
        with pytest.raises((InvalidImage, DeviceError)) as caught:
            read(source, 1000, 5000)
        assert not isinstance(caught.value, ReadError)
        source.close()


STATUS: dict[str, bytes] = {
    "no extents": struct.pack(">I", 77),
    "of no bytes": struct.pack(">III", 77, 0, 3),
    "of another context": struct.pack(">III", 78, 4096, 3),
    "half of one": struct.pack(">II", 77, 4096),
}


@pytest.mark.parametrize("what", STATUS)
def test_extents_that_are_none(what: str, tmp_path: Path) -> None:
    def behave(wire: Wire) -> None:
        wire.greet(len(CONTENT))
        _, cookie, _, _ = wire.request()
        wire.chunk(cookie, 5, STATUS[what])

    with served(behave, tmp_path) as address:
        source = opened(address, patience=Patience(5))
        with pytest.raises(InvalidImage):
            source.extents(0, len(CONTENT))
        source.close()


def test_a_server_that_cannot_say_what_is_zero(tmp_path: Path) -> None:
    def behave(wire: Wire) -> None:
        wire.greet(len(CONTENT))
        while True:
            command, cookie, _, _ = wire.request()
            if command == 2:
                return
            wire.chunk(cookie, 0x8001, struct.pack(">IH", 95, 0))

    with served(behave, tmp_path) as address:
        source = opened(address)
        assert source.extents(100, 5000).total(State.ZERO) == 0
        source.close()


def test_a_server_that_falls_silent(tmp_path: Path) -> None:
    def behave(wire: Wire) -> None:
        wire.greet(len(CONTENT))
        wire.request()
        wire.receive(1)

    with served(behave, tmp_path) as address:
        source = opened(address, patience=Patience(0.6))
        with pytest.raises(DeviceError, match="has not answered"):
            read(source, 0, 512)
        source.close()

        def stop(path: Path, seconds: float) -> None:
            raise Cancelled

        source = opened(address, patience=Patience(30, stop))
        with pytest.raises(Cancelled):
            read(source, 0, 512)
        source.close()
