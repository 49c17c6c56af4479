"""Which files of ext2, ext3 and ext4 stand in lost ranges: against debugfs, dumpe2fs and the kernel's mounts."""

from __future__ import annotations

import os
import random
import re
import struct
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ferrotype.block.file import FileSource
from ferrotype.block.memory import MemoryDisk
from ferrotype.errors import FormatError, InvalidImage, ReadError
from ferrotype.filesystems import ext
from tests.filesystems.claimed import check_claims
from tests.machine import corpus, loop, mounted, run, unpack

Ranges = list[tuple[int, int]]  # start, end; bytes

# ---------------------------------------------------------------------- volumes with a bit of everything


def populate(root: Path, seed: int) -> None:
    """Files in pieces, deep block maps and extent trees, hash trees, links, attributes, and names of all kinds."""
    rng = random.Random(seed)
    content = rng.randbytes(1 << 18)
    for i in range(90):
        folder = root / f"d{i % 5}" / f"e{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{i}").write_bytes(content[: rng.choice((0, 10, 3000, 20_000, 70_000))])
    for i in range(0, 90, 3):
        (root / f"d{i % 5}" / f"e{i % 3}" / f"f{i}").unlink()
    (root / "long").write_bytes(content * 3)
    (root / "long").with_name("to be deleted").write_bytes(content)
    with (root / "pieces").open("wb") as file:  # deep trees: every second block, and some far away
        for i in range(700):
            file.seek(i * 2048)
            file.write(content[:1024])
        for far in (20 << 20, 70 << 20, 300 << 20):
            file.seek(far)
            file.write(content[:5000])
    (root / "to be deleted").unlink()
    (root / "full").mkdir()  # a hash tree
    for i in range(300):
        (root / "full" / f"a name that is long enough to fill blocks {i:05}").touch()
    (root / "many").mkdir()  # more than what fits into an inode
    for i in range(8):
        (root / "many" / f"m{i}").write_bytes(content[: i * 40])
    for i in range(40):
        path = root / f"attributes{i}"
        path.write_bytes(content[:50])
        os.setxattr(path, "user.text", rng.randbytes(300 if i % 2 else 20))
    os.link(root / "long", root / "d1" / "hard link")
    (root / "short symlink").symlink_to("d1")
    (root / "long symlink").symlink_to("x" * 200)
    os.mkfifo(root / "pipe")
    os.mknod(root / "device", 0o600 | 0o20000, os.makedev(5, 1))
    Path(os.fsdecode(os.fsencode(root) + b"/latin \xe4\x1b[31m")).write_bytes(content[:3000])
    (root / "Größe ☃").write_bytes(content[:3000])


FOUR = ("-t", "ext4", "-b", "1024")
MATRIX: dict[str, tuple[str, ...]] = {
    "ext2": ("14M", "-t", "ext2", "-b", "1024", "-I", "128", "-g", "1024"),
    "ext2-untyped": ("14M", "-t", "ext2", "-b", "1024", "-O", "^filetype,^dir_index"),
    "ext3": ("24M", "-t", "ext3", "-b", "2048", "-J", "size=4"),
    "ext4": ("20M", *FOUR, "-g", "1024", "-J", "size=1"),
    "ext4-4k": ("20M", "-t", "ext4", "-b", "4096", "-I", "512"),
    "meta-bg": ("16M", *FOUR, "-g", "256", "-O", "meta_bg,^resize_inode,^flex_bg"),
    "bigalloc": ("24M", *FOUR, "-C", "4096", "-O", "bigalloc"),
    "inline": ("16M", *FOUR, "-O", "inline_data,^has_journal", "-I", "256"),
    "uninit": ("16M", *FOUR, "-O", "^metadata_csum,^64bit,uninit_bg,mmp"),
}


@dataclass(frozen=True, eq=False)
class Truth:
    """What the tools say of a volume."""

    image: bytes
    block: int
    paths: dict[int, set[str]]  # inode -> its names
    blocks: dict[int, set[int]]  # inode -> blocks
    slots: dict[int, tuple[int, int]]  # inode -> bytes of the volume
    structures: dict[str, set[int]]  # blocks
    parents: dict[int, set[int]]  # inode -> folders that it stands in

    def owners(self, ranges: Ranges) -> set[int]:
        touched = self._blocks(ranges)
        found = {inode for inode, blocks in self.blocks.items() if not blocks.isdisjoint(touched)}
        return found | {i for i, (low, high) in self.slots.items() if any(a < high and low < b for a, b in ranges)}

    def told(self, ranges: Ranges) -> set[str]:
        touched = self._blocks(ranges)
        found = {name for name, blocks in self.structures.items() if not blocks.isdisjoint(touched)}
        if any(a < 1024 for a, _ in ranges):
            found.add("<boot block>")
        if any(a < 2048 and b > 1024 for a, b in ranges):
            found.add("<superblock>")
        return found

    def _blocks(self, ranges: Ranges) -> set[int]:
        return {b for start, end in ranges for b in range(start // self.block, -(-end // self.block))}

    def inodes(self, names: Iterable[str]) -> set[int]:
        """The inodes behind an answer."""
        numbers = {name: inode for inode, names in self.paths.items() for name in names}
        return {numbers[name] for name in names}


def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def structures(dump: str, per_block: int) -> dict[str, set[int]]:
    """From dumpe2fs.  The primary superblock is left to the byte."""
    found = defaultdict[str, set[int]](set)
    group = 0
    for line in dump.splitlines():
        if start := re.match(r"Group (\d+):", line):
            group = int(start[1])
        primary = group % per_block == 0 if "meta_bg" in dump else group == 0
        for pattern, name in (
            (r"Backup superblock at (\d+)", "<copy of the superblock>"),
            (r"Group descriptors? at (\d+)(?:-(\d+))?", f"<{'' if primary else 'copy of the '}group descriptors>"),
            (r"Block bitmap at (\d+)", "<block bitmap>"),
            (r"Inode bitmap at (\d+)", "<inode bitmap>"),
            (r"Inode table at (\d+)-(\d+)", "<inode table>"),
            (r"MMP block number: +(\d+)", "<multiple mount protection>"),
        ):
            for match in re.finditer(pattern, line):
                found[name] |= set(range(int(match[1]), int(match[match.lastindex or 1]) + 1))
    return dict(found)


def truth_of(image: Path, tmp: Path) -> Truth:
    dump = run("dumpe2fs", image)

    def number(name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+)", dump, re.MULTILINE)
        assert found, name
        return int(found[1])

    block, count, per_group, size = (
        number(name) for name in ("Block size", "Block count", "Inodes per group", "Inode size")
    )
    tables = [int(n) for n in re.findall(r"Inode table at (\d+)", dump)]
    paths, parents = defaultdict[int, set[str]](set), defaultdict[int, set[int]](set)
    with loop(image, read_only=True) as device, mounted(device, "ext4", tmp / "mnt", "ro,noload") as root:
        for folder, names, files in os.walk(os.fsencode(root)):
            for name in (*names, *files):
                path = os.path.join(folder, name)
                inode = os.lstat(path).st_ino
                text = os.path.relpath(path, os.fsencode(root)).decode("utf-8", "backslashreplace")
                paths[inode].add(text.replace("\x1b", "\\x1b"))
                parents[inode].add(os.lstat(folder).st_ino)
    blocks = defaultdict[int, set[int]](set)
    script = tmp / "script"
    script.write_text(
        "".join(f"icheck {' '.join(map(str, range(a, min(a + 500, count))))}\n" for a in range(1, count, 500))
    )
    for match in re.finditer(r"^(\d+)\t(\d+)$", run("debugfs", "-f", script, image), re.MULTILINE):
        blocks[int(match[2])].add(int(match[1]))
    paths[2] = {"<root folder>"}
    for inode in list(blocks):
        if not paths[inode]:
            paths[inode] = {{7: "<resize inode>", 8: "<journal>"}.get(inode, f"<inode {inode}>")}
    if "has_journal" in dump:
        paths[8] = {"<journal>"}
    if "resize_inode" in dump:
        paths[7] = {"<resize inode>"}
    slots = {}
    for inode in paths:
        group, slot = divmod(inode - 1, per_group)
        at = tables[group] * block + slot * size
        slots[inode] = at, at + size
    return Truth(
        image.read_bytes(),
        block,
        dict(paths),
        dict(blocks),
        slots,
        structures(dump, block // (number("Group descriptor size") if "64bit" in dump else 32)),
        dict(parents),
    )


_MADE: dict[str, Truth] = {}


def made(name: str, tmp: Path) -> Truth:
    """A volume of the matrix, made once for all tests that want it."""
    if name not in _MADE:
        tmp.mkdir(exist_ok=True)
        _MADE[name] = make(name, tmp)
    return _MADE[name]


def make(name: str, tmp: Path) -> Truth:
    size, *options = MATRIX[name]
    image = tmp / "image"
    image.write_bytes(random.Random(size).randbytes(int(size[:-1]) << 20))
    run("mke2fs", "-q", "-F", "-E", "nodiscard,lazy_itable_init=0", "-N", "2000", *options, image)
    with loop(image) as device, mounted(device, "ext4", tmp / "mnt") as root:
        populate(root, 1)
    return truth_of(image, tmp)


@pytest.fixture(scope="module", params=MATRIX)
def truth(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return made(request.param, tmp_path_factory.mktemp("ext"))


# ---------------------------------------------------------------------- sources


class Damaged(MemoryDisk):
    """A volume whose ranges cannot be read."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.lost: Ranges = []

    def read_into(self, offset: int, buf: memoryview, /) -> None:
        if any(a < offset + len(buf) and offset < b for a, b in self.lost):
            buf[:] = b"\xa5" * len(buf)  # a failed read may leave anything
            raise ReadError("memory", offset, len(buf), "lost")
        super().read_into(offset, buf)


def ask(fs: ext.Ext, ranges: Ranges) -> tuple[str, ...]:
    edges = np.array(ranges, np.int64).reshape(-1, 2)
    return fs.files_at(edges[:, 0].copy(), edges[:, 1].copy())


def some_ranges(rng: random.Random, truth: Truth, most: int) -> Ranges:
    """Ascending and apart; of all lengths, and some of them where metadata lies."""
    starts = set(rng.sample(range(len(truth.image)), rng.randrange(1, most + 1)))
    known = sorted(rng.choice([*truth.blocks.values(), *truth.structures.values()]))
    starts |= {b * truth.block + rng.randrange(truth.block) for b in rng.sample(known, min(len(known), 2))}
    out: Ranges = []
    for start in sorted(starts):
        start = max(start, out[-1][1] + 1 if out else 0)
        end = min(start + rng.choice((1, 100, 1024, 4096, 30_000)), len(truth.image))
        if start < end:
            out.append((start, end))
    return out


# ---------------------------------------------------------------------- tests


def test_random_ranges_agree_with_debugfs(truth: Truth) -> None:
    rng = random.Random(1)
    fs = ext.open(MemoryDisk(truth.image))
    assert ask(fs, []) == ()
    whole = set(ask(fs, [(0, len(truth.image))]))
    assert truth.inodes(whole - truth.told([(0, len(truth.image))])) == set(truth.paths)
    text = int.from_bytes(b"d1", "little") * truth.block  # the target of a symlink must not be taken for a block
    asked = [[(min(text, len(truth.image) - 1), min(text, len(truth.image) - 1) + 1)]]
    for ranges in asked + [some_ranges(rng, truth, 20) for _ in range(15)]:
        found = ask(fs, ranges)
        assert list(found) == sorted(found)
        told = truth.told(ranges)
        assert told <= set(found)
        assert truth.inodes(set(found) - told) == truth.owners(ranges), ranges


def intact(truth: Truth, inode: int, lost: set[int]) -> bool:
    """Whether one way from the root to the inode can still be read."""
    if inode == 2:
        return True
    folders = truth.parents.get(inode, set())
    return any(folder not in lost and intact(truth, folder, lost) for folder in folders)


@pytest.mark.parametrize("left", ["nothing", "zeros", "noise"])
def test_damaged_volumes_name_what_can_be_named(truth: Truth, left: str) -> None:
    """Ranges that cannot be read, or read as something else: what has a way to it is named, and nothing else is."""
    rng = random.Random(left)
    safe = truth.structures["<group descriptors>"] | {1024 // truth.block}
    every = {name for names in truth.paths.values() for name in names}
    fs = ext.open(disk := Damaged(truth.image))
    for _ in range(12):
        ranges = some_ranges(rng, truth, 8)
        ranges = [(a, b) for a, b in ranges if safe.isdisjoint(range(a // truth.block, b // truth.block + 1))]
        if left == "nothing":
            disk.lost = ranges
        for start, end in ranges:
            disk.data[start:end] = bytes(end - start) if left == "zeros" else rng.randbytes(end - start)
        found, told = set(ask(fs, ranges)), truth.told(ranges)
        for start, end in ranges:
            disk.data[start:end] = truth.image[start:end]
        assert told <= found
        named, owners = (found - told) & every, truth.owners(ranges)
        if left != "noise":  # a name can be changed to another
            assert all(name.startswith("<inode ") for name in found - told - named)
            assert truth.inodes(named) <= owners
        assert {i for i in owners if intact(truth, i, owners)} <= truth.inodes(named)


def test_lost_descriptors_are_taken_from_a_copy(tmp_path: Path) -> None:
    """Of a file system that was used since the copies were written, and of one without checksums."""
    for name in ("ext4", "ext2", "meta-bg"):
        truth = made(name, tmp_path / name)
        disk = Damaged(truth.image)
        fs = ext.open(disk)
        descriptors = sorted(truth.structures["<group descriptors>"])
        disk.lost = [(b * truth.block, (b + 1) * truth.block) for b in descriptors]
        inode = next(i for i, names in truth.paths.items() if "long" in names)
        block = max(truth.blocks[inode])
        ranges = [*disk.lost, (block * truth.block, block * truth.block + 1)]
        found = set(ask(fs, sorted(ranges)))
        assert found & truth.paths[inode], name
        if name != "ext4":
            disk.lost += [
                (b * truth.block, (b + 1) * truth.block) for b in truth.structures["<copy of the group descriptors>"]
            ]
            assert not set(ask(fs, sorted(ranges))) & truth.paths[inode], "there was no need of a copy"


def test_folders_in_a_circle_end(tmp_path: Path) -> None:
    """Two folders that hold each other, and nothing leads to from the root."""
    image = tmp_path / "image"
    run("mke2fs", "-q", "-t", "ext2", "-b", "1024", "-O", "^dir_index", image, "2M")
    made_of = "mkdir a\nmkdir a/b\nwrite /etc/hostname a/b/file\nlink a a/b/again\nunlink a\n"
    run("debugfs", "-w", "-f", "/dev/stdin", image, text_in=made_of)
    found = ask(ext.open(MemoryDisk(image.read_bytes())), [(0, 2 << 20)])
    assert any(name.startswith("<inode ") and name.endswith("file") for name in found)


def test_hostile_structures_end(tmp_path: Path) -> None:
    """Words of inodes, trees, block maps, folders and descriptors set to what leads elsewhere, and in circles."""
    rng = random.Random(5)
    for name in ("ext4", "ext2", "inline"):
        truth = made(name, tmp_path / name)
        fs = ext.open(disk := MemoryDisk(truth.image))
        metadata = sorted(set().union(*truth.structures.values()))
        folders = sorted(
            set().union(*(truth.blocks.get(i, set()) for i in {f for p in truth.parents.values() for f in p}))
        )
        slots = sorted(truth.slots.values())
        for _ in range(10):
            disk.data[:] = truth.image
            for _ in range(rng.choice((5, 500))):
                where = rng.choice((metadata, folders))
                at = rng.choice(where) * truth.block + rng.randrange(0, truth.block, 4)
                if rng.random() < 0.6:
                    at = rng.choice(slots)[0] + rng.randrange(0, 128, 4)
                value = rng.choice(
                    (0, 1, 2, 12, 0xF30A, 0x5F30A, 0x10004, 0xFFFFFFFF, rng.choice(folders), rng.randrange(1 << 14))
                )
                struct.pack_into("<I", disk.data, at, value)
            assert "<inode table>" in ask(fs, [(0, len(truth.image))])


MALFORMED = [
    e for e in corpus() if e["kind"] == "malformed" and "ext" in e["holds"] and e["decompressed_size"] <= 4 << 20
]


def test_corpus_malformed(tmp_path: Path) -> None:
    asked = 0
    for number, entry in enumerate(MALFORMED):
        image = unpack(entry, tmp_path / str(number))
        with FileSource(image) as source:
            try:
                fs = ext.open(source)
            except FormatError:
                continue
            assert "<superblock>" in ask(fs, [(0, source.size)])
            asked += 1
    assert asked > len(MALFORMED) // 2 or not MALFORMED


# ---------------------------------------------------------------------- the second opinion


def test_claims_are_what_debugfs_says_is_in_use(truth: Truth) -> None:
    """Found without the block bitmap: every block of every inode, and every structure that dumpe2fs lists."""
    fs = ext.open(MemoryDisk(truth.image))
    blocks = set().union(*truth.blocks.values(), *truth.structures.values())
    files = check_claims(fs, len(truth.image), (block * truth.block for block in blocks))
    assert files >= len(truth.paths)


@pytest.mark.parametrize("name", ["ext4", "ext2"])
def test_a_damaged_inode_in_use_is_not_passed_over(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    truth = made(name, tmp_path_factory.mktemp("ext"))
    at = truth.slots[next(i for i, names in truth.paths.items() if "pieces" in names)][0]
    image = bytearray(truth.image)
    image[at + 40 : at + 100] = b"\xa7" * 60  # i_block
    with pytest.raises(InvalidImage, match="cannot be followed"):
        list(ext.open(MemoryDisk(image)).claims())


@pytest.mark.parametrize("name", ["ext4", "ext2"])
def test_a_lost_inode_table_is_not_passed_over(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    truth = made(name, tmp_path_factory.mktemp("ext"))
    image = bytearray(truth.image)
    start = truth.slots[next(i for i, names in truth.paths.items() if "pieces" in names)][0]
    image[start : start + 128] = bytes(128)
    with pytest.raises(InvalidImage, match="inodes in use"):
        list(ext.open(MemoryDisk(image)).claims())


def test_what_cannot_be_read_is_not_proven(tmp_path_factory: pytest.TempPathFactory) -> None:
    truth = made("ext4", tmp_path_factory.mktemp("ext"))
    disk = Damaged(truth.image)
    fs = ext.open(disk)
    disk.lost = [truth.slots[next(iter(truth.slots))]]
    with pytest.raises(ReadError):
        list(fs.claims())
