"""ISO 9660: a raw disk whose sectors a CD has; nothing else may take it for its own."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest

from ferrotype.block import read
from ferrotype.block.file import FileSource
from ferrotype.engine.info import disk_info
from ferrotype.engine.references import Access, open_disk
from ferrotype.formats.registry import format_of_suffix, recognise
from ferrotype.job import NullJob
from tests.formats.corpus import entries
from tests.machine import need, run, unpack


def named_like_an_iso(path: Path) -> Path:
    return path if path.suffix == ".iso" else path.rename(path.with_suffix(".iso"))


@pytest.mark.parametrize("entry", entries("iso9660"), ids=lambda entry: str(entry["id"]))
def test_corpus(entry: dict[str, Any], tmp_path: Path) -> None:
    path = named_like_an_iso(unpack(entry, tmp_path))
    with FileSource(path) as file:
        assert recognise(file) is None
    job = NullJob()
    with open_disk(str(path), Access(), job) as disk:
        assert disk.format == "raw"
        (wanted,) = [file["sha256"] for file in entry["files"]]
        assert hashlib.sha256(read(disk.source, 0, disk.source.size)).hexdigest() == wanted
        info = disk_info(disk, job)
    found = [volume.filesystem for volume in info.survey.volumes]
    table = any(fact["claim"] == "partitions" for fact in entry["truth"])
    assert found == ["iso9660"] or (table and "iso9660" in found)


def test_a_new_one_is_named(tmp_path: Path) -> None:
    need("genisoimage")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_bytes(random.Random(1).randbytes(100_000))
    run("genisoimage", "-quiet", "-J", "-R", "-V", "A LABEL", "-o", tmp_path / "a.iso", folder)
    assert format_of_suffix(tmp_path / "a.iso") == "raw"
    job = NullJob()
    with open_disk(str(tmp_path / "a.iso"), Access(), job) as disk:
        (volume,) = disk_info(disk, job).survey.volumes
    assert (volume.filesystem, volume.label) == ("iso9660", "A LABEL")
    assert not job.warnings
