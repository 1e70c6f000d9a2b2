"""Files to documents: plain text by lines or whole, JSON lines, Parquet, archives."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import itertools
import json
import re
import shutil
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from eso_jax.data.catalog import TEXT8, Corpus
from eso_jax.errors import EsoError, require

FIELDS = ("text", "sentence", "article", "article_text", "content")  # of JSON lines and Parquet, the first there is
PIECE = 1_000_000  # characters of text8 in a document


def find_files(paths: Iterable[str | Path], unpacked: Path, flag: str = "--from") -> dict[str, Path]:
    """The files of some files, folders and archives (tar or zip, unpacked below `unpacked`), by relative path, sorted
    within each; hidden ones are left out.

    Raises:
      EsoError: one is missing, or an archive is broken.
    """
    found: dict[str, Path] = {}
    for given in map(Path, paths):
        require(given.exists(), flag, str(given), "no such file or folder")
        root = _unpack(given, unpacked) if given.is_file() and _is_archive(given) else given
        files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file())
        for path in files:
            name = path.relative_to(root.parent)
            if not any(part.startswith(".") for part in path.relative_to(root).parts):
                require(found.setdefault(name.as_posix(), path) == path, flag, str(given),
                        f"two files are called {name.as_posix()!r}; rename one")
    return found


def documents(corpus: Corpus, split: str, files: dict[str, Path]) -> Iterator[str]:
    """The documents of one published split, in order; those without text are left out.

    Raises:
      EsoError: a file cannot be read as what its corpus holds.
    """
    patterns = corpus.splits[split]
    chosen = [path for name, path in files.items() if any(PurePosixPath(name).match(pattern) for pattern in patterns)]
    if corpus.unit == "text8":
        return itertools.chain.from_iterable(_text8(path, split) for path in chosen)
    return itertools.chain.from_iterable(_read(path, corpus.unit) for path in chosen)


def _read(path: Path, unit: str) -> Iterator[str]:
    """The documents of one file; its suffix says what it is, else `unit` does:

    line       one per line
    full line  the same, with its blanks and line feed (WikiText)
    file       all of it; three and more line feeds become two (OpenWebText)
    json       a JSON object per line
    ag_news    comma-separated class, title, description
    """
    plain = path.name.removesuffix(".gz")
    found: Iterator[str]
    try:
        if plain.endswith(".parquet"):
            found = map(_field, _parquet(path), itertools.repeat(path))
        elif _is_archive(path):
            found = _nested(path)
        elif plain.endswith((".jsonl", ".json")) or unit == "json":
            found = (_field(json.loads(line), path) for line in _lines(path) if line.strip())
        elif unit == "ag_news":
            found = (f"{title} {description}" for _, title, description
                     in csv.reader(_lines(path), skipinitialspace=True))
        elif unit == "line":
            found = (line.strip() for line in _lines(path))
        elif unit == "full line":
            found = _lines(path)
        else:
            found = iter(["".join(_lines(path))])
        for document in found:
            document = re.sub("\n\n\n+", "\n\n", document).strip() if unit == "file" else document
            if document.strip():
                yield document
    except (OSError, EOFError, ValueError, csv.Error, tarfile.TarError) as error:  # ValueError: JSON, UTF-8, Parquet
        if isinstance(error, EsoError):
            raise
        raise EsoError(f"--from: cannot read {str(path)!r} ({type(error).__name__}: {error})".replace("\n", " ")
                       ) from error


@contextlib.contextmanager
def _open(path: Path) -> Iterator[TextIO]:
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8", newline="\n") as file:
        yield file


def _lines(path: Path) -> Iterator[str]:
    with _open(path) as file:
        yield from file


def _nested(path: Path) -> Iterator[str]:
    """The text files of an archive inside an archive, sorted by name."""
    with tarfile.open(path) as archive:
        for member in sorted((member for member in archive if member.isfile()), key=lambda member: member.name):
            content = archive.extractfile(member)
            assert content is not None
            yield content.read().decode()


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        field = next((name for name in FIELDS if name in file.schema_arrow.names), None)
        for batch in file.iter_batches(columns=[field] if field else None):
            yield from batch.to_pylist()


def _field(row: Any, path: Path) -> str:
    value = next((row[name] for name in FIELDS if name in row), None) if isinstance(row, dict) else None
    value = "\n".join(value) if isinstance(value, list) else value
    require(isinstance(value, str), "--from", str(path), f"its rows have no text in a field {', '.join(FIELDS)}")
    return str(value)


def _text8(path: Path, split: str) -> Iterator[str]:
    """A split of the 100 million characters, in pieces; of a shorter file, its first 90%, and twice 5%."""
    text = "".join(_lines(path)).strip("\n")
    total = sum(TEXT8)
    before, after = {"train": (0, 1), "validation": (1, 2), "test": (2, 3)}[split]
    low, high = (len(text) * sum(TEXT8[:part]) // total for part in (before, after))
    for start in range(low, high, PIECE):
        yield text[start:min(start + PIECE, high)]


def _is_archive(path: Path) -> bool:
    compressed = path.suffix in (".tar", ".gz", ".tgz", ".xz", ".bz2")
    return zipfile.is_zipfile(path) or compressed and tarfile.is_tarfile(path)


def _unpack(archive: Path, below: Path) -> Path:
    """The folder that an archive was unpacked to, whole or not at all."""
    state = archive.stat()
    identity = hashlib.sha256(f"{archive.resolve()} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:8]
    folder = below / f"{archive.name}-{identity}"
    if folder.exists():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                file.extractall(partial)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(partial, filter="data")
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise EsoError(f"--from = {str(archive)!r}: cannot be unpacked ({type(error).__name__}: {error}); it may be "
                       "cut short") from error
    return partial.rename(folder)
