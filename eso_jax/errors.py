"""What goes wrong for a user, and how it is said: the field, its value and what to do."""

from __future__ import annotations

from typing import Any


class EsoError(ValueError):
    """A mistake in the input that the user can mend. The command line prints it as one line and exits with 2."""


class RunAgain(RuntimeError):
    """The run stopped through no fault of its own: the same command goes on from its last checkpoint. The command line
    prints it as one line and exits with EXIT, on which the scripts in launch/ do so."""

    EXIT = 75  # the "try again" of sysexits.h


def reason_of(error: BaseException) -> str:
    """An error of a library, in one line that fits into one of ours."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def require(condition: bool, name: str, value: Any, remedy: str) -> None:
    """Raises an EsoError `name = value: remedy` unless `condition` holds."""
    if not condition:
        raise EsoError(f"{name} = {value!r}: {remedy}")
