"""Asking before something is overwritten that cannot be had back."""

from __future__ import annotations

from pathlib import Path

import click

from ferrotype.cli import output
from ferrotype.cli.frame import Frame
from ferrotype.cli.progress import asking
from ferrotype.errors import Refused

__all__ = ["confirm"]


def confirm(frame: Frame, target: Path, disk: str) -> None:
    """At a terminal the user types the target's name; anywhere else ``--force`` is needed.  Raises Refused."""
    if not frame.interactive:
        raise Refused(f"{target} exists and would be overwritten; say --force if that is meant")
    output.say(f"Everything on {target} will be overwritten with {disk}.")
    with asking():
        typed = click.prompt(output.shown(f"Type {target.name} to go on"), err=True, default="", show_default=False)
    if typed != target.name:
        raise Refused("the name was not typed; nothing was written")
