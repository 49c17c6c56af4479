"""What all verbs share: common options, secrets, one JSON document, exit codes.

@click.command()
@options
def command(frame: Frame, ...):
    with frame.run() as job:
        ...
        frame.show(document, text)
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from ferrotype.cli import apart, exits, output, secrets
from ferrotype.cli.progress import CliJob, asking, display_for, stopping
from ferrotype.errors import DeviceError, FerrotypeError, KeyRefused, UsageError
from ferrotype.stall import LIMIT, Patience
from ferrotype.units import parse_size

if TYPE_CHECKING:
    from ferrotype.engine.remembered import Memory
    from ferrotype.objects.volumes import Opener
    from ferrotype.repository.store import Repository

_TELL: Final = 5.0  # seconds that storage may take before the user hears of it
_OPEN_FILES: Final = 1 << 16  # split disks have up to 10,000 parts; programs started from here inherit the limit
_MAX_SIZE: Final = (1 << 63) - 1  # bytes; what an offset of the kernel can say

F = TypeVar("F", bound=Callable[..., Any])


class Size(click.ParamType[int]):
    """A size such as 64KiB or 4GiB, given to the command as bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            size = parse_size(value)
        except UsageError as error:
            self.fail(str(error), param, ctx)
        except (ValueError, OverflowError):  # thousands of digits
            size = _MAX_SIZE + 1
        if size > _MAX_SIZE:
            self.fail("a size beyond 8EiB is beyond every disk", param, ctx)
        return size


class Share(click.ParamType[float]):
    """A share such as 10% or 0.1, given to the command as a number from 0 to 1."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            share = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
        except ValueError:
            share = -1.0
        if not 0 < share <= 1:
            self.fail(f"{value!r} is not a share; write it like 10% or 0.1", param, ctx)
        return share


class Place(click.ParamType[Path]):
    """A path.  Unlike click's own kind this looks at nothing: storage may not answer, and nobody watches yet."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:  # noqa: ARG002
        return Path(value)


SIZE = Size()
SHARE = Share()
REFERENCE = click.STRING
IMAGE = Place()


@dataclass
class Frame:
    """The common options of one call, and what is to be shown at its end."""

    json: bool = False
    progress: str = "auto"
    quiet: bool = False
    verbose: bool = False
    password_file: Path | None = None
    password_command: str | None = None
    key_file: Path | None = None
    stall_limit: float = LIMIT
    no_warnings: bool = False
    code: int = exits.OK
    _job: CliJob | None = None
    _passphrase: bytes | None = None
    _document: dict[str, object] = field(default_factory=dict)
    _text: output.Text = ""
    _told: bool = False
    _asked: bool = False

    @contextmanager
    def run(self) -> Iterator[CliJob]:
        """Run the verb's body; afterwards print its result and end the process with the right code."""
        job = CliJob(
            display_for("none" if self.quiet else self.progress, sys.stderr),
            self._say,
            verbose=self.verbose,
            alarm=self._alarm,
        )
        self._job = job
        from ferrotype import linux  # ctypes takes its time, which help need not spend

        linux.allow_open_files(_OPEN_FILES)
        try:
            with stopping(job), ExitStack() as stack:
                away = apart.paths_away(_given())
                for path in away:
                    self.patience.reach(Path(path))
                stack.callback(apart.watch(away, self.patience, lambda error: self._lost(error, job)))
                yield job
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            job.finish()
            raise
        except BaseException as error:  # noqa: BLE001  every error becomes a sentence and a code
            job.finish()
            self._fail(error, job)
        job.finish()
        code = exits.WARNINGS if self.code == exits.OK and job.warnings else self.code
        if self.json:
            document = self._document | {"warnings": [*job.warnings, *job.notes]}
            code = output.put(json.dumps(document), code, needed=True, instead="" if self._asked else self._text)
        elif self._text != "" and not self.quiet:
            code = output.put(self._text, code, needed=self._asked, instead="" if self._asked else self._text)
        raise click.exceptions.Exit(code)

    def show(self, document: dict[str, object], text: output.Text) -> None:
        """What the call has done: a JSON document, and the same for people: a line, lines, or what makes them."""
        self._document, self._text, self._asked = document, text, False

    def answer(self, document: dict[str, object], text: output.Text) -> None:
        """The same of a call that does nothing but answer: where that is lost, it has failed."""
        self._document, self._text, self._asked = document, text, True

    def tell(self, document: dict[str, object], text: output.Text) -> None:
        """Set what is known, and printed, although the verb fails now."""
        self._document, self._text, self._told = document, text, True

    def _say(self, message: str) -> None:
        if not self.quiet:
            output.say(message)

    def _alarm(self, message: str) -> None:
        if not self.no_warnings:
            output.say(message)

    def _fail(self, error: BaseException, job: CliJob) -> None:
        if isinstance(error, KeyboardInterrupt):
            raise click.exceptions.Exit(exits.STOPPED)
        if os.environ.get("FERROTYPE_DEBUG"):
            raise error
        raise click.exceptions.Exit(self._report(error, job))

    def _lost(self, error: DeviceError, job: CliJob) -> int:
        """Say that some call on storage does not return; the exit code."""
        job.finish()
        return self._report(error, job)

    def _report(self, error: BaseException, job: CliJob) -> int:
        """Say what went wrong; the exit code."""
        sentence = exits.says(error)
        if self.json:
            document = {"error": sentence, "kind": type(error).__name__, "warnings": [*job.warnings, *job.notes]}
            output.put(json.dumps(self._document | document if self._told else document), exits.OK)
        elif self._told and not self.quiet:
            output.put(self._text, exits.OK)
        output.say(f"ferrotype: {sentence}")
        return exits.code_of(error)

    @contextmanager
    def open_image(self, image: Path, job: CliJob | None = None, *, writable: bool = False) -> Iterator[Repository]:
        """The image a verb works on; what is odd about it goes to the job as warnings."""
        from ferrotype.engine.opening import open_image

        with open_image(
            image,
            self.secret,
            writable=writable,
            secret_given=self.secret_given,
            opener=self.opener,
            memory=self.memory,
        ) as repository:
            yield repository
            if job is not None:
                for warning in repository.warnings:
                    job.warn(warning)

    @property
    def memory(self) -> Memory | None:
        """What this user's runs remember of images, where there is a place for it."""
        from ferrotype.engine.remembered import Memory

        folder = state_folder()
        return Memory(folder, self._job.warn) if folder and self._job else None

    # ------------------------------------------------------------------ storage that does not answer

    @functools.cached_property
    def patience(self) -> Patience:
        """How long this call waits for storage; meanwhile the user is told, and may stop it."""
        return Patience(self.stall_limit, self._wait)

    @property
    def opener(self) -> Opener:
        """How an image's files are opened."""
        from ferrotype.objects.volumes import PatientOpener

        return PatientOpener(self.patience)

    def _wait(self, path: Path, seconds: float) -> None:
        if self._job is not None:
            self._job.advance(0)
            if seconds >= _TELL:
                self._job.note(f"waiting for the storage of {path}")

    # ------------------------------------------------------------------ secrets

    def secret(self, image: Path) -> Any:
        """The key file or passphrase for an encrypted image, from wherever the user chose.  Raises KeyRefused."""
        from ferrotype.repository.keys import Secret

        if self.key_file is not None:
            return Secret(secrets.key_file(self.key_file, self.patience), "keyfile")
        given = self._given_passphrase()
        if given is not None:
            return Secret(given)
        if not self.interactive:
            raise KeyRefused(
                f"{image} is encrypted; give --password-file, --password-command, --key-file or FERROTYPE_PASSWORD"
            )
        return Secret(_typed(f"Passphrase of {image}"))

    def new_secret(self, image: Path, *, ask: bool = False) -> Any:
        """A secret to lock with: the one that was given, or asked for twice at a terminal."""
        from ferrotype.repository.keys import Secret

        if not ask and not self.secret_given and not self.interactive:
            raise KeyRefused(
                f"{image} would be a new image, and nothing to encrypt it with was given: give --password-file, "
                "--password-command, --key-file or FERROTYPE_PASSWORD"
            )
        if not ask and self.secret_given:
            secret = self.secret(image)
        else:
            secret = Secret(_typed(f"New passphrase of {image}", confirmation_prompt=True))
        if not secret.value:
            raise UsageError("an empty passphrase or key file protects nothing")
        return secret

    @property
    def interactive(self) -> bool:
        """Whether a person can be asked."""
        return sys.stdin is not None and sys.stdin.isatty()  # None: it is closed

    @property
    def secret_given(self) -> bool:
        """Whether the user named a secret, in whatever way."""
        return self.key_file is not None or self._given_passphrase() is not None

    def _given_passphrase(self) -> bytes | None:
        if self._passphrase is None:  # a command is run once: it may ask somebody
            if self.password_file is not None:
                self._passphrase = secrets.password_file(self.password_file, self.patience)
            elif self.password_command is not None:
                self._passphrase = secrets.password_command(self.password_command)
            elif (text := os.environb.get(b"FERROTYPE_PASSWORD")) is not None:
                self._passphrase = text
        return self._passphrase


def _typed(prompt: str, *, confirmation_prompt: bool = False) -> bytes:
    with asking():
        text = click.prompt(output.shown(prompt), hide_input=True, confirmation_prompt=confirmation_prompt, err=True)
    return os.fsencode(str(text))


def state_folder() -> Path | None:
    """Where this user's programs keep what should outlast them (XDG Base Directory Specification)."""
    named = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        return (named if named.is_absolute() else Path("~/.local/state").expanduser()) / "ferrotype"
    except RuntimeError:  # nobody has a home
        return None


def _given() -> list[str]:
    """All words that the verb was given."""
    context = click.get_current_context(silent=True)
    values = list(context.params.values()) if context is not None else []
    several = [one for value in values if isinstance(value, tuple) for one in value]
    return [str(value) for value in (*values, *several) if isinstance(value, str | Path)]


def options(function: F) -> F:
    """Add the options every verb has, and hand them over as a Frame."""

    @functools.wraps(function)
    def wrapped(
        json: bool,
        progress: str,
        quiet: bool,
        verbose: bool,
        password_file: Path | None,
        password_command: str | None,
        key_file: Path | None,
        stall_limit: float,
        no_warnings: bool,
        **kwargs: Any,
    ) -> None:
        frame = Frame(
            json,
            progress,
            quiet,
            verbose,
            password_file,
            password_command,
            key_file,
            stall_limit,
            no_warnings=no_warnings,
        )
        function(frame, **kwargs)

    for option in reversed(
        (
            click.option("--json", is_flag=True, help="One JSON document on standard output."),
            click.option(
                "--progress",
                type=click.Choice(["auto", "bar", "json", "none"]),
                default="auto",
                help="Progress on standard error.",
            ),
            click.option("-q", "--quiet", is_flag=True, help="Say nothing but warnings and errors."),
            click.option("--no-warnings", is_flag=True, help="Do not print warnings; the exit code stays 8."),
            click.option("-v", "--verbose", is_flag=True, help="Name each step as it begins."),
            click.option("--password-file", type=IMAGE, help="Read the passphrase from the first line of a file."),
            click.option("--password-command", help="Read the passphrase from what a command prints."),
            click.option("--key-file", type=IMAGE, help="Use a file's content instead of a passphrase."),
            click.option(
                "--stall-limit",
                type=click.FloatRange(min=0),
                default=LIMIT,
                metavar="SECONDS",
                help="Fail when storage has not answered for so long (15 s; 0: wait for ever).",
            ),
        )
    ):
        wrapped = option(wrapped)
    return wrapped  # type: ignore[return-value]


__all__ = ["IMAGE", "REFERENCE", "SHARE", "SIZE", "FerrotypeError", "Frame", "options"]
