"""Disks that other software made, odd and hostile ones among them: nothing in them stops a survey or a backup."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from ferrotype.block.device import open_source
from ferrotype.block.memory import MemoryDisk
from ferrotype.engine.restore import Part, RestoreOptions, restore
from ferrotype.engine.survey import survey
from ferrotype.extents import State
from ferrotype.job import NullJob
from ferrotype.units import KiB, MiB
from tests.engine.images import back_up, in_memory
from tests.engine.surveying import Result
from tests.machine import corpus, unpack

LIMIT = 10  # seconds
MEMORY = 500 * MiB

ENTRIES = [
    entry
    for entry in corpus()
    if entry["format"] == "raw" and entry["kind"] != "container" and entry["decompressed_size"] <= 64 * MiB
]
SMALL = [entry for entry in ENTRIES if entry["decompressed_size"] <= 20 * MiB]
MALFORMED = [entry for entry in SMALL if entry["kind"] == "malformed"]
CHOSEN = [
    *[entry for entry in SMALL if entry["kind"] == "partition"],
    *MALFORMED[:: max(1, len(MALFORMED) // 15)],
    *[entry for entry in SMALL if entry["kind"] not in ("partition", "malformed")][::6],
]


def _chosen(entry: dict[str, Any]) -> Any:
    """A case for a test; the trees of what e2fsck is tested with are damaged, and their bitmaps are not."""
    marks = [pytest.mark.unproven] if entry["id"].startswith("e2-f-") else []
    return pytest.param(entry, id=entry["id"], marks=marks)


@pytest.fixture(scope="module")
def surveyed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """All entries, surveyed by one process that forks for each."""
    folder = tmp_path_factory.mktemp("strange")
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.engine.surveying", str(LIMIT)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    results = {}
    for entry in ENTRIES:
        path = unpack(entry, folder / entry["id"])
        child.stdin.write(json.dumps([str(path), entry.get("sector_size")]) + "\n")
        child.stdin.flush()
        results[entry["id"]] = msgspec.json.decode(child.stdout.readline(), type=Result)
        for file in entry["files"]:
            (folder / entry["id"] / file["name"]).unlink()
    child.communicate()
    assert child.returncode == 0
    return results


@pytest.mark.parametrize("name", [entry["id"] for entry in ENTRIES])
def test_a_survey_never_fails(surveyed: dict[str, Result], name: str) -> None:
    result = surveyed[name]
    assert result.error == ""
    assert result.seconds < LIMIT
    assert result.grown < MEMORY


def test_surveys_find_something(surveyed: dict[str, Result]) -> None:
    """The results above are not those of surveys that gave up."""
    if ENTRIES:
        assert sum(result.free > 0 for result in surveyed.values()) > len(ENTRIES) // 5
        assert sum(result.volumes > 1 for result in surveyed.values()) > 5


@pytest.mark.parametrize("entry", [_chosen(entry) for entry in CHOSEN])
def test_all_but_free_space_comes_back(entry: dict[str, Any], tmp_path: Path) -> None:
    path = unpack(entry, tmp_path)
    content = path.read_bytes()
    source = open_source(path, sector_size=entry.get("sector_size"))
    repository, job = in_memory(16 * KiB), NullJob()
    record = back_up(repository, source, job=job).disks[0]
    same, larger = MemoryDisk(len(content), record.sector_size), MemoryDisk(len(content) + MiB, record.sector_size)
    restore(Part(repository, record, 0, record.size), same, RestoreOptions(), job)
    wanted = np.frombuffer(content, np.uint8).copy()
    for start, end in zip(*survey(source).extents.runs(State.FREE), strict=True):
        wanted[start:end] = 0
    assert np.array_equal(np.frombuffer(same.data, np.uint8), wanted)
    result = restore(Part(repository, record, 0, record.size), larger, RestoreOptions(), job)
    if not result.table_moved:
        assert larger.data[: len(content)] == same.data
    source.close()
