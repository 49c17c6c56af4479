"""What fuzzers start from: small disks made by the tools themselves, and what the shared corpus has of the kind."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ferrotype.units import KiB, MiB
from tests.fuzz.sparse import BLOCK, Sparse
from tests.machine import CORPUS, corpus, loop, mounted, run

_MOST_BLOCKS: Final = 400  # of a seed: a larger one makes all its children slow
_MOST_UNPACKED: Final = 1 << 28  # bytes of a corpus file, holes included

_FORMATS: Final[dict[str, tuple[tuple[int, tuple[str, ...]], ...]]] = {
    "fat": (
        (1440 * KiB, ("mkfs.fat", "-n", "FLOPPY")),
        (5 * MiB, ("mkfs.fat", "-F16", "-s1", "-n", "SIXTEEN")),
        (36 * MiB, ("mkfs.fat", "-F32", "-s1", "-n", "LARGE32")),
        (4 * MiB, ("mkfs.fat", "-F32", "-S4096", "-s1")),
    ),
    "exfat": ((2 * MiB, ("mkfs.exfat", "-b", "4K", "-L", "ex")), (4 * MiB, ("mkfs.exfat", "-b", "4K", "-c", "512"))),
    "ext": (
        (1 * MiB, ("mke2fs", "-q", "-F", "-t", "ext2", "-b1024", "-N16")),
        (2 * MiB, ("mke2fs", "-q", "-F", "-t", "ext4", "-b1024", "-N32", "-O", "^has_journal", "-g256")),
        (4 * MiB, ("mke2fs", "-q", "-F", "-t", "ext4", "-b4096", "-N16", "-O", "^has_journal,64bit,metadata_csum")),
        (3 * MiB, ("mke2fs", "-q", "-F", "-t", "ext4", "-b1024", "-N32", "-g256",
                   "-O", "^has_journal,^resize_inode,meta_bg,bigalloc", "-C4096")),
    ),
    "ntfs": (
        (2 * MiB, ("mkntfs", "-q", "-F", "-Q", "-s512", "-p0", "-H0", "-S0", "-c512", "-L", "small")),
        (2 * MiB, ("mkntfs", "-q", "-F", "-Q", "-s512", "-p0", "-H0", "-S0", "-c4096")),
    ),
    "swap": ((64 * KiB, ("mkswap", "-q", "-L", "swap")), (1 * MiB, ("mkswap", "-q", "-p", "65536"))),
}  # fmt: skip

_TABLES: Final[dict[str, tuple[str, ...]]] = {
    "mbr": (
        (
            "label: dos\nstart=64, size=100, type=7\nstart=200, size=1000, type=5\nstart=202, size=50, type=83\n"
            "start=300, size=50, type=82\nstart=1500, size=200, type=c, bootable\n"
        ),
    ),
    "gpt": (
        "label: gpt\nstart=64, size=100, name=one\nstart=300, size=1000, type=U\n",
        "label: gpt\ntable-length: 4\nfirst-lba: 34\nstart=64, size=8\n",
    ),
}

_EMPTY: Final = {("fat", 3), ("ext", 3), ("ntfs", 1), ("exfat", 1), ("swap", 0), ("swap", 1)}

# what the corpus calls a file system, and the kinds of disks for each target
_CORPUS: Final = {
    "fat": ("fat", "vfat"), "exfat": ("exfat",), "ext": ("ext2", "ext3", "ext4"), "ntfs": ("ntfs",),
    "swap": ("swap",),
}  # fmt: skip


def _trimmed(disk: Sparse) -> Sparse:
    """Without tables of letters (NTFS $UpCase), which are large and looked at by nobody."""
    kept = []
    for r in disk.runs:
        steps = np.diff(np.frombuffer(bytes(r.data), "<u2").astype(np.int32))
        if not ((steps == 1).mean() > 0.5 and r.data[:4] != b"FILE"):
            kept.append(r)
    disk.runs = kept[:_MOST_BLOCKS]
    return disk


def _filled(kind: str, path: Path, folder: Path) -> None:
    """Some files and folders, where that needs no mount."""
    names = [folder / "one.txt", folder / "two.bin"]
    names[0].write_bytes(b"one\n" * 300)
    names[1].write_bytes(b"two\n" * 5000)
    if kind == "fat":
        run("mmd", "-i", path, "::/folder")
        for name in names:
            run("mcopy", "-i", path, name, f"::/folder/a long name of {name.name}")
    elif kind == "ext":
        commands = "mkdir folder\ncd folder\n" + "".join(f"write {name} {name.name}\n" for name in names)
        run("debugfs", "-w", "-f", "-", path, text_in=commands)
    elif kind in ("ntfs", "exfat"):
        with loop(path) as device, mounted(device, kind, folder / "mount") as root:
            (root / "folder").mkdir()
            for name in names:
                (root / "folder" / f"a long name of {name.name}").write_bytes(name.read_bytes())
            (root / "pagefile.sys").write_bytes(bytes(5000))


@functools.cache
def filesystem(kind: str) -> tuple[bytes, ...]:
    """Small file systems of one kind, empty ones and ones with files."""
    made = []
    with tempfile.TemporaryDirectory(prefix="ferrotype-fuzz-") as name:
        folder = Path(name)
        for i, (size, command) in enumerate(_FORMATS[kind]):
            path = folder / f"{kind}{i}.img"
            with path.open("wb") as file:
                file.truncate(size)
            run(*command, path)
            if (kind, i) not in _EMPTY:
                _filled(kind, path, folder)
            made.append(_trimmed(Sparse.of(path.read_bytes())).encode())
    return tuple(made)


@functools.cache
def table(kind: str) -> tuple[bytes, ...]:
    """Small partitioned disks of one kind."""
    if kind == "apm":
        return (_apple(),)
    made = []
    with tempfile.TemporaryDirectory(prefix="ferrotype-fuzz-") as name:
        for script in _TABLES[kind]:
            path = Path(name) / "disk.img"
            path.write_bytes(bytes(2 * MiB))
            run("sfdisk", "-q", "--no-reread", path, text_in=script)
            made.append(Sparse.of(path.read_bytes()).encode())
    return tuple(made)


def _apple() -> bytes:
    """An Apple partition map by hand: no tool here makes one."""
    disk = Sparse(1 * MiB)
    disk.write(0, b"ER" + (512).to_bytes(2, "big") + (2048).to_bytes(4, "big"))
    entries = (
        (1, 63, b"Apple", b"Apple_partition_map"),
        (64, 800, b"Mac", b"Apple_HFS"),
        (900, 8, b"", b"Apple_Free"),
    )
    for i, (start, count, label, kind) in enumerate(entries, 1):
        numbers = (len(entries).to_bytes(4, "big"), start.to_bytes(4, "big"), count.to_bytes(4, "big"))
        disk.write(i * BLOCK, b"PM\0\0" + b"".join(numbers) + label.ljust(32, b"\0") + kind.ljust(32, b"\0"))
    return disk.encode()


@functools.cache
def whole_disks() -> tuple[bytes, ...]:
    """A partitioned disk whose partitions hold file systems."""
    made = []
    for kind in ("mbr", "gpt"):
        disk = Sparse.decode(table(kind)[0])
        for start, name in ((64, "swap"), (300, "ext")):
            inner = Sparse.decode(filesystem(name)[0])
            for r in inner.runs:
                r.number += start
            disk.runs += inner.runs
        disk.size = 4 * MiB
        made.append(disk.encode())
    return tuple(made)


def from_corpus(kind: str) -> tuple[bytes, ...]:
    """The corpus's disks of one kind; ``table`` for partitioned ones, ``other`` for what has no module of its own."""
    made = []
    for entry in corpus():
        if entry.get("format") != "raw" or entry["decompressed_size"] > _MOST_UNPACKED or len(entry["files"]) != 1:
            continue
        if kind not in _kinds(entry):
            continue
        stored = entry["files"][0]
        disk = _trimmed(Sparse.load(CORPUS / stored["stored"], stored["storage"]))
        if disk.runs:
            made.append(disk.encode())
    return tuple(made)


def _kinds(entry: dict[str, Any]) -> Sequence[str]:
    if entry["kind"] == "partition":
        return ("table",)
    words = {w.lower() for w in entry.get("holds", [])} | set(entry["id"].lower().replace("_", "-").split("-"))
    if "e2" in words:
        words.add("ext4")
    if "dos" in words:
        words.add("fat")
    found = [kind for kind, names in _CORPUS.items() if any(w.startswith(n) for w in words for n in names)]
    return found or ("other",)
