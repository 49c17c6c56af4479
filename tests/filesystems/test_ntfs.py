"""NTFS against mkntfs, ntfs-3g, ntfsresize, partclone, sleuthkit, blkid, and volumes that Windows made."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ferrotype
from ferrotype.block import Source, Traits
from ferrotype.block.memory import MemoryDisk
from ferrotype.errors import FormatError, InvalidImage, UnsupportedError
from ferrotype.extents import ExtentMap, State
from ferrotype.filesystems import FileSystem, ntfs
from ferrotype.filesystems.ntfs_mft import Geometry
from ferrotype.filesystems.ntfs_records import BootSector, RestartArea, RestartPageHeader
from ferrotype.units import KiB, MiB, TiB
from tests.machine import corpus, mounted, need, run, unpack

Runs = list[tuple[int, int]]  # (start, end) in bytes

CORPUS = [
    pytest.param(entry, truth, id=f"{entry['id']}@{truth['at']}")
    for entry in corpus()
    for truth in entry.get("truth", [])
    if truth["claim"] == "allocation" and truth["by"] == "partclone.ntfs" and truth["value"]["exit"] == 0
]
HOSTILE = [pytest.param(e, id=e["id"]) for e in corpus() if e["validity"] == "malformed" and "ntfs" in e["holds"]]


# ---------------------------------------------------------------------- volumes and oracles


def make(path: Path, size: int, *, sector: int = 512, cluster: int = 4096, label: str = "") -> Path:
    with path.open("wb") as image:
        image.truncate(size)
    sizes = ["-s", str(sector), "-c", str(cluster), "-p", "0", "-H", "0", "-S", "0"]
    run("mkntfs", "-q", "-F", "-Q", *sizes, "-L", label, path)
    return path


def disk(path: Path) -> MemoryDisk:
    return MemoryDisk(path.read_bytes())


def opened(path: Path) -> FileSystem:
    return ntfs.open(disk(path))


def free(extents: ExtentMap) -> Runs:
    starts, ends = extents.runs(State.FREE)
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def used(extents: ExtentMap, end: int) -> Runs:
    starts, ends = extents.clip(0, end).runs(State.FREE, present=False)
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def joined(runs: Runs) -> Runs:
    out: Runs = []
    for start, end in sorted(runs):
        if out and out[-1][1] == start:
            out[-1] = out[-1][0], end
        else:
            out.append((start, end))
    return out


def span(path: Path) -> int:
    """Bytes of all whole clusters, told by ntfs-3g's ntfsinfo."""
    told = run("ntfsinfo", "-m", "-f", path)
    size, count = (re.search(rf"{what}: (\d+)", told) for what in ("Cluster Size", "Volume Size in Clusters"))
    assert size is not None
    assert count is not None
    return int(size[1]) * int(count[1])


def partclone_used(path: Path) -> Runs:
    domain = path.with_suffix(".domain")
    domain.unlink(missing_ok=True)
    run("partclone.ntfs", "-D", "-q", "-I", "-F", "-L", path.with_suffix(".log"), "-s", path, "-o", domain)
    lines = re.findall(r"^(0x\w+)\s+(0x\w+)\s+\+", domain.read_text(), re.MULTILINE)
    return joined([(int(start, 16), int(start, 16) + int(length, 16)) for start, length in lines])


def sleuthkit_used(path: Path, unit: int) -> Runs:
    lines = re.findall(r"^(\d+)\|a", run("blkls", "-el", "-f", "ntfs", path), re.MULTILINE)
    return joined([(int(line) * unit, int(line) * unit + unit) for line in lines])


def clusters_of(path: Path, name: str, unit: int) -> Runs:
    """Where the unnamed data of a file lies, told by ntfscluster."""
    told = run("ntfscluster", "-f", "-F", name, path)
    data = [part for part in told.split("    0x")[1:] if part.startswith("80 ")]
    found = [
        (int(start) * unit, (int(start) + int(count)) * unit)
        for part in data
        for start, count in re.findall(r"^\s+\d+\s+(\d+)\s+(\d+)", part, re.MULTILINE)
    ]
    return joined(found)


def refused_by_ntfs_3g(path: Path, where: Path) -> bool:
    """Whether ntfs-3g takes the volume for dirty, open or hibernated; the image stays as it is."""
    need("ntfs-3g")
    copy = path.with_suffix(".copy")
    shutil.copy(path, copy)
    where.mkdir(exist_ok=True)
    done = subprocess.run(["ntfs-3g", copy, where], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        run("umount", where)
    return any(word in done.stderr for word in ("safely closed", "ibernated", "Windows cache"))


def write_some(folder: Path, seed: int, budget: int) -> None:
    """Files of many sizes, half of them deleted again, and larger ones written into the gaps."""
    rng = random.Random(seed)
    names: list[Path] = []
    while budget > 0:
        size = rng.choice([0, 100, 700, 5000, 20_000, 150_000])
        name = folder / f"file {len(names):04}.bin"
        name.write_bytes(rng.randbytes(size))
        names.append(name)
        budget -= size + 1024
    for name in rng.sample(names, len(names) // 2):
        name.unlink()
    (folder / "gaps").write_bytes(rng.randbytes(500_000))


@pytest.fixture(scope="module")
def aged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume of 512-byte clusters, full of holes: $MFT and pagefile.sys lie in hundreds of runs and so
    have attribute lists."""
    path = make(tmp_path_factory.mktemp("aged") / "aged.img", 12 * MiB, cluster=512)
    with mounted(path, "ntfs", path.parent / "mount") as root:
        (root / "a").mkdir()
        (root / "PageFile.SYS").write_bytes(bytes(2048))
        count = 0
        with contextlib.suppress(OSError):
            while True:
                (root / "a" / f"{count:05}").write_bytes(b"x" * 1000)
                count += 1
        for i in range(0, count, 2):
            (root / "a" / f"{i:05}").unlink()
        with contextlib.suppress(OSError):
            for i in range(count):
                (root / "a" / f"empty {i:05}").touch()
        with contextlib.suppress(OSError), (root / "filler").open("wb", 0) as filler:
            while True:
                filler.write(bytes(512))
        # the volume is full: pagefile.sys grows into one hole after the other
        with (root / "PageFile.SYS").open("ab", 0) as page:
            for i in range(1, count - 6, 12):
                (root / "a" / f"{i:05}").unlink()
                (root / "a" / f"{i + 6:05}").unlink()
                page.write(bytes(1024))
        (root / "filler").unlink()
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make(tmp_path_factory.mktemp("small") / "small.img", 4 * MiB, label="small")
    with mounted(path, "ntfs", path.parent / "mount") as root:
        write_some(root, 1, MiB)
    return path


# ---------------------------------------------------------------------- reading and writing records


class Editor:
    """Changes file records of an image as a driver would: fix-ups undone before and renewed after."""

    def __init__(self, path: Path) -> None:
        self.data = bytearray(path.read_bytes())
        geometry = Geometry.of(BootSector.unpack(self.data), len(self.data))
        self.unit, self.size = geometry.cluster_size, geometry.record_size
        self.mft, self.mirror = geometry.mft_lcn * self.unit, geometry.mirror_lcn * self.unit

    @contextlib.contextmanager
    def record(self, number: int, *, mirror: bool = False) -> Iterator[bytearray]:
        at = (self.mirror if mirror else self.mft) + number * self.size
        raw = self.data[at : at + self.size]
        table = int.from_bytes(raw[4:6], "little")
        ends = range(510, self.size, 512)
        for i, end in enumerate(ends):
            raw[end : end + 2] = raw[table + 2 + 2 * i : table + 4 + 2 * i]
        yield raw
        for i, end in enumerate(ends):
            raw[table + 2 + 2 * i : table + 4 + 2 * i] = raw[end : end + 2]
            raw[end : end + 2] = raw[table : table + 2]
        self.data[at : at + self.size] = raw

    @staticmethod
    def attribute(raw: bytearray, type_code: int) -> int:
        at = int.from_bytes(raw[0x14:0x16], "little")
        while (found := int.from_bytes(raw[at : at + 4], "little")) != type_code:
            assert found != 0xFFFFFFFF
            at += int.from_bytes(raw[at + 4 : at + 8], "little")
        return at

    def runs(self, number: int) -> Runs:
        """Runs of the unnamed data of a file (without attribute list), in clusters."""
        with self.record(number) as raw:
            at = self.attribute(raw, 0x80)
            at += int.from_bytes(raw[at + 0x20 : at + 0x22], "little")
            found, lcn = [], 0
            while raw[at]:
                middle = at + 1 + (raw[at] & 15)
                end = middle + (raw[at] >> 4)
                lcn += int.from_bytes(raw[middle:end], "little", signed=True)
                found.append((lcn, lcn + int.from_bytes(raw[at + 1 : middle], "little", signed=True)))
                at = end
        return found

    def save(self, path: Path) -> Path:
        path.write_bytes(self.data)
        return path


def change(path: Path, to: Path, number: int, edit: Callable[[bytearray], None]) -> Path:
    editor = Editor(path)
    with editor.record(number) as raw:
        edit(raw)
    return editor.save(to)


# ---------------------------------------------------------------------- the allocation map


@pytest.mark.parametrize(
    ("sector", "cluster"),
    [
        (256, 256),
        (256, 512),
        (512, 512),
        (512, 1024),
        (512, 4096),
        (512, 64 * KiB),
        (512, 128 * KiB),
        (512, 2 * MiB),
        (1024, 1024),
        (1024, 128 * KiB),
        (2048, 8192),
        (4096, 4096),
        (4096, 64 * KiB),
        (4096, 2 * MiB),
    ],
)
def test_every_sector_and_cluster_size(sector: int, cluster: int, tmp_path: Path) -> None:
    # 3 sectors more than whole clusters: a remainder that no bit stands for
    size = (128 * MiB if cluster > MiB else 24 * MiB) + 3 * sector
    path = make(tmp_path / "v.img", size, sector=sector, cluster=cluster, label="Grüße 1")
    with mounted(path, "ntfs", tmp_path / "mount") as root:
        write_some(root, cluster, 2 * MiB)
    volume = opened(path)
    found = volume.allocation()
    assert (found.start, found.end) == (0, size)
    assert used(found, span(path)) == partclone_used(path)
    assert all(end <= span(path) for _, end in free(found))
    assert volume.facts.unclean is None
    assert (volume.facts.kind, volume.facts.block_size) == ("ntfs", cluster)
    assert volume.facts.size == size // max(sector, 512) * max(sector, 512)  # mkntfs counts no less than 512
    told = run("blkid", "-p", "-o", "export", path, ok=(0, 2))
    if cluster <= 64 * KiB and sector >= 512:
        assert f"UUID={volume.facts.uuid}\n" in told
        assert "LABEL=Gr" in told
        assert used(found, span(path)) == sleuthkit_used(path, cluster)
    assert volume.facts.label == "Grüße 1"


def test_fragmented_mft_with_attribute_list(aged: Path) -> None:
    volume = ntfs.open(disk(aged))
    assert len(volume._mft.data.lcns) > 100  # the fixture is what it means to be
    assert volume._mft.record(0).find(0x20, "") is not None
    assert volume.facts.unclean is None
    assert used(volume.allocation(), span(aged)) == partclone_used(aged) == sleuthkit_used(aged, 512)


def test_resized_volume_is_unclean_until_it_was_checked(aged: Path, tmp_path: Path) -> None:
    path = tmp_path / "v.img"
    shutil.copy(aged, path)
    with path.open("r+b") as image:
        image.truncate(96 * MiB)
    run("ntfsresize", "-f", "-f", path)
    assert "chkdsk" in (opened(path).facts.unclean or "")
    run("ntfsfix", "-d", path)
    volume = opened(path)
    assert volume.facts.unclean is None
    assert used(volume.allocation(), span(path)) == partclone_used(path)


def test_bitmap_in_many_runs(small: Path, tmp_path: Path) -> None:
    source = make(tmp_path / "v.img", 64 * MiB, cluster=512)
    with mounted(source, "ntfs", tmp_path / "mount") as root:
        write_some(root, 5, 4 * MiB)
    editor = Editor(source)
    (first, end) = editor.runs(6)[0]
    content = editor.data[first * 512 : end * 512]
    # move every cluster but the first to one of its own in the free space, in no order
    rng = random.Random(4)
    spare = rng.sample(range(60_000, 130_000, 2), end - first - 1)
    for lcn in range(first + 1, end):
        content[lcn // 8] &= ~(1 << lcn % 8)
    for lcn in spare:
        content[lcn // 8] |= 1 << lcn % 8
    places, pairs, last = [first, *spare], b"", 0
    for i, lcn in enumerate(places):
        editor.data[lcn * 512 : lcn * 512 + 512] = content[i * 512 : i * 512 + 512]
        pairs += b"\x31\x01" + (lcn - last).to_bytes(3, "little", signed=True)
        last = lcn
    pairs += bytes(8 - len(pairs) % 8)
    with editor.record(6) as raw:
        at = editor.attribute(raw, 0x80)
        length = int.from_bytes(raw[at + 4 : at + 8], "little")
        offset = int.from_bytes(raw[at + 0x20 : at + 0x22], "little")
        rest = bytes(raw[at + length : int.from_bytes(raw[0x18:0x1C], "little")])
        raw[at + 4 : at + 8] = (offset + len(pairs)).to_bytes(4, "little")
        raw[at + offset : at + offset + len(pairs) + len(rest)] = pairs + rest
        raw[0x18:0x1C] = (at + offset + len(pairs) + len(rest)).to_bytes(4, "little")
    path = editor.save(tmp_path / "moved.img")
    found = opened(path).allocation()
    assert used(found, span(path)) == partclone_used(path) == sleuthkit_used(path, 512)


class Window:
    """Part of a file as a Source, so that large sparse ones need no memory."""

    def __init__(self, path: Path, start: int = 0, end: int = -1) -> None:
        self.file, self.start = os.open(path, os.O_RDONLY), start
        self.size, self.traits = (path.stat().st_size if end < 0 else end) - start, Traits()

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        assert 0 <= offset <= self.size - len(buf)
        assert os.preadv(self.file, [buf], self.start + offset) == len(buf)

    def extents(self, offset: int, length: int, /) -> ExtentMap:
        return ExtentMap.uniform(offset, length)

    def close(self) -> None:
        os.close(self.file)


def test_eight_tebibytes_take_little_time_and_memory(tmp_path: Path) -> None:
    path = make(tmp_path / "v.img", 8 * TiB, cluster=64 * KiB)
    source: Source = Window(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    found = ntfs.open(source).allocation()
    source.close()
    assert time.monotonic() - start < 5
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * KiB < 200 * MiB
    assert found.end == 8 * TiB
    assert 8 * TiB - MiB * 512 < found.total(State.FREE) < 8 * TiB


@pytest.mark.parametrize(("entry", "truth"), CORPUS)
def test_volumes_made_elsewhere(entry: dict[str, Any], truth: dict[str, Any], tmp_path: Path) -> None:
    path = raw_content(entry, tmp_path)
    later = [t["at"] for t in entry["truth"] if t["claim"] == "allocation" and t["at"] > truth["at"]]
    source = Window(path, truth["at"], min(later, default=-1))
    assert ntfs.probe(source)
    volume = ntfs.open(source)
    unit, count = truth["value"]["block_size"], truth["value"]["total_blocks"]
    runs = used(volume.allocation(), unit * count)
    source.close()
    lines = b"".join(b"%d+%d\n" % (start // unit, (end - start) // unit) for start, end in runs)
    assert volume.facts.block_size == unit
    assert hashlib.sha256(lines).hexdigest() == truth["value"]["used_ranges_sha256"]
    for told in entry["truth"]:
        if told["claim"] == "blkid" and told["at"] == truth["at"]:
            assert volume.facts.uuid == told["value"]["UUID"]
            assert volume.facts.label == told["value"].get("LABEL", "").replace("\\ ", " ")


def raw_content(entry: dict[str, Any], into: Path) -> Path:
    primary, raw = unpack(entry, into / "unpacked"), into / "content.raw"
    if entry["format"] == "raw":
        return primary
    if entry["format"] in ("vhd", "vhdx", "vmdk"):
        kind = {"vhd": "vpc"}.get(entry["format"], entry["format"])
        run("qemu-img", "convert", "-f", kind, "-O", "raw", primary, raw)
    elif entry["format"] == "ewf":
        need("img_cat")
        with raw.open("wb") as out:
            subprocess.run(["img_cat", "-i", "ewf", primary], stdout=out, check=True)
    elif entry["format"] == "partclone":
        run("partclone.restore", "-C", "-W", "-q", "-L", into / "log", "-s", primary, "-O", raw)
    elif entry["format"] == "ntfsclone":
        run("ntfsclone", "--restore-image", "--overwrite", raw, primary)
    else:
        ferrotype.convert(primary, raw)
    return raw


# ---------------------------------------------------------------------- clean or not


def set_flags(flags: int) -> Callable[[bytearray], None]:
    def edit(raw: bytearray) -> None:
        at = Editor.attribute(raw, 0x70)
        at += int.from_bytes(raw[at + 0x14 : at + 0x16], "little") + 10
        raw[at : at + 2] = flags.to_bytes(2, "little")

    return edit


@pytest.mark.parametrize(("flags", "clean"), [(0, True), (0x0080, True), (0x8000, True), (1, False), (0x4081, False)])
def test_dirty_flag(flags: int, clean: bool, small: Path, tmp_path: Path) -> None:
    path = change(small, tmp_path / "v.img", 3, set_flags(flags))
    assert (opened(path).facts.unclean is None) == clean


@pytest.mark.parametrize(("version", "known"), [((1, 0), False), ((1, 2), True), ((3, 0), True), ((3, 2), False)])
def test_versions(version: tuple[int, int], known: bool, small: Path, tmp_path: Path) -> None:
    def edit(raw: bytearray) -> None:
        at = Editor.attribute(raw, 0x70)
        at += int.from_bytes(raw[at + 0x14 : at + 0x16], "little") + 8
        raw[at : at + 2] = bytes(version)

    path = change(small, tmp_path / "v.img", 3, edit)
    if known:
        assert opened(path).facts.unclean is None
    else:
        with pytest.raises(UnsupportedError):
            opened(path)


@pytest.mark.parametrize(
    ("head", "clean"),
    [(b"hibr", False), (b"HIBR", False), (b"RSTR", False), (b"wake", True), (b"WAKE", True), (bytes(4), True)],
)
@pytest.mark.parametrize("size", [8192, 700_000])
def test_hibernation(head: bytes, clean: bool, size: int, tmp_path: Path) -> None:
    path = make(tmp_path / "v.img", 4 * MiB)
    with mounted(path, "ntfs", tmp_path / "mount") as root:
        (root / "HiberFil.sys").write_bytes(head + random.Random(1).randbytes(size - 4))
        (root / "hibernate.sys").write_bytes(b"hibr" + bytes(5000))
    volume = opened(path)
    assert (volume.facts.unclean is None) == clean
    if not clean:
        assert "hibernated" in str(volume.facts.unclean)
    assert free(volume.swap_files()) == clusters_of(path, "/HiberFil.sys", 4096)


@pytest.mark.parametrize("content", [b"", b"hibr" + bytes(100), b"some other system"])
def test_hiberfile_without_a_whole_header_is_another_systems(content: bytes, tmp_path: Path) -> None:
    path = make(tmp_path / "v.img", 4 * MiB)
    with mounted(path, "ntfs", tmp_path / "mount") as root:
        (root / "hiberfil.sys").write_bytes(content)
    assert refused_by_ntfs_3g(path, tmp_path / "mount")
    assert "hibernated" in str(opened(path).facts.unclean)


def test_ntfs_3g_agrees_on_hibernation(tmp_path: Path) -> None:
    path = make(tmp_path / "v.img", 4 * MiB)
    with mounted(path, "ntfs", tmp_path / "mount") as root:
        (root / "hiberfil.sys").write_bytes(b"HIBR" + bytes(8188))
    assert refused_by_ntfs_3g(path, tmp_path / "mount")
    assert "hibernated" in str(opened(path).facts.unclean)


def restart_page(
    lsn: int, *, signature: bytes = b"RSTR", version: tuple[int, int] = (1, 1), client: int = 0, flags: int = 0
) -> bytes:
    """A restart page of 4096 bytes with one client, fix-ups applied."""
    header = RestartPageHeader(
        signature, 0x1E, 9, lsn if signature == b"CHKD" else 0, 4096, 4096, 0x30, version[1], version[0]
    )
    free_list = 0 if client == 0xFFFF else 0xFFFF
    area = RestartArea(lsn, 1, free_list, client, flags, 46, 0xE0, 0x40, MiB, 0, 0x30, 0x40, 1, 0)
    page = bytearray(4096)
    page[: len(header.pack())] = header.pack()
    page[0x30:0x60] = area.pack()
    page[0x70 : 0x70 + 0xA0] = (
        (lsn).to_bytes(8, "little") * 2
        + b"\xff\xff\xff\xff"
        + bytes(8)
        + (8).to_bytes(4, "little")
        + "NTFS".encode("utf-16-le")
    ).ljust(0xA0, b"\0")
    page[0x1E:0x20] = b"\x07\0"
    for end in range(510, 4096, 512):
        page[end : end + 2] = b"\x07\0"
    return bytes(page)


OPEN, CLOSED, IDLE = restart_page(10), restart_page(10, flags=2), restart_page(10, client=0xFFFF)
LATER_OPEN, LATER_CLOSED = restart_page(20), restart_page(20, flags=2)


@pytest.mark.parametrize(
    ("log", "clean"),
    [
        pytest.param(b"\xff" * 8192, True, id="emptied"),
        pytest.param(CLOSED + CLOSED, True, id="closed"),
        pytest.param(IDLE + IDLE, True, id="no client"),
        pytest.param(OPEN + OPEN, False, id="open"),
        pytest.param(CLOSED + LATER_OPEN, False, id="the newer is open"),
        pytest.param(LATER_CLOSED + OPEN, True, id="the newer is closed"),
        pytest.param(OPEN + LATER_CLOSED, True, id="the second is newer and closed"),
        pytest.param(restart_page(10, flags=2, version=(2, 0)) * 2, False, id="fast startup"),
        pytest.param(restart_page(10, flags=2, version=(1, 7)) * 2, False, id="unknown version"),
        pytest.param(restart_page(10, signature=b"CHKD", client=0xFFFF) * 2, True, id="chkdsk"),
        pytest.param(CLOSED[:4094] + b"\0\0" + LATER_OPEN, False, id="first torn, second open"),
        pytest.param(bytes(8192), False, id="zeros"),
        pytest.param(b"RCRD" + bytes(4092) + CLOSED, False, id="log records first"),
    ],
)
def test_log(log: bytes, clean: bool, small: Path, tmp_path: Path) -> None:
    editor = Editor(small)
    start, end = editor.runs(2)[0]
    editor.data[start * 4096 : end * 4096] = log.ljust((end - start) * 4096, b"\xff")
    path = editor.save(tmp_path / "v.img")
    volume = opened(path)
    assert (volume.facts.unclean is None) == clean, volume.facts.unclean
    assert volume.allocation() == opened(small).allocation()
    assert refused_by_ntfs_3g(path, tmp_path / "mount") == (not clean)


# ---------------------------------------------------------------------- paging files


def test_swap_files_in_a_large_root_folder(tmp_path: Path) -> None:
    path = make(tmp_path / "v.img", 32 * MiB, cluster=1024)
    rng = random.Random(3)
    names = [
        f"{rng.choice(['hiber', 'page', 'Swap', 'zz', 'A'])}file {i:04} {'x' * rng.randrange(60)}" for i in range(900)
    ]
    with mounted(path, "ntfs", tmp_path / "mount") as root:
        for i, name in enumerate(names):
            (root / name).write_bytes(b"1" * rng.randrange(3000))
            if i % 300 == 200:
                other = ("pagefile.sys", "SWAPFILE.SYS", "Hiberfil.sys")[i // 300]
                (root / other).write_bytes(bytes(4096) + rng.randbytes(200_000))
        for name in names[::3]:
            (root / name).unlink()
        with (root / "pagefile.sys").open("ab") as more:
            more.write(rng.randbytes(400_000))
        (root / "sub").mkdir()
        (root / "sub" / "pagefile.sys").write_bytes(rng.randbytes(50_000))
    volume = opened(path)
    assert volume.facts.unclean is None
    expected = [
        run for name in ("/pagefile.sys", "/SWAPFILE.SYS", "/Hiberfil.sys") for run in clusters_of(path, name, 1024)
    ]
    assert free(volume.swap_files()) == joined(expected)
    assert sum(end - start for start, end in expected) >= 3 * 204_096 + 400_000


def test_swap_file_in_extension_records(aged: Path) -> None:
    volume = ntfs.open(disk(aged))
    (record,) = volume._in_root("PAGEFILE.SYS")
    assert record.find(0x20, "") is not None  # the fixture is what it means to be
    found = free(volume.swap_files())
    assert len(found) > 150
    assert found == clusters_of(aged, "/PageFile.SYS", 512)


def test_no_swap_files(small: Path) -> None:
    found = opened(small).swap_files()
    assert (len(found), found.end, free(found)) == (1, 4 * MiB, [])


def test_swap_file_that_claims_clusters_of_mft_is_not_offered(tmp_path: Path) -> None:
    path = make(tmp_path / "v.img", 4 * MiB)
    with mounted(path, "ntfs", tmp_path / "mount") as root:
        (root / "pagefile.sys").write_bytes(bytes(range(256)) * 64)
        number = (root / "pagefile.sys").stat().st_ino
    assert free(opened(path).swap_files()) != []

    def edit(raw: bytearray) -> None:
        at = Editor.attribute(raw, 0x80)
        at += int.from_bytes(raw[at + 0x20 : at + 0x22], "little")
        raw[at : at + 4] = bytes([0x11, 4, Editor(path).mft // 4096, 0])

    volume = opened(change(path, tmp_path / "w.img", number, edit))
    assert free(volume.swap_files()) == []


# ---------------------------------------------------------------------- damage


def outcome(source: Source, truth: list[tuple[int, int]]) -> str:
    """What becomes of a damaged volume; fails if a map taken for good calls used bytes free."""
    start = time.monotonic()
    try:
        volume = ntfs.open(source)
        found = volume.allocation()
        swap = volume.swap_files()
        assert (found.start, found.end, swap.end) == (0, source.size, source.size)
    except FormatError:
        return "refused"
    finally:
        assert time.monotonic() - start < 10
    if volume.facts.unclean is not None:
        return "unclean"
    beside = ExtentMap.from_runs(0, source.size, [a for a, _ in truth], [b for _, b in truth], State.FREE)
    starts, ends = found.runs(State.FREE)
    for low, high in zip(starts.tolist(), ends.tolist(), strict=True):
        part = beside.clip(low, high - low)
        assert part.total(State.FREE) == high - low, f"{low}..{high} is in use"
    return "map"


def test_no_flipped_byte_makes_used_clusters_free(small: Path) -> None:
    editor = Editor(small)
    truth = free(opened(small).allocation())
    places = list(range(0x54)) + [
        editor.mft + number * editor.size + i for number in (0, 2, 3, 5, 6) for i in range(number % 2, 0x1F0, 2)
    ]
    source = disk(small)
    seen = set()
    for i, place in enumerate(places):
        before = source.data[place]
        source.data[place] ^= (0xFF, 0x01, 0x80, 0x10)[i % 4]
        seen.add(outcome(source, truth))
        source.data[place] = before
    assert seen == {"refused", "unclean", "map"}


def test_random_damage_of_fragmented_volumes(aged: Path) -> None:
    source = disk(aged)
    truth = free(opened(aged).allocation())
    rng = random.Random(11)
    mft = Editor(aged).mft
    for _ in range(150):
        saved = []
        for _ in range(rng.randrange(1, 4)):
            place = mft + rng.choice([rng.randrange(32 * 1024), rng.randrange(1024)])
            saved.append((place, source.data[place]))
            source.data[place] = rng.choice([0, 1, 0xFF, rng.randrange(256)])
        outcome(source, truth)
        for place, value in reversed(saved):
            source.data[place] = value


@pytest.mark.parametrize("number", [0, 2, 3])
def test_mirror_stands_in_for_damaged_records(number: int, small: Path) -> None:
    source, editor = disk(small), Editor(small)
    at = editor.mft + number * editor.size
    source.data[at : at + editor.size] = bytes(editor.size)
    volume = ntfs.open(source)
    assert "$MFT is damaged" in str(volume.facts.unclean)
    assert volume.allocation() == opened(small).allocation()
    assert volume.facts.label == "small"
    mirror = editor.mirror + number * editor.size
    source.data[mirror : mirror + editor.size] = bytes(editor.size)
    if number == 2:
        assert "$LogFile" in str(ntfs.open(source).facts.unclean)
    else:
        with pytest.raises(InvalidImage):
            ntfs.open(source)


def test_mirror_that_disagrees_is_refused(small: Path) -> None:
    editor = Editor(small)
    with editor.record(0, mirror=True) as raw:
        at = editor.attribute(raw, 0x80)
        at += int.from_bytes(raw[at + 0x20 : at + 0x22], "little")
        raw[at + 2] ^= 1
    with pytest.raises(InvalidImage, match="disagree"):
        ntfs.open(MemoryDisk(editor.data))


def test_bitmap_that_frees_what_it_needs_is_refused(small: Path) -> None:
    editor = Editor(small)
    start, _ = editor.runs(6)[0]
    for lcn in (0, start, editor.mft // 4096):
        source = MemoryDisk(editor.data)
        source.data[start * 4096 + lcn // 8] &= ~(1 << lcn % 8)
        with pytest.raises(InvalidImage, match="free"):
            ntfs.open(source).allocation()


def test_root_folder_that_runs_in_circles(tmp_path: Path) -> None:
    path = make(tmp_path / "v.img", 8 * MiB)
    with mounted(path, "ntfs", tmp_path / "mount") as root:
        for i in range(400):
            (root / f"a name {i:05}").touch()
    source = disk(path)
    assert ntfs.open(source).facts.unclean is None
    # every node below the root names itself as the node below its first entry
    for at in range(0, len(source.data), 4096):
        if source.data[at : at + 4] == b"INDX":
            node = source.data[at + 16 : at + 24]
            entry = at + 24 + int.from_bytes(source.data[at + 24 : at + 28], "little")
            length = int.from_bytes(source.data[entry + 8 : entry + 10], "little")
            source.data[entry + 12] = 3
            source.data[entry + length - 8 : entry + length] = node
    volume = ntfs.open(source)
    assert "hibernated" in str(volume.facts.unclean)
    assert free(volume.swap_files()) == []


@pytest.mark.parametrize("entry", HOSTILE)
def test_malformed_volumes_of_others(entry: dict[str, Any], tmp_path: Path) -> None:
    data = unpack(entry, tmp_path).read_bytes()
    assert outcome(MemoryDisk(data), []) in ("refused", "unclean")


def test_truncated_volumes_are_refused(small: Path) -> None:
    data = small.read_bytes()
    for size in (0, 1, 511, 512, 513, 4096, len(data) // 2, len(data) - 513):
        with pytest.raises(InvalidImage):
            ntfs.open(MemoryDisk(data[:size]))
    # without the backup boot sector everything is there
    assert ntfs.open(MemoryDisk(data[:-512])).facts.size == len(data) - 512


def test_probe(small: Path) -> None:
    assert ntfs.probe(disk(small))
    for content in (
        b"",
        bytes(100),
        bytes(4096),
        random.Random(1).randbytes(4096),
        b"\xebX\x90-FVE-FS-" + bytes(4096),
    ):
        assert not ntfs.probe(MemoryDisk(content))
        with pytest.raises(InvalidImage):
            ntfs.open(MemoryDisk(content))
