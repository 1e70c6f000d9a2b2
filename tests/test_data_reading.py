"""Rows of every shape, archives and compression of every kind, folders: read, or one line that names them."""

from __future__ import annotations

import bz2
import codecs
import errno
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from conftest import Run
from eso_jax.data import documents as raw_documents
from eso_jax.data import readers
from eso_jax.data.catalog import CORPORA
from eso_jax.data.rows import Reading
from eso_jax.errors import EsoError, RunAgain
from eso_jax.evaluation import texts


def read(folder: Path, *sources: Path, **reading: Any) -> list[str]:
    """The documents of files, folders and archives."""
    asked = Reading(**reading)
    files = readers.find_files(sources, folder / "unpacked", asked)
    return list(readers.documents(CORPORA["text"], "train", files, asked))


def refused(folder: Path, *sources: Path, **reading: Any) -> str:
    with pytest.raises(EsoError) as error:
        read(folder, *sources, **reading)
    assert "\n" not in str(error.value) and str(sources[0]) in str(error.value)
    return str(error.value)


# Rows

GOOD = "caf\u00e9 \u2028 \x85 \x0c \u2029 \x1c a\nb"  # ends of lines for Python's splitlines, and for no row


def as_lines(path: Path, rows: list[Any]) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode("utf-8", "surrogatepass"))
    return path


def as_escaped_lines(path: Path, rows: list[Any]) -> Path:
    path = path.with_suffix(".ndjson")
    path.write_text("".join(json.dumps(row) + "\r\n" for row in rows), "utf-8")
    return path


def as_array(path: Path, rows: list[Any]) -> Path:
    path = path.with_suffix(".json")
    path.write_text(json.dumps(rows, indent=1), "utf-8-sig")
    return path


def as_parquet(path: Path, rows: list[Any]) -> Path:
    path = path.with_suffix(".parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    return path


def as_arrow(path: Path, rows: list[Any]) -> Path:
    path = path.with_suffix(".arrow")
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def as_npz(path: Path, rows: list[Any]) -> Path:
    path = path.with_suffix(".npz")
    np.savez(path, text=[row["text"] for row in rows])
    return path


Writer = Callable[[Path, list[Any]], Path]
FORMATS = [as_lines, as_escaped_lines, as_array, as_parquet, as_arrow, as_npz]
NAMES = [kind.__name__ for kind in FORMATS]


@pytest.mark.parametrize("write", FORMATS, ids=NAMES)
def test_rows_with_a_text_are_read(tmp_path: Path, write: Writer) -> None:
    path = write(tmp_path / "a", [{"text": text, "id": 1} for text in ("one", GOOD, " ", "three")])
    assert read(tmp_path, path) == ["one", GOOD, "three"]
    assert texts.read(str(path), "--samples").strings == ["one", GOOD, " ", "three"]


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_rows_of_any_text(tmp_path_factory: pytest.TempPathFactory, rows: list[str]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    for write in FORMATS:
        if write is as_npz:  # NumPy drops NULs at the end
            rows = [row.rstrip("\0") for row in rows]
        if rows or write in (as_lines, as_array):
            path = write(folder / "a", [{"text": row} for row in rows])
            assert list(readers.rows.texts(str(path), readers.streams.of_file(path), Reading())) == rows


BAD: dict[str, tuple[Any, str]] = {
    "null": ({"text": None}, "has a field 'text' that is null, not text"),
    "number": ({"text": 3}, "has a field 'text' that is a number, not text"),
    "truth": ({"text": True}, "has a field 'text' that is true or false, not text"),
    "list": ({"text": ["a", "b"]}, "has a field 'text' that is a list, not text"),
    "nested": ({"text": {"en": "a"}}, "has a field 'text' that is an object, not text"),
    "chat": ({"text": [{"role": "user", "content": "a"}]}, "has a field 'text' that is a list, not text (turns of"),
}
ONLY_JSON: dict[str, tuple[Any, str]] = {
    "absent": ({"messages": [], "id": 1}, "has no field text (its fields: 'messages', 'id')"),
    "empty": ({}, "has no field text (its fields: none)"),
    "no object": (7, "is a number, not an object with a text"),
    "array": (["a"], "is a list, not an object with a text"),
    "surrogate": ({"text": "a\ud800b"}, "has a field 'text' with half a character (a lone surrogate)"),
}
ROWS = {**BAD, **ONLY_JSON}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("write", FORMATS[1:], ids=NAMES[1:])
def test_rows_without_a_text(tmp_path: Path, write: Writer, kind: str) -> None:
    """One among many; in a column, all are of its kind, or null."""
    row, reason = ROWS[kind]
    columns = write in (as_parquet, as_arrow, as_npz)
    if columns and (kind in ONLY_JSON or write is as_npz and kind in ("null", "nested", "chat")):
        return
    one = write is not as_npz and kind == "null" or not columns
    good = [{"text": "good"}] * 4
    path = write(tmp_path / "a", [*good[:2], row, *good[2:]] if one else [row] * 3)
    place = f"{'line' if write is as_escaped_lines else 'row'} {3 if one else 1} "
    if write is as_npz and kind == "list":  # an array of texts by its shape
        assert read(tmp_path, path) == ["a", "b"] * 3
        return
    said = refused(tmp_path, path)
    assert f"--from = '{path}': {place}{reason}" in said and "--field" in said and "--skip-bad-rows" in said, said
    with pytest.raises(EsoError, match=r"^--samples = '.*/a\.\w+': (row|line) \d "):
        texts.read(str(path), "--samples")
    reading = Reading(skip_rows=True)
    found = list(readers.documents(CORPORA["text"], "train", {"a": path}, reading))
    assert found == ["good"] * (4 if one else 0) and len(reading.rows) == (1 if one else 3)
    assert reading.rows[0].startswith(f"{path}, {place}{reason}")


def test_one_null_among_many_in_every_command(tmp_path: Path, run: Run) -> None:
    path = as_lines(tmp_path / "a", [{"text": f"document {i}" * 5} for i in range(12)] + [{"text": None}])
    prepare = ["data", "prepare", "text", "--from", path, "--tokenizer", "bytes", "--length", 16, "--held-out", 2,
               "--data-dir", tmp_path / "data"]
    for command in (prepare, ["data", "train-tokenizer", "--from", path, "--vocab-size", 300, "--out", tmp_path / "t"],
                    ["quality", "--samples", path, "--judge", "none", "--out", tmp_path / "q.json"]):
        assert "line 13 has a field 'text' that is null, not text" in run(*command, code=2)
        said = run(*command, "--skip-bad-rows")
        assert "left out 1 row: " in said and f"{path.name}, line 13 has a field 'text' that is null" in said
    assert json.loads((tmp_path / "q.json").read_text("utf-8"))["samples"] == 12


@pytest.mark.parametrize("write", FORMATS[1:5], ids=NAMES[1:5])
def test_the_field_that_is_read(tmp_path: Path, write: Writer) -> None:
    path = write(tmp_path / "a", [{"body": {"en": f"one {i}"}, "content": f"two {i}", "id": i} for i in range(3)])
    assert read(tmp_path, path) == ["two 0", "two 1", "two 2"]
    assert read(tmp_path, path, field="body.en") == ["one 0", "one 1", "one 2"]
    assert texts.read(str(path), "--samples", reading=Reading("body.en")).strings == ["one 0", "one 1", "one 2"]
    assert "is a number, not text" in refused(tmp_path, path, field="id")
    assert "'body', 'content', 'id'" in refused(tmp_path, path, field="title")


def test_rows_that_are_text_themselves(tmp_path: Path) -> None:
    assert read(tmp_path, as_lines(tmp_path / "a", ["one", GOOD])) == ["one", GOOD]
    assert read(tmp_path, as_array(tmp_path / "b", ["one", GOOD])) == ["one", GOOD]
    (tmp_path / "c.json").write_text('{\n "text": "one object"\n}\n', "utf-8")
    assert read(tmp_path, tmp_path / "c.json") == ["one object"]


@pytest.mark.parametrize("content, message", [
    ('{"text": "a"}\n{"text": "b', "line 2 is no JSON (Unterminated string starting at at column 10; the file may be"),
    ('{"text": "a"}\n\n{"text": 1e}\n', "line 3 is no JSON"),
    ('{"text": "a"}\n{"text": "b", "m": ' + "[" * 10**5 + "]" * 10**5 + "}\n", "line 2 is no JSON (nested too deep)"),
    ("[" * 100_000 + "]" * 100_000, "line 1 is no JSON (nested too deep"),
    ('{"text": "a"}\n{"text": "b", "n": ' + "1" * 5000 + "}", "line 2 is no JSON (Exceeds the limit"),
    ('[\n{"text": "a"},\n{"text": "b"', "is no JSON ("), ('{"text": "\ud800"}', "line 1 is not UTF-8"),
], ids=["cut", "no JSON", "nested", "nested array", "digits", "cut array", "surrogate in UTF-8"])
def test_lines_that_are_no_rows(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    assert message in refused(tmp_path, path)


def test_a_bom_is_no_text(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", b'{"text": "one"}\n'), ("b.txt", b"one"), ("c.json", b'[{"text": "one"}]')):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + content)
        assert read(tmp_path, tmp_path / name) == ["one"]
    for encoding in ("utf-16", "utf-32"):
        (tmp_path / "d.txt").write_text("one", encoding)
        assert "is UTF-16; save it as UTF-8" in refused(tmp_path, tmp_path / "d.txt")


TABLE = 'id,text\r\n1,"a, ""b""\nc"\r\n2,caf\u00e9\r\n\r\n3,\r\n'


@pytest.mark.parametrize("name, content", [
    ("a.csv", TABLE), ("a.CSV", "\ufeff" + TABLE), ("a.tsv", TABLE.replace("id,", "id\t").replace("\n1,", "\n1\t")
                                                    .replace("\n2,", "\n2\t").replace("\n3,", "\n3\t"))])
def test_tables_of_text(tmp_path: Path, name: str, content: str) -> None:
    """A table is no document: its rows are."""
    path = tmp_path / name
    path.write_bytes(content.encode())
    assert read(tmp_path, path) == ['a, "b"\nc', "caf\u00e9"]
    assert read(tmp_path, path, field="id") == ["1", "2", "3"]
    assert "has no column body (its columns: 'id', 'text'; --field names one)" in refused(tmp_path, path, field="body")
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    assert texts.read(str(tmp_path / f"{name}.gz"), "--samples").strings == ['a, "b"\nc', "caf\u00e9", ""]


@pytest.mark.parametrize("content, reason", [
    ("id,text\n1,a\n2\n3,b\n", "row 2 has 1 cells, and the first line 2"),
    ("id,text\n1,a\n2,b, c\n3,b\n", "row 2 has 3 cells, and the first line 2"),
    ('id,text\n1,a\n2,"b\n', "unexpected end of data"), ("", "has no column text"),
    ("id,text\n1,a\0b\n", "holds NUL bytes"), (f"id,text\n1,{'a' * 200_000}\n2\n", "row 2 has 1 cells")])
def test_tables_that_are_damaged(tmp_path: Path, content: str, reason: str) -> None:
    path, good = tmp_path / "a.csv", tmp_path / "b.txt"
    path.write_text(content)
    good.write_text("good")
    if content:
        assert reason in refused(tmp_path, path)
    if reason.startswith("row"):
        assert len(read(tmp_path, path, skip_rows=True)) == content.count("\n") - 2


def test_a_field_is_of_rows(tmp_path: Path) -> None:
    """Where one is asked for, a file without rows is not taken for a text: it may hold JSON lines by another name."""
    path = as_lines(tmp_path / "a", [{"text": "x"}]).rename(tmp_path / "a.txt")
    assert "has no rows, and so no field 'text'" in refused(tmp_path, path, field="text")
    assert read(tmp_path, path) == ['{"text": "x"}']


# Compression and archives

LINES = b"".join(json.dumps({"text": f"document {i} " * 20}).encode() + b"\n" for i in range(200))
DOCUMENTS = [(f"document {i} " * 20).strip() for i in range(200)]


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, "zstd", asbytes=True))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd,
    "lz4": lambda content: bytes(pyarrow.compress(content, "lz4", asbytes=True))}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files(tmp_path: Path, suffix: str) -> None:
    whole = COMPRESS[suffix](LINES)
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(whole)
    assert read(tmp_path, path) == DOCUMENTS
    parts = [COMPRESS[suffix](part) for part in (LINES[:5000], LINES[5000:])]
    path.write_bytes(b"".join(parts))  # as pzstd, pigz and cat write them
    assert read(tmp_path, path) == DOCUMENTS
    (tmp_path / "a.jsonl").write_bytes(whole)  # by another name
    assert read(tmp_path, tmp_path / "a.jsonl") == DOCUMENTS
    path.write_bytes(LINES)  # not compressed, as some clients leave a download
    assert read(tmp_path, path) == DOCUMENTS
    for damaged in (whole[:-20], whole[:len(whole) // 2], whole[:30] + bytes(20) + whole[50:]):
        path.write_bytes(damaged)
        said = refused(tmp_path, path)
        assert "cannot be read (" in said or "is no JSON" in said or "is not UTF-8" in said, said
        reading = Reading(skip_files=True, skip_rows=True)
        list(readers.documents(CORPORA["text"], "train", {"a": path}, reading))
        assert reading.files or reading.rows


TREE = {"t/a.txt": b"one", "t/b.jsonl": b'{"text": "two"}\n{"text": "three"}\n', "t/.hidden": b"x",
        "__MACOSX/._a": b"\0"}


def as_zip(path: Path, tree: dict[str, bytes] = TREE, kind: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as file:
        for name, content in tree.items():
            file.writestr(name, content)
    return path


def as_tar(path: Path, tree: dict[str, bytes] = TREE) -> Path:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        for name, content in tree.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    suffix = path.suffix.removeprefix(".").replace("tgz", "gz")
    path.write_bytes(COMPRESS[suffix](held.getvalue()) if suffix in COMPRESS else held.getvalue())
    return path


@pytest.mark.parametrize("name", ["a.zip", "bzip2.zip", "lzma.zip", "a.tar", "a.tgz", "a.tar.gz", "a.tar.bz2",
                                  "a.tar.xz", "a.tar.zst", "a.bin"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a folder"])
def test_archives(tmp_path: Path, name: str, inside: bool) -> None:
    """Rows in them are rows, whether they are named or found."""
    path = tmp_path / "in" / name
    path.parent.mkdir()
    kinds = {"bzip2.zip": zipfile.ZIP_BZIP2, "lzma.zip": zipfile.ZIP_LZMA}
    as_zip(path, TREE, kinds.get(name, zipfile.ZIP_DEFLATED)) if name.endswith("zip") else as_tar(path)
    assert read(tmp_path, path.parent if inside else path) == ["one", "two", "three"]
    if not inside:
        assert read(tmp_path, path, include=["*.jsonl"]) == ["two", "three"]


def encrypted(path: Path) -> Path:
    content = bytearray(as_zip(path).read_bytes())
    for header, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = -1
        while (start := content.find(header, start + 1)) >= 0:
            content[start + flags] |= 1
    path.write_bytes(content)
    return path


def of_method_9(path: Path) -> Path:
    content = as_zip(path).read_bytes()
    path.write_bytes(content.replace(b"\x14\0\0\0\x08\0", b"\x14\0\0\0\x09\0"))
    return path


def damaged(path: Path) -> Path:
    as_zip(path, {"t/a.txt": bytes(range(256)) * 4 + os.urandom(3000)})
    content = bytearray(path.read_bytes())
    content[300:330] = bytes(30)
    path.write_bytes(content)
    return path


def cut(path: Path) -> Path:
    whole = as_zip(path) if path.suffix == ".zip" else as_tar(path)
    whole.write_bytes(whole.read_bytes()[:-40])
    return whole


def of_damaged_header(path: Path) -> Path:
    """tarfile alone would take it for the end."""
    as_tar(path, {"a.txt": b"one", "b.txt": b"two", "c.txt": b"three"})
    content = bytearray(path.read_bytes())
    content[1024 + 150] ^= 1
    path.write_bytes(content)
    return path


def with_one_name_twice(path: Path) -> Path:
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "w") as file:
        for content in ("one", "two"):
            file.writestr("a.txt", content)
    return path


def with_a_link(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        link = zipfile.ZipInfo("b.txt")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "/etc/passwd")
    return path


def with_a_link_outside(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("b.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "../../outside"
        tar.addfile(link)
    return path


@pytest.mark.parametrize("make, name, reason", [
    (encrypted, "a.zip", "encrypted"), (of_method_9, "a.zip", "compression"), (damaged, "a.zip", "t/a.txt"),
    (cut, "a.zip", "zip"), (cut, "a.tar.gz", "EOFError"), (cut, "a.tar.xz", "EOFError"), (cut, "a.tar.bz2", "EOFError"),
    (cut, "a.tar.zst", "Truncated"), (of_damaged_header, "a.tar", "bad checksum"),
    (with_one_name_twice, "a.zip", "two members called 'a.txt'"), (with_a_link, "a.zip", "'b.txt' in it is a link")])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a folder"])
def test_archives_that_cannot_be_read(tmp_path: Path, make: Callable[[Path], Path], name: str, reason: str,
                                      inside: bool) -> None:
    path = tmp_path / "in" / name
    path.parent.mkdir()
    make(path)
    said = refused(tmp_path, path.parent if inside else path)
    assert name in said and reason in said, said
    assert not (tmp_path / "unpacked").exists() or not list((tmp_path / "unpacked").iterdir())
    if inside:
        reading = Reading(skip_files=True)
        list(readers.documents(CORPORA["text"], "train", {"a": path}, reading))
        assert len(reading.files) == 1 and str(path) in reading.files[0]


def test_a_tar_cannot_reach_outside(tmp_path: Path) -> None:
    assert "outside the destination" in refused(tmp_path, with_a_link_outside(tmp_path / "a.tar"))


@pytest.mark.parametrize("name, content, reason", [
    ("a.docx", None, "is a zip archive by its content and not by its name"), ("a.7z", b"7z\xbc\xaf\x27\x1c\0", "is 7z"),
    ("a.rar", b"Rar!\x1a\x07\0", "is rar"), ("a.pdf", b"%PDF-1.7\n", "is PDF"), ("a.txt", b"a\0b\0", "holds NUL bytes"),
    ("a.zip", b"no zip at all", "cannot be unpacked"), ("a.zip", b"", "is empty, and no archive"),
    ("a.tar.gz", b"\x1f\x8b\x08\0 no", "cannot be read"), ("a.parquet", b"PAR1 cut", "cannot be read"),
    ("a.arrow", b"no arrow", "cannot be read"), ("a.npz", b"PK\x03\x04", "cannot be read")])
def test_what_is_not_read(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    path = tmp_path / name
    as_zip(path) if content is None else path.write_bytes(content)
    assert reason in refused(tmp_path, path)


# Folders


def saved(folder: Path, rows: list[str], shards: int = 2) -> Path:
    """As save_to_disk of Hugging Face's datasets writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{shards:05d}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        as_arrow(folder / name.removesuffix(".arrow"), [{"text": row} for row in rows[i::shards]])
    (folder / "dataset_info.json").write_text('{"features": {}}', "utf-8")
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state), "utf-8")
    as_arrow(folder / "cache-1f2e", [{"text": "a cache"}])
    return folder


def test_a_folder_of_save_to_disk(tmp_path: Path) -> None:
    one = saved(tmp_path / "one", ["a", "b", "c"])
    assert read(tmp_path, one) == ["a", "c", "b"]
    both = tmp_path / "both"
    saved(both / "train", ["a"], 1)
    (both / "dataset_dict.json").write_text('{"splits": ["train"]}', "utf-8")
    assert read(tmp_path, both) == ["a"]
    saved(both / "test", ["b"], 1)
    assert "holds the splits test, train; give the folder of one of them" in refused(tmp_path, both)
    assert read(tmp_path, both / "test") == ["b"]
    (one / "data-00001-of-00002.arrow").unlink()
    assert "lacks data-00001-of-00002.arrow, which its state.json names" in refused(tmp_path, one)


def linked(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    for name in ("in/a.txt", "in/sub/b.txt", "elsewhere/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name, "utf-8")
    (root / "behind").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path)
    (root / "again").symlink_to(root / "sub")  # is read already
    os.mkfifo(root / "pipe")
    return root


def test_folders_behind_links_are_read_once(tmp_path: Path) -> None:
    root = linked(tmp_path)
    assert sorted(readers.find_files([root], tmp_path / "unpacked")) == [
        "in/a.txt", "in/behind/deep/c.txt", "in/sub/b.txt"]
    assert {name for name, _ in raw_documents(str(root), "all")} == {"a.txt", "behind/deep/c.txt", "sub/b.txt"}
    assert sorted(read(tmp_path, root / "*" / "*.txt")) == ["in/sub/b.txt"]
    assert sorted(read(tmp_path, root / "**" / "*.txt")) == ["elsewhere/deep/c.txt", "in/a.txt", "in/sub/b.txt"]
    assert sorted(read(tmp_path, root / "be*")) == ["elsewhere/deep/c.txt"]
    (root / "broken").symlink_to(tmp_path / "gone")
    assert "cannot read" in refused(tmp_path, root) and "broken" in refused(tmp_path, root)


@pytest.mark.parametrize("which", ["file", "folder"])
def test_what_may_not_be_read_is_named(tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """(The tests may run as root, whom no permission stops.)"""
    root = linked(tmp_path)
    scandir, opened = os.scandir, open

    def refuse(real: Callable[..., Any], name: str, path: Any, *rest: Any, **more: Any) -> Any:
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **more)

    if which == "folder":
        monkeypatch.setattr(os, "scandir", lambda path=".": refuse(scandir, "/sub", path))
    else:
        monkeypatch.setattr("builtins.open", lambda *a, **more: refuse(opened, "a.txt", *a, **more))
    for source in (root, root / "**" / "*.txt"):
        said = str(pytest.raises(EsoError, read, tmp_path, source).value)
        assert f"cannot read '{root}/{'sub' if which == 'folder' else 'a.txt'}' (Permission denied)" in said
    if which == "file":
        reading = Reading(skip_files=True)
        files = readers.find_files([root], tmp_path / "unpacked", reading)
        assert len(list(readers.documents(CORPORA["text"], "train", files, reading))) == 2
        assert reading.files == [f"{root}/a.txt cannot be read (Permission denied)"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_storage_that_does_not_answer_leaves_nothing_out(tmp_path: Path, number: int,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is the file to blame, nor do --skip-bad-files and --skip-bad-rows leave it out."""
    root, opened = linked(tmp_path), open

    def fail(path: Any, *rest: Any, **more: Any) -> Any:
        if str(path).endswith("a.txt"):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *rest, **more)

    monkeypatch.setattr("builtins.open", fail)
    for skip in (False, True):
        with pytest.raises(RunAgain, match=f"cannot read '{root}/a.txt' .*mend the storage and repeat"):
            read(tmp_path, root, skip_files=skip, skip_rows=skip)
