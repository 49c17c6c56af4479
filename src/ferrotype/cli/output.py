"""Standard output, which may be closed, full, or a pipe that nobody reads any more."""

from __future__ import annotations

import os
import re
import sys
from typing import Final

import click

from ferrotype.cli import exits

_COMMANDS: Final = re.compile(r"\x1b(?!\[[0-9;]*m)|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f]")  # colours are let through


def printable(text: str) -> str:
    """Text without what would command a terminal: labels and names come from disks, and disks are not trusted."""
    return _COMMANDS.sub("\ufffd", text)


def put(text: str, code: int) -> int:
    """Write a line; the exit code: ``code``, or that of a failed write."""
    if sys.stdout is None:  # it is where the caller closed it
        return code
    try:
        click.echo(printable(text))
        flush()
    except OSError as error:
        return lost(error)
    return code


def flush() -> None:
    """Raises OSError where what was written finds no room."""
    if sys.stdout is not None:
        sys.stdout.flush()


def lost(error: OSError) -> int:
    """Say that the output is lost, except to a reader who went away; the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or the interpreter fails once more when it flushes at its end
    if not isinstance(error, BrokenPipeError):
        click.echo(f"ferrotype: standard output: {exits.says(error)}", err=True)
    return exits.code_of(error)
