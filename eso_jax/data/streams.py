"""The content of files: decompressed, as their first bytes say, and the members of archives."""

from __future__ import annotations

import bz2
import codecs
import contextlib
import functools
import gzip
import io
import lzma
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

Opener = Callable[[], AbstractContextManager[Any]]  # of a binary file, from its beginning

SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd", ".lz4")  # taken off a name to see what is inside
_KINDS = {"gzip": rb"\x1f\x8b", "bz2": rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "xz": rb"\xfd7zXZ\x00",
          "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "lz4": rb"\x04\x22\x4d\x18"}
_UNREAD = {"7z": b"7z\xbc\xaf\x27\x1c", "rar": b"Rar!\x1a\x07", "compress": b"\x1f\x9d", "PDF": b"%PDF-"}


class NotText(ValueError):
    """A file that holds no text, and no rows or archive that are read."""


def of_file(path: Path) -> Opener:
    return functools.partial(open, path, "rb")


def of_bytes(content: bytes) -> Opener:
    return functools.partial(io.BytesIO, content)


def decompress(opener: Opener) -> Opener:
    """Opens what is inside a compressed file, which may be compressed again; any other file as it is."""
    kind = compression(head(opener))
    return opener if kind is None else decompress(functools.partial(_decompress, opener, kind))


def compression(start: bytes) -> str | None:
    """How a file is compressed, by its first bytes; None: it is not."""
    return next((kind for kind, magic in _KINDS.items() if re.match(magic, start)), None)


def inner_name(name: str) -> str:
    """A name in lower case, without the suffixes of compression."""
    name = name.lower()
    while name.endswith(SUFFIXES):
        name = name[:name.rindex(".")]
    return name


def head(opener: Opener) -> bytes:
    """The first 512 bytes."""
    with opener() as file:
        start: bytes = file.read(512)
    return start


@contextlib.contextmanager
def _decompress(opener: Opener, kind: str) -> Iterator[Any]:
    with opener() as file:
        if kind in ("zstd", "lz4"):
            import pyarrow

            with pyarrow.CompressedInputStream(file, kind) as stream, io.BufferedReader(stream) as content:
                yield content
        else:
            open_file: Any = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}[kind]
            with open_file(file) as content:
                yield content


@contextlib.contextmanager
def seekable(opener: Opener) -> Iterator[Any]:
    """The file, in memory if it is compressed."""
    with opener() as file:
        on_disk = isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO)
        yield file if on_disk else io.BytesIO(file.read())


def lines(opener: Opener) -> Iterator[bytes]:
    """Lines, which end in a line feed and in nothing else that Unicode or Python may take for an end; no BOM."""
    with opener() as file:
        first = file.readline()
        yield from filter(None, [first.removeprefix(codecs.BOM_UTF8)])
        yield from file


def text(opener: Opener) -> str:
    """All of it.

    Raises:
      NotText: it is not UTF-8, or binary.
    """
    with opener() as file:
        return as_text(file.read())


def as_text(content: bytes) -> str:
    """The same as `text`, of bytes."""
    kind = next((kind for kind, magic in _UNREAD.items() if content.startswith(magic)), None)
    if kind:
        raise NotText(f"is {kind}, which is not read")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise NotText("is UTF-16; save it as UTF-8")
    if b"\0" in content:
        raise NotText("holds NUL bytes, which text does not")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotText(f"is not UTF-8 at byte {error.start}") from error


def is_zip(start: bytes) -> bool:
    return start.startswith((b"PK\x03\x04", b"PK\x05\x06"))


def is_tar(start: bytes) -> bool:
    """Whether a file is a tar, by the header of its first member, which has a checksum."""
    try:
        return bool(tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape"))
    except tarfile.HeaderError:
        return False


class _Header(tarfile.TarInfo):
    """tarfile takes a damaged header for the end of the archive, unless it is the first one."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str | None, errors: str) -> _Header:
        try:
            return super().frombuf(buf, encoding, errors)  # type: ignore[arg-type]
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the zeros that end it
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged or cut short: {error}") from error


def members(opener: Opener) -> Iterator[tuple[str, Opener]]:
    """(name, opener) of each file in an archive, sorted by name, in memory; without hidden ones, as of folders."""
    with seekable(opener) as file:
        if is_zip(head(opener)):
            with zipfile.ZipFile(file) as archive:
                for info in sorted(_files_in_zip(archive), key=lambda info: info.filename):
                    if _is_visible(info.filename):
                        with _name_in_errors(info.filename):
                            content = archive.read(info)
                        yield info.filename, of_bytes(content)
        else:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as tar:
                files = [member for member in tar if member.isfile()]
                _refuse_duplicates([member.name for member in files])
                for member in sorted(files, key=lambda member: member.name):
                    if _is_visible(member.name):
                        with _name_in_errors(member.name):
                            content = tar.extractfile(member).read()  # type: ignore[union-attr]  # it is a file
                        yield member.name, of_bytes(content)


def unpack(opener: Opener, folder: Path) -> None:
    """Extracts an archive to a folder."""
    if is_zip(head(opener)):
        with seekable(opener) as file, zipfile.ZipFile(file) as archive:
            for info in _files_in_zip(archive):
                with _name_in_errors(info.filename):
                    archive.extract(info, folder)
    else:
        with opener() as file, tarfile.open(fileobj=file, mode="r|", tarinfo=_Header) as tar:
            tar.extractall(folder, filter="data")


@contextlib.contextmanager
def _name_in_errors(member: str) -> Iterator[None]:
    """Puts the name of an archive's member into the errors of a block, except those of the file system."""
    try:
        yield
    except Exception as error:  # of each kind of compression its own
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{member}: {type(error).__name__}: {error}") from error


def _files_in_zip(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files in a zip; an error where two have one name, or one is a link, which zipfile would take for a text."""
    infos = [info for info in archive.infolist() if not info.is_dir()]
    _refuse_duplicates([info.filename for info in infos])
    link = next((info.filename for info in infos if stat.S_ISLNK(info.external_attr >> 16)), None)
    if link is not None:
        raise ValueError(f"{link!r} in it is a link")
    return infos


def _refuse_duplicates(names: list[str]) -> None:
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        raise ValueError(f"it holds two members called {twice!r}")


def _is_visible(name: str) -> bool:
    return not any(part.startswith(".") for part in Path(name).parts if part not in (".", ".."))
