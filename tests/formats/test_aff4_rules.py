"""AFF4, where "AFF4 Standard v1.0a" leaves a choice, or says other than the images published with it do."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from ferrotype.errors import InvalidImage
from ferrotype.job import NullJob
from tests.formats import aff4_files
from tests.formats.aff4_files import Aff4, ImageStream, Map
from tests.formats.judges import KiB, MiB, check_reader, damages_of, opened, random_disk

CONTENT = random_disk(150 * KiB + 1234, seed=12)
STREAM, MAP = "aff4://stream-1", "aff4://map-1"
VOLUME = Aff4([]).urn


def zipped(path: Path, volume: Aff4, name_of: Callable[[str], str], turtle: str = "") -> Path:
    """The volume with its members under other names."""
    made = volume.members()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("container.description", volume.urn)
        for urn, content in made.items():
            archive.writestr(name_of(urn), content)
        archive.writestr("information.turtle", volume.description(made) + turtle)
    return path


# ---------------------------------------------------------------------- names: section 5


@pytest.mark.parametrize(
    "name_of",
    [
        lambda urn: urn,
        lambda urn: quote(urn[:7], safe="") + urn[7:],
        lambda urn: (quote(urn[:7], safe="") + urn[7:]).replace("%3A%2F%2F", "%3a%2f%2f"),
        lambda urn: quote(urn[:7], safe="") + quote(urn[7:]),  # %20 as %2520
        lambda urn: quote(urn[:7], safe="") + quote(urn[7:]).lower(),
        lambda urn: quote(urn[:7], safe="") + urn[7:].replace("%20", " "),
        lambda urn: urn.removeprefix(VOLUME + "/"),
        lambda urn: "/" + urn.removeprefix(VOLUME + "/"),
        lambda urn: quote(urn.removeprefix(VOLUME + "/")),
        lambda urn: urn.removeprefix(VOLUME + "/").replace("%20", " "),
        lambda urn: urn.removeprefix(VOLUME + "/").replace("$", "%24").replace("é", "%C3%A9"),
    ],
)
def test_names_of_members_are_escaped_in_many_ways(tmp_path: Path, name_of: Callable[[str], str]) -> None:
    stream = f"{VOLUME}/my%20disk/part-$1-é"
    volume = Aff4([ImageStream(stream, CONTENT)], stream)
    path = zipped(tmp_path / "a.aff4", volume, name_of)
    check_reader(path, CONTENT, rounds=3)
    image = opened(path)
    assert image.check is not None
    assert image.check(NullJob()) == []
    image.close()


def test_the_description_may_name_members(tmp_path: Path) -> None:
    """aff4:fileName goes before the rules; where there is no such member, they hold."""
    volume = Aff4([ImageStream(STREAM, CONTENT)], STREAM)
    made = volume.members()
    names = {urn: f"PhysicalMemory%2fdata%2f{number}" for number, urn in enumerate(made)}
    turtle = "\n".join(f'<{urn}> a aff4:File ; aff4:fileName "{name}"^^xsd:string .' for urn, name in names.items())
    path = tmp_path / "a.aff4"
    check_reader(zipped(path, volume, names.__getitem__, turtle), CONTENT, rounds=3)
    check_reader(zipped(path, volume, lambda urn: urn, turtle), CONTENT, rounds=3)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(names[f"{STREAM}/00000000.index"], bytes(12))
    with pytest.raises(InvalidImage):
        check_reader(path, CONTENT, rounds=1)


# ---------------------------------------------------------------------- streams: section 3


@pytest.mark.parametrize(
    ("compression", "address"),
    [
        ("deflate", "http://tools.ietf.org/html/rfc1951"),
        ("deflate", "https://www.ietf.org/rfc/rfc1951.txt"),
        ("zlib", "https://tools.ietf.org/html/rfc1950"),
        ("snappy", "https://code.google.com/p/snappy/"),
        ("lz4", "http://code.google.com/p/lz4/"),
        ("stored", "http://aff4.org/Schema#compression/stored"),
    ],
)
def test_addresses_of_compressions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str, address: str
) -> None:
    monkeypatch.setitem(aff4_files.COMPRESSIONS, compression, f"<{address}>")
    path = Aff4([ImageStream(STREAM, CONTENT, compression)], STREAM).write(tmp_path / "a.aff4")
    check_reader(path, CONTENT, rounds=3)
    assert opened(path).facts["compression"] == compression


def test_without_a_compression_chunks_are_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = ImageStream(STREAM, CONTENT, "stored")
    volume = Aff4([stream], STREAM)
    description = volume.description(volume.members())
    monkeypatch.setattr(Aff4, "description", lambda *_: description.replace("aff4:compressionMethod", "aff4:other"))
    check_reader(volume.write(tmp_path / "a.aff4"), CONTENT, rounds=3)


# ---------------------------------------------------------------------- maps: section 4


def test_symbolic_streams_by_their_short_names(tmp_path: Path) -> None:
    targets = [STREAM, "aff4:Zero", "aff4:SymbolicStreamff", "aff4:UnknownData", "aff4:UnreadableData"]
    entries = [(1000 * number, 1000, 7 * number, number) for number in range(5)]
    path = Aff4([ImageStream(STREAM, CONTENT), Map(MAP, targets, entries)], MAP).write(tmp_path / "a.aff4")
    unknown, unreadable = b"UNKNOWN" * 200, b"UNREADABLEDATA" * 100
    expected = CONTENT[:1000] + bytes(1000) + b"\xff" * 1000 + unknown[:1000] + unreadable[28 % 14 : 1000 + 28 % 14]
    check_reader(path, expected, rounds=5)


def test_a_line_of_the_index_is_the_number_of_a_target(tmp_path: Path) -> None:
    entries = [(0, 5000, 0, 1), (5000, 100, 0, 0)]
    for targets, right in [
        ([STREAM, "aff4:Zero", "", ""], True),
        ([STREAM + "\r", "aff4:Zero\r"], True),
        (["", STREAM, "aff4:Zero"], False),
    ]:
        arranged = Map(MAP, targets, entries, hashes=False)
        volume = Aff4([ImageStream(STREAM, CONTENT), arranged], MAP)
        turtle = f"<{MAP}> a aff4:Map ; aff4:dependentStream <{STREAM}> ."
        made, volume.parts = volume.members(), volume.parts[:1]
        volume.turtle = turtle
        path = volume.write(tmp_path / "a.aff4", members=made)
        if right:
            check_reader(path, bytes(5000) + CONTENT[:100], rounds=3)
        else:
            with pytest.raises(InvalidImage, match="without a name"):
                opened(path)


def test_strings_begin_anew_at_every_mib_of_their_stream(tmp_path: Path) -> None:
    arranged = Map(MAP, ["aff4:UnknownData"], [(0, 100, MiB - 3, 0)])
    path = Aff4([arranged], MAP).write(tmp_path / "a.aff4")
    check_reader(path, (b"UNKNOWN" * 149797)[MiB - 3 : MiB] + (b"UNKNOWN" * 14)[:97], rounds=3)


# ---------------------------------------------------------------------- hashes: section 6


def hashed(kind: str) -> tuple[Aff4, dict[str, bytes], str]:
    """A volume whose lists of digests are named as the text says, all of its hashes of one kind."""
    stream = ImageStream(STREAM, CONTENT, hashes=())
    arranged = Map(MAP, [STREAM], [(0, 9999, 5, 0)], hashes=False)
    volume = Aff4([stream, arranged], MAP)
    made = volume.members()
    lists = {"md5": b"", "sha256": b"", "blake2b": b""}
    chunks = [CONTENT[at : at + stream.chunk] for at in range(0, len(CONTENT), stream.chunk)]
    for name in lists:
        for number, at in enumerate(range(0, len(chunks), stream.chunks_in_segment)):
            part = b"".join(hashlib.new(name, chunk).digest() for chunk in chunks[at : at + stream.chunks_in_segment])
            made[f"{STREAM}/{number:08}.{name}"] = part
            lists[name] += part

    def digest(data: bytes) -> bytes:
        return hashlib.new(kind, data).digest()

    own = {name: made[f"{MAP}/{name}"] for name in ("map", "idx", "mapPath")}
    parts = {"mapPointHash": own["map"], "mapIdxHash": own["idx"], "mapPathHash": own["mapPath"]}
    total = digest(b"".join(digest(data) for data in [*lists.values(), *parts.values()])).hex()
    parts["mapHash"] = b"".join(own.values())
    typed = f"^^aff4:{kind.upper()}"
    lines = [
        *(f'<{STREAM}/blockhash.{name}> aff4:hash "{digest(data).hex()}"{typed} .' for name, data in lists.items()),
        *(f'<{MAP}> aff4:{name} "{digest(data).hex()}"{typed} .' for name, data in parts.items()),
        f'<aff4://image> aff4:hash "{total}"^^aff4:blockMapHash{kind.upper()} .',
        f'<{MAP}> aff4:blockMapHash "{total}"{typed} .',
    ]
    return volume, made, "\n".join(lines)


@pytest.mark.parametrize("kind", ["sha256", "sha512"])
def test_hashes_over_the_map_and_the_lists(tmp_path: Path, kind: str) -> None:
    volume, made, turtle = hashed(kind)
    path, volume.turtle = tmp_path / "a.aff4", turtle
    assert damages_of(volume.write(path, members=made)) == []
    for line, words in zip(
        turtle.splitlines(),
        ["list of md5", "list of sha256", "list of blake2b", "mapPointHash", "mapIdxHash", "mapPathHash", "mapHash"]
        + ["blockMapHash"] * 2,
        strict=True,
    ):
        at = line.index('"') + 1
        wrong = line[:at] + ("1" if line[at] == "0" else "0") + line[at + 1 :]
        volume.turtle = turtle.replace(line, wrong)
        found = damages_of(volume.write(path, members=made))
        assert words in found[0], line
    volume.turtle = turtle
    for name in ("md5", "blake2b"):
        member = f"{STREAM}/00000001.{name}"
        broken = made | {member: bytes(len(made[member]))}
        assert f"{name} of chunk 16" in damages_of(volume.write(path, members=broken))[0]
