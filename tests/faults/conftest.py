"""Every scenario, plain and encrypted, on a memory file system where there is one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.runs import Theatre

_MEMORY = Path("/dev/shm")


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """Thousands of states are written into it."""
    if not os.access(_MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="ferrotype-", dir=_MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def theatre(
    request: pytest.FixtureRequest, quick_folder: Path, record_property: Callable[[str, object], None]
) -> Iterator[Theatre]:
    """One scenario, ready to begin; how many points were tried is printed with ``-s``."""
    scenario, encrypted = request.param
    made = Theatre(scenario, encrypted, quick_folder)
    made.prepare()
    yield made
    record_property("points", made.points.points)
    record_property("checked", made.points.checked)
    print(f" {made.points.points} points, {made.points.checked} different states")  # noqa: T201
