"""Files to documents: plain text by lines or whole, rows, archives."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from eso_jax.data import folders, rows, streams
from eso_jax.data.catalog import TEXT8, Corpus
from eso_jax.data.rows import Reading
from eso_jax.data.streams import NotText, Opener
from eso_jax.errors import EsoError, RunAgain, require
from eso_jax.files import PASSING

ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz")
PIECE = 1_000_000  # characters of text8 in a document


def find_files(paths: Iterable[str | Path], unpacked: Path, reading: Reading | None = None) -> dict[str, Path]:
    """The files that files, folders, globs and archives stand for, by relative path, sorted within each of `paths`.

    Hidden files are left out. Archives are unpacked below `unpacked`. Of a folder that datasets' save_to_disk has
    written only the data files are taken.

    Raises:
      EsoError: one is missing or cannot be listed, or an archive cannot be unpacked.
    """
    reading = reading or Reading()
    files: dict[str, Path] = {}
    for given in (Path(path).expanduser() for path in paths):
        is_archive = given.is_file() and _is_archive(given, reading)
        place = _unpack(given, unpacked, reading) if is_archive else given
        try:
            root, below = folders.find(place, reading.flag, below=True)
        except OSError as error:
            raise _unreadable(error, given, reading) from error
        base = root if place.is_file() else root.parent
        for path in _data_files(sorted(below), reading):
            name = path.relative_to(base).as_posix()
            if place.is_file() or not reading.include or _matches(name, reading.include):
                require(files.setdefault(name, path) == path, reading.flag, str(given),
                        f"two files are called {name!r}; rename one")
    require(bool(files), reading.flag, [str(path) for path in paths], "holds no files" + (
        f" that --include {' '.join(reading.include)} matches" if reading.include else " (hidden ones are left out)"))
    return files


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(PurePosixPath(name).match(pattern) for pattern in patterns)


def _data_files(paths: list[Path], reading: Reading) -> list[Path]:
    """The paths without those files of save_to_disk that hold no rows. A state.json names those that do."""
    kept = dict.fromkeys(paths)
    for path in paths:
        if path.name == "dataset_dict.json":
            splits = [folder.name for folder in sorted(path.parent.iterdir()) if folder.is_dir()]
            require(len(splits) == 1, reading.flag, str(path.parent), f"holds the splits {', '.join(splits)}; give the "
                    "folder of one of them")
            del kept[path]
        if path.name == "state.json" and path.with_name("dataset_info.json").is_file():
            try:
                state = json.loads(path.read_bytes())
                names = [each["filename"] for each in state["_data_files"]]
                chosen = state.get("_indices_files") or state.get("_indices_data_files")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise EsoError(f"{reading.flag} = {str(path)!r}: not a state.json of save_to_disk ({error})") from error
            require(not chosen, reading.flag, str(path.parent), "keeps a choice of rows beside all rows; save it again "
                    "by flatten_indices().save_to_disk(...)")
            for other in paths:
                if other.parent == path.parent and other.name not in names:
                    kept.pop(other, None)
            missing = [name for name in names if path.with_name(name) not in kept]
            require(not missing, reading.flag, str(path.parent), f"lacks {', '.join(missing[:3])}, which its state.json"
                    " names")
    return list(kept)


def documents(corpus: Corpus, split: str, files: dict[str, Path], reading: Reading | None = None) -> Iterator[str]:
    """The documents of one published split, in order; those without text are left out.

    Raises:
      EsoError: a file cannot be read as what its corpus holds, or a row has no text.
      RunAgain: storage did not answer.
    """
    reading = reading or Reading()
    paths = [path for name, path in files.items() if _matches(name, corpus.splits[split])]
    for number, path in enumerate(paths):
        try:
            if corpus.unit == "text8":
                yield from _text8(path, split)
            else:
                yield from _read(str(path), streams.of_file(path), corpus.unit, reading, corpus.fields)
        except EsoError:
            raise
        except NotText as error:
            if not reading.skip_files and len(paths) > 1:
                _refuse_all(path, error, paths[number + 1:], reading)
            reading.bad_file(str(path), str(error))
        except Exception as error:  # every library raises its own
            if not isinstance(error, OSError) or error.errno is None:
                reading.bad_file(str(path), f"cannot be read ({_reason(error)}); it may be damaged or cut short")
            elif reading.skip_files and error.errno not in PASSING:
                reading.bad_file(str(path), f"cannot be read ({error.strerror})")
            else:
                raise _unreadable(error, path, reading) from error


def _refuse_all(path: Path, error: NotText, others: list[Path], reading: Reading) -> None:
    """Raises an EsoError that counts all files that are no text: `path`, and those of `others`.

    Nothing is raised where it is the only one.
    """
    more = [str(other) for other in others if not _may_be_text(other)]
    if more:
        shown = ", ".join(map(repr, more[:rows.SHOWN - 1]))
        raise EsoError(f"{reading.flag}: {1 + len(more):,} of the files are no text: {str(path)!r} ({error}), {shown}"
                       f"{', ...' if len(more) >= rows.SHOWN else ''}; choose files by --include (such as '*.txt'), or "
                       "leave such files out by --skip-bad-files") from error


def _may_be_text(path: Path) -> bool:
    try:
        opener = streams.of_file(path)
        if not path.name.lower().endswith((*rows.JSON, *rows.COLUMNS, *ARCHIVES, *streams.SUFFIXES)):
            streams.text(opener)
    except (OSError, NotText):
        return False
    return True


def _unreadable(error: OSError, path: Path, reading: Reading) -> EsoError | RunAgain:
    what = f"{reading.flag}: cannot read {str(error.filename or path)!r} ({error.strerror}); "
    if error.errno in PASSING:
        return RunAgain(what + "mend the storage and repeat the command")
    return EsoError(what + "make it readable or remove it")


def _reason(error: Exception) -> str:
    """An error of a library, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _read(name: str, opener: Opener, unit: str, reading: Reading, fields: tuple[str, ...]) -> Iterator[str]:
    """The documents of one file, decompressed; its content and its name say what it is, else `unit` does:

    line       one per line
    full line  the same, with its blanks and line feed (WikiText)
    file       all of it; three and more line feeds become two (OpenWebText)
    json       a JSON object per line
    ag_news    comma-separated class, title, description
    """
    opener, name_inside = streams.decompress(opener), streams.inner_name(name)
    start = streams.head(opener)
    texts: Iterator[str]
    if name_inside.endswith((*rows.JSON, *rows.COLUMNS)) or start.startswith(b"PAR1"):
        texts = rows.texts(name, opener, reading, fields)
    elif streams.is_zip(start) and not name_inside.endswith(ARCHIVES):
        raise NotText("is a zip archive by its content and not by its name; rename it to .zip if it holds texts")
    elif streams.is_zip(start) or streams.is_tar(start):
        for member, content in streams.members(opener):
            yield from _read(f"{name}/{member}", content, unit, reading, fields)
        return
    elif unit == "ag_news":
        texts = (f"{title} {description}" for _, title, description
                 in csv.reader(_lines(opener), skipinitialspace=True))
    elif unit == "json" or name_inside.endswith(rows.TABLES):
        texts = rows.texts(name, opener, reading, fields)
    elif reading.field is not None:
        raise NotText(f"has no rows, and so no field {reading.field!r} (by its name; a file of JSON lines is a .jsonl)")
    elif unit == "line":
        texts = (line.strip() for line in _lines(opener))
    elif unit == "full line":
        texts = _lines(opener)
    else:
        texts = iter([streams.text(opener)])
    for text in texts:
        if text.strip():
            yield re.sub("\n\n\n+", "\n\n", text).strip() if unit == "file" else text


def _lines(opener: Opener) -> Iterator[str]:
    return map(streams.as_text, streams.lines(opener))


def _text8(path: Path, split: str) -> Iterator[str]:
    """A split of the 100 million characters, in pieces; of a shorter file, its first 90%, and twice 5%."""
    text = streams.text(streams.decompress(streams.of_file(path))).strip("\n")
    total = sum(TEXT8)
    before, after = {"train": (0, 1), "validation": (1, 2), "test": (2, 3)}[split]
    low, high = (len(text) * sum(TEXT8[:part]) // total for part in (before, after))
    for start in range(low, high, PIECE):
        yield text[start:min(start + PIECE, high)]


def _is_archive(path: Path, reading: Reading) -> bool:
    """Whether a file is to be unpacked: a tar, whatever its name, or a file whose name says an archive."""
    if path.name.lower().endswith(rows.COLUMNS):
        return False
    try:
        start = streams.head(streams.decompress(streams.of_file(path)))
    except OSError as error:
        if error.errno is not None:
            raise _unreadable(error, path, reading) from error
        return False  # damaged: reading it says how
    except Exception:  # the same, of another library
        return False
    named = streams.inner_name(path.name).endswith(ARCHIVES)
    require(not named or bool(start), reading.flag, str(path), "is empty, and no archive")
    return named or streams.is_tar(start)


def _unpack(archive: Path, below: Path, reading: Reading) -> Path:
    """The folder that an archive is unpacked to, whole or not at all; it is kept for the next time."""
    state = archive.stat()
    identity = hashlib.sha256(f"{archive.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} "
                              f"{state.st_ino}".encode()).hexdigest()[:8]
    folder = below / f"{archive.name}-{identity}"
    if folder.exists():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        streams.unpack(streams.decompress(streams.of_file(archive)), partial)
        return partial.rename(folder)
    except Exception as error:  # every library raises its own
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            if error.errno in PASSING:
                raise _unreadable(error, archive, reading) from error
            raise EsoError(f"{reading.flag} = {str(archive)!r}: cannot be unpacked to {str(below)!r} ({error.strerror})"
                           "; make room, and repeat the command") from error
        raise EsoError(f"{reading.flag} = {str(archive)!r}: cannot be unpacked ({_reason(error)})"
                       "; it may be damaged, cut short, encrypted or of a kind that Python does not read: unpack it "
                       "yourself, and give the folder") from error
