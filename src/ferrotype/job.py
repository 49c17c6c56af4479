"""How long work reports what it does and is told to stop: one parameter, used by every verb."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from typing import Protocol

from ferrotype.errors import Cancelled


class Job(Protocol):
    """Progress out, cancellation in.  Calls may come from any thread."""

    def begin(self, phase: str, total: int | None = None, /) -> None:
        """A new phase starts; ``total`` bytes are ahead, or None where that is not known."""

    def advance(self, count: int, /) -> None:
        """``count`` more bytes of the phase are done.  Raises Cancelled once the user asked to stop."""

    def warn(self, message: str, /) -> None:
        """Something the user should know; the work goes on, and ends with exit code 8."""

    def note(self, message: str, /) -> None:
        """Something worth saying that is not a problem."""


@dataclass(slots=True)
class NullJob:
    """Keeps warnings, shows nothing.  ``stop`` may be set from another thread to cancel."""

    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stop: bool = False

    def begin(self, phase: str, total: int | None = None, /) -> None:  # noqa: ARG002  the protocol's signature
        self.advance(0)

    def advance(self, count: int, /) -> None:  # noqa: ARG002  the protocol's signature
        if self.stop:
            raise Cancelled

    def warn(self, message: str, /) -> None:
        self.warnings.append(message)

    def note(self, message: str, /) -> None:
        self.notes.append(message)


def leave_signals() -> None:
    """From now on signals that ask for an end are not delivered to this thread: each thread calls it first.

    Python hears a signal in the main thread alone, and one that the kernel gives to another thread does not wake it:
    the main thread would learn of it when what it waits for is done, which may take seconds.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
