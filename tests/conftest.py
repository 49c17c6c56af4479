"""After each test that passed, the second reader looks at the images the test left behind.

And what its backups left out as free space has to be proven, but in tests of damaged volumes and of how much is
read.  What the program remembers of images between runs is kept out: folders of tests get their names again."""

from __future__ import annotations

import os
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from ferrotype.repository.keys import Secret
from tests.proof import Proofs
from tests.second_reader import LARGEST, Agreed, agree

WORDS = (b"correct horse", b"another one", b"third words", b"correct horse battery")  # that tests lock images with
SECRETS = (None, *map(Secret, WORDS))

UNPROVEN = ("tests/fuzz/", "tests/work/", "tests/faults/")  # damaged by hand, and counted to the byte and the call

_agreed = Agreed()
_proofs = Proofs()
_seen: set[tuple[str, int, int]] = set()  # images of fixtures that several tests share


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "unproven: its volumes are damaged by hand, or reads are counted")
    _proofs.install()
    os.environ["XDG_STATE_HOME"] = "/dev/null/none"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _proofs.wanted = not item.nodeid.startswith(UNPROVEN) and item.get_closest_marker("unproven") is None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Runs the test, then compares; a difference fails the test."""
    result = yield
    _proofs.check()
    for path in _images(item):
        agree(path, SECRETS, _agreed)
    return result


def _images(item: pytest.Item) -> list[Path]:
    values = getattr(item, "funcargs", {}).values()
    found = []
    for path in {path for value in values if isinstance(value, Path) for path in _below(value)}:
        if path.suffix != ".ferro" or not path.is_file():
            continue
        status = path.stat()
        key = str(path), status.st_mtime_ns, status.st_size
        if key not in _seen and status.st_size <= LARGEST:
            _seen.add(key)
            found.append(path)
    return found


def _below(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.ferro")) if path.is_dir() else []


def pytest_sessionfinish(session: pytest.Session) -> None:
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["agreed"] = asdict(_agreed)
        output["proven"] = {"volumes": _proofs.volumes, "files": _proofs.files}


def pytest_testnodedown(node: Any) -> None:
    """A worker of pytest-xdist has ended."""
    for name, count in getattr(node, "workeroutput", {}).get("agreed", {}).items():
        setattr(_agreed, name, getattr(_agreed, name) + count)
    for name, count in getattr(node, "workeroutput", {}).get("proven", {}).items():
        setattr(_proofs, name, getattr(_proofs, name) + count)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(
        f"second reader: the same of {_agreed.images} images, {_agreed.snapshots} snapshots, {_agreed.data} bytes"
    )
    terminalreporter.write_line(
        f"second opinion: nothing of {_proofs.files} files of {_proofs.volumes} volumes was left out"
    )
