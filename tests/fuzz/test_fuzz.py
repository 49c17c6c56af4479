"""A fixed number of hostile inputs for each target, the same ones each time.  Long runs are ``tests.fuzz.run``."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.limits import Finding, execute
from tests.fuzz.targets import TARGETS, Target

EXECUTIONS = {  # as many as take about two seconds; the rest of the work is done by long runs
    "mbr": 3000, "gpt": 1000, "apm": 2500, "scan": 1200, "fat": 800, "swap": 1500, "ext": 250, "ntfs": 150,
    "exfat": 400, "identify": 700, "survey": 300, "reference": 10_000, "size": 20_000, "config": 20_000,
    "slot": 20_000, "snapshot": 20_000, "spare": 10_000, "lock": 5000, "container": 150, "salvage": 60,
    "writer": 80, "repository": 60, "objects": 200,
    "image-aff4": 30, "image-bochs": 500, "image-dmg": 150, "image-ewf": 25, "image-ntfsclone": 40,
    "image-parallels": 400, "image-partclone": 60, "image-qcow": 150, "image-qcow2": 150, "image-qed": 150,
    "image-vdi": 200, "image-vhd": 400, "image-vhdx": 80, "image-vmdk": 400, "image-wim": 300,
    "image-bzip2": 60, "image-gzip": 60, "image-ova": 60, "image-simg": 200, "image-xz": 60, "image-zip": 60,
    "image-zstd": 60,
}  # fmt: skip


def _told(target: Target, finding: Finding, data: bytes, tmp_path: Path) -> str:
    saved = tmp_path / f"{target.name}.bin"
    saved.write_bytes(data)
    return f"{finding.key}: python -m tests.fuzz.run {target.name} --replay {saved}"


def test_every_target_has_its_share() -> None:
    assert set(EXECUTIONS) == set(TARGETS)


@pytest.mark.parametrize("name", EXECUTIONS)
def test_hostile_input_is_refused_in_bounds(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    rng = random.Random(name)
    seeds = target.seeds()
    for data in seeds:
        assert execute(target.run, data) is None, "an honest input"
    for _ in range(EXECUTIONS[name]):
        data = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 2, 4))):
            data = target.mutate(rng, data)
        finding = execute(target.run, data)
        if finding is not None:
            raise AssertionError(_told(target, finding, data, tmp_path)) from finding.error


def test_a_finding_is_noticed() -> None:
    def recursive(data: bytes) -> None:
        recursive(data)

    def greedy(_: bytes) -> None:
        bytearray(1 << 30)

    def endless(_: bytes) -> None:
        while True:
            pass

    for target, kind in ((recursive, RecursionError), (greedy, MemoryError), (int, ValueError)):
        found = execute(target, b"x")  # type: ignore[arg-type]
        assert found is not None
        assert isinstance(found.error, kind)
    found = execute(endless, b"", seconds=0.05)
    assert found is not None
    assert found.key.startswith("TooLong")
