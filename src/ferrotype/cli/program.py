"""The group of all verbs, and how a run of one ends.

A verb's module is imported only when the verb is used, so ``ferrotype --help`` stays quick.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
import threading
import time
from typing import Final

import click

from ferrotype.cli import VERBS, apart, exits, output
from ferrotype.version import VERSION

_GRACE: Final = 1.0  # seconds that threads have to end, which have nothing to do any more

EPILOG: Final = """\b
Exit codes: 0 done; 1 the answer is no; 2 wrong command; 3 refused; 4 damaged or unsupported input;
5 wrong or missing key; 6 reading or writing failed; 7 locked; 8 done with warnings; 130 stopped."""


class Verbs(click.Group):
    """A group whose commands are modules of this package, imported when they are wanted."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"ferrotype.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As ever; of a verb that there is not, the ones that it may be meant for are said."""
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], VERBS, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else " `ferrotype --help` lists them all."
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(
    cls=Verbs, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(VERSION, prog_name="ferrotype")
def cli() -> None:
    """Disk imaging: whole disks into one portable, compressed, deduplicated, encrypted, incremental file, and back.

    \b
    ferrotype backup /dev/sda laptop.ferro
    ferrotype list laptop.ferro
    ferrotype restore laptop.ferro /dev/sdb
    """


def run() -> int:
    """Run the command line; the exit code that the interface promises."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name need not be text
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, which nothing calls: it would start a thread a core
    output.occupy()
    apart.go_apart(sys.argv[1:])
    code = _code()
    apart.say(code)
    output.end()
    _see_off_threads(code)
    return code


def _see_off_threads(code: int) -> None:
    """Let threads that work in the background end; the program ends at once where one is stuck in a call.

    Python ends under those that are left: a thread that then wakes up has nothing of Python to stand on.
    """
    until = time.monotonic() + _GRACE
    left = [thread for thread in threading.enumerate() if thread.name.startswith("ferrotype")]
    for thread in left:
        thread.join(max(until - time.monotonic(), 0))
    if any(thread.is_alive() for thread in left):
        os._exit(code)


def _code() -> int:
    try:
        done = cli.main(prog_name="ferrotype", standalone_mode=False)
        output.flush()
    except click.ClickException as error:
        told = io.StringIO()
        error.show(told)
        output.say(told.getvalue().splitlines())
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return exits.STOPPED
    except SystemExit:  # click's way of saying that nobody reads on; verbs end with click's Exit
        return output.lost(BrokenPipeError())
    except OSError as error:
        return output.lost(error)
    except BaseException as error:
        if os.environ.get("FERROTYPE_DEBUG"):
            raise
        output.say(f"ferrotype: {exits.says(error)}")
        return exits.code_of(error)
    return done if isinstance(done, int) else exits.OK
