"""Where documents come from, and which split each belongs to."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from eso_jax.errors import EsoError, require

SPLITS = ("train", "validation", "test")

# Tests are left out of the standard library: they are half of its bytes, and much of that is tables of data.
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def documents(source: str, split: str) -> list[tuple[str, bytes]]:
    """The documents of one split: (path relative to the source, content), sorted by path.

    A file goes to a split by a hash of its relative path, so that adding files moves none: about 90% are for train, 5%
    for validation and 5% for test. Where that would leave a split empty (few files), each file is cut instead, at 90%
    and 95% of its bytes. Hidden files,
    empty files and folders behind symbolic links are passed over; relative to a glob means to the last folder before
    its first wildcard. Content is bytes as they are: nothing is decoded, and nothing (NUL included) refused.

    Args:
      source: "stdlib", the Python files of the standard library without its tests; or a folder, a file or a glob.
      split: one of SPLITS, or "all".

    Raises:
      EsoError: the source is missing, holds no text, cannot be read, or has nothing for this split.
    """
    if split == "all":
        return sorted(document for part in SPLITS for document in _documents(source, part))
    require(split in SPLITS, "split", split, f"choose one of {', '.join(SPLITS)} or all")
    found = _documents(source, split)
    require(bool(found), "data.source", source, f"holds too little text: its {split} split is empty; give more")
    return found


def _documents(source: str, split: str) -> list[tuple[str, bytes]]:
    try:
        files = {name: path for name, path in sorted(_files(source).items()) if path.stat().st_size}
        require(bool(files), "data.source", source, "holds no text (no files, or only empty or hidden ones); "
                "give 'stdlib', a folder, a file or a glob")
        if {split_of(name) for name in files} != set(SPLITS):
            parts = [(name, _cut(path.read_bytes(), split)) for name, path in files.items()]
            return [(name, part) for name, part in parts if part]
        return [(name, path.read_bytes()) for name, path in files.items() if split_of(name) == split]
    except OSError as error:
        raise EsoError(f"data.source = {source!r}: cannot read {str(error.filename or source)!r} ({error.strerror}); "
                       "make it readable or remove it") from error


def split_of(name: str) -> str:
    """The split of a file among many, by its relative path (posix): the same on every machine and Python."""
    percent = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest(), "big") % 100
    return "validation" if percent < 5 else "test" if percent < 10 else "train"


def _cut(content: bytes, split: str) -> bytes:
    low, high = {"train": (0, 90), "validation": (90, 95), "test": (95, 100)}[split]
    return content[len(content) * low // 100:len(content) * high // 100]


def _files(source: str) -> dict[str, Path]:
    """Path of each file of the source, by its relative path."""
    given = Path(os.path.expanduser(source))
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in _walk(root, _NOT_STDLIB) if path.suffix == ".py"]
    elif given.is_dir():
        root, paths = given, list(_walk(given))
    elif given.is_file():
        root, paths = given.parent, [given]
    else:
        require(glob.has_magic(source), "data.source", source,
                "no such file or folder; give 'stdlib', a folder, a file or a glob")
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), given.parts))
        paths = [path for path in map(Path, glob.glob(str(given), recursive=True))
                 if not any((root / folder).is_symlink() for folder in path.relative_to(root).parents[:-1])]
    # A broken link is kept, so that reading it names it; a link to a folder, a pipe or a device is not.
    return {path.relative_to(root).as_posix(): path for path in paths if path.is_file() or not path.exists()}


def _walk(root: Path, skip: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Every file below `root`, but for hidden ones and folders named in `skip`; links to folders aren't followed."""
    def refuse(error: OSError) -> None:
        raise error  # os.walk would pass over an unreadable folder in silence

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        yield from (Path(folder, name) for name in names if not name.startswith("."))
