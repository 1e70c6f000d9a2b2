"""The one way in which files are written, and what happens if a disk is full, read-only or does not answer."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from eso_jax.errors import EsoError, RunAgain, require

Result = TypeVar("Result")
Content = str | bytes | Callable[[BinaryIO], Any]

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError: a full disk, quota or limit
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)  # storage did not answer: it may answer later
TRIES, PAUSE = 3, 1.0  # when storage does not answer; seconds before the second try, twice that before the third
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
NAME_MAX = 255  # bytes in a name, on all usual file systems


def write_whole(path: str | Path, content: Content, name: str = "--out") -> None:
    """Writes a file whole or not at all: under a temporary name, then renamed. An old file stays until then.

    Links are followed. Anything but a regular file (a pipe, a terminal, /dev/stdout) is written directly.

    Args:
      content: text (UTF-8), bytes, or a function that writes to the open file.
      name: the option or field that names the file, for errors.

    Raises:
      EsoError: it cannot be written there.
      RunAgain: storage did not answer, three times.
    """
    with writing(name, path):
        place = _place(Path(path))
        if place is None:
            with open(path, "wb") as file:
                _fill(file, content)
        else:
            _retry(lambda: _replace(place, content))


def append(path: Path, text: str, name: str) -> None:
    """Adds text to the end of a file, whole or not at all; raises as `write_whole` does."""
    def add() -> None:
        end = path.stat().st_size if path.exists() else 0
        try:
            with path.open("ab") as file:
                file.write(text.encode())
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(path, end)
            raise

    with writing(name, path):
        _retry(add)


def reading(name: str, path: Any, action: Callable[[], Result]) -> Result:
    """What an action reads from `path`, or from files below it. Storage that does not answer is asked again.

    Raises:
      EsoError: it cannot be read.
      RunAgain: storage did not answer, three times.
    """
    try:
        return _retry(action)
    except Exception as error:
        mistaken = isinstance(error, EsoError) and errno_of(error) in PASSING  # for one of the user's
        if (told := trouble(error.__cause__ or error if mistaken else error, name, path, "read")) is None:
            raise
        raise told from error


@contextlib.contextmanager
def writing(name: str, path: Any) -> Iterator[None]:
    """For a block that writes to `path` in another way: raises errors of the file system as `write_whole` does."""
    try:
        yield
    except Exception as error:  # what is written through a library raises what that library raises
        if (problem := trouble(error, name, path)) is None:
            raise
        raise problem from error


@contextlib.contextmanager
def one_at_a_time(folder: Path, name: str) -> Iterator[None]:
    """For a block that one process at a time may run for a folder: the second waits, and says so. The folder is made
    if it is missing. Nobody waits where the file system knows no locks, or where nothing can be written."""
    import fcntl

    from eso_jax.console import say

    file = None
    with writing(name, folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = (folder / "turn.lock").open("ab")
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES):
                raise
    if file is None:
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is at work in {folder}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass
        yield


def npz(**arrays: Any) -> bytes:
    """Arrays as a .npz."""
    import numpy as np

    buffer = io.BytesIO()  # a .npz goes back and forth, as a pipe cannot
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def as_json(values: Any, indent: int | None = 1) -> str:
    """JSON and a line feed. What is no finite number is null: JSON has no word for it, and many readers refuse NaN."""
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            return list(map(plain, value))
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(values), indent=indent, allow_nan=False) + "\n"


def check_out(path: str | Path, name: str = "--out") -> None:
    """Before any long work: raises an EsoError unless a file can be written there."""
    with writing(name, path):
        place = _place(Path(path))
        if place is None:
            require(os.access(path, os.W_OK), name, str(path), "cannot be written")
            return
        folder = place.parent
        require(folder.is_dir(), name, str(path), f"the folder {str(folder)!r} does not exist")
        require(not place.is_dir(), name, str(path), "is a folder; give the name of a file")
        writable = os.access(folder, os.W_OK) and (not place.exists() or os.access(place, os.W_OK))
        require(writable, name, str(path), f"cannot be written, or no new file can be made in {str(folder)!r}")


def local(text: str, name: str) -> str:
    """A path, or NAME=PATH, as a user gives it, with the home folder in place of ~.

    Raises:
      EsoError: it is an address (gs://...), or no path that everything underneath could open.
    """
    prefix, equals, path = text.rpartition("=")
    scheme = SCHEME.match(path)
    if scheme and not os.path.exists(text):
        mount = {"gs": " (gcsfuse)", "s3": " (mount-s3)"}.get(scheme[1].lower(), "")
        raise EsoError(f"{name} = {text!r}: no folder; mount the bucket{mount} and give the folder, or a copy on this "
                       "machine")
    try:
        utf8 = os.fsencode(text) == text.encode()  # as TensorStore and ArrayRecord would open it
    except UnicodeEncodeError:
        utf8 = False
    require(utf8, name, text, "is not UTF-8 here; rename it, or set PYTHONUTF8=1 where the locale is not UTF-8")
    require(all(len(part.encode()) <= NAME_MAX for part in path.split("/")), name, text,
            f"holds a name of more than {NAME_MAX} bytes; give a shorter one")
    return prefix + equals + os.path.expanduser(path)


def errno_of(error: BaseException | None) -> int | None:
    """The errno of an exception: that of an OSError which caused it, or one in the message of a C++ library
    (ArrayRecord, TensorStore). None if there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if not isinstance(error, OSError) and (match := re.search(r"\[(?:OS error |os_error_code=')(\d+)", str(error))):
            return int(match[1])
        if isinstance(error, RuntimeError) or type(error).__module__.startswith("safetensors"):
            for number in (*FULL, *PASSING, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG):
                if os.strerror(number) in str(error):
                    return number
        error = error.__cause__ or error.__context__
    return None


def trouble(error: BaseException, name: str, path: Any, done: str = "written") -> EsoError | RunAgain | None:
    """The error to raise for a failed write or read; None if the file system did not cause it."""
    number = errno_of(error)
    if isinstance(error, EsoError | RunAgain) or number is None:
        return None
    file = getattr(error, "filename", None)
    which = f"{str(file)!r} cannot" if done == "read" and file else "cannot"
    failure = f"{name} = {str(path)!r}: {which} be {done} ({os.strerror(number)}); "
    if number in PASSING:
        return RunAgain(f"{failure}tried {TRIES} times; mend the storage and repeat the command")
    return EsoError(failure + ("make room and repeat the command" if number in FULL else "give another, or mend that"))


def _place(path: Path) -> Path | None:
    """Where the regular file of that path is, or would be, after following links. None if it is no regular file."""
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
            return None
    while path.is_symlink():
        path = path.parent / os.readlink(path)
        if os.path.realpath(path.parent).startswith(("/proc/", "/dev/fd")):  # a file that this process has open
            return None
    return Path(os.path.abspath(path))


def _replace(place: Path, content: Content) -> None:
    # A hidden name, which no command reads as text; cut, since the suffix must not make it longer than NAME_MAX.
    partial = place.with_name(os.fsdecode(b"." + os.fsencode(place.name)[:NAME_MAX - 9] + b".partial"))
    try:
        with open(partial, "wb") as file:
            _fill(file, content)
            file.flush()
            os.fsync(file.fileno())  # some file systems say only now that they are full
        if place.exists():
            shutil.copymode(place, partial)
        os.replace(partial, place)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _fill(file: BinaryIO, content: Content) -> None:
    if callable(content):
        content(file)
    else:
        file.write(content.encode() if isinstance(content, str) else content)


def _retry(action: Callable[[], Result]) -> Result:
    """Calls an action up to three times, for as long as storage does not answer."""
    for attempt in range(1, TRIES):
        try:
            return action()
        except Exception as error:
            if isinstance(error, RunAgain) or errno_of(error) not in PASSING:
                raise
            time.sleep(PAUSE * attempt)
    return action()
