"""WIM files against wimlib-imagex and 7-Zip: folders, contents, both compressions, streams, damage."""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from ferrotype.block.file import FileSource
from ferrotype.block.memory import MemoryDisk
from ferrotype.errors import FerrotypeError, FormatError, InvalidImage, UnsupportedError, UsageError
from ferrotype.formats.registry import open_file, open_tree, recognise
from ferrotype.formats.related import Related
from ferrotype.formats.wim import Header, Wim
from ferrotype.formats.wim.chunks import unlzx, unxpress
from tests.cli.program import PROGRAM
from tests.formats.corpus import entries
from tests.formats.judges import KiB
from tests.machine import need, run, unpack


def opened(path: Path) -> Wim:
    tree = open_tree(FileSource(path), Related(path))
    assert isinstance(tree, Wim)
    return tree


def content(tree: Wim, path: str) -> bytes:
    return b"".join(tree.read(path))


def code_like(rng: random.Random, size: int) -> bytes:
    """Bytes like a program's: text, repeats at all distances, calls."""
    out = bytearray()
    while len(out) < size:
        kind = rng.random()
        if kind < 0.3:
            out += rng.randbytes(rng.randint(1, 300))
        elif kind < 0.6 and out:
            start = rng.randrange(len(out))
            out += out[start : start + rng.choice([3, 5, 17, 260, 3000])]
        elif kind < 0.8:
            out += b"\xe8" + struct.pack("<i", rng.choice([5, 100_000, -300, 11_999_999, 12_000_001]))
        elif kind < 0.9:
            out += bytes([rng.randrange(256)]) * rng.choice([2, 40, 600, 70_000])
        else:
            out += b"and so the code goes on and on. " * rng.randint(1, 5)
    return bytes(out[:size])


def make_folder(root: Path, seed: int = 0) -> Path:
    """Files whose contents each take another way through the compressors."""
    rng = random.Random(seed)
    root.mkdir()
    (root / "empty").touch()
    (root / "one").write_bytes(b"1")
    (root / "random").write_bytes(rng.randbytes(50_000))
    (root / "zeros").write_bytes(bytes(100_000))
    (root / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 2000)
    inner = root / "Ordner mit Umlaut ä" / "deep" / "deeper"
    inner.mkdir(parents=True)
    for number, size in enumerate([1, 5, 11, 4095, 4096, 32 * KiB, 32 * KiB + 1, 150_001, 200_000]):
        (inner / f"code{number}.bin").write_bytes(code_like(rng, size))
    (inner / "same.bin").write_bytes((inner / "code7.bin").read_bytes())
    os.link(inner / "code8.bin", root / "hard link")
    (root / "link").symlink_to("text.txt")
    many = root / "many"
    many.mkdir()
    for number in range(100):
        (many / f"file {number:03}").write_bytes(rng.randbytes(number % 7) + bytes(number))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("wim") / "folder")


def check_tree(tree: Wim, folder: Path, image: int = 1) -> None:
    """The tree is the folder, in its names, kinds, sizes and contents."""
    found = dict(tree.walk(str(image)))
    wanted = {f"{image}/{path.relative_to(folder)}": path for path in folder.rglob("*")}
    assert sorted(found) == sorted(wanted)
    for path, there in wanted.items():
        entry = found[path]
        assert entry.name == there.name
        if there.is_symlink():
            assert entry.kind == "link"
        elif there.is_dir():
            assert entry.kind == "folder"
        else:
            data = there.read_bytes()
            assert (entry.kind, entry.size) == ("file", len(data))
            assert content(tree, path) == data
            assert entry.digest == (hashlib.sha1(data, usedforsecurity=False).hexdigest() if data else "")


@pytest.mark.parametrize(
    "options",
    [
        ("--compress=none",),
        ("--compress=XPRESS",),
        ("--compress=XPRESS", "--chunk-size=4096"),
        ("--compress=XPRESS:100", "--chunk-size=65536"),
        ("--compress=LZX",),
        ("--compress=LZX:20",),
        ("--compress=LZX:100", "--chunk-size=131072"),
        ("--compress=LZX", "--chunk-size=2097152"),
        ("--compress=LZX", "--check"),
    ],
)
def test_an_image_of_wimlib(options: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    need("wimlib-imagex")
    path = tmp_path / "a.wim"
    run("wimlib-imagex", "capture", folder, path, "The name & more", *options)
    with FileSource(path) as file:
        assert recognise(file) == "wim"
    tree = opened(path)
    check_tree(tree, folder)
    images: Any = tree.facts["images"]
    (described,) = images
    assert described["name"] == "The name & more"
    compression = options[0].removeprefix("--compress=").split(":")[0]
    assert tree.facts["compression"] == compression
    listed = run("wimlib-imagex", "dir", path, "1").splitlines()
    assert sorted(f"/{name.partition('/')[2]}" for name, _ in tree.walk("1")) == sorted(listed[1:])
    tree.close()


def test_seven_zip_writes_one(folder: Path, tmp_path: Path) -> None:
    need("7z")
    path = tmp_path / "a.wim"
    run("7z", "a", path, ".", "-xr!link", cwd=folder)
    tree = opened(path)
    for name in ("text.txt", "random", "many/file 023"):
        assert content(tree, f"1/{name}") == (folder / name).read_bytes()
    tree.close()


def test_several_images_and_a_boot_image(folder: Path, tmp_path: Path) -> None:
    need("wimlib-imagex")
    path = tmp_path / "a.wim"
    run("wimlib-imagex", "capture", folder, path, "first", "--compress=XPRESS")
    run("wimlib-imagex", "append", folder / "many", path, "second", "the description", "--boot")
    tree = opened(path)
    assert [entry.name for entry in tree.list()] == ["1", "2"]
    check_tree(tree, folder, 1)
    check_tree(tree, folder / "many", 2)
    assert tree.facts["boot_image"] == 2
    images: Any = tree.facts["images"]
    assert [(image["name"], image["files"]) for image in images] == [("first", 117), ("second", 100)]
    assert images[1]["description"] == "the description"
    tree.close()


def test_alternate_streams(tmp_path: Path) -> None:
    entry = next((entry for entry in entries("wim") if entry["id"] == "dissect-wim-basic32k"), None)
    if entry is None:
        pytest.skip("the corpus is not here")
    tree = opened(unpack(entry, tmp_path))
    found = dict(tree.walk())
    (stream,) = found["1/ads.txt"].streams
    assert content(tree, f"1/ads.txt:{stream}")
    with pytest.raises(UsageError, match="no stream"):
        content(tree, "1/ads.txt:other")
    tree.close()


def test_paths_that_are_none(folder: Path, tmp_path: Path) -> None:
    need("wimlib-imagex")
    path = tmp_path / "a.wim"
    run("wimlib-imagex", "capture", folder / "many", path)
    tree = opened(path)
    for name in ("2", "0", "x", "1/nothing", "1/file 001/more"):
        with pytest.raises(UsageError):
            list(tree.list(name))
        with pytest.raises(UsageError):
            content(tree, name)
    with pytest.raises(UsageError):
        content(tree, "1")
    assert len(list(tree.list("1"))) == 100
    tree.close()


def test_info_shows_its_facts_and_images(folder: Path, tmp_path: Path) -> None:
    need("wimlib-imagex")
    path = tmp_path / "a.wim"
    run("wimlib-imagex", "capture", folder / "many", path, "The name", "--compress=XPRESS")
    document = json.loads(run(*PROGRAM, "info", "--json", path))
    assert document["format"] == "wim"
    assert document["container"]["compression"] == "XPRESS"
    assert [(image["index"], image["name"]) for image in document["container"]["images"]] == [(1, "The name")]
    assert "name The name, folders 1, files 100" in run(*PROGRAM, "info", path)
    run(*PROGRAM, "checksum", path, ok=(4,))


def test_it_is_no_disk(folder: Path, tmp_path: Path) -> None:
    need("wimlib-imagex")
    path = tmp_path / "a.wim"
    run("wimlib-imagex", "capture", folder / "many", path)
    with FileSource(path) as file, pytest.raises(UnsupportedError, match="files and no disk"):
        open_file(file, Related(path))


@pytest.mark.parametrize("options", [("--compress=LZMS", "--solid"), ("--compress=LZMS",), ("--pipable",)])
def test_what_is_not_read_is_refused(options: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    need("wimlib-imagex")
    path = tmp_path / "a.wim"
    run("wimlib-imagex", "capture", folder / "many", path, *options)
    with pytest.raises(UnsupportedError, match="wimlib-imagex export"):
        opened(path)


def test_a_split_one_is_listed_and_says_what_is_elsewhere(folder: Path, tmp_path: Path) -> None:
    need("wimlib-imagex")
    run("wimlib-imagex", "capture", folder, tmp_path / "a.wim", "--compress=none")
    run("wimlib-imagex", "split", tmp_path / "a.wim", tmp_path / "b.swm", "0.3")
    tree = opened(tmp_path / "b.swm")
    assert tree.facts["parts"] != 1
    names = [path for path, entry in tree.walk() if entry.kind == "file"]
    assert len(names) == 116
    refused = 0
    for name in names:
        try:
            assert content(tree, name) == (folder / name[2:]).read_bytes()
        except UnsupportedError:
            refused += 1
    assert 0 < refused < len(names)
    tree.close()


# ---------------------------------------------------------------------- damage and hostile files


@pytest.fixture(scope="module", params=["none", "XPRESS", "LZX"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A WIM of a few files."""
    need("wimlib-imagex")
    root = tmp_path_factory.mktemp("small")
    source = root / "source"
    (source / "inner").mkdir(parents=True)
    rng = random.Random(1)
    for name, size in (("a", 9000), ("inner/b", 40_000), ("inner/c", 200)):
        (source / name).write_bytes(code_like(rng, size))
    run("wimlib-imagex", "capture", source, root / "a.wim", f"--compress={request.param}")
    return (root / "a.wim").read_bytes()


def read_all(data: bytes) -> dict[str, bytes]:
    tree = Wim(MemoryDisk(data))
    return {path: content(tree, path) for path, entry in tree.walk() if entry.kind == "file"}


def test_damage_is_never_believed(small: bytes) -> None:
    """Whatever single byte is wrong: an error, or the right contents."""
    right = read_all(small)
    assert len(right) == 3
    rng = random.Random(2)
    caught = 0
    for at in [*range(0, 208, 5), *rng.sample(range(208, len(small)), 90)]:
        damaged = bytearray(small)
        damaged[at] ^= 1 << rng.randrange(8)
        try:
            found = read_all(bytes(damaged))
        except FerrotypeError:
            caught += 1
            continue
        assert all(data in right.values() for data in found.values())
    assert caught > 40


def test_a_file_cut_short_is_refused(small: bytes) -> None:
    for length in [0, 7, 8, 100, 207, 208, *random.Random(3).sample(range(209, len(small)), 30), len(small) - 1]:
        with pytest.raises(FormatError):
            read_all(small[:length])


@pytest.mark.parametrize(
    ("at", "layout", "values"),
    [
        (8, "<I", (0, 1)),
        (12, "<I", (0, 0xFFFFFFFF)),
        (16, "<I", (0x60002, 0x80002, 0x200002)),
        (20, "<I", (1, 3000, 1 << 31)),
        (40, "<H", (0, 9)),
        (42, "<H", (0,)),
        (48, "<Q", (0x02FFFFFFFFFFFFFF, 1 << 20)),
        (56, "<Q", (1 << 63, (1 << 64) - 1)),
        (64, "<Q", (1 << 63, (1 << 64) - 1, 51)),
        (72, "<Q", (0x02FFFFFFFFFFFFFF,)),
        (88, "<Q", (1 << 63, (1 << 64) - 1)),
    ],
)
def test_impossible_headers(small: bytes, at: int, layout: str, values: tuple[int, ...]) -> None:
    compressed = Header.unpack(small).flags & 2
    for value in values:
        damaged = bytearray(small)
        struct.pack_into(layout, damaged, at, value)
        if at == 20 and not compressed:
            continue  # nothing is cut into chunks
        with pytest.raises(FormatError):
            read_all(bytes(damaged))


def test_folders_that_lie_in_each_other_end(tmp_path: Path) -> None:
    need("wimlib-imagex")
    (tmp_path / "source" / "first folder" / "second folder").mkdir(parents=True)
    run("wimlib-imagex", "capture", tmp_path / "source", tmp_path / "a.wim", "--compress=none")
    data = bytearray((tmp_path / "a.wim").read_bytes())
    table = Wim(MemoryDisk(bytes(data)))
    before = table._metadata[0][1]
    place = data.index("first folder".encode("utf-16-le")) - 102
    inner = data.index("second folder".encode("utf-16-le")) - 102
    data[inner + 16 : inner + 24] = data[place + 16 : place + 24]  # the second holds what the first does: itself
    assert data[inner + 16 : inner + 24] != bytes(8)
    with pytest.raises(InvalidImage, match="do not match their SHA-1"):
        list(Wim(MemoryDisk(bytes(data))).walk())
    place = data.index(before) - 30  # of the lookup table
    (size,) = struct.unpack_from("<Q", data, place + 16)
    (start,) = struct.unpack_from("<Q", data, place + 8)
    data[place + 30 : place + 50] = hashlib.sha1(data[start : start + size], usedforsecurity=False).digest()
    tree = Wim(MemoryDisk(bytes(data)))
    with pytest.raises(InvalidImage, match="part of another one"):
        list(tree.walk())


def test_random_bytes_never_harm_the_decoders() -> None:
    rng = random.Random(7)
    opened_well = 0
    for round_ in range(300):
        data = rng.randbytes(rng.choice([0, 3, 255, 256, 260, 300, 3000]))
        if round_ % 3 == 0:  # a code that is complete, so that symbols are read
            data = bytes([0x99] * 256) + data
        for window in (0, 15, 20):
            try:
                unlzx(data, 1 << window, window) if window else unxpress(data, 32 * KiB)
                opened_well += 1
            except InvalidImage:
                pass
    assert opened_well < 300


# ---------------------------------------------------------------------- corpus


@pytest.mark.parametrize("entry", entries("wim"), ids=lambda entry: str(entry["id"]))
def test_corpus(entry: dict[str, Any], tmp_path: Path) -> None:
    tree = opened(unpack(entry, tmp_path))
    truth = {fact["claim"]: fact["value"] for fact in entry["truth"]}
    assert tree.facts["compression"] == truth["container"]["compression"]
    assert f"{tree.facts['unit']} bytes" == truth["container"]["chunk"]
    assert f"0x{tree.facts['guid']}" == truth["container"]["guid"]
    found = {path.partition("/")[2]: item for path, item in tree.walk("1")}
    assert sorted(found) == sorted(name for name, _, _ in truth["files"]["listing"])
    for name, kind, size in truth["files"]["listing"]:
        if found[name].kind == "file":
            assert kind == "f"
            assert len(content(tree, f"1/{name}")) == found[name].size == int(size)
    tree.close()
