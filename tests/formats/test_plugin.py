"""A format in a package of its own: the one that the documentation shows, taken from there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from ferrotype.testing.formats import check_format, check_writable
from tests.formats.judges import MiB, random_disk

ROOT = Path(__file__).resolve().parents[2]
CONTENT = random_disk(3 * MiB + 512, seed=11)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The page's code as an installed package: a module, and the metadata that names it."""
    page = (ROOT / "docs" / "adding-a-format.md").read_text()
    code = re.search(r"```python\n(\"\"\"TINY.*?)```", page, re.DOTALL)
    entry = re.search(r'```toml\n\[project\.entry-points\."(ferrotype\.formats)"\]\n(.*?)```', page, re.DOTALL)
    assert code is not None
    assert entry is not None
    folder = tmp_path / "site"
    info = folder / "tiny_disk-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "tiny_disk.py").write_text(code[1])
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-disk\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{entry[1]}]\n{entry[2].replace(chr(34), '')}")
    return folder


@pytest.fixture
def module(package: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("tiny_disk", package / "tiny_disk.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def ferrotype(package: Path | None, *words: str | Path) -> dict[str, Any]:
    path = os.pathsep.join([str(ROOT / "src"), *([str(package)] if package else [])])
    done = subprocess.run(
        [sys.executable, "-m", "ferrotype", *map(str, words), "--json"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_the_documented_format_passes_the_conformance_suite(module: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.tiny"
    check_writable(module, path, CONTENT)
    check_format(module, path, CONTENT)


def test_the_suite_notices_a_wrong_reader(module: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.tiny"
    check_writable(module, path, CONTENT)
    module.DATA_AT -= 4096
    with pytest.raises(AssertionError):
        check_format(module, path, CONTENT)


def test_verbs_use_a_format_from_another_package(package: Path, tmp_path: Path) -> None:
    raw, tiny, back = tmp_path / "a.raw", tmp_path / "a.tiny", tmp_path / "b.raw"
    raw.write_bytes(CONTENT)
    assert ferrotype(package, "convert", "-O", "tiny", raw, tiny)["format"] == "tiny"
    info = ferrotype(package, "info", tiny)
    assert (info["format"], info["virtual_size"]) == ("tiny", len(CONTENT))
    assert ferrotype(package, "checksum", tiny)["digest"] == ferrotype(package, "checksum", raw)["digest"]
    ferrotype(package, "convert", tiny, back)
    assert back.read_bytes() == CONTENT
    ferrotype(package, "backup", tiny, tmp_path / "a.ferro")
    assert ferrotype(None, "info", tiny)["format"] == "raw"
