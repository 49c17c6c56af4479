"""Trailers behind which somebody left padding."""

from __future__ import annotations

from pathlib import Path

import pytest

from ferrotype.errors import UnsupportedError
from ferrotype.formats import signs
from tests.formats.judges import MiB, check_reader, make_image, opened, random_disk
from tests.formats.udif import Udif
from tests.machine import need, run

CONTENT = random_disk(3 * MiB, seed=5)


@pytest.mark.parametrize("padding", [1, 511, 512, 3584, 65_536, 3 * MiB])
@pytest.mark.parametrize("subformat", ["fixed", "dynamic"])
def test_a_vhd_with_padding(tmp_path: Path, subformat: str, padding: int) -> None:
    need("qemu-img", "7z")
    raw, path = tmp_path / "a.raw", tmp_path / "a.vhd"
    raw.write_bytes(CONTENT)
    run("qemu-img", "convert", "-f", "raw", "-O", "vpc", "-o", f"subformat={subformat},force_size=on", raw, path)
    path.write_bytes(path.read_bytes() + bytes(padding))
    check_reader(path, CONTENT, rounds=20)
    image = opened(path)
    assert (image.format, image.warnings) == ("vhd", ())
    image.close()
    if subformat == "fixed":
        run("7z", "e", f"-o{tmp_path / 'judge'}", path)
        assert [one.read_bytes() for one in (tmp_path / "judge").iterdir()] == [CONTENT]


@pytest.mark.parametrize("padding", [1, 512, 100_000])
def test_a_dmg_with_padding(tmp_path: Path, padding: int) -> None:
    path = Udif(CONTENT, ("UDZO",), seed=2).write(tmp_path / "a.dmg")
    path.write_bytes(path.read_bytes() + bytes(padding))
    check_reader(path, CONTENT, rounds=20)
    image = opened(path)
    assert image.format == "dmg"
    image.close()


def test_a_raw_disk_that_ends_with_a_vhd_is_none(tmp_path: Path) -> None:
    """A footer before zeros counts only where it is that of the whole file."""
    inner = make_image(tmp_path / "inner.vhd", "vhd", CONTENT, "subformat=fixed").read_bytes()
    path = tmp_path / "disk"
    path.write_bytes(random_disk(MiB) + inner + bytes(4096))
    with pytest.raises(UnsupportedError, match="no disk image"):
        opened(path)
    damaged = bytearray(inner + bytes(4096))
    damaged[len(inner) - 440] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UnsupportedError, match="no disk image"):
        opened(path)


def test_padding_is_looked_through_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "_MOST_PADDING", 8192)
    monkeypatch.setattr(signs, "_PIECE", 1000)
    content = make_image(tmp_path / "a.vhd", "vhd", CONTENT, "subformat=fixed").read_bytes()
    path = tmp_path / "b.vhd"
    path.write_bytes(content + bytes(7000))
    opened(path).close()
    path.write_bytes(content + bytes(9000))
    with pytest.raises(UnsupportedError, match="no disk image"):
        opened(path)
