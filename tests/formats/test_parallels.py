"""Parallels: expandable images against qemu-img, folders of them against what they were built of."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from ferrotype.block import read
from ferrotype.block.views import Slice
from ferrotype.errors import FormatError, InvalidImage, NotAllowed, UnsupportedError
from ferrotype.formats import Image
from ferrotype.formats.parallels import Header
from ferrotype.formats.registry import open_folder
from ferrotype.formats.related import Related
from ferrotype.testing.sources import check_source
from tests.formats.hostile import bad_values, fields_of, survives, with_bytes
from tests.formats.judges import KiB, MiB, check_reader, content_of, opened, scattered

GUIDS = [f"{{0000000{number}-1111-2222-3333-44444444444{number}}}" for number in range(5)]
NONE = "{00000000-0000-0000-0000-000000000000}"
CLUSTER = 63 * 512  # as old versions had it


def built(path: Path, size: int, seed: int, *, in_use: int = 0, extended: bool = False) -> dict[int, bytes]:
    """An image with some clusters, in shuffled order; what it has, by cluster."""
    rng = random.Random(seed)
    count = -(-size // CLUSTER)
    table, body = [0] * count, b""
    start = -(-(64 + 4 * count) // CLUSTER) * CLUSTER
    clusters = {number: rng.randbytes(CLUSTER) for number in rng.sample(range(count), k=count // 2)}
    for number, content in clusters.items():
        table[number] = (start + len(body)) // (CLUSTER if extended else 512)
        body += content
    magic = b"WithouFreSpacExt" if extended else b"WithoutFreeSpace"
    high = 0 if extended else 0xABCD << 32  # means nothing in the old kind
    head = struct.pack(
        "<16s5IQIIIQ", magic, 2, 16, 100, CLUSTER // 512, count, size // 512 | high, in_use, start // 512, 0, 0
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((head + struct.pack(f"<{count}I", *table)).ljust(start, b"\0") + body)
    return clusters


def over(below: bytes, size: int, clusters: dict[int, bytes]) -> bytes:
    disk = bytearray(below[:size].ljust(size, b"\0"))
    for number, content in clusters.items():
        disk[number * CLUSTER : (number + 1) * CLUSTER] = content
    return bytes(disk[:size])


# ---------------------------------------------------------------------- one image


@pytest.mark.parametrize(("size", "options"), [(9 * MiB + 512, ""), (3 * MiB + 1536, "cluster_size=65536")])
def test_images_made_by_qemu(tmp_path: Path, size: int, options: str) -> None:
    path = scattered(tmp_path / "a.hdd", "parallels", size, options, seed=size, zeros=False)
    content = content_of(path, "parallels", tmp_path)
    assert len(content) == size
    check_reader(path, content)


@pytest.mark.parametrize("extended", [False, True])
def test_images_of_both_kinds(tmp_path: Path, extended: bool) -> None:
    size = MiB + 1536
    content = over(b"", size, built(tmp_path / "a.hds", size, 1, extended=extended))
    assert content_of(tmp_path / "a.hds", "parallels", tmp_path) == content
    check_reader(tmp_path / "a.hds", content)


def test_an_image_in_use(tmp_path: Path) -> None:
    for in_use, dirty in ((0x746F6E59, True), (0x312E3276, False), (0, False)):
        built(tmp_path / "a.hds", MiB, 1, in_use=in_use)
        image = opened(tmp_path / "a.hds")
        assert image.facts["dirty"] == dirty
        assert bool(image.warnings) == dirty
        image.close()


def test_every_field_set_to_what_it_must_not_be(tmp_path: Path) -> None:
    built(tmp_path / "good.hds", MiB, 1)
    image = (tmp_path / "good.hds").read_bytes()
    path = tmp_path / "a.hds"
    refused = kept = 0
    for field in fields_of(Header):
        for value in bad_values(field, image[field.offset : field.offset + field.size]):
            path.write_bytes(with_bytes(image, field.offset, value))
            survived = survives(path, "parallels")
            refused, kept = refused + (not survived), kept + survived
    assert refused > 30
    assert kept > 30
    for entry in (len(image) // 512, 0xFFFFFFFF):
        path.write_bytes(with_bytes(image, 64, struct.pack("<I", entry)))
        broken = opened(path)
        with pytest.raises(InvalidImage):
            read(broken.source, 0, 512)
        broken.close()
    for length in [*range(0, 400, 13), *range(400, len(image), 30_000)]:
        path.write_bytes(image[:length])
        survives(path, "parallels")


# ---------------------------------------------------------------------- a folder of them


def storage(start: int, end: int, images: list[tuple[str, str, str]]) -> str:
    inner = "".join(
        f"<Image><GUID>{guid}</GUID><Type>{type_}</Type><File>{file}</File></Image>" for guid, type_, file in images
    )
    return f"<Storage><Start>{start}</Start><End>{end}</End><Blocksize>63</Blocksize>{inner}</Storage>"


def descriptor(
    folder: Path, size: int, storages: str, shots: list[tuple[str, str]], top: str = "", head: str = ""
) -> Path:
    shown = "".join(f"<Shot><GUID>{guid}</GUID><ParentGUID>{parent}</ParentGUID></Shot>" for guid, parent in shots)
    (folder / "DiskDescriptor.xml").write_text(
        f"""<?xml version="1.0" encoding="UTF-8"?>{head}
        <Parallels_disk_image Version="1.0">
          <Disk_Parameters><Disk_size>{size // 512}</Disk_size>
            <Encryption><Engine>{NONE}</Engine><Data></Data></Encryption></Disk_Parameters>
          <StorageData>{storages}</StorageData>
          <Snapshots>{f"<TopGUID>{top}</TopGUID>" if top else ""}{shown}</Snapshots>
        </Parallels_disk_image>"""
    )
    return folder


def opened_folder(folder: Path) -> Image:
    return open_folder(folder, Related(folder))


def chain(folder: Path) -> tuple[int, list[bytes]]:
    """A disk in two storages, the second one plain at first, with two snapshots; its content at each, and now."""
    first, second = 30 * CLUSTER + 512 * 5, 20 * CLUSTER
    folder.mkdir()
    plain = random.Random(9).randbytes(second)
    (folder / "b0.hds").write_bytes(plain)
    below, states, files = [b"", plain], [], [[(GUIDS[0], "Compressed", "a0.hds")], [(GUIDS[0], "Plain", "b0.hds")]]
    below[0] = over(b"", first, built(folder / "a0.hds", first, 50))
    states.append(b"".join(below))
    for number in (1, 2):
        for which, size in enumerate((first, second)):
            name = f"{'ab'[which]}{number}.hds"
            below[which] = over(below[which], size, built(folder / name, size, 10 * number + which))
            files[which].append((GUIDS[number], "Compressed", name if number == 1 else f"/Users/me/{name}"))
        states.append(b"".join(below))
    middle = first // 512
    storages = storage(middle, middle + second // 512, files[1]) + storage(0, middle, files[0])
    shots = [(GUIDS[2], GUIDS[1]), (GUIDS[0], NONE), (GUIDS[1].upper(), GUIDS[0])]
    descriptor(folder, first + second, storages, shots, GUIDS[2])
    return first + second, states


def test_a_folder_with_storages_and_snapshots(tmp_path: Path) -> None:
    size, states = chain(tmp_path / "disk.hdd")
    image = opened_folder(tmp_path / "disk.hdd")
    assert image.source.size == size
    check_source(lambda: Slice(image.source, 0, size), states[2])
    assert sorted(image.disks) == [GUIDS[0].strip("{}"), GUIDS[1].strip("{}")]
    for number in (0, 1):
        assert read(image.disk(GUIDS[number].strip("{}")), 0, size) == states[number]
    assert image.facts["files"] == ["a0.hds", "a1.hds", "a2.hds", "b0.hds", "b1.hds", "b2.hds"]
    image.close()


def test_a_layer_alone_says_that_it_is_one(tmp_path: Path) -> None:
    chain(tmp_path / "disk.hdd")
    for name, alone in (("a0.hds", True), ("a2.hds", False)):
        image = opened(tmp_path / "disk.hdd" / name)
        assert bool(image.warnings) != alone
        image.close()


def test_a_top_that_is_not_named(tmp_path: Path) -> None:
    top = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
    content = over(b"", MiB, built(tmp_path / "d.hds", MiB, 3))
    descriptor(tmp_path, MiB, storage(0, 2048, [(top, "Compressed", "d.hds")]), [(top, NONE)])
    image = opened_folder(tmp_path)
    assert read(image.source, 0, MiB) == content
    image.close()


ONE = [(GUIDS[0], "Compressed", "d.hds")]
SHOTS = [(GUIDS[0], NONE)]


@pytest.mark.parametrize(
    ("size", "storages", "shots", "error"),
    [
        (MiB, storage(0, 2047, ONE), SHOTS, InvalidImage),
        (MiB, storage(1, 2048, ONE), SHOTS, InvalidImage),
        (MiB, storage(0, 1024, ONE) + storage(1000, 2048, ONE), SHOTS, InvalidImage),
        (MiB, storage(0, 0, ONE) + storage(0, 2048, ONE), SHOTS, InvalidImage),
        (2 * MiB, storage(0, 4096, ONE), SHOTS, InvalidImage),
        (1 << 70, storage(0, 1 << 61, ONE), SHOTS, InvalidImage),
        (MiB, storage(0, 2048, []), SHOTS, InvalidImage),
        (MiB, storage(0, 2048, ONE), [], InvalidImage),
        (MiB, storage(0, 2048, ONE), [(GUIDS[0], GUIDS[1])], InvalidImage),
        (MiB, storage(0, 2048, ONE), [(GUIDS[0], GUIDS[0])], InvalidImage),
        (MiB, storage(0, 2048, [(GUIDS[0], "Compressed", "gone.hds")]), SHOTS, InvalidImage),
        (MiB, storage(0, 2048, [(GUIDS[0], "Compressed", "../d.hds")]), SHOTS, NotAllowed),
        (MiB, storage(0, 2048, [(GUIDS[0], "Plain", "/etc/passwd")]), SHOTS, InvalidImage),
        (MiB, storage(0, 2048, [(GUIDS[0], "Plain", "nbd:unix:x")]), SHOTS, NotAllowed),
        (MiB, storage(0, 2048, [(GUIDS[0], "Compressed", "DiskDescriptor.xml")]), SHOTS, InvalidImage),
        (MiB, storage(0, 2048, [(GUIDS[0], "Other", "d.hds")]), SHOTS, UnsupportedError),
    ],
)
def test_descriptors_that_say_what_is_not_so(
    tmp_path: Path, size: int, storages: str, shots: list[tuple[str, str]], error: type[FormatError]
) -> None:
    folder = tmp_path / "disk.hdd"
    built(folder / "d.hds", MiB, 3)
    built(tmp_path / "d.hds", MiB, 3)
    with pytest.raises(error):
        opened_folder(descriptor(folder, size, storages, shots, GUIDS[0]))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no xml",
        "<a>" * 100_000,
        "<Parallels_disk_image>" + "<a>" * 40 + "</a>" * 40 + "</Parallels_disk_image>",
        "<Parallels_disk_image/>",
        "<other/>",
        "\0" * 100,
        '<?xml version="1.0" encoding="no-such"?><a/>',
        '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><Parallels_disk_image>&b;</Parallels_disk_image>',
        '<!DOCTYPE x SYSTEM "file:///etc/passwd"><Parallels_disk_image/>',
        "<a>" + "x" * (2 << 20) + "</a>",
    ],
)
def test_descriptors_that_are_none(tmp_path: Path, text: str) -> None:
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "DiskDescriptor.xml").write_bytes(text.encode(encoding))
        with pytest.raises(FormatError):
            opened_folder(tmp_path)


def test_a_descriptor_with_entities(tmp_path: Path) -> None:
    built(tmp_path / "d.hds", MiB, 3)
    declared = '<!DOCTYPE Parallels_disk_image [<!ENTITY a "aaaa">]>'
    descriptor(tmp_path, MiB, storage(0, 2048, ONE), SHOTS, GUIDS[0], declared)
    with pytest.raises(InvalidImage, match="document type"):
        opened_folder(tmp_path)


def test_an_encrypted_disk(tmp_path: Path) -> None:
    built(tmp_path / "d.hds", MiB, 3)
    path = descriptor(tmp_path, MiB, storage(0, 2048, ONE), SHOTS, GUIDS[0]) / "DiskDescriptor.xml"
    path.write_text(path.read_text().replace(f"<Engine>{NONE}", f"<Engine>{GUIDS[1]}"))
    with pytest.raises(UnsupportedError, match="encrypted"):
        opened_folder(tmp_path)


def test_a_cluster_over_its_own_bat(tmp_path: Path) -> None:
    head = struct.pack("<16s5IQIIIQ", b"WithoutFreeSpace", 2, 16, 100, 1, 1000, 1000, 0, 0, 0, 0)
    path = tmp_path / "a.hds"
    path.write_bytes((head + struct.pack("<I", 7)).ljust(8192, b"\0"))
    image = opened(path)
    with pytest.raises(InvalidImage, match="over its BAT"):
        read(image.source, 0, 512)
    image.close()


def test_small_clusters_of_a_large_disk(tmp_path: Path) -> None:
    """The table is no larger than the file, however large the disk says it is."""
    path = tmp_path / "a.hds"
    head = struct.pack("<16s5IQIIIQ", b"WithouFreSpacExt", 2, 16, 100, 1, 0xFFFFFFFF, 64 * KiB, 0, 8, 0, 0)
    path.write_bytes(head + bytes(4096))
    with pytest.raises(InvalidImage, match="BAT"):
        opened(path)
