"""What the conformance suites have to say when a check fails: plain AssertionErrors, also under ``python -O``."""

from __future__ import annotations

from collections.abc import Callable


def require(truth: bool, what: str) -> None:
    """Raises AssertionError with ``what`` unless ``truth``."""
    if not truth:
        raise AssertionError(what)


def must_raise(kind: type[Exception], call: Callable[[], object], what: str) -> None:
    """Raises AssertionError unless ``call`` raises ``kind``."""
    try:
        call()
    except kind:
        return
    raise AssertionError(f"{what} did not raise {kind.__name__}")
