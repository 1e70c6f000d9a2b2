"""Errors for users: each message names the field, its value and what to do."""

from __future__ import annotations

from typing import Any


class EsoError(ValueError):
    """A mistake in the input that the user can correct. The command line prints it as one line and exits with 2."""


class RunAgain(RuntimeError):
    """The run stopped for an outside reason: the same command resumes it from its last checkpoint. The command line
    prints it as one line and exits with EXIT; the scripts in launch/ then repeat the command."""

    EXIT = 75  # the "try again" of sysexits.h


def reason_of(error: BaseException) -> str:
    """An error of a library in one line, for use in a message of ours."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def require(condition: bool, name: str, value: Any, remedy: str) -> None:
    """Raises an EsoError `name = value: remedy` unless `condition` holds."""
    if not condition:
        raise EsoError(f"{name} = {value!r}: {remedy}")
