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
from eso_jax.data.rows import Wish
from eso_jax.data.streams import NotText, Opener
from eso_jax.errors import EsoError, RunAgain, require
from eso_jax.files import PASSING

ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz")
PIECE = 1_000_000  # characters of text8 in a document


def find_files(paths: Iterable[str | Path], unpacked: Path, wish: Wish | None = None) -> dict[str, Path]:
    """The files of some files, folders, globs and archives (unpacked below `unpacked`), by relative path, sorted within
    each; hidden ones are left out. A folder of datasets' save_to_disk is its data files.

    Raises:
      EsoError: one is missing or cannot be listed, or an archive cannot be unpacked.
    """
    wish = wish or Wish()
    found: dict[str, Path] = {}
    for given in (Path(path).expanduser() for path in paths):
        is_archive = given.is_file() and _is_archive(given, wish)
        given, asked = (_unpack(given, unpacked, wish) if is_archive else given), given
        try:
            root, files = folders.find(given, wish.flag, below=True)
        except OSError as error:
            raise _unreadable(error, asked, wish) from error
        base = root if given.is_file() else root.parent
        for path in _data_files(sorted(files), wish):
            name = path.relative_to(base).as_posix()
            if given.is_file() or not wish.include or any(PurePosixPath(name).match(each) for each in wish.include):
                require(found.setdefault(name, path) == path, wish.flag, str(asked),
                        f"two files are called {name!r}; rename one")
    require(bool(found), wish.flag, [str(path) for path in paths], "holds no files" + (
        f" that --include {' '.join(wish.include)} matches" if wish.include else " (hidden ones are left out)"))
    return found


def _data_files(paths: list[Path], wish: Wish) -> list[Path]:
    """Without the files of save_to_disk that hold no rows, whose names are in a state.json."""
    kept = dict.fromkeys(paths)
    for path in paths:
        if path.name == "dataset_dict.json":
            splits = [folder.name for folder in sorted(path.parent.iterdir()) if folder.is_dir()]
            require(len(splits) == 1, wish.flag, str(path.parent), f"holds the splits {', '.join(splits)}; give the "
                    "folder of one of them")
            del kept[path]
        if path.name == "state.json" and path.with_name("dataset_info.json").is_file():
            try:
                state = json.loads(path.read_bytes())
                names = [each["filename"] for each in state["_data_files"]]
                chosen = state.get("_indices_files") or state.get("_indices_data_files")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise EsoError(f"{wish.flag} = {str(path)!r}: not a state.json of save_to_disk ({error})") from error
            require(not chosen, wish.flag, str(path.parent), "keeps a choice of rows beside all rows; save it again by "
                    "flatten_indices().save_to_disk(...)")
            for other in paths:
                if other.parent == path.parent and other.name not in names:
                    kept.pop(other, None)
            missing = [name for name in names if path.with_name(name) not in kept]
            require(not missing, wish.flag, str(path.parent), f"lacks {', '.join(missing[:3])}, which its state.json "
                    "names")
    return list(kept)


def documents(corpus: Corpus, split: str, files: dict[str, Path], wish: Wish | None = None) -> Iterator[str]:
    """The documents of one published split, in order; those without text are left out.

    Raises:
      EsoError: a file cannot be read as what its corpus holds, or a row has no text.
      RunAgain: storage did not answer.
    """
    wish = wish or Wish()
    patterns = corpus.splits[split]
    chosen = [path for name, path in files.items() if any(PurePosixPath(name).match(pattern) for pattern in patterns)]
    for number, path in enumerate(chosen):
        try:
            if corpus.unit == "text8":
                yield from _text8(path, split)
            else:
                yield from _read(str(path), streams.of_file(path), corpus.unit, wish)
        except EsoError:
            raise
        except NotText as error:
            if not wish.skip_files and len(chosen) > 1:
                _refuse_all(path, error, chosen[number + 1:], wish)
            wish.bad_file(str(path), str(error))
        except Exception as error:  # every library raises its own
            if not isinstance(error, OSError) or error.errno is None:
                wish.bad_file(str(path), f"cannot be read ({type(error).__name__}: {_line(error)}); it may be damaged "
                              "or cut short")
            elif wish.skip_files and error.errno not in PASSING:
                wish.bad_file(str(path), f"cannot be read ({error.strerror})")
            else:
                raise _unreadable(error, path, wish) from error


def _refuse_all(path: Path, error: NotText, others: list[Path], wish: Wish) -> None:
    """Raises an EsoError that counts all files which are no text, not only the first."""
    more = [str(other) for other in others if not _may_be_text(other)]
    if more:
        shown = ", ".join(map(repr, more[:rows.SHOWN - 1]))
        raise EsoError(f"{wish.flag}: {1 + len(more):,} of the files are no text: {str(path)!r} ({error}), {shown}"
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


def _unreadable(error: OSError, path: Path, wish: Wish) -> EsoError | RunAgain:
    what = f"{wish.flag}: cannot read {str(error.filename or path)!r} ({error.strerror}); "
    if error.errno in PASSING:
        return RunAgain(what + "mend the storage and repeat the command")
    return EsoError(what + "make it readable or remove it")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _read(name: str, opener: Opener, unit: str, wish: Wish) -> Iterator[str]:
    """The documents of one file, decompressed; its content and its name say what it is, else `unit` does:

    line       one per line
    full line  the same, with its blanks and line feed (WikiText)
    file       all of it; three and more line feeds become two (OpenWebText)
    json       a JSON object per line
    ag_news    comma-separated class, title, description
    """
    opener, plain = streams.inside(opener), streams.inner_name(name)
    start = streams.head(opener)
    found: Iterator[str]
    if plain.endswith((*rows.JSON, *rows.COLUMNS)) or start.startswith(b"PAR1"):
        found = rows.texts(name, opener, wish)
    elif streams.is_zip(start) and not plain.endswith(ARCHIVES):
        raise NotText("is a zip archive by its content and not by its name; rename it to .zip if it holds texts")
    elif streams.is_zip(start) or streams.is_tar(start):
        for member, content in streams.members(opener):
            yield from _read(f"{name}/{member}", content, unit, wish)
        return
    elif unit == "json":
        found = rows.texts(name, opener, wish)
    elif unit == "ag_news":
        found = (f"{title} {description}" for _, title, description
                 in csv.reader(_lines(opener), skipinitialspace=True))
    elif unit == "line":
        found = (line.strip() for line in _lines(opener))
    elif unit == "full line":
        found = _lines(opener)
    else:
        found = iter([streams.text(opener)])
    for document in found:
        document = re.sub("\n\n\n+", "\n\n", document).strip() if unit == "file" else document
        if document.strip():
            yield document


def _lines(opener: Opener) -> Iterator[str]:
    return map(streams.as_text, streams.lines(opener))


def _text8(path: Path, split: str) -> Iterator[str]:
    """A split of the 100 million characters, in pieces; of a shorter file, its first 90%, and twice 5%."""
    text = streams.text(streams.inside(streams.of_file(path))).strip("\n")
    total = sum(TEXT8)
    before, after = {"train": (0, 1), "validation": (1, 2), "test": (2, 3)}[split]
    low, high = (len(text) * sum(TEXT8[:part]) // total for part in (before, after))
    for start in range(low, high, PIECE):
        yield text[start:min(start + PIECE, high)]


def _is_archive(path: Path, wish: Wish) -> bool:
    """Whether a file is one that is unpacked: a tar, whatever it is called, or what is called a zip."""
    if path.name.lower().endswith(rows.COLUMNS):
        return False
    try:
        start = streams.head(streams.inside(streams.of_file(path)))
    except OSError as error:
        if error.errno is not None:
            raise _unreadable(error, path, wish) from error
        return False  # damaged: reading it says how
    except Exception:  # the same, of another library
        return False
    named = streams.inner_name(path.name).endswith(ARCHIVES)
    require(not named or bool(start), wish.flag, str(path), "is empty, and no archive")
    return named or streams.is_tar(start)


def _unpack(archive: Path, below: Path, wish: Wish) -> Path:
    """The folder that an archive was unpacked to, whole or not at all."""
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
        streams.unpack(streams.inside(streams.of_file(archive)), partial)
        return partial.rename(folder)
    except Exception as error:  # every library raises its own
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            if error.errno in PASSING:
                raise _unreadable(error, archive, wish) from error
            raise EsoError(f"{wish.flag} = {str(archive)!r}: cannot be unpacked to {str(below)!r} ({error.strerror}); "
                           "make room, and repeat the command") from error
        raise EsoError(f"{wish.flag} = {str(archive)!r}: cannot be unpacked ({type(error).__name__}: {_line(error)}); "
                       "it may be damaged, cut short, encrypted or of a kind that Python does not read: unpack it "
                       "yourself, and give the folder") from error
