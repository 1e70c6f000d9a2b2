"""A folder of one's own text to a model, as a new user goes; and what is missing on the way, said first."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import BASE, Run
from eso_jax import config as configs
from eso_jax.config import Config, DataConfig, ModelConfig
from eso_jax.data import ByteTokenizer, identity, override, prepare, tokenizer_of, windows_of
from eso_jax.data.rows import Reading
from eso_jax.errors import EsoError


def code_folder(root: Path) -> Path:
    """40 Python files in folders, with what such folders hold beside."""
    for i in range(40):
        path = root / f"package{i % 4}" / f"module{i:02d}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def function{i}(argument):\n    return argument + {i}  # caf\u00e9 {i * 37}\n" * 6, "utf-8")
        cache = path.parent / "__pycache__"
        cache.mkdir(exist_ok=True)
        (cache / f"module{i:02d}.cpython-311.pyc").write_bytes(b"\xa7\r\r\n\0\0\0\0" + bytes(range(256)))
    (root / "logo.png").write_bytes(b"\x89PNG\r\n\x1a\n\0")
    return root


@pytest.fixture
def code(tmp_path: Path) -> Path:
    return code_folder(tmp_path / "code")


@pytest.mark.slow
def test_the_journey(tmp_path: Path, code: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = BASE.override("train.steps=2", "model.length=32").to_json()
    Path("small.json").write_text(small, "utf-8")
    run("data", "train-tokenizer", "--from", code, "--include", "*.py", "--vocab-size", 300, "--out", "tokenizer.json")
    said = run("data", "prepare", "text", "--from", f"{code}/**/*.py", "--data-dir", "data", "--tokenizer",
               "tokenizer.json", "--length", 16, "--held-out", 5)
    assert "train on it: eso-jax train quickstart --workdir W data.source=data/text" in said
    Path("tokenizer.json").unlink()  # nothing but the prepared folder is needed
    run("train", "small.json", "--workdir", "w", "data.source=data/text")
    trained = configs.from_file(Path("w/config.json"))
    assert (trained.model.length, trained.model.vocab_size, trained.model.mask) == (16, 300, 299)
    run("train", "w/config.json", "--workdir", "w", "train.steps=3")
    run("eval", "--workdir", "w", "--num-windows", 4, "--out", "e.json")
    found = json.loads(Path("e.json").read_text("utf-8"))
    assert found["bits_per_byte"] > 0 and found["bytes_of"] == "text"
    run("sample", "--workdir", "w", "--num-samples", 2, "--steps", 2, "--out", "s.npz")
    assert len(np.load("s.npz")["text"]) == 2
    run("export", "--workdir", "w", "--out", "m.safetensors")
    assert Path("m.safetensors").stat().st_size > 1000
    # The folder is made anew of other text: not the run's.
    prepared = ["--data-dir", "other", "--tokenizer", "w/tokenizer.json", "--length", 16, "--held-out", 6]
    run("data", "prepare", "text", "--from", f"{code}/**/*.py", *prepared)
    Path("data").rename("before")
    Path("other").rename("data")
    said = run("train", "w/config.json", "--workdir", "w", "train.steps=4", code=2)
    assert "data.source = 'data/text': is not what this run began with" in said


# What --from takes


@pytest.mark.parametrize("action", ["prepare", "train-tokenizer"])
def test_files_that_are_no_text(tmp_path: Path, code: Path, run: Run, action: str) -> None:
    """Counted and named; chosen by a glob or --include; or left out when asked."""
    command: list[object] = ["data", "train-tokenizer", "--vocab-size", 300]
    if action == "prepare":
        command = ["data", "prepare", "text", "--tokenizer", "bytes", "--length", 16, "--held-out", 5]
    target = functools.partial(out_of, tmp_path, action)
    said = run(*command, *target("a"), "--from", code, code=2)
    assert "--from: 41 of the files are no text: " in said and "logo.png' (holds NUL bytes, " in said
    assert "--include" in said and "--skip-bad-files" in said
    skipped = run(*command, *target("b"), "--from", code, "--skip-bad-files")
    assert "left out 41 files: " in skipped and "" in skipped and "logo.png holds NUL bytes" in skipped
    assert "; and 38 more" in skipped
    results = [read_out(tmp_path, action, "b")]
    for i, choice in enumerate(([code, "--include", "*.py"], [f"{code}/**/*.py"], [f"{code}/package?/*.py"],
                                [f"{code}/package[0-3]", "--include", "module*.py", "*.rs"])):
        assert "left out" not in run(*command, *target(str(i)), "--from", *choice)
        results.append(read_out(tmp_path, action, str(i)))
    assert len(results) == 5 and all(result == results[0] for result in results)


def out_of(folder: Path, action: str, name: str) -> list[object]:
    return ["--data-dir", folder / name] if action == "prepare" else ["--out", folder / f"{name}.json"]


def read_out(folder: Path, action: str, name: str) -> str:
    if action == "prepare":
        return json.dumps(json.loads((folder / name / "text" / "manifest.json").read_text("utf-8"))["splits"])
    return (folder / f"{name}.json").read_text("utf-8")


def test_what_is_not_there_is_said_as_missing(tmp_path: Path, run: Run, code: Path) -> None:
    (tmp_path / "e.json").write_text(BASE.to_json(), "utf-8")
    for arguments, message in (
            ([f"data.tokenizer={tmp_path}/no.json"], f"data.tokenizer = '{tmp_path}/no.json': no such file"),
            (["data.tokenizer=no.json"], "data.tokenizer = 'no.json': no such file"),
            (["data.tokenizer=gpt2=no"], "data.tokenizer = 'gpt2=no': no such file"),
            ([f"data.tokenizer={code}"], f"data.tokenizer = '{code}': is a folder; give the tokenizer.json in it"),
            ([f"data.source={tmp_path}/data/text", "model.vocab_size=8192"], "no such file or folder; give 'stdlib'"),
            ([f"data.source={tmp_path}/no.txt", "model.vocab_size=8192"], "no such file or folder; give 'stdlib'"),
            ([f"data.source={tmp_path}/data/lm1b", "model.vocab_size=30522"], "data/lm1b': does not exist; eso-jax"),
            ([f"data.source={tmp_path}/no/*.txt"], "holds no text")):
        said = run("train", tmp_path / "e.json", "--workdir", tmp_path / "w", *arguments, code=2)
        assert message in said, said
    (tmp_path / "blank.txt").write_text(" \n", "utf-8")
    said = run("data", "prepare", "text", "--tokenizer", "bytes", "--length", 8, "--data-dir", tmp_path / "data",
               "--from", tmp_path / "blank.txt", code=2)
    assert "holds no text: what was found is empty or blank" in said
    for files, message in ((["gone"], "--from = 'gone': no such file or folder"),
                           ([f"{code}/**/*.rs"], "holds no files"), ([code, "--include", "*.rs"], "--include *.rs m")):
        said = run("data", "train-tokenizer", "--vocab-size", 300, "--out", tmp_path / "t", "--from", *files, code=2)
        assert message in said, said


# What a prepared folder brings


def prepared(folder: Path, length: int = 8, tokenizer: str = "bytes") -> Path:
    """The manifest alone."""
    folder.mkdir(parents=True)
    size = {"bytes": 258, "characters": 29}[tokenizer]
    made = {"name": tokenizer, "sha256": "", "vocab_size": size, "mask_id": 4 if tokenizer == "bytes" else size - 1}
    (folder / "manifest.json").write_text(json.dumps({"tokenizer": made, "length": length, "splits": {}}), "utf-8")
    return folder


def four(config: Config) -> tuple[object, ...]:
    return config.model.length, config.model.vocab_size, config.model.mask_id, config.data.tokenizer


def test_a_prepared_folder_brings_its_fields(tmp_path: Path) -> None:
    letters, others = (prepared(tmp_path / name, tokenizer=name) for name in ("characters", "bytes"))
    config = Config(model=ModelConfig(length=64, vocab_size=500, mask_id=7), data=DataConfig(tokenizer="gpt2"))
    assert four(override(Config(), f"data.source={letters}")) == (8, 29, None, "characters")
    assert four(override(Config(), f"data.source={others}")) == (8, 258, 4, "bytes")
    assert four(override(config, f"data.source={letters}")) == (8, 29, 28, "characters")
    # What is said on the command line stays.
    said = override(config, f"data.source={letters}", "model.length=16", "model.mask_id=3", "data.tokenizer=x=y")
    assert four(said) == (16, 29, 3, "x=y")
    # What a file says of its own folder stays too, and its defaults do not.
    there = override(config, f"data.source={letters}", *(f"model.{each}" for each in ("length=64", "vocab_size=500")))
    assert four(override(there)) == (64, 500, 28, "characters")
    assert four(override(Config(data=DataConfig(source=str(letters))))) == (8, 29, None, "characters")
    assert four(override(there, "data.source=elsewhere")) == four(there)
    with pytest.raises(EsoError, match="^model.length = 'many': must be of type int"):
        override(Config(), f"data.source={letters}", "model.length=many")


def test_what_is_no_prepared_folder_is_not_checked(tmp_path: Path, run: Run) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        assert f"'{folder}': is no prepared folder: it has no manifest.json" in run("data", "check", folder, code=2)


def test_what_is_said_otherwise_is_checked(tmp_path: Path, run: Run) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox " * 50, "utf-8")
    (tmp_path / "b.txt").write_text("the quick brown fox " * 50, "utf-8")
    run("data", "prepare", "text", "--from", tmp_path / "a.txt", tmp_path / "b.txt", "--data-dir", tmp_path,
        "--tokenizer", "bytes", "--length", 8, "--held-out", 1)
    source = f"data.source={tmp_path / 'text'}"
    with pytest.raises(EsoError, match=f"data.source = '{tmp_path}': holds prepared folders; give one: "):
        windows_of(BASE.override(f"data.source={tmp_path}"), "train")
    config = override(BASE, source)
    assert tokenizer_of(config).name == "bytes" and windows_of(config, "train")[:].shape[1] == 8
    for said, message in (("model.length=16", "model.length = 16: .* was prepared with windows of 8 tokens"),
                          ("model.vocab_size=300", "model.vocab_size = 300: data.tokenizer = 'bytes' needs 258"),
                          ("data.tokenizer=characters", "model.vocab_size = 258: data.tokenizer = 'characters' needs")):
        with pytest.raises(EsoError, match=message):
            windows_of(override(BASE, source, said), "train")


# Is the data of a run what it began with?


def test_a_corpus_that_changed_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 100, "utf-8")
    config = BASE.override(f"data.source={text}")

    def identities() -> dict[str, dict[str, object]]:
        return {split: identity.identity(windows_of(config, split)) for split in ("train", "validation")}

    first = identities()
    identity.claim(tmp_path, "S", first)  # a run of an earlier version adopts what it sees first
    kept = (tmp_path / "data.json").read_bytes()
    assert first["train"]["windows"] == 1800 // 16
    stat = text.stat()
    for content in ("the quick brown fax " * 100, "the quick brown fox " * 92 + "the quick brown fax " * 8,
                    "the quick brown fox " * 120):
        text.write_text(content, "utf-8")
        os.utime(text, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # no time stamp tells
        with pytest.raises(EsoError, match=r"^data.source = 'S': is not what this run began with \(112 and 6 windows"):
            identity.claim(tmp_path, "S", identities())
        assert (tmp_path / "data.json").read_bytes() == kept
    text.write_text("the quick brown fox " * 100, "utf-8")
    identity.claim(tmp_path, "S", identities())
    for content in ("{", "null", "[1]", '{"train": {}}', "\udcff"):
        (tmp_path / "data.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(EsoError, match="data.json is not what was written .*; remove it if data.source is what"):
            identity.claim(tmp_path, "S", first)


@pytest.mark.parametrize("older", [False, True])
def test_a_document_replaced_is_found(tmp_path: Path, older: bool) -> None:
    """With an equal or an older time stamp, and the same size; by the documents, and by the prepared folder."""
    source = tmp_path / "in"
    source.mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (source / name).write_text(f"{name} the quick brown fox " * 20, "utf-8")
    make = functools.partial(prepare.prepare, "text", tmp_path / "data", ByteTokenizer(), 8, [str(source)], held_out=1,
                             processes=1)
    make()
    stat = (source / "a.txt").stat()
    later = tmp_path / "later.txt"
    later.write_text("a.txt the quick brown dog " * 20, "utf-8")
    time = stat.st_mtime_ns - 10**12 * older
    os.utime(later, ns=(time, time))
    later.replace(source / "a.txt")
    assert (source / "a.txt").stat().st_size == stat.st_size
    with pytest.raises(EsoError, match="has changed since"):
        make()
    shutil.rmtree(tmp_path / "data" / "documents")  # read again, but the folder holds the other windows
    with pytest.raises(EsoError, match=r"manifest.json content = .* this command would make"):
        make()
    (source / "a.txt").write_text("a.txt the quick brown fox " * 20, "utf-8")
    shutil.rmtree(tmp_path / "data" / "documents")
    make()
    (source / "a.txt").touch()  # no change but of the time
    make()


def test_the_documents_of_another_reading_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the fox", "body": "another fox"}\n' * 20, "utf-8")

    def make(**reading: Any) -> None:
        prepare.prepare("text", tmp_path / "data", ByteTokenizer(), 8, [str(tmp_path / "a.jsonl")], held_out=1,
                        processes=1, reading=Reading(**reading))

    make()
    make()
    for reading in ({"field": "body"}, {"include": ["*.jsonl"]}, {"skip_rows": True}):
        with pytest.raises(EsoError, match="was read with .* and this command says"):
            make(**reading)


def test_documents_and_folders_of_an_earlier_version_are_taken(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the fox"}\n' * 20, "utf-8")
    make = functools.partial(prepare.prepare, "text", tmp_path / "data", ByteTokenizer(), 8,
                             [str(tmp_path / "a.jsonl")], held_out=1, processes=1)
    folder = make()
    metadata = next((tmp_path / "data" / "documents").rglob("metadata.json"))
    before = json.loads(metadata.read_text("utf-8"))
    assert before.pop("asked") and before["state"]["content"]
    metadata.write_text(json.dumps(before | {"state": "1 files, 400 bytes, changed 1"}), "utf-8")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    del manifest["content"]
    (folder / "manifest.json").write_text(json.dumps(manifest), "utf-8")
    make()
    make(out=tmp_path / "other")
