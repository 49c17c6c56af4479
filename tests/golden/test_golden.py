"""Every image that a released version wrote is read by this one, and can be written on."""

from __future__ import annotations

import hashlib
import json
import shutil
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest

from ferrotype.block import read
from ferrotype.engine.verify import VerifyOptions, verify
from ferrotype.job import NullJob
from ferrotype.repository.keys import Secret
from ferrotype.repository.source import SnapshotSource
from ferrotype.repository.store import Repository
from tests.golden.make import MAKERS, make
from tests.repository.small import back_up, disk_content, open_at, restored
from tests.second_reader import Agreed, agree

FOLDER = Path(__file__).parent
TRUTHS: dict[str, dict[str, Any]] = {
    f"{path.parent.name}/{name}": truth
    for path in sorted(FOLDER.glob("v*/truth.json"))
    for name, truth in json.loads(path.read_text()).items()
}


def secrets(truth: dict[str, Any]) -> list[Secret | None]:
    return [Secret(b64decode(s["value"]), s["kind"]) for s in truth["secrets"]] or [None]


@pytest.fixture(params=sorted(TRUTHS))
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A copy of a golden image, and what is in it."""
    original = FOLDER / f"{request.param}.ferro"
    for path in original.parent.glob(original.name + "*"):
        shutil.copy(path, tmp_path / path.name)
    return tmp_path / original.name, TRUTHS[request.param]


def check(repository: Repository, truth: dict[str, Any]) -> None:
    """Everything the truth names is there, byte for byte."""
    known = {snapshot.name: snapshot for snapshot in repository.snapshots()}
    assert {name: known[name].id for name in truth["snapshots"]} == truth["snapshots"]
    for where, disk in truth["disks"].items():
        name, disk_name = where.split("/")
        record = known[name].disk(disk_name)
        content = read(SnapshotSource(repository, record), 0, record.size)
        assert len(content) == disk["size"]
        assert hashlib.sha256(content).hexdigest() == disk["sha256"], where


def test_the_versions_are_there() -> None:
    assert {name.partition("/")[2] for name in TRUTHS if name.startswith("v1/")} == set(MAKERS)


def test_it_is_read(golden: tuple[Path, dict[str, Any]]) -> None:
    path, truth = golden
    for secret in secrets(truth):
        with open_at(path, secret) as repository:
            check(repository, truth)
            assert set(truth["snapshots"]) == {snapshot.name for snapshot in repository.snapshots()}
            assert verify(repository, VerifyOptions(deep=True), NullJob()).ok


def test_the_second_reader_reads_it(golden: tuple[Path, dict[str, Any]]) -> None:
    path, truth = golden
    agreed = Agreed()
    for secret in secrets(truth):
        assert agree(path, [secret], agreed)
    assert agreed.snapshots >= len(truth["snapshots"])


def test_it_is_written_on(golden: tuple[Path, dict[str, Any]]) -> None:
    path, truth = golden
    fresh = disk_content(10, 99)
    with open_at(path, secrets(truth)[0], writable=True) as repository:
        snapshot = back_up(repository, fresh, "fresh", day=99)
        assert restored(repository, snapshot) == fresh
        check(repository, truth)
    with open_at(path, secrets(truth)[0]) as repository:
        check(repository, truth)
        assert verify(repository, VerifyOptions(deep=True), NullJob()).ok


def test_they_can_be_made_again(tmp_path: Path) -> None:
    """With the same content; keys and salts are random."""
    make(tmp_path)
    made = json.loads((tmp_path / "truth.json").read_text())
    for name, truth in made.items():
        assert truth["disks"] == TRUTHS[f"v1/{name}"]["disks"]
