"""Published corpora to prepared folders and back: builders, shards, resuming, checksums, and training on the result."""

from __future__ import annotations

import errno
import functools
import http.server
import io
import json
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource
from pyarrow import parquet

import eso_jax
from conftest import BASE
from eso_jax import console, files
from eso_jax.cli import main
from eso_jax.config import Config, DataConfig, ModelConfig
from eso_jax.data import (ByteTokenizer, Tokenizer, evenly_spaced, is_prepared, prepare, prepared_windows, tokenizer_of,
                          windows_of)
from eso_jax.data.catalog import CORPORA, Corpus
from eso_jax.data.pipeline import batches
from eso_jax.data.prepared import PreparedWindows, check
from eso_jax.data.rows import Reading
from eso_jax.data.tokenizers import train_tokenizer
from eso_jax.errors import EsoError, RunAgain
from eso_jax.run import train as training
from vocabularies import BERT_WORDS, bert_like, gpt2_like

BYTES = ByteTokenizer()
Made = Callable[..., Path]

LM1B = "1-billion-word-language-modeling-benchmark-r13output"
SENTENCES = {
    "training-monolingual.tokenized.shuffled/news.en-00001-of-00100": ["the cat sat .", "cats , cats"],
    "training-monolingual.tokenized.shuffled/news.en-00002-of-00100": ["The cat 's cat", "", "sat"],
    "heldout-monolingual.tokenized.shuffled/news.en-00000-of-00100": ["not in the published splits"],
    "heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050": ["the cat , the cat"],
    "heldout-monolingual.tokenized.shuffled/news.en.heldout-00001-of-00050": ["the cat .", "sat sat"],
}


def archive(path: Path, files: dict[str, str], mode: str = "w:gz") -> Path:
    """A tar archive of text files, in the order given."""
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return path


def lm1b_archive(folder: Path) -> Path:
    """In the layout of the published one, its files out of order."""
    files = {f"{LM1B}/{name}": "\n".join(lines) + "\n" for name, lines in reversed(SENTENCES.items())}
    return archive(folder / f"{LM1B}.tar.gz", {**files, f"{LM1B}/README": "about"})


def text_file(path: Path, documents: int, seed: int = 0) -> Path:
    """JSON lines of texts of a few letters, none blank."""
    rng = np.random.default_rng(seed)
    texts = ["x" + "".join(rng.choice(list("abc "), size)) for size in rng.integers(1, 60, documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents_of(folder: Path, name: str) -> dict[str, list[str]]:
    """The documents of a TFDS data set, by split, read as any user of TFDS would."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(folder / "documents" / "corpora" / name / "1.0.0")
    return {split: [example["text"].decode() for example in builder.as_data_source(split)]
            for split in builder.info.splits}


def config_of(source: Path, tokenizer: Tokenizer, length: int, name: str | None = None) -> Config:
    model = ModelConfig(length=length, vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id)
    return Config(model=model, data=DataConfig(source=str(source), tokenizer=name or tokenizer.name))


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of 300 documents that is prepared in many chunks and shards."""
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 300)
    monkeypatch.setattr(prepare, "SHARD_CHUNKS", 3)
    return text_file(tmp_path / "text.jsonl", 300)


def made(source: Path, data_dir: Path, length: int = 16, **options: Any) -> Path:
    return prepare.prepare("text", data_dir, options.pop("tokenizer", BYTES), length, [str(source)],
                           **{"held_out": 40, "processes": 1, **options})


# Builders


@pytest.mark.parametrize("source", ["archive", "folder", "files"])
def test_lm1b_in_the_layout_of_its_archive(tmp_path: Path, source: str) -> None:
    tar = lm1b_archive(tmp_path)
    files = [str(tar)]
    if source != "archive":
        with tarfile.open(tar) as opened:
            opened.extractall(tmp_path / "extracted", filter="data")
        folders = sorted((tmp_path / "extracted" / LM1B).iterdir())
        files = [str(tmp_path / "extracted")] if source == "folder" else list(map(str, folders))
    tokenizer = bert_like()
    folder = prepare.prepare("lm1b", tmp_path / "data", tokenizer, 6, files)
    assert documents_of(tmp_path / "data", "lm1b") == {
        "train": ["the cat sat .", "cats , cats", "The cat 's cat", "sat"],
        "test": ["the cat , the cat", "the cat .", "sat sat"]}
    cls, the, cat, sat, s, dot, comma, quote = 2, 5, 6, 7, 8, 10, 11, 12
    config = config_of(folder, tokenizer, 6)
    assert windows_of(config, "train")[:].tolist() == [
        [cls, the, cat, sat, dot, cls], [cls, cls, cat, s, comma, cls], [cls, cat, s, cls, the, cls],
        [cls, cat, quote, BERT_WORDS.index("[UNK]"), cat, cls]]  # "cat's cat", then [CLS] sat [CLS] left over
    manifest = check(folder)
    assert manifest["splits"]["train"] | {"shards": []} == {
        "documents": 4, "tokens": 19, "windows": 4, "remainder": 3, "shards": []}
    # One held-out split, whatever it is called.
    assert (windows_of(config, "validation")[:] == windows_of(config, "test")[:]).all()
    assert len(windows_of(config, "all")) == len(windows_of(config, "train")) + len(windows_of(config, "test"))


def test_openwebtext_archive_of_archives(tmp_path: Path) -> None:
    inner = {}
    subsets = {2: {"b.txt": "the cat\n\n\n\n\nsat\n", "a.txt": "the\n"}, 1: {"c.txt": "cat", "d.txt": " "}}
    for number, texts in subsets.items():
        path = archive(tmp_path / f"urlsf_subset0{number}-1_data.xz", texts, "w:xz")
        inner[path] = f"openwebtext/{path.name}"
    with tarfile.open(tmp_path / "openwebtext.tar.xz", "w:xz") as tar:
        for path, name in inner.items():
            tar.add(path, name)
    tokenizer = gpt2_like()
    folder = prepare.prepare("openwebtext", tmp_path / "data", tokenizer, 3, [str(tmp_path / "openwebtext.tar.xz")],
                             held_out=1)
    # Sorted by name as the hub's copy is; three and more line feeds are two; the last documents are held out.
    assert documents_of(tmp_path / "data", "openwebtext") == {"train": ["cat", "the", "the cat\n\nsat"]}
    the, end = 257, 260
    config = config_of(folder, tokenizer, 3)
    train = windows_of(config, "train")[:].ravel().tolist()
    assert train == [*tokenizer.encode("cat"), end, the, end]
    assert windows_of(config, "validation")[0].tolist() == tokenizer.encode("the cat").tolist()
    assert check(folder)["split_rule"] == "the last 1 documents are for validation"


def write_parquet(path: Path, **columns: list[Any]) -> None:
    parquet.write_table(pyarrow.table(columns), path)


def zipped(path: Path, **files: str) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, text in files.items():
            file.writestr(name.replace("__", "/").replace("_dot_", "."), text)


def layouts(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Files of the other corpora as they are published; the documents that each must give."""
    folder.mkdir()
    zipped(folder / "text8.zip", text8="abcdefghi " * 10)
    zipped(folder / "wikitext-2-raw-v1.zip", **{
        f"wikitext-2-raw__wiki_dot_{split}_dot_raw": f" \n = {split} = \n \n Text , text . \n"
        for split in ("train", "valid", "test")})
    for split in ("train", "valid", "test"):
        (folder / f"ptb.{split}.txt").write_text(f" {split} N <unk> \n two \n")
    (folder / "lambada_test.jsonl").write_text('{"text": "a b"}\n{"text": "c"}\n')
    for split in ("train", "test"):
        (folder / f"{split}.csv").write_text(f'"3","Title {split}","Some ""quoted"" text, more"\n"1","B","C"\n')
    zipped(folder / "arxiv-dataset.zip", **{
        f"arxiv-dataset__{split}_dot_txt": json.dumps({"article_id": 1, "article_text": [f"in {split}", "b ."]}) + "\n"
        for split in ("train", "val", "test")})
    names = ("train", "validation", "test")
    for name in names:
        write_parquet(folder / f"{name}-00000-of-00001.parquet", document=[f"in {name}", "b", " "],
                      summary=["in short", "", "c"], id=["1", "2", "3"])
    wiki = {name: [f" = {split} = \n", " Text , text . \n"] for name, split in zip(names, ("train", "valid", "test"))}
    return {
        "text8.zip text8": {"train": ["abcdefghi " * 9], "validation": ["abcde"], "test": ["fghi "]},
        "wikitext-2-raw-v1.zip wikitext2": wiki,
        "ptb.train.txt,ptb.valid.txt,ptb.test.txt ptb": {
            name: [f"{split} N <unk>", "two"] for name, split in zip(names, ("train", "valid", "test"))},
        "lambada_test.jsonl lambada": {"test": ["a b", "c"]},
        "train.csv,test.csv ag_news": {
            name: [f'Title {name} Some "quoted" text, more', "B C"] for name in ("train", "test")},
        "arxiv-dataset.zip arxiv": {
            name: [f"in {split}\nb ."] for name, split in zip(names, ("train", "val", "test"))},
        ",".join(f"{name}-00000-of-00001.parquet" for name in names) + " xsum": {
            name: [f"in {name}", "in short"] for name in names},
    }


def test_the_other_layouts(tmp_path: Path) -> None:
    from eso_jax.data import builder

    for sources, expected in layouts(tmp_path / "published").items():
        files, name = sources.split(" ")
        builder.documents(name, tmp_path / "documents", [str(tmp_path / "published" / f) for f in files.split(",")])
        assert documents_of(tmp_path, name) == expected


def test_a_field_is_refused_where_a_corpus_has_fields_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(EsoError, match="--field = 'summary': of xsum, document and summary are read; leave it out"):
        prepare.prepare("xsum", tmp_path, ByteTokenizer(), 8, reading=Reading("summary"))


def test_folders_of_text_json_lines_and_parquet(tmp_path: Path) -> None:
    from eso_jax.data import builder

    source = tmp_path / "mine"
    (source / "sub").mkdir(parents=True)
    (source / "a.txt").write_text("one\ntwo\n")
    (source / "b.jsonl").write_text('{"id": 1, "text": "three"}\n\n{"id": 2, "text": "four"}\n')
    write_parquet(source / "c.parquet", id=[1, 2, 3], text=["five", "", "six"])
    (source / "sub" / "d.md").write_text("seven")
    (source / ".hidden").write_text("x")
    builder.documents("text", tmp_path / "documents", [str(source)])
    assert documents_of(tmp_path, "text") == {"train": ["one\ntwo", "three", "four", "five", "six", "seven"]}


def test_parquet_of_the_hub(tmp_path: Path) -> None:
    """The hub serves published splits as Parquet files, named for them."""
    from eso_jax.data import builder

    for split in ("train", "test", "validation"):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", sentence=[f"in {split}"])
    builder.documents("ptb", tmp_path / "documents", [str(p) for p in tmp_path.glob("*.parquet")])
    assert documents_of(tmp_path, "ptb") == {split: [f"in {split}"] for split in ("train", "validation", "test")}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and its address."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()


def test_downloads(tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from eso_jax.data import builder

    folder, address = server
    lm1b_archive(folder)
    url = f"{address}/{LM1B}.tar.gz"
    published = CORPORA["lm1b"]
    monkeypatch.setitem(CORPORA, "lm1b", Corpus((url,), published.unit, published.splits))
    builder.documents("lm1b", tmp_path / "documents", [])
    assert documents_of(tmp_path, "lm1b")["test"] == ["the cat , the cat", "the cat .", "sat sat"]
    monkeypatch.setitem(CORPORA, "lambada", Corpus((f"{address}/gone.jsonl",), "json", CORPORA["lambada"].splits))
    with pytest.raises(EsoError, match=r"^lambada: http://127.*/gone.jsonl could not be downloaded \(.*404.*\); get "
                                       "the files in another way and name them with --from$"):
        builder.documents("lambada", tmp_path / "documents", [])


def test_no_tensorflow(tmp_path: Path) -> None:
    """Building, preparing and reading import no TensorFlow, even where there is one."""
    (tmp_path / "tensorflow.py").write_text("open('imported', 'w').close()\nraise AssertionError")
    lm1b_archive(tmp_path)
    (tmp_path / "tokenizer.json").write_text(str(bert_like().json))
    code = f"""
import sys
from eso_jax.cli import main
if __name__ == "__main__":
    assert main(["data", "prepare", "lm1b", "--data-dir", "data", "--from", "{LM1B}.tar.gz", "--length", "6",
                 "--tokenizer", "bert-base-uncased=tokenizer.json", "--processes", "2"]) == 0
    from eso_jax import Config, DataConfig, ModelConfig
    from eso_jax.data import windows_of
    from eso_jax.data.pipeline import batches
    model = ModelConfig(length=6, vocab_size={len(BERT_WORDS)}, mask_id=4)
    windows = windows_of(Config(model=model, data=DataConfig("data/lm1b", "bert-base-uncased")), "train")
    assert next(batches(windows, 2, 0)).shape == (2, 6)
    assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
"""
    (tmp_path / "run.py").write_text(code)
    subprocess.run([sys.executable, "-W", "error", "run.py"], check=True, cwd=tmp_path, timeout=120)
    assert not (tmp_path / "imported").exists()


# Shards


def test_every_document_is_there_once(tmp_path: Path, many: Path) -> None:
    folder = made(many, tmp_path / "data")
    texts = [json.loads(line)["text"].strip() for line in many.read_text().splitlines()]
    manifest = check(folder)
    for split, chosen in (("train", texts[:-40]), ("validation", texts[-40:])):
        stream = BYTES.join(chosen, separate=True)
        part = manifest["splits"][split]
        windows = windows_of(config_of(folder, BYTES, 16), split)
        assert windows[:].ravel().tolist() == stream[:len(windows) * 16].tolist()
        assert (part["documents"], part["tokens"]) == (len(chosen), stream.size)
        assert stream.size == len(windows) * 16 + part["remainder"] and part["remainder"] < 16
        assert part["windows"] == len(windows)
    assert len(manifest["splits"]["train"]["shards"]) > 5


def test_a_source_that_has_changed_is_not_taken_for_what_was_read(tmp_path: Path) -> None:
    """By the same path; one that is gone is not missed, since its documents are kept."""
    (tmp_path / "texts").mkdir()
    source = tmp_path / "texts" / "a.txt"
    for path in (source, source.with_name("b.txt")):
        path.write_text("one two three " * 50)

    def prepared(out: str) -> Path:
        return prepare.prepare("text", tmp_path / "data", BYTES, 8, [str(source.parent)], held_out=1,
                               out=tmp_path / out)

    prepared("first")
    prepared("second")
    source.write_text("four five six " * 51)
    with pytest.raises(EsoError, match="has changed since"):
        prepared("third")
    source.parent.rename(tmp_path / "elsewhere")
    prepared("third")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shard", [0, 1, 4])
def test_interrupted_it_goes_on(tmp_path: Path, many: Path, monkeypatch: pytest.MonkeyPatch, shard: int) -> None:
    whole = contents(made(many, tmp_path / "data"))
    write, written = prepare._write_records, []

    def stop(path: Path, windows: np.ndarray) -> dict[str, Any]:
        if len(written) == shard:
            path.with_name(f".{path.name}.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path.name)
        return write(path, windows)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_write_records", stop)
        with pytest.raises(KeyboardInterrupt):
            made(many, tmp_path / "data", out=tmp_path / "again")
    if shard:
        with pytest.raises(EsoError, match="its preparation was interrupted; repeat the same eso-jax data prepare"):
            is_prepared(str(tmp_path / "again"))

    def log(path: Path, windows: np.ndarray) -> dict[str, Any]:
        written.append(path.name)
        return write(path, windows)

    monkeypatch.setattr(prepare, "_write_records", log)
    assert contents(made(many, tmp_path / "data", out=tmp_path / "again")) == whole
    assert len(set(written)) == len(written)  # no shard twice
    assert contents(made(many, tmp_path / "data", out=tmp_path / "again")) == whole
    assert len(written) == len(whole) - 1  # the complete folder was left as it is


def test_a_corrupt_shard_is_named_and_made_again(tmp_path: Path, many: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(many, tmp_path / "data")
    whole = contents(folder)
    path = folder / "train-00002.array_record"
    capsys.readouterr()
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert main(["data", "check", str(folder)]) == 2
    printed = capsys.readouterr().err
    assert len(printed.splitlines()) == 1 and f"data.source = '{path}': this shard is missing or corrupt" in printed
    with pytest.raises(EsoError, match="train-00002.array_record': this shard is missing or corrupt"):
        made(many, tmp_path / "data")
    path.unlink()
    made(many, tmp_path / "data")
    assert contents(folder) == whole
    assert main(["data", "check", str(folder)]) == 0
    assert "all checksums are right" in capsys.readouterr().err


def test_a_damaged_shard_is_not_read(tmp_path: Path, many: Path) -> None:
    folder = made(many, tmp_path / "data")
    config = config_of(folder, BYTES, 16)
    path = folder / "train-00001.array_record"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(EsoError, match="train-00001.array_record': this shard must have"):
        windows_of(config, "train")
    path.unlink()
    with pytest.raises(EsoError, match="train-00001.array_record': this shard is missing"):
        windows_of(config, "train")
    first = json.loads((folder / "manifest.json").read_text())["splits"]["train"]["shards"][0]["windows"]
    record = good.find(b"x")
    path.write_bytes(good[:record] + b"y" + good[record + 1:])
    windows = windows_of(config, "train")
    with pytest.raises(EsoError, match=f"a shard cannot be read .* eso-jax data check {folder} says which"):
        windows[first:first + 3]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale", "b/c.txt"),
                                   RuntimeError("pread() failed: Connection timed out at byte 16")])
@pytest.mark.parametrize("what", ["raw text", "a manifest", "a shard"])
def test_data_that_storage_does_not_give_is_asked_for_again(
        tmp_path: Path, many: Path, error: Exception, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times; then a run ends with 75, and the launch scripts repeat it."""
    monkeypatch.setattr(files, "PAUSE", 0.0)
    source = many if what == "raw text" else made(many, tmp_path / "data")
    config = config_of(source, BYTES, 16)
    windows = windows_of(config, "train")
    place, name = {"raw text": (Path, "read_bytes"), "a manifest": (Path, "read_text"),
                   "a shard": (ArrayRecordDataSource, "__getitems__")}[what]
    real, failures = getattr(place, name), [2]

    def fail(*arguments: Any) -> Any:
        failures[0] -= 1
        if failures[0] >= 0:
            raise error
        return real(*arguments)

    def read() -> Any:
        return next(batches(windows, 4, 0)) if what == "a shard" else windows_of(config, "train")[:4]

    expected = read()
    monkeypatch.setattr(place, name, fail)
    np.testing.assert_array_equal(read(), expected)
    assert failures[0] < 0
    failures[0] = 1000
    with pytest.raises(RunAgain, match="data.source = .* be read .*; tried 3 times; mend the storage and repeat"):
        read()
    tries = 1000 - failures[0]
    assert tries >= 3 if what == "a shard" else tries == 3  # grain reads ahead, in other threads


@pytest.mark.slow
def test_processes_do_not_change_the_result(tmp_path: Path, many: Path) -> None:
    one, two = (made(many, tmp_path / "data", out=tmp_path / str(n), processes=n, tokenizer=gpt2_like())
                for n in (1, 2))
    assert contents(one) == contents(two)


def test_windows_are_read_by_number_slice_and_integers(tmp_path: Path, many: Path) -> None:
    windows = windows_of(config_of(made(many, tmp_path / "data"), BYTES, 16), "train")
    assert isinstance(windows, PreparedWindows) and windows.dtype == np.uint16
    every = windows[:]
    assert windows.shape == every.shape == (len(windows), 16)
    assert (windows[5] == every[5]).all() and windows[5].shape == (16,)
    assert (windows[-1] == every[-1]).all() and (windows[np.int64(7)] == every[7]).all()
    assert (windows[2:90:7] == every[2:90:7]).all()
    assert (windows[np.array([40, 3, 3])] == every[[40, 3, 3]]).all()
    assert windows[np.arange(0)].shape == (0, 16)
    for wrong in (len(windows), -len(windows) - 1):
        with pytest.raises(IndexError):
            windows[wrong]
    drawn = evenly_spaced(windows, 8)[:]
    assert (drawn == every[np.arange(8) * len(every) // 8]).all()


def test_two_processes_read_disjoint_rows_and_resume_exactly(tmp_path: Path, many: Path) -> None:
    windows = windows_of(config_of(made(many, tmp_path / "data"), BYTES, 16), "train")
    steps = 2 * len(windows) // 8 + 1
    iterators = [batches(windows, 8, 0, np.arange(4 * p, 4 * p + 4)) for p in (0, 1)]
    parts = [[next(iterator) for _ in range(steps)] for iterator in iterators]
    rows = np.concatenate([np.concatenate(pair) for pair in zip(*parts)])
    for epoch in (0, 1):
        found = rows[epoch * len(windows):(epoch + 1) * len(windows)]
        assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, windows[:].tolist()))
    for p in (0, 1):
        iterator = batches(windows, 8, 0, np.arange(4 * p, 4 * p + 4))
        for _ in range(5):
            next(iterator)
        resumed = batches(windows, 8, 0, np.arange(4 * p, 4 * p + 4))
        resumed.set_state(iterator.get_state())
        assert (np.array([next(resumed) for _ in range(6)]) == parts[p][5:11]).all()


# Configs and commands


def test_paper_scale_configs_need_no_file() -> None:
    config = Config(model=ModelConfig.of_size("small", length=128, vocab_size=30522, mask_id=103),
                    data=DataConfig(source="data/lm1b", tokenizer="bert-base-uncased"))
    with pytest.raises(EsoError) as error:
        windows_of(config, "train")
    assert str(error.value) == (
        "data.source = 'data/lm1b': does not exist; eso-jax data prepare lm1b --data-dir data --tokenizer "
        "bert-base-uncased --length 128 makes it")


@pytest.mark.parametrize("changes, message", [
    (["model.length=8"], r"model.length = 8: .* was prepared with windows of 16 tokens"),
    (["model.vocab_size=300"], "model.vocab_size = 300: data.tokenizer = 'bytes' needs 258, with mask 257"),
    (["model.mask_id=0"], "model.mask_id = 0: data.tokenizer = 'bytes' needs 257"),
    (["data.tokenizer=characters", "model.vocab_size=29", "model.mask_id=28"],
     "data.tokenizer = 'characters': .* was prepared with another, 'bytes'"),
])
def test_configs_that_do_not_fit(tmp_path: Path, many: Path, changes: list[str], message: str) -> None:
    config = config_of(made(many, tmp_path / "data"), BYTES, 16).override(*changes)
    with pytest.raises(EsoError, match=message):
        windows_of(config, "train")
    with pytest.raises(EsoError, match="split = 'extra': .* has train, validation"):
        windows_of(config_of(tmp_path / "data" / "text", BYTES, 16), "extra")


@pytest.mark.slow
def test_a_prepared_folder_is_self_contained(tmp_path: Path) -> None:
    """Train on it, evaluate on another, with all that they were made from gone."""
    source, held_out = text_file(tmp_path / "text.jsonl", 200), tmp_path / "ptb.valid.txt"
    held_out.write_text("the cat 's cat\n" * 40)
    original = tmp_path / "tokenizer.json"
    original.write_text(str(gpt2_like().json))
    length = BASE.model.length
    command = ["--data-dir", str(tmp_path / "data"), "--tokenizer", f"gpt2={original}", "--length", str(length)]
    assert main(["data", "prepare", "text", "--from", str(source), "--held-out", "20", *command]) == 0
    assert main(["data", "prepare", "ptb", "--from", str(held_out), *command]) == 0
    for path in (source, held_out, original):
        path.unlink()
    config = BASE.override(f"data.source={tmp_path / 'data' / 'text'}", "data.tokenizer=gpt2", "model.vocab_size=262",
                           "train.steps=2")
    assert tokenizer_of(config).json == gpt2_like().json
    training.train(config, tmp_path / "w")
    assert eso_jax.load(tmp_path / "w").tokenizer is not None
    out = tmp_path / "e.json"
    assert main(["eval", "--workdir", str(tmp_path / "w"), "--source", str(tmp_path / "data" / "ptb"),
                 "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    stream = gpt2_like().join(["the cat's cat"] * 40, separate=False)
    assert found["split"] == "validation" and found["windows"] == len(stream) // (length - 2)
    whole = found["windows"] * length
    text = gpt2_like().num_bytes(stream[:found["windows"] * (length - 2)])
    assert found["bits_per_byte"] == pytest.approx(found["nats_per_token"] * whole / np.log(2) / text)


@pytest.mark.slow
def test_eval_refuses_another_tokenizer(tmp_path: Path, many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made(many, tmp_path / "data", length=BASE.model.length, tokenizer=gpt2_like())
    (tmp_path / "text.py").write_text("x = 1\n" * 300)
    training.train(BASE.override(f"data.source={tmp_path / 'text.py'}", "train.steps=1"), tmp_path / "w")
    capsys.readouterr()
    assert main(["eval", "--workdir", str(tmp_path / "w"), "--source", str(folder), "--out", str(tmp_path / "e")]) == 2
    assert f"data.tokenizer = 'bytes': {folder} was prepared with another, 'gpt2'" in capsys.readouterr().err


def test_prepare_errors(tmp_path: Path, many: Path) -> None:
    def message(name: str = "text", files: object = many, length: int = 16, **options: Any) -> str:
        with pytest.raises(EsoError) as error:
            prepare.prepare(name, tmp_path / "data", BYTES, length, [str(files)],
                            **{"held_out": 40 if name == "text" else None, "processes": 1, **options})
        assert "\n" not in str(error.value)
        return str(error.value)

    gone = tmp_path / "gone"
    assert message("owt") == f"NAME = 'owt': choose one of {', '.join(CORPORA)}"
    assert message(files=gone) == f"--from = '{gone}': no such file or folder"
    assert message(held_out=300) == "--held-out = 300: leaves none of 300 documents to train on; give a smaller number"
    assert message("ptb", held_out=3) == "--held-out = 3: ptb has splits of its own"
    assert message(length=2, wrapping="zero-shot") == "--length = 2: leaves no room for text"
    assert "holds no documents of ptb; its files are called *train*, *valid*, *test*" in message("ptb")
    (tmp_path / "few.txt").write_text("a b")
    assert "documents was made from" in message(files=tmp_path / "few.txt").replace("/corpora/text/1.0.0", "")
    short = message(out=tmp_path / "short", length=5000)
    assert short.startswith("--from: text: holds ") and "tokens in its validation split, fewer than one window" in short
    assert short.endswith("of --length = 5000; give more text, or a smaller --length")
    made(many, tmp_path / "data")
    assert "length = 16: this command would make 8; give another --out, or delete the folder" in message(length=8)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    assert message(out=tmp_path / "other") == f"--out = '{tmp_path / 'other'}': exists and is no prepared folder; " \
                                              "give another"
    (tmp_path / "data" / "text" / "manifest.json").write_text("{}")
    with pytest.raises(EsoError, match="manifest.json is not one of eso-jax data prepare"):
        prepared_windows(config_of(tmp_path / "data" / "text", BYTES, 16), str(tmp_path / "data" / "text"), "train",
                         BYTES)


def test_a_try_that_came_to_nothing_keeps_none_from_the_next(tmp_path: Path, many: Path) -> None:
    """No window was there to lose."""
    for tokenizer in (train_tokenizer(["ab " * 99], 300, "bpe"), BYTES):
        with pytest.raises(EsoError, match="fewer than one window of --length = 1000000;"):
            prepare.prepare("text", tmp_path, tokenizer, 10**6, [str(many)], held_out=40, processes=1)
    folder = made(many, tmp_path)
    check(folder)
    assert not (folder / "tokenizer.json").exists()
    with pytest.raises(EsoError, match="length = 16: this command would make 8; give another --out"):
        prepare.prepare("text", tmp_path, BYTES, 8, [str(many)], held_out=40, processes=1)


def test_a_tokenizer_of_the_user_is_kept(tmp_path: Path, many: Path) -> None:
    """The folder may hold the tokenizer that is asked for, and no other."""
    path, tokenizer = tmp_path / "out" / "tokenizer.json", train_tokenizer(["ab " * 99], 300, "bpe")
    path.parent.mkdir()
    assert tokenizer.json is not None
    path.write_text(tokenizer.json)
    for other in (BYTES, train_tokenizer(["ab cd " * 99], 300, "bpe")):
        with pytest.raises(EsoError, match="^--out = .*: exists and is no prepared folder; give another"):
            made(many, tmp_path, tokenizer=other, out=path.parent)
        assert path.read_text() == tokenizer.json
    check(made(many, tmp_path, tokenizer=tokenizer, out=path.parent))


def test_two_at_once_take_turns(tmp_path: Path, many: Path) -> None:
    """Another length, into the same data directory. What a killed one has left there is removed."""
    (tmp_path / "data" / "documents" / "corpora" / "text" / "incomplete.ABC_1.0.0").mkdir(parents=True)
    command = [sys.executable, "-m", "eso_jax", "data", "prepare", "text", "--from", many, "--data-dir",
               tmp_path / "data", "--tokenizer", "bytes", "--held-out", "40", "--processes", "1"]
    processes = [subprocess.Popen([*map(str, command), "--length", length, "--out", str(tmp_path / length)], text=True,
                                  stderr=subprocess.PIPE) for length in ("8", "16")]
    for process, length in zip(processes, ("8", "16"), strict=True):
        said = process.communicate()[1]
        assert process.returncode == 0, said
        assert check(tmp_path / length)["length"] == int(length)
    assert [path.name for path in (tmp_path / "data" / "documents" / "corpora" / "text").iterdir()] == ["1.0.0"]


def test_a_preparation_waits_until_the_folder_is_free(tmp_path: Path, many: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """It has not begun to read before."""
    begun, waits, say = threading.Event(), threading.Event(), console.say
    _prepare = prepare._prepare

    def begin(*arguments: Any) -> Path:
        begun.set()
        return _prepare(*arguments)

    def said(message: str) -> None:
        say(message)
        if "waiting for it" in message:
            waits.set()

    monkeypatch.setattr(prepare, "_prepare", begin)
    monkeypatch.setattr(console, "say", said)
    with files.one_at_a_time(tmp_path / "data" / "documents", "--data-dir"):
        thread = threading.Thread(target=made, args=(many, tmp_path / "data"))
        thread.start()
        assert waits.wait(60) and not begun.is_set()
    thread.join()
    assert begun.is_set() and check(tmp_path / "data" / "text")


def test_the_second_waits_for_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def second() -> None:
        with files.one_at_a_time(tmp_path, "--data-dir"):
            order.append("second")

    with files.one_at_a_time(tmp_path, "--data-dir"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.5)
        order.append("first")
    thread.join()
    assert order == ["first", "second"] and f"at work in {tmp_path}; waiting for it" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_documents_that_can_only_be_read(number: int, tmp_path: Path, many: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """They do for another length, in a folder elsewhere."""
    made(many, tmp_path / "data")
    lock, opened = tmp_path / "data" / "documents" / "turn.lock", Path.open

    def refusing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == lock:
            raise OSError(number, "refused", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)
    assert check(made(many, tmp_path / "data", 8, out=tmp_path / "out"))["length"] == 8


def test_a_single_document_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("a b c " * 100)
    with pytest.raises(EsoError, match="leaves none of 1 documents to train on; a file of text is one: give several"):
        prepare.prepare("text", tmp_path, BYTES, 8, [str(tmp_path / "book.txt")], held_out=1)


@pytest.mark.parametrize("name, content, reason", [
    ("x.tar.gz", b"\x1f\x8bnot a tar", "cannot be read"), ("x.jsonl", b'{"text": \n', "line 1 is no JSON"),
    ("y.jsonl", b'{"id": 1}\n', "line 1 has no field text, sentence,"), ("x.parquet", b"PAR1", "cannot be read"),
    ("x.txt", b"\xff\xfe\xff", "is UTF-16"), ("y.txt", b"abc\xff", "is not UTF-8 at byte 3")])
def test_files_that_are_not_what_they_seem(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EsoError) as error:
        made(tmp_path / name, tmp_path / "data")
    assert "\n" not in str(error.value) and name in str(error.value) and reason in str(error.value)


def test_an_archive_cut_short_is_named(tmp_path: Path) -> None:
    path = lm1b_archive(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(EsoError, match=rf"{LM1B}.tar.gz': cannot be unpacked \(.*\); it may be damaged, cut"):
        prepare.prepare("lm1b", tmp_path / "data", BYTES, 8, [str(path)])
    assert not list((tmp_path / "data" / "documents").rglob("*.partial"))


@pytest.mark.parametrize("action", ["prepare", "check", "train-tokenizer"])
def test_help(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["data", action, "--help"])
    assert not stop.value.code and f"example: eso-jax data {action}" in capsys.readouterr().out


@pytest.mark.parametrize("options, message", [
    (["--length", "0"], "--length = 0: must be at least 1"),
    (["--length", "8", "--processes", "0"], "--processes = 0: must be at least 1"),
    (["--length", "8", "--tokenizer", "nothing"], "--tokenizer = 'nothing': choose bytes, characters"),
])
def test_options_are_checked(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "prepare", "ptb", "--tokenizer", "bytes", *options]) == 2
    assert message in capsys.readouterr().err
