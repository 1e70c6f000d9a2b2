"""Where documents come from, and which split each belongs to."""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import sysconfig
from pathlib import Path

from eso_jax.console import say
from eso_jax.data import folders, streams
from eso_jax.errors import EsoError, require

SPLITS = ("train", "validation", "test")
MISSING = "; give 'stdlib', a folder, a file, a glob, or what eso-jax data prepare has made"

# Tests are left out of the standard library: they are half of its bytes, and much of that is tables of data.
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


def documents(source: str, split: str) -> list[tuple[str, bytes]]:
    """The documents of one split: (path relative to the source, content), sorted by that path.

    A file goes to a split by a hash of its relative path, so that adding files moves none: about 90% are for train, 5%
    for validation and 5% for test. Where that would leave a split empty (few files), each file is cut instead, at 90%
    and 95% of its bytes. Hidden and empty files are skipped; links are followed, each folder is read once;
    paths of a glob are relative to the last folder before its first wildcard. Content is bytes as they are: nothing is
    decoded, and nothing (NUL included) refused.

    Args:
      source: "stdlib", the Python files of the standard library without its tests; or a folder, a file or a glob.
      split: one of SPLITS, or "all": every file, whole.

    Raises:
      EsoError: the source is missing, holds no text, cannot be read, or has nothing for this split.
    """
    require(split in (*SPLITS, "all"), "split", split, f"choose one of {', '.join(SPLITS)} or all")
    chosen = _documents(source, split)
    require(bool(chosen), "data.source", source, f"holds too little text: its {split} split is empty; give more")
    return chosen


def _documents(source: str, split: str) -> list[tuple[str, bytes]]:
    try:
        files = {name: path for name, path in sorted(_files(source).items()) if path.stat().st_size}
        require(bool(files), "data.source", source, "holds no text (no files, or only empty or hidden ones); "
                "give 'stdlib', a folder, a file or a glob")
        few = split != "all" and {split_of(name) for name in files} != set(SPLITS)
        chosen = [(name, path.read_bytes()) for name, path in files.items() if few or split in ("all", split_of(name))]
    except OSError as error:
        raise EsoError(f"data.source = {source!r}: cannot read {str(error.filename or source)!r} ({error.strerror}); "
                       "make it readable or remove it") from error
    if source != "stdlib":
        _say_not_text(source, tuple(name for name, content in chosen if not _is_text(content)), len(chosen))
    parts = [(name, _share(content, split) if few else content) for name, content in chosen]
    return [(name, part) for name, part in parts if part]


def _is_text(content: bytes) -> bool:
    try:
        return bool(streams.as_text(content)) and not streams.compression(content)
    except streams.NotText:
        return False


@functools.cache  # once for each split
def _say_not_text(source: str, names: tuple[str, ...], count: int) -> None:
    if names:
        say(f"data.source = {source!r}: {len(names):,} of {count:,} files are no text ({', '.join(names[:3])}"
            f"{', ...' if len(names) > 3 else ''}) and are read as the bytes they are; eso-jax data prepare text reads "
            "archives, rows and compressed files, and leaves others out")


def require_source(source: str) -> None:
    """Raises an EsoError where there is no such file or folder."""
    given = os.path.expanduser(source)
    require(source == "stdlib" or glob.has_magic(given) or os.path.exists(given), "data.source", source,
            f"no such file or folder{MISSING}")


def split_of(name: str) -> str:
    """The split of a file among many, by its relative path (posix): the same on every machine and Python."""
    percent = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest(), "big") % 100
    return "validation" if percent < 5 else "test" if percent < 10 else "train"


def _share(content: bytes, split: str) -> bytes:
    """The part of one file that a split gets, if every file is cut."""
    low, high = {"train": (0, 90), "validation": (90, 95), "test": (95, 100)}[split]
    return content[len(content) * low // 100:len(content) * high // 100]


def _files(source: str) -> dict[str, Path]:
    """Path of each file of the source, by its relative path."""
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in folders.walk(root, lambda folder: folder.name not in _NOT_STDLIB)
                 if path.suffix == ".py"]
    else:
        root, paths = folders.find(Path(os.path.expanduser(source)), "data.source", MISSING)
    return {path.relative_to(root).as_posix(): path for path in paths}
