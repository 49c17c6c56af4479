"""DeviceSource and DeviceSink on loop devices with sectors of 512 and 4096 bytes; failing sectors are feigned."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ferrotype import linux
from ferrotype.block import Sink, Source, Traits, read
from ferrotype.block.device import DeviceSink, DeviceSource, aligned_buffer, open_source
from ferrotype.block.file import FileSource
from ferrotype.block.lenient import Lenient
from ferrotype.errors import ReadError, Refused, UsageError, WriteError
from ferrotype.extents import State
from ferrotype.testing.sources import check_sink, check_source
from ferrotype.units import KiB, MiB
from tests.machine import loop, run

SIZE = 2 * MiB + 64 * KiB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of random bytes."""
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture(params=[512, 4096])
def device(request: pytest.FixtureRequest, image: Path) -> Iterator[Path]:
    """A loop device over the image."""
    with loop(image, sector_size=request.param) as device:
        yield device


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that promises O_DIRECT and refuses every such request, as some drivers do."""
    import fcntl

    def guarded(real: Callable[..., int]) -> Callable[..., int]:
        def call(fd: int, bufs: Any, at: int) -> int:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EINVAL, "no")
            return real(fd, bufs, at)

        return call

    monkeypatch.setattr(os, "preadv", guarded(os.preadv))
    monkeypatch.setattr(os, "pwritev", guarded(os.pwritev))


# ---------------------------------------------------------------------- reading


def test_geometry_is_the_devices_own(image: Path, device: Path) -> None:
    with DeviceSource(device) as source:
        assert source.size == SIZE == int(run("blockdev", "--getsize64", device))
        assert source.traits.sector_size == int(run("blockdev", "--getss", device))
        assert source.physical_sector_size == int(run("blockdev", "--getpbsz", device))
        assert source.traits.sector_known
        assert not source.read_only
    with loop(image, read_only=True) as protected, DeviceSource(protected) as source:
        assert source.read_only


def test_any_split(image: Path, device: Path) -> None:
    check_source(lambda: DeviceSource(device), image.read_bytes(), rounds=400)


def test_any_split_where_direct_reads_are_refused(image: Path, device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_direct(monkeypatch)
    check_source(lambda: DeviceSource(device), image.read_bytes())


def test_short_reads_are_continued(image: Path, device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: real(fd, [bufs[0][:8192]], at))
    check_source(lambda: DeviceSource(device), image.read_bytes(), rounds=30)


@pytest.mark.parametrize("extra", [512, 1536, 3584])
def test_a_device_that_does_not_end_on_a_sector(image: Path, extra: int) -> None:
    with image.open("ab") as out:
        out.write(random.Random(2).randbytes(extra))
    with loop(image, sector_size=4096) as device:
        content = image.read_bytes()[: int(run("blockdev", "--getsize64", device))]
        assert len(content) % 4096
        usable = len(content) // 4096 * 4096
        with DeviceSource(device) as source:
            assert read(source, 0, usable) == content[:usable]
            assert read(source, usable - 100_000, 100_000) == content[usable - 100_000 : usable]
            # What lies behind the last whole sector comes right or fails, and never as something else.
            with contextlib.suppress(ReadError):
                assert read(source, usable - 10, 10 + extra) == content[usable - 10 :]


def test_bulk_reads_stay_out_of_the_page_cache(device: Path) -> None:
    run("blockdev", "--flushbufs", device)
    with DeviceSource(device) as source:
        buf = aligned_buffer(MiB)
        before = direct_reads(device)
        source.read_into(0, buf)
        assert direct_reads(device) - before == MiB // 512
        source.read_into(0, buf)
        assert direct_reads(device) - before == 2 * MiB // 512


def direct_reads(device: Path) -> int:
    """Sectors the device was asked for since it exists."""
    return int(Path(f"/sys/block/{device.name}/stat").read_text().split()[2])


def test_small_reads_are_cached(device: Path) -> None:
    with DeviceSource(device) as source:
        run("blockdev", "--flushbufs", device)
        before = direct_reads(device)
        for at in range(0, 64 * KiB, 512):
            read(source, at, 512)
        first = direct_reads(device)
        for at in range(0, 64 * KiB, 512):
            read(source, at, 512)
        assert first - before >= 128
        assert direct_reads(device) == first


def test_an_aligned_buffer() -> None:
    for size in (0, 1, 4096, MiB + 1):
        buf = aligned_buffer(size)
        assert len(buf) == size
        assert not buf.readonly
        assert bytes(buf) == bytes(size)


# ---------------------------------------------------------------------- sectors that fail


class Failing:
    """``os.preadv`` of a device with bad sectors: it fails where a request touches one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bad: list[tuple[int, int]], code: int = errno.EIO) -> None:
        self.bad, self.code, self.failures = bad, code, 0
        self._real = os.preadv
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, fd: int, bufs: list[memoryview], at: int) -> int:
        end = at + sum(map(len, bufs))
        if any(at < stop and start < end for start, stop in self.bad):
            self.failures += 1
            raise OSError(self.code, os.strerror(self.code))
        return self._real(fd, bufs, at)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENODATA, errno.EREMOTEIO])
def test_failing_sectors_are_found_exactly(
    image: Path, device: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Those of a device, though the page cache reads eight of them at a time."""
    content = bytearray(image.read_bytes())
    with DeviceSource(device) as source:
        sector = source.traits.sector_size
        bad = [(MiB + 3 * sector, MiB + 5 * sector), (MiB + 9 * sector, MiB + 10 * sector)]
        for start, stop in bad:
            content[start:stop] = bytes(stop - start)
        failing = Failing(monkeypatch, bad, code)
        for start, length in [(0, SIZE), (MiB, 64 * sector), (5, SIZE - 9), (MiB + 1, 20 * sector)]:
            buf, lenient = bytearray(length), Lenient(source)
            lenient.read_into(start, memoryview(buf))
            assert lenient.unreadable == [(first, stop - first) for first, stop in bad]
            assert buf == content[start : start + length]
        assert failing.failures < 4 * 40


def test_a_device_that_is_gone_is_not_searched(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with DeviceSource(device) as source:
        failing = Failing(monkeypatch, [(0, SIZE)], errno.ENXIO)
        with pytest.raises(ReadError, match="the device has failed or was pulled out") as caught:
            read(source, 4096, MiB)
        assert (caught.value.start, caught.value.length) == (4096, MiB)
        assert failing.failures == 1


# ---------------------------------------------------------------------- writing


def read_back(sink: Sink) -> bytes:
    assert isinstance(sink, DeviceSink)
    sink.flush()
    with DeviceSource(sink.path) as source:
        return read(source, 0, source.size)


def test_writing_anywhere(image: Path, device: Path) -> None:
    check_sink(lambda: DeviceSink(device), read_back, rounds=400)


def test_writing_where_direct_writes_are_refused(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_direct(monkeypatch)
    check_sink(lambda: DeviceSink(device), read_back)


@pytest.mark.parametrize("works", ["zero_range", "zero_out", "writing", "nothing but errors"])
def test_zeroing_falls_back(device: Path, monkeypatch: pytest.MonkeyPatch, works: str) -> None:
    def fail(fd: int, offset: int, length: int) -> bool:
        raise OSError(errno.EREMOTEIO, "the bridge does not know that command after all")

    for name in ("punch_hole", "zero_range", "zero_out"):
        if name == works:
            break
        monkeypatch.setattr(linux, name, fail if works == "nothing but errors" else lambda *_: False)
    check_sink(lambda: DeviceSink(device), read_back)


def test_zeros_are_not_written(tmp_path: Path) -> None:
    image = Path(tmp_path / "a")
    image.write_bytes(b"x" * SIZE)
    with loop(image) as device, DeviceSink(device) as sink:
        os.sync()
        sink.write_zeros(0, SIZE)
        sink.flush()
        assert image.stat().st_blocks < 64
    assert image.read_bytes() == bytes(SIZE)


def test_neighbours_in_a_sector_are_kept(image: Path, device: Path) -> None:
    before = image.read_bytes()
    with DeviceSink(device) as sink:
        sink.write(100, memoryview(b"abc"))
        sink.write_many(MiB - 1, [b"d", b"", b"e" * 5000, b"f"])
        sink.write_zeros(5000, 9)
        sink.flush()
    expected = bytearray(before)
    expected[100:103] = b"abc"
    expected[MiB - 1 : MiB + 5001] = b"d" + b"e" * 5000 + b"f"
    expected[5000:5009] = bytes(9)
    os.sync()
    assert image.read_bytes() == bytes(expected)


def test_many_parts(image: Path, device: Path) -> None:
    rng = random.Random(5)
    unaligned = [rng.randbytes(rng.choice([0, 1, 600, 5000])) for _ in range(700)]
    buffer = aligned_buffer(1200 * 512)
    buffer[:] = rng.randbytes(len(buffer))
    aligned = [buffer[at : at + 512] for at in range(0, len(buffer), 512)]
    for parts in (unaligned, aligned):
        whole = b"".join(parts)
        with DeviceSink(device) as sink:
            sink.write_many(4096, list(parts))
            sink.flush()
        with DeviceSource(device) as source:
            assert read(source, 4096, len(whole)) == whole


def test_a_failing_write_is_said_in_words(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, bufs: object, at: int) -> int:
        raise OSError(errno.EIO, "no")

    with DeviceSink(device) as sink:
        monkeypatch.setattr(os, "pwritev", fail)
        with pytest.raises(WriteError, match=f"{device}: writing 512 bytes at 1024 failed: the device reports"):
            sink.write(1024, memoryview(bytes(512)))


def test_a_device_in_use_is_refused(image: Path) -> None:
    with loop(image) as device:
        words = f"{device} is in use: .*held by another program"
        with DeviceSink(device), pytest.raises(Refused, match=words):
            DeviceSink(device)
        DeviceSink(device).close()
    with loop(image, read_only=True) as device, pytest.raises(Refused, match="write-protected"):
        DeviceSink(device)


def test_partitions_are_read_again(device: Path) -> None:
    """A loop device without partitions cannot; the point is that it says so quietly."""
    with DeviceSink(device) as sink:
        assert sink.reread_partitions() is False


# ---------------------------------------------------------------------- opening


def test_open_source_picks_by_what_stands_there(image: Path, device: Path) -> None:
    source: Source = open_source(device)
    assert isinstance(source, DeviceSource)
    assert source.extents(0, SIZE).total(State.ZERO) == 0
    sector = source.traits.sector_size
    source.close()
    open_source(device, sector_size=sector).close()
    with pytest.raises(UsageError, match=f"has sectors of {sector} bytes, not of 1024"):
        open_source(device, sector_size=1024)
    for given, expected in [(None, 512), (4096, 4096)]:
        source = open_source(image, sector_size=given)
        assert isinstance(source, FileSource)
        assert source.traits == Traits(sector_size=expected)
        source.close()


def test_what_cannot_be_a_source(tmp_path: Path) -> None:
    for path, words in [
        (tmp_path / "no", "does not exist"),
        (tmp_path, "neither a block device nor a regular file"),
        (Path("/dev/null"), "neither a block device nor a regular file"),
        (Path("/dev/null/x"), "does not exist"),
    ]:
        with pytest.raises(UsageError, match=words):
            open_source(path)
    for kind in (DeviceSource, DeviceSink):
        with pytest.raises(UsageError, match="is not a block device"):
            kind(tmp_path)
        with pytest.raises(UsageError, match="does not exist"):
            kind(tmp_path / "no")


def test_nothing_stays_open(image: Path, device: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        DeviceSource(device).close()
        DeviceSink(device).close()
        with pytest.raises(UsageError):
            open_source(device, sector_size=8192)
        open_source(image).close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_loop_driver_tells_what_it_stands_on(image: Path, device: Path) -> None:
    fd = os.open(device, os.O_RDONLY)
    try:
        info = linux.loop_info(fd)
    finally:
        os.close(fd)
    status = image.stat()
    assert (info.lo_device, info.lo_inode, info.lo_offset) == (status.st_dev, status.st_ino, 0)
    assert struct.unpack("64s", info.lo_file_name)[0].rstrip(b"\0").decode() == os.fspath(image)[:63]
