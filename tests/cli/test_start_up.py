"""What a start costs: counted in modules, since seconds depend on the machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ferrotype.cli import VERBS
from tests.cli.program import environment, ferrotype

HEAVY = {"numpy", "cryptography", "rich", "msgspec", "blake3", "xxhash", "ssl", "asyncio"}


SCRIPT = """
import sys
from ferrotype.cli import main
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


def imported(*words: str | Path) -> set[str]:
    """The modules a run imports."""
    line = [sys.executable, "-c", SCRIPT, *words]
    done = subprocess.run(
        line, stdin=subprocess.DEVNULL, capture_output=True, env=environment(), text=True, check=True
    )
    return set(done.stderr.split())


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
