"""FileSource and FileSink: holes, cuts, caches, and files that stay away until they are whole."""

from __future__ import annotations

import errno
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ferrotype import linux
from ferrotype.block import Sink
from ferrotype.block.file import FileSink, FileSource
from ferrotype.errors import DeviceError, ReadError, Refused, UsageError, WriteError
from ferrotype.extents import State
from ferrotype.testing.sources import check_sink, check_source
from ferrotype.units import KiB, MiB
from tests.machine import run


@pytest.fixture(params=["tmpfs", "disk"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on tmpfs, and one on a file system with storage below it: they differ in what they know of holes."""
    base = tmp_path if request.param == "disk" else Path("/dev/shm") / f"ferrotype-{os.getpid()}-{tmp_path.name}"
    base.mkdir(exist_ok=True)
    yield base
    if request.param != "disk":
        run("rm", "-rf", base)


def sparse(path: Path, size: int, runs: list[tuple[int, int]], seed: int = 1) -> bytes:
    """A sparse file with random bytes in the runs; its content."""
    content, rng = bytearray(size), random.Random(seed)
    with path.open("wb") as out:
        out.truncate(size)
        for start, length in runs:
            content[start : start + length] = rng.randbytes(length)
            out.seek(start)
            out.write(content[start : start + length])
    return bytes(content)


def test_any_split_of_a_sparse_file(folder: Path) -> None:
    runs = [(0, 100), (256 * KiB, 300 * KiB), (1 * MiB + 512, 4096), (2 * MiB - 3, 3)]
    content = sparse(folder / "a", 2 * MiB, runs)
    check_source(lambda: FileSource(folder / "a"), content)
    check_source(lambda: FileSource(folder / "a", 4096, drop_cache=False), content, seed=2)


@pytest.mark.parametrize("size", [0, 1, 511, 4097])
def test_files_of_odd_size(folder: Path, size: int) -> None:
    content = sparse(folder / "a", size, [(0, size)])
    check_source(lambda: FileSource(folder / "a"), content, rounds=40)


def test_holes_are_those_that_were_left(folder: Path) -> None:
    page = mmap.PAGESIZE
    sparse(folder / "a", 64 * page, [(8 * page, 4 * page), (20 * page, page)])
    with FileSource(folder / "a") as source:
        states = [(e.start // page, e.length // page, e.state) for e in source.extents(0, source.size)]
        assert states == [
            (0, 8, State.ZERO | State.HOLE),
            (8, 4, State.DATA),
            (12, 8, State.ZERO | State.HOLE),
            (20, 1, State.DATA),
            (21, 43, State.ZERO | State.HOLE),
        ]
        inside = source.extents(9 * page + 7, 5 * page)
        assert [(e.start, e.end) for e in inside] == [(9 * page + 7, 12 * page), (12 * page, 14 * page + 7)]


def test_many_holes(folder: Path) -> None:
    page = mmap.PAGESIZE
    runs = [(i * 2 * page, page) for i in range(2000)]
    sparse(folder / "a", 4000 * page, runs)
    with FileSource(folder / "a") as source:
        assert len(source.extents(0, source.size)) == 4000
        assert source.extents(0, source.size).total(State.ZERO) == 2000 * page


def test_too_many_holes_count_as_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = mmap.PAGESIZE
    content = sparse(folder / "a", 100 * page, [(i * 2 * page, page) for i in range(50)])
    monkeypatch.setattr(linux, "MAX_RUNS", 10)
    check_source(lambda: FileSource(folder / "a"), content, rounds=20)
    with FileSource(folder / "a") as source:
        assert source.extents(0, source.size).total(State.ZERO) == 9 * page


def test_a_file_system_without_holes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = sparse(folder / "a", MiB, [(0, 10)])

    def refuse(fd: int, offset: int, how: int) -> int:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(os, "lseek", refuse)
    check_source(lambda: FileSource(folder / "a"), content, rounds=20)
    with FileSource(folder / "a") as source:
        assert [e.state for e in source.extents(0, MiB)] == [State.DATA]


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = sparse(tmp_path / "a", 50_000, [(0, 50_000)])
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: real(fd, [bufs[0][:777]], at))
    check_source(lambda: FileSource(tmp_path / "a"), content, rounds=20)


def test_a_file_cut_off_while_open_is_an_error_not_zeros(folder: Path) -> None:
    sparse(folder / "a", MiB, [(0, MiB)])
    with FileSource(folder / "a") as source:
        os.truncate(folder / "a", 4096)
        with pytest.raises(ReadError, match="shorter") as caught:
            source.read_into(0, memoryview(bytearray(8192)))
        assert (caught.value.start, caught.value.length) == (0, 8192)
        assert source.extents(0, MiB).total(State.ZERO) == 0


def test_a_failing_read_names_file_and_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse(tmp_path / "a", 8192, [(0, 8192)])

    def fail(fd: int, bufs: object, at: int) -> int:
        raise OSError(errno.EIO, "no")

    with FileSource(tmp_path / "a") as source:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(ReadError, match=r"a: reading 512 bytes at 1024 failed: the device reports an error"):
            source.read_into(1024, memoryview(bytearray(512)))


def cached_pages(path: Path) -> int:
    """Pages of the file in the page cache, as fincore counts them."""
    return int(run("fincore", "-n", "-r", "-o", "PAGES", path).strip() or 0)


def test_large_reads_do_not_stay_in_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "a"
    sparse(path, 16 * MiB, [(0, 16 * MiB)])
    with path.open("rb+") as file:
        os.fsync(file)
    buf = memoryview(bytearray(MiB))
    kept = {}
    for drop in (False, True):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with FileSource(path, drop_cache=drop) as source:
            for at in range(0, 16 * MiB, MiB):
                source.read_into(at, buf)
        kept[drop] = cached_pages(path)
    if kept[False] < 4096:
        pytest.skip("this file system does not keep pages")
    assert kept[True] < 200


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "socket"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    if kind == "folder":
        path.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    if kind == "socket":
        os.mknod(path, 0o140600)
    with pytest.raises((UsageError, DeviceError), match=r"a (does not exist|is not a regular|cannot be opened)"):
        FileSource(path)
    with pytest.raises((UsageError, WriteError)):
        FileSink.open_existing(path)


# ---------------------------------------------------------------------- sinks


def create(path: Path, size: int, sector_size: int = 512) -> tuple[Callable[[], Sink], Callable[[Sink], bytes]]:
    def read_back(sink: Sink) -> bytes:
        assert isinstance(sink, FileSink)
        sink.commit()
        return path.read_bytes()

    return lambda: FileSink.create(path, size, sector_size), read_back


def test_a_new_file_takes_anything(folder: Path) -> None:
    check_sink(*create(folder / "a", MiB + 4000))
    assert os.listdir(folder) == ["a"]


def test_an_existing_file_is_written_in_place(folder: Path) -> None:
    sparse(folder / "a", MiB + 1, [(0, MiB + 1)])
    before = (folder / "a").stat().st_ino
    check_sink(lambda: FileSink.open_existing(folder / "a"), lambda _: (folder / "a").read_bytes())
    assert (folder / "a").stat().st_ino == before
    assert not FileSink.open_existing(folder / "a").traits.blank


@pytest.mark.parametrize("missing", ["punch", "both"])
def test_zeros_where_holes_cannot_be_made(folder: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(linux, "punch_hole", lambda *_: False)
    if missing == "both":
        monkeypatch.setattr(linux, "zero_range", lambda *_: False)
    sparse(folder / "a", 3 * MiB, [(0, 3 * MiB)])
    check_sink(lambda: FileSink.open_existing(folder / "a"), lambda _: (folder / "a").read_bytes())


def test_zeros_give_storage_back(folder: Path) -> None:
    sparse(folder / "a", MiB, [(0, MiB)])
    with FileSink.open_existing(folder / "a") as sink:
        sink.flush()
        full = (folder / "a").stat().st_blocks
        sink.write_zeros(0, MiB)
        sink.flush()
    assert full >= 2048
    assert (folder / "a").stat().st_blocks < 64


def test_parts_are_gathered(folder: Path) -> None:
    """More parts than one call takes, some empty, with short writes between them."""
    rng = random.Random(3)
    parts = [rng.randbytes(rng.choice([0, 1, 100, 3000])) for _ in range(3000)]
    whole = b"".join(parts)
    with FileSink.create(folder / "a", len(whole) + 7) as sink:
        sink.write_many(7, parts)
        sink.commit()
    assert (folder / "a").read_bytes() == bytes(7) + whole


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev
    calls: list[int] = []

    def short(fd: int, parts: list[memoryview], at: int) -> int:
        calls.append(len(parts))
        flat = b"".join(parts)
        return real(fd, [flat[: max(len(flat) // 3, 1)]], at)

    monkeypatch.setattr(os, "pwritev", short)
    parts = [bytes([i % 251]) * (i % 40) for i in range(2100)]
    with FileSink.create(tmp_path / "a", sum(map(len, parts))) as sink:
        sink.write_many(0, parts)
        sink.commit()
    assert (tmp_path / "a").read_bytes() == b"".join(parts)
    assert max(calls) <= 1024


def test_an_unfinished_file_leaves_nothing(folder: Path) -> None:
    (folder / "a").write_bytes(b"old")
    with FileSink.create(folder / "a", MiB, replace=True) as sink:
        sink.write(0, memoryview(b"new"))
        sink.flush()
        assert len(os.listdir(folder)) == 2
    assert os.listdir(folder) == ["a"]
    assert (folder / "a").read_bytes() == b"old"


def test_the_old_file_stays_until_the_new_one_is_whole(folder: Path) -> None:
    (folder / "a").write_bytes(b"old")
    (folder / "link").symlink_to("a")
    with FileSink.create(folder / "link", 4, replace=True) as sink:
        sink.write(0, memoryview(b"new!"))
        assert (folder / "a").read_bytes() == b"old"
        sink.commit()
        sink.commit()
        assert (folder / "a").read_bytes() == b"new!"
    assert (folder / "a").read_bytes() == b"new!"
    assert (folder / "link").is_symlink()


def test_nothing_is_overwritten_unasked(folder: Path) -> None:
    (folder / "a").write_bytes(b"old")
    with pytest.raises(Refused, match="exists"):
        FileSink.create(folder / "a", 10)
    with FileSink.create(folder / "b", 10) as sink:
        (folder / "b").write_bytes(b"someone was faster")
        with pytest.raises(Refused, match="exists by now"):
            sink.commit()
    assert (folder / "b").read_bytes() == b"someone was faster"
    (folder / "c").mkdir()
    with pytest.raises(Refused, match="not a regular file"):
        FileSink.create(folder / "c", 10, replace=True)
    with pytest.raises(UsageError, match=r"folder .* does not exist"):
        FileSink.create(folder / "no" / "a", 10)
    assert sorted(os.listdir(folder)) == ["a", "b", "c"]


def test_a_name_as_long_as_it_gets(folder: Path) -> None:
    with FileSink.create(folder / ("é" * 127), 10) as sink:
        sink.commit()
    assert os.listdir(folder) == ["é" * 127]


def test_an_interrupted_process_leaves_nothing(tmp_path: Path) -> None:
    """The usual way out of an interrupt closes what is open."""
    script = (
        "import signal, sys, time; from ferrotype.block.file import FileSink\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what starts tests in the background ignores it
        "with FileSink.create(sys.argv[1], 1 << 20) as sink:\n"
        "    print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "a")], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        assert len(os.listdir(tmp_path)) == 1
        process.send_signal(signal.SIGINT)
        process.wait(30)
    assert os.listdir(tmp_path) == []


def test_a_full_file_system_is_said_in_words(tmp_path: Path) -> None:
    where = tmp_path / "small"
    where.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1m", "none", where)
    try:
        words = r"a: writing 4194304 bytes at 0 failed: there is no space left"
        with FileSink.create(where / "a", 8 * MiB) as sink, pytest.raises(WriteError, match=words):
            sink.write(0, memoryview(bytes(4 * MiB)))
        assert os.listdir(where) == []
    finally:
        run("umount", where)


def test_a_file_too_large_is_said_in_words(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MiB, hard))
    try:
        with pytest.raises(WriteError, match="may write files of 1 MiB only"):
            FileSink.create(tmp_path / "a", 2 * MiB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert os.listdir(tmp_path) == []
