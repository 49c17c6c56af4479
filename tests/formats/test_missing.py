"""Disks that cannot be read as things are: what their headers say is told all the same, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ferrotype.block import Traits, read
from ferrotype.block.file import FileSource
from ferrotype.block.memory import MemoryDisk
from ferrotype.block.views import Unavailable
from ferrotype.errors import (
    DeviceError,
    FerrotypeError,
    FormatError,
    InvalidImage,
    KeyRefused,
    NotAllowed,
    UnsupportedError,
    UsageError,
)
from ferrotype.formats import Image, related
from ferrotype.formats.registry import open_file, open_folder
from ferrotype.formats.related import Related
from tests.formats import test_dmg, test_ewf, test_ewf2, test_parallels, test_vdi, test_vhd, vhdx_by_hand
from tests.formats.judges import MiB, opened, scatter, scattered
from tests.formats.test_luks import SECRET, encrypted
from tests.machine import run

GUID = "11111111-2222-3333-4444-555555555555"  # of the content of a VHDX


def headers(path: Path, passphrase: bytes | None = None) -> Image:
    """An image as it is opened for what its headers say."""
    beside = Related(path, passphrase=lambda: passphrase)
    if path.is_dir():
        return open_folder(path, beside, headers_only=True)
    file = FileSource(path)
    try:
        return open_file(file, beside, headers_only=True)
    except BaseException:
        file.close()
        raise


def whole(path: Path) -> Image:
    """An image as it is opened for its disk."""
    return open_folder(path, Related(path)) if path.is_dir() else opened(path)


def check_unreadable(image: Image, kind: type[FerrotypeError]) -> None:
    """The disk has its size, and every look into it is the same error."""
    assert type(image.missing) is kind
    size = image.source.size
    for look in (
        lambda: read(image.source, 0, 512),
        lambda: read(image.source, size - 512, 512),
        lambda: image.source.extents(0, size),
    ):
        with pytest.raises(FerrotypeError) as caught:
            look()
        assert caught.value is image.missing


# ---------------------------------------------------------------------- another file is not there


@dataclass(frozen=True)
class Needy:
    """An image of several files: the one that is opened, and the one that it cannot do without."""

    path: Path
    needed: Path
    spoilt: Callable[[bytes], bytes]  # makes the headers of ``path``, or the descriptor in it, contradict themselves
    volatile: frozenset[str] = frozenset()  # facts that are known with all files only


def at(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    """Other bytes at a place; a negative one counts from the end."""

    def spoilt(data: bytes) -> bytes:
        start = offset % len(data)
        return data[:start] + value + data[start + len(value) :]

    return spoilt


def word(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def spoilt(data: bytes) -> bytes:
        assert old in data
        return data.replace(old, new)

    return spoilt


def over_qcow2(format: str) -> Callable[[Path], Needy]:
    """A child of a format of QEMU over a qcow2."""

    def made(folder: Path) -> Needy:
        base = scattered(folder / "base.qcow2", "qcow2", 2 * MiB, writes=5)
        child, named = folder / f"child.{format}", ["-b", "base.qcow2", "-F", "qcow2"]
        run("qemu-img", "create", "-q", "-f", format, *named, child, "3M")
        scatter(child, format, 3 * MiB, seed=2, writes=5, zeros=False)
        return Needy(child, base, at(40, bytes(8)))  # where the first table is, in all three

    return made


def data_file(folder: Path) -> Needy:
    path = folder / "a.qcow2"
    options = ["-o", "data_file=data.bin,cluster_size=4096"]
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, "3M", cwd=folder)
    return Needy(path, folder / "data.bin", at(40, b"\xff" * 8))


def vmdk_parent(folder: Path) -> Needy:
    base = scattered(folder / "base.vmdk", "vmdk", 2 * MiB, writes=5)
    child = scattered(folder / "child.vmdk", "vmdk", 2 * MiB, writes=5, seed=2, backing=(Path(base.name), "vmdk"))
    return Needy(child, base, at(20, b"\3"))  # sectors of a grain


def vmdk_extents(subformat: str, needed: str) -> Callable[[Path], Needy]:
    def made(folder: Path) -> Needy:
        path = scattered(folder / "a.vmdk", "vmdk", 2 * MiB, f"subformat={subformat}", writes=5)
        volatile = frozenset({"unit"})  # the extent's own header says it
        return Needy(path, folder / needed, word(b"createType=", b"createType "), volatile)

    return made


def vhd(folder: Path) -> Needy:
    """A VHD over another."""
    base = test_vhd.built(folder / "base.vhd", MiB, test_vhd.layer(MiB, 1)[0], unique_id=test_vhd.PARENT_ID)
    blocks, child = test_vhd.layer(MiB, 2)[0], folder / "child.vhd"
    test_vhd.built(child, MiB, blocks, kind=4, parent=test_vhd.PARENT_ID, name=base.name)
    return Needy(child, base, at(512, b"nothing!"))


def vhdx(folder: Path) -> Needy:
    linked = {"parent_linkage": "{" + GUID + "}", "relative_path": ".\\base.vhdx"}
    base = vhdx_by_hand.write(folder / "base.vhdx", vhdx_by_hand.Disk(2 * MiB))
    child = vhdx_by_hand.write(folder / "child.vhdx", vhdx_by_hand.Disk(2 * MiB, parent=linked))
    return Needy(child, base, word(b"metadata", b"nothing!"))


def vdi(folder: Path) -> Needy:
    ids = test_vdi.IDS
    table, body, _ = test_vdi.layer(MiB, 1)
    base = test_vdi.built(folder / "base.vdi", MiB, table, body)
    table, body, _ = test_vdi.layer(MiB, 2)
    child = test_vdi.built(folder / "child.vdi", MiB, table, body, kind=4, ids=(ids[2], ids[3], ids[0], ids[1]))
    return Needy(child, base, at(72, bytes(4)), frozenset({"backing"}))  # it knows the parent by its id alone


def parallels(folder: Path) -> Needy:
    test_parallels.chain(folder / "disk.hdd")
    return Needy(folder / "disk.hdd", folder / "disk.hdd" / "a1.hds", word(b"<End>", b"<End>9"))


def dmg(folder: Path) -> Needy:
    path = test_dmg._segments(folder, (5001, 20_000))
    return Needy(path, folder / "disk.002.dmgpart", at(-20, (1).to_bytes(8, "big")))  # sectors of the disk


def ewf(folder: Path) -> Needy:
    test_ewf.pair(folder)
    return Needy(folder / "disk.E01", folder / "disk.E02", at(13, b"HEADER"), frozenset({"segments", "files"}))


def ewf2(folder: Path) -> Needy:
    test_ewf2.pair(folder)
    return Needy(folder / "disk.Ex01", folder / "disk.Ex02", at(-4, b"\1\1\1\1"), frozenset({"segments", "files"}))


PARENTS: dict[str, Callable[[Path], Needy]] = {
    "qcow2": over_qcow2("qcow2"),
    "qcow": over_qcow2("qcow"),
    "qed": over_qcow2("qed"),
    "vmdk": vmdk_parent,
    "vhd": vhd,
    "vhdx": vhdx,
    "vdi": vdi,
}
PARTS: dict[str, Callable[[Path], Needy]] = {
    "qcow2 data file": data_file,
    "vmdk split": vmdk_extents("twoGbMaxExtentSparse", "a-s001.vmdk"),
    "vmdk flat": vmdk_extents("monolithicFlat", "a-flat.vmdk"),
    "parallels": parallels,
    "dmg": dmg,
    "ewf": ewf,
    "ewf2": ewf2,
}
ALL = PARENTS | PARTS


@pytest.fixture(params=ALL)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Needy:
    folder = tmp_path / "inner"
    folder.mkdir()
    return ALL[request.param](folder)


def without(facts: dict[str, object], keys: frozenset[str]) -> dict[str, object]:
    return {key: value for key, value in facts.items() if key not in keys}


def check_told(made: Needy, kinds: tuple[type[FerrotypeError], ...]) -> None:
    """The image is told as it was before, when it could be read; nobody gets its disk."""
    with pytest.raises(FerrotypeError) as caught:
        whole(made.path)
    assert type(caught.value) in kinds
    image = headers(made.path)
    assert str(image.missing) == str(caught.value)
    check_unreadable(image, type(caught.value))
    image.close()
    image.close()


def test_it_is_told_without_the_file(made: Needy, tmp_path: Path) -> None:
    image = headers(made.path)
    assert image.missing is None
    size, facts = image.source.size, image.facts
    read(image.source, 0, size)
    image.close()
    made.needed.rename(tmp_path / made.needed.name)
    check_told(made, (InvalidImage,))
    image = headers(made.path)
    assert image.source.size == size
    assert bool(image.facts.get("backing")) == (made.path.stem == "child")
    assert without(image.facts, made.volatile) == without(facts, made.volatile)
    image.close()
    (tmp_path / made.needed.name).rename(made.needed)
    whole(made.path).close()


def test_it_is_told_where_the_file_may_not_be_opened(made: Needy, tmp_path: Path) -> None:
    made.needed.rename(tmp_path / "elsewhere")
    made.needed.symlink_to(tmp_path / "elsewhere")
    # a VDI does not name its parent: what may not be opened may be another disk
    check_told(made, (InvalidImage,) if made.path.suffix == ".vdi" else (NotAllowed,))


def test_it_is_told_where_the_file_cannot_be_opened(made: Needy, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened_or_not(path: Path, **options: object) -> FileSource:
        if Path(path).name == made.needed.name:
            raise DeviceError(f"{path}: the disk is on fire")
        return FileSource(path)

    monkeypatch.setattr(related, "FileSource", opened_or_not)
    check_told(made, (InvalidImage,) if made.path.suffix == ".vdi" else (DeviceError,))


@pytest.mark.parametrize("name", PARENTS)
def test_it_is_told_over_a_parent_that_is_damaged(name: str, tmp_path: Path) -> None:
    made = PARENTS[name](tmp_path)
    data = made.needed.read_bytes()
    made.needed.write_bytes(b"nothing at all".ljust(len(data)))
    check_told(made, (InvalidImage, UnsupportedError))


@pytest.mark.parametrize("name", PARTS)
def test_a_damaged_part_is_damage(name: str, tmp_path: Path) -> None:
    made = PARTS[name](tmp_path)
    if name in ("qcow2 data file", "vmdk flat"):  # has no headers; only its length can be wrong
        return
    made.needed.write_bytes(b"nothing at all".ljust(1 << 16))
    for opening in (headers, whole):
        with pytest.raises(InvalidImage):
            opening(made.path)


def test_a_damaged_image_is_damaged_without_the_file_too(made: Needy) -> None:
    made.needed.unlink()
    file = made.path / "DiskDescriptor.xml" if made.path.is_dir() else made.path
    file.write_bytes(made.spoilt(file.read_bytes()))
    for opening in (headers, whole):
        with pytest.raises(InvalidImage) as caught:
            opening(made.path)
        assert made.needed.name not in str(caught.value)


def test_a_chain_can_be_read_if_all_of_it_can(tmp_path: Path) -> None:
    scattered(tmp_path / "base.qcow2", "qcow2", 2 * MiB, writes=5)
    below = "base.qcow2"
    for name, format in (("one.qed", "qed"), ("two.qcow2", "qcow2"), ("top.qcow2", "qcow2")):
        named = ["-b", below, "-F", below.rsplit(".", 1)[1]]
        run("qemu-img", "create", "-q", "-f", format, *named, tmp_path / name, "2M")
        below = name
    opened(tmp_path / below).close()
    (tmp_path / "base.qcow2").unlink()
    image = headers(tmp_path / below)
    assert image.facts["backing"] == {"name": "two.qcow2", "format": "qcow2"}
    assert "'base.qcow2'" in str(image.missing)
    image.close()
    with pytest.raises(InvalidImage, match=r"'base\.qcow2'"):
        Related(tmp_path / "other").image("top.qcow2", "parent")


# ---------------------------------------------------------------------- no key


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encrypted(tmp_path_factory.mktemp("luks"))[0]


def test_an_encrypted_image_without_its_passphrase(locked: Path) -> None:
    image = headers(locked, SECRET.encode())
    assert image.missing is None
    facts, size = image.facts, image.source.size
    read(image.source, 0, size)
    image.close()
    for passphrase, says in ((None, "give its passphrase"), (b"wrong", "opens no key slot")):
        image = headers(locked, passphrase)
        check_unreadable(image, KeyRefused)
        assert says in str(image.missing)
        assert (image.facts, image.source.size) == (facts, size)
        assert facts["encryption"] == {"format": "luks", "cipher": "aes-xts-plain64", "hash": "sha256"}
        image.close()
    with pytest.raises(KeyRefused):
        opened(locked)


def test_a_damaged_key_slot_is_damage(locked: Path, tmp_path: Path) -> None:
    data = locked.read_bytes()
    path = tmp_path / "a.qcow2"
    path.write_bytes(at(data.index(b"LUKS\xba\xbe") + 164, bytes(4))(data))  # iterations of the digest
    with pytest.raises(InvalidImage):
        headers(path, SECRET.encode())


@pytest.mark.parametrize(("format", "place"), [("qcow2", 35), ("qcow", 39)])
def test_the_old_encryption_is_told(tmp_path: Path, format: str, place: int) -> None:
    path = tmp_path / "a"
    run("qemu-img", "create", "-q", "-f", format, path, "3M")
    path.write_bytes(at(place, b"\1")(path.read_bytes()))
    image = headers(path)
    check_unreadable(image, UnsupportedError)
    assert "AES" in str(image.missing)
    assert (image.facts["encrypted"], image.source.size) == (True, 3 * MiB)
    image.close()


def test_an_encrypted_folder_is_told(tmp_path: Path) -> None:
    size, _ = test_parallels.chain(tmp_path / "disk.hdd")
    path = tmp_path / "disk.hdd" / "DiskDescriptor.xml"
    path.write_text(path.read_text().replace(f"<Engine>{test_parallels.NONE}", f"<Engine>{GUID}"))
    image = headers(path.parent)
    check_unreadable(image, UnsupportedError)
    assert (image.facts["encrypted"], image.source.size) == (True, size)
    assert len(image.disks) == 2
    image.close()


# ---------------------------------------------------------------------- further disks


def test_further_disks_are_as_unreadable(tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "base.qcow2", "2M")
    path, named = tmp_path / "a.qcow2", ["-b", "base.qcow2", "-F", "qcow2"]
    run("qemu-img", "create", "-q", "-f", "qcow2", *named, path, "2M")
    run("qemu-img", "snapshot", "-c", "before", path)
    run("qemu-img", "resize", "-q", path, "4M")
    (tmp_path / "base.qcow2").unlink()
    image = headers(path)
    assert (image.source.size, image.disk("before").size) == (4 * MiB, 2 * MiB)
    with pytest.raises(InvalidImage, match="backing file"):
        read(image.disk("before"), 0, 512)
    with pytest.raises(UsageError, match="before"):
        image.disk("after")
    image.close()


def test_a_snapshot_that_lacks_a_file_of_its_own(tmp_path: Path) -> None:
    """Two states over the same one, of which the disk is at the first now."""
    guids, none = test_parallels.GUIDS, test_parallels.NONE
    for number in range(3):
        test_parallels.built(tmp_path / f"{number}.hds", MiB, number)
    files = [(guids[number], "Compressed", f"{number}.hds") for number in range(3)]
    shots = [(guids[0], none), (guids[1], guids[0]), (guids[2], guids[0])]
    test_parallels.descriptor(tmp_path, MiB, test_parallels.storage(0, 2048, files), shots, guids[1])
    (tmp_path / "2.hds").unlink()
    image = whole(tmp_path)
    assert image.facts["files"] == ["0.hds", "1.hds"]
    with pytest.raises(InvalidImage, match=r"'2\.hds'"):
        image.disk(guids[2].strip("{}"))
    read(image.source, 0, MiB)
    image.close()


# ---------------------------------------------------------------------- by itself


def test_an_image_closes_what_it_never_reads() -> None:
    closed: list[str] = []

    class Counted(MemoryDisk):
        def close(self) -> None:
            closed.append("source")

    error = FormatError("not now")
    image = Image("x", Counted(MiB), close=lambda: closed.append("rest"), missing=error)
    assert isinstance(image.source, Unavailable)
    check_unreadable(image, FormatError)
    image.close()
    assert closed == ["source", "rest"]
    image.close()
    assert closed == ["source", "rest"]


def test_a_disk_of_which_only_the_size_is_known() -> None:
    disk = Unavailable(1 << 40, Traits(sector_size=4096), NotAllowed("no"))
    assert (disk.size, disk.traits.sector_size) == (1 << 40, 4096)
    with pytest.raises(NotAllowed):
        disk.read_into(random.Random(1).randrange(1 << 40), memoryview(bytearray(1)))
    with pytest.raises(NotAllowed):
        disk.extents(0, 1)
    disk.close()
