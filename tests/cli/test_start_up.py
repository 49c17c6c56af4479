"""What a start costs: counted in modules, since seconds depend on the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ferrotype.cli import VERBS
from tests.cli.program import environment, ferrotype

HEAVY = {"numpy", "cryptography", "rich", "msgspec", "blake3", "xxhash", "ssl", "asyncio", "hashlib"}


def imported(*words: str | Path) -> set[str]:
    """The modules a run imports."""
    line = [sys.executable, "-X", "importtime", "-m", "ferrotype", *words]
    done = subprocess.run(
        line, stdin=subprocess.DEVNULL, capture_output=True, env=environment(), text=True, check=True
    )
    return {
        entry.rpartition("|")[2].strip() for entry in done.stderr.splitlines() if entry.startswith("import time:")
    }


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["backup", "--help"]])
def test_help_needs_nothing_heavy(words: list[str]) -> None:
    found = imported(*words)
    assert "ferrotype.cli" in found
    assert not found & HEAVY
    assert not {name for name in found if name.startswith(("ferrotype.engine", "ferrotype.repository"))}


def test_a_verb_imports_itself_and_no_other(image: Path) -> None:
    found = imported("list", image, "--json")
    assert "ferrotype.cli.list" in found
    others = {f"ferrotype.cli.{verb}" for verb in VERBS} - {"ferrotype.cli.list"}
    assert not found & (others | {"rich", "rich.console", "asyncio", "ssl"})
    assert not {"ferrotype.engine.backup", "ferrotype.engine.prune", "ferrotype.engine.verify"} & found


def test_the_help_lists_every_verb_with_every_common_option() -> None:
    text = ferrotype("--help").out
    for verb in VERBS:
        assert f"\n  {verb} " in text
    common = ferrotype("list", "--help").out
    for option in (
        "--json",
        "--progress",
        "--quiet",
        "--verbose",
        "--password-file",
        "--password-command",
        "--key-file",
    ):
        assert option in common
