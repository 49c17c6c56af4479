"""Standard output and standard error, either of which may be closed, full, or a pipe that nobody reads any more.

What is written to standard error is for whoever looks: if it finds no room, nothing else changes.  Standard output
has the answer: if that finds no room, the work is done and the answer lost, which is an exit code of its own.

Labels, names and tags come from disks and images, which are not trusted: all that would command a terminal is escaped
here, and nowhere else.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Final, TextIO

import click

from ferrotype.cli import exits

Text = str | Iterable[str] | Callable[[], str | Iterable[str]]  # a line, or lines; drawn only if it is wanted

COLOUR: Final = f"\x1b{os.urandom(8).hex()}["  # begins a colour of ours: nobody else can know it
# Control characters, line separators, marks and overrides of direction, invisible letters and tags, lone surrogates.
# The joiners of U+200C and U+200D are parts of words and emoji.
_COMMANDS: Final = re.compile(
    r"[\x00-\x1a\x1c-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    rf"\ud800-\udfff\U000e0000-\U000e007f]|\x1b(?!{COLOUR[1:-1]}\[[0-9;]*m)"
)
_SHORT: Final = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


def shown(text: str) -> str:
    """One line of text, in which all that would command a terminal is written as in a string of Python."""
    return text if text.isprintable() else _COMMANDS.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    char = found[0]
    code = ord(char)
    return _SHORT.get(char) or (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )


def lines(text: Text) -> str:
    """What is to be written: each line by itself, so that no name can make one."""
    if callable(text):
        text = text()
    joined = shown(text) if isinstance(text, str) else "\n".join(map(shown, text))
    return joined.replace(COLOUR, "\x1b[")


def put(text: Text, code: int, *, needed: bool = False, instead: Text = "") -> int:
    """Write lines; the exit code: ``code``, or that of a failed write.

    Where standard output was closed before, nobody wants to hear; unless the answer is ``needed``.  ``instead`` is
    said of work that was done, on standard error, where its answer is lost.
    """
    if sys.stdout is None:
        return lost(OSError("it is closed"), instead) if needed else code
    try:
        click.echo(lines(text))
        flush()
    except OSError as error:
        return lost(error, instead)
    return code


def flush() -> None:
    """Raises OSError where what was written finds no room."""
    if sys.stdout is not None:
        sys.stdout.flush()


def lost(error: OSError, instead: Text = "") -> int:
    """Say that the output is lost, and what was done, except to a reader who went away; the exit code."""
    _nowhere(1)
    if not isinstance(error, BrokenPipeError):
        done = lines(instead)
        say(
            f"ferrotype: standard output: {exits.says(error)}"
            + ("; the work was done, and it is said here:" if done else "")
        )
        if done:
            say(done.splitlines())
    return exits.code_of(error)


# ---------------------------------------------------------------------- standard error


def say(text: Text) -> None:
    """Write lines to standard error, if they find room there."""
    if sys.stderr is not None:
        draw(sys.stderr, lines(text) + "\n")


def draw(out: TextIO, text: str) -> None:
    """Write to a stream that is for whoever looks; after a failure nothing more is written to it."""
    try:
        click.echo(text, out, nl=False)
        out.flush()
    except BlockingIOError:  # a pipe that is full just now
        pass
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            _nowhere(out.fileno())


def end() -> None:
    """Nothing is left for the interpreter to write at its end, where a failure would change the exit code."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            _nowhere(number)


def occupy() -> None:
    """Where a standard stream is closed, nothing that is opened later takes its number: others write to that."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)


def _nowhere(number: int) -> None:
    """What is written to a descriptor from now on is dropped; what waits in its buffer, too."""
    with contextlib.suppress(OSError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, number)
        os.close(nothing)
