"""The files below a folder, or that a glob matches, without hidden ones, what is no file, such as a pipe, and what we
have made ourselves."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from eso_jax.errors import require


def find(given: Path, flag: str, remedy: str = "", below: bool = False) -> tuple[Path, list[Path]]:
    """(root, files): the files that a folder, a file or a glob stands for, and the folder that their names are relative
    to. Of a glob that is the last folder before its first wildcard.

    Args:
      flag: the option that names `given`, for errors.
      remedy: said at the end of errors.
      below: a folder that a glob matches stands for the files below it.

    Raises:
      EsoError: there is none, or it is neither.
      OSError: a folder cannot be listed.
    """
    if given.is_dir():
        root, paths = given, list(walk(given))
    elif given.is_file():
        root, paths = given.parent, [given]
    else:
        require(not given.exists(), flag, str(given), f"is neither a file nor a folder{remedy}")
        require(glob.has_magic(str(given)), flag, str(given), f"no such file or folder{remedy}")
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), given.parts))
        pattern = given.parts[len(root.parts):]

        def matches(path: Path) -> bool:
            parts = path.relative_to(root).parts
            return any(_matches(parts[:end], pattern) for end in range(1 if below else len(parts), len(parts) + 1))

        paths = [path for path in walk(root, lambda folder: _begins(folder.relative_to(root).parts, pattern)
                                       or below and matches(folder)) if matches(path)] if root.is_dir() else []
    return root, [path for path in paths if path.is_file() or not path.exists()]  # reading names a broken link


def walk(root: Path, enter: Callable[[Path], bool] = lambda folder: True) -> Iterator[Path]:
    """Every file below `root` in the folders that `enter` accepts; links are followed. A folder is listed once, if
    possible under its name without a link. Our own folders are left out, so that a run whose work directory lies among
    its texts finds the same texts when it resumes.

    Raises:
      OSError: a folder cannot be listed, or a config.json beside checkpoints cannot be read.
    """
    def refuse(error: OSError) -> None:
        raise error  # os.walk would pass over an unreadable folder in silence

    seen: set[str] = set()
    starts = [root]  # and then the links to folders
    while starts:
        for folder, folders, names in os.walk(starts.pop(0), onerror=refuse):
            real = os.path.realpath(folder)
            if real in seen or folder != str(root) and _is_ours(Path(folder), {*folders, *names}):
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and enter(Path(folder, name)))
            starts += [link for name in folders if (link := Path(folder, name)).is_symlink()]
            yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _is_ours(folder: Path, names: set[str]) -> bool:
    """Whether a folder, by what is in it, is a work directory, a prepared folder or the documents of one. Others may
    have some of these files, such as a model of the transformers library or shards of another program."""
    if {"turn.lock", "corpora"} <= names:
        return True
    if any(".array_record" in name for name in names):
        return bool({"manifest.json", "manifest.json.unfinished"} & names) or {
            "dataset_info.json", "features.json"} <= names
    if not {"config.json", "checkpoints"} <= names:
        return False
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError:
        return False
    return isinstance(config, dict) and "family" in config


def _begins(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Whether files below the folder `parts` may match `pattern`."""
    if not parts or pattern[:1] == ("**",):
        return True
    return len(pattern) > 1 and fnmatch.fnmatchcase(parts[0], pattern[0]) and _begins(parts[1:], pattern[1:])


def _matches(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if pattern[:1] == ("**",):
        return any(_matches(parts[start:], pattern[1:]) for start in range(len(parts) + 1))
    if not parts or not pattern:
        return not parts and not pattern
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])
