"""Messages and progress bars on stderr, and how a program ends: its exit code and its last message.

Nothing here fails if stderr cannot be written: it may be closed (cron), a pipe whose reader is gone, or on a full disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import jax

from eso_jax.errors import EsoError, RunAgain
from eso_jax.files import PASSING

if TYPE_CHECKING:
    from tqdm import tqdm


def is_writer() -> bool:
    """Whether this process prints and writes files: it is process 0, or the only one, in which case no device is
    touched."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def say(message: str) -> None:
    """Prints a line on stderr, above any progress bar; only in the writer."""
    if is_writer():
        tell(message)


def tell(message: str) -> None:
    """Prints a line on stderr in any process."""
    from tqdm import tqdm

    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            tqdm.write(message, file=sys.stderr)
            sys.stderr.flush()


def is_terminal() -> bool:
    """Whether stderr is a terminal: only then are there progress bars."""
    return sys.stderr is not None and sys.stderr.isatty()


def bar(iterable: Iterable[Any] | None = None, shown: bool = True, **options: Any) -> tqdm:
    """tqdm(iterable, ...) on the writer's terminal; silent elsewhere, and if not `shown`."""
    from tqdm import tqdm

    return tqdm(iterable, disable=not (shown and is_terminal() and is_writer()), file=sys.stderr, dynamic_ncols=True,
                **options)


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """For a whole program: stdin, stdout and stderr are open in its block (on /dev/null if they were closed), so that
    no other file gets their numbers; and a message that could not be written does not change the exit code.

    Raises:
      SystemExit: with code 2, at the end, if stdout was lost otherwise than by a reader who had enough.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, so its own
            os.set_inheritable(null, True)
            setattr(sys, name, open(null, "w" if number else "r", encoding="utf-8"))
    try:
        yield
    finally:
        lost = [_flush(sys.stdout), _flush(sys.stderr)][0]
        if lost not in (None, errno.EPIPE) and not isinstance(sys.exc_info()[1], Exception):  # a crash stays one
            tell(f"eso-jax: error: stdout: cannot be written ({os.strerror(lost)})")
            raise SystemExit(2)


def _flush(stream: Any) -> int | None:
    """Writes what a stream still holds. Returns the errno of a failure, after which the stream leads nowhere."""
    try:
        stream.flush()
    except OSError as error:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
        return error.errno
    return None


def ending(error: BaseException) -> tuple[int, str]:
    """(exit code, last message) of a program that an error ends: 1 and its repr, unless the user or storage is at
    fault."""
    if isinstance(error, OSError) and (error.filename is not None or error.errno in PASSING):
        named = "" if error.filename is None else f"{error.filename!r}: "
        return (RunAgain.EXIT if error.errno in PASSING else 2), f"{named}{error.strerror}"
    code = next((code for kind, code in {RunAgain: RunAgain.EXIT, EsoError: 2, KeyboardInterrupt: 130}.items()
                 if isinstance(error, kind)), 1)
    return code, "interrupted" if code == 130 else str(error) if code != 1 else repr(error)
