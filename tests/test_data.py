"""Raw text, the training pipeline and the bigram baseline."""

from __future__ import annotations

import gzip
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from eso_jax.data import SPLITS, Bigram, documents, evenly_spaced
from eso_jax.data.corpora import split_of
from eso_jax.data.pipeline import batches
from eso_jax.errors import EsoError


def write(folder: Path, **files: bytes) -> str:
    """Makes files (`__` in a name is a slash, `_dot_` a dot) below `folder`, which is returned."""
    for name, content in files.items():
        path = folder / name.replace("_dot_", ".").replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(folder)


def everything(source: str) -> dict[str, bytes]:
    """The documents of all splits, which must not share any, each split in order."""
    splits = [documents(source, split) for split in SPLITS]
    assert all(names == sorted(names) for names in ([name for name, _ in found] for found in splits))
    found = [document for split in splits for document in split]
    assert len(dict(found)) == len(found)
    return dict(found)


def everything_of(source: str) -> dict[str, bytes]:
    """The documents of a source whose files are cut between splits, put together again."""
    whole: dict[str, bytes] = {}
    for split in SPLITS:
        try:
            for name, part in documents(source, split):
                whole[name] = whole.get(name, b"") + part
        except EsoError:
            pass
    return whole


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 files, 40 of them in a folder, and things that are no documents."""
    root = tmp_path_factory.mktemp("corpus") / "text"
    write(root, **{f"{i:03d}": b"document %d\0\xff" % i for i in range(80)})
    write(root, **{f"sub__{i:03d}": b"below %d" % i for i in range(40)})
    write(root, empty=b"", _dot_hidden=b"x", _dot_git__config=b"x", sub___dot_hidden=b"x")
    write(root.parent, elsewhere__a=b"behind a link")
    (root / "linked").symlink_to(root.parent / "elsewhere")
    (root / "linked" / "again").symlink_to(root / "linked")
    (root / "loop").symlink_to(root)
    (root / "zero").symlink_to(root / "sub")  # a folder that is read already
    os.mkfifo(root / "pipe")
    return root


EXPECTED = {f"{i:03d}": b"document %d\0\xff" % i for i in range(80)}
EXPECTED |= {f"sub/{i:03d}": b"below %d" % i for i in range(40)} | {"linked/a": b"behind a link"}


# Corpora


def test_splits_of_a_folder_are_disjoint_and_complete(folder: Path) -> None:
    assert everything(str(folder)) == EXPECTED


def test_splits_are_stable() -> None:
    names = [f"{i:03d}.py" for i in range(1000)]
    heldout = {name[:3]: split_of(name) for name in names[:60] if split_of(name) != "train"}
    assert heldout == {"003": "test", "006": "test", "007": "test", "013": "validation",
                       "016": "test", "036": "test", "049": "validation"}
    share = {split: sum(split_of(name) == split for name in names) / 1000 for split in SPLITS}
    assert share == pytest.approx(dict(train=0.9, validation=0.05, test=0.05), abs=0.02)


def test_adding_files_moves_none(folder: Path, tmp_path: Path) -> None:
    names = [f"{i:03d}" for i in range(80)]
    write(tmp_path, **{name: EXPECTED[name] for name in names})
    for split in SPLITS:
        assert documents(str(tmp_path), split) == [d for d in documents(str(folder), split) if d[0] in names]


def test_glob(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert everything(f"{folder}/**") == EXPECTED
    below = {name: content for name, content in EXPECTED.items() if name.startswith("sub/")}
    assert everything(f"{folder}/s*/*") == below
    monkeypatch.chdir(folder)
    assert everything("s*/[0-9]??") == below
    assert everything("0*") == {name: content for name, content in EXPECTED.items() if "/" not in name}


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert documents("~/text", "test") == documents(str(folder), "test")


@pytest.mark.parametrize("alone", ["file", "folder", "glob"])
def test_one_file_is_cut(tmp_path: Path, alone: str) -> None:
    content = bytes(range(210))
    write(tmp_path, **{"[x__a": content, "[x__b": b""})
    source = {"file": tmp_path / "[x" / "a", "folder": tmp_path / "[x", "glob": tmp_path / "*" / "a"}[alone]
    name = "[x/a" if alone == "glob" else "a"
    parts = [documents(str(source), split) for split in SPLITS]
    assert parts == [[(name, content[:189])], [(name, content[189:199])], [(name, content[199:])]]


def test_what_we_made_is_no_text(tmp_path: Path) -> None:
    """A work directory and prepared data may lie among the texts."""
    source = write(tmp_path / "text", a=b"text", b__c=b"text", d__config_json=b"{}", e__manifest_json=b"{}")
    before = documents(source, "all")
    (tmp_path / "text" / "w" / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "text" / "data" / "text").mkdir(parents=True)
    shards = tmp_path / "text" / "data" / "documents" / "corpora" / "text" / "1.0.0"
    shards.mkdir(parents=True)
    for name in ("w/config.json", "w/metrics.jsonl", "w/checkpoints/1/x", "data/text/manifest.json",
                 "data/text/train-00000.array_record", *(str(shards / name) for name in (
                     "dataset_info.json", "features.json", "corpora-train.array_record-00000-of-00001"))):
        (tmp_path / "text" / name).write_text('{"family": {}}' if name == "w/config.json" else "no text")
    assert documents(source, "all") == before and len(before) == 4
    (tmp_path / "text" / "data" / "documents" / "turn.lock").touch()
    (shards / "dataset_info.json").unlink()  # interrupted
    assert documents(source, "all") == before
    assert [name for name, _ in documents(f"{source}/**", "all")] == [name for name, _ in before]


def test_what_others_made_is_read(tmp_path: Path) -> None:
    """Though some of it has names that ours has, too."""
    source = write(tmp_path / "text", a__b=b"text", c__config_dot_json=b'{"model_type": "gpt2"}',
                   c__checkpoints__d=b"text", e__config_dot_json=b"text", e__checkpoints__d=b"text")
    (tmp_path / "text" / "a" / "notes.array_record.txt").write_text("text")
    assert [name for name, _ in documents(source, "all")] == [
        "a/b", "a/notes.array_record.txt", "c/checkpoints/d", "c/config.json", "e/checkpoints/d",
        "e/config.json"]


def test_all_of_a_file_is_the_file(tmp_path: Path) -> None:
    """Though its splits are parts of it: no separator stands between these, and their order is that of the text."""
    source = write(tmp_path / "text", b=b"zyx" * 100, a=b"x")
    assert documents(source, "all") == [("a", b"x"), ("b", b"zyx" * 100)]
    assert [name for name, _ in documents(source, "train")] == ["b"]


def test_stdlib() -> None:
    found = everything("stdlib")
    assert len(found) > 300 and sum(map(len, found.values())) > 5e6
    assert {"argparse.py", "json/decoder.py"} <= set(found)
    parts = {part for name in found for part in name.split("/")}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert all(name.endswith(".py") for name in found)
    assert found["argparse.py"] == Path(__import__("argparse").__file__).read_bytes()


def test_corpus_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def message(source: str, split: str = "train") -> str:
        with pytest.raises(EsoError) as error:
            documents(source, split)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert message("stdlib", "valid") == "split = 'valid': choose one of train, validation, test or all"
    gone = str(tmp_path / "gone")
    assert message(gone) == (f"data.source = {gone!r}: no such file or folder; "
                             "give 'stdlib', a folder, a file, a glob, or what eso-jax data prepare has made")
    empty = write(tmp_path / "empty", a=b"", _dot_hidden=b"text")
    for source in (empty, f"{empty}/*", f"{empty}/a", f"{gone}/*.txt"):
        assert message(source) == (f"data.source = {source!r}: holds no text (no files, or only empty or hidden ones); "
                                   "give 'stdlib', a folder, a file or a glob")
    few = write(tmp_path / "few", a=b"one", b=b"two", c=b"three")
    assert [split_of(name) for name in "abc"] == ["train"] * 3
    assert everything_of(few) == {"a": b"one", "b": b"two", "c": b"three"}  # too few for the hash: cut by bytes
    assert documents(few, "test") == [("a", b"e"), ("b", b"o"), ("c", b"e")]
    short = write(tmp_path / "short", a=b"x" * 10)
    assert message(short, "validation") == (f"data.source = {short!r}: holds too little text: its validation split is "
                                            "empty; give more")
    (tmp_path / "few" / "broken").symlink_to(gone)
    for source in (few, f"{few}/*"):
        assert message(source) == (f"data.source = {source!r}: cannot read {few + '/broken'!r} "
                                   "(No such file or directory); make it readable or remove it")
    (tmp_path / "few" / "broken").unlink()

    def refuse(path: object, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        assert f"cannot read {few + '/a'!r} (Permission denied)" in message(few)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)  # a folder that can't be listed isn't passed over
        assert f"cannot read {few!r} (Permission denied)" in message(few)


# The pipeline


def numbered(count: int) -> np.ndarray:
    """Windows [count, 2] whose first token is their number and whose second is 1000 more."""
    return (np.arange(count)[:, None] + [0, 1000]).astype(np.uint16)


def draw(iterator: object, steps: int) -> np.ndarray:
    return np.array([next(iterator) for _ in range(steps)])  # type: ignore[call-overload]


@pytest.mark.parametrize("batch_size", [1, 4, 21, 50])  # 4 and 50 don't divide an epoch; 50 is more than two
def test_every_epoch_holds_each_window_once_in_a_new_order(batch_size: int) -> None:
    drawn = draw(batches(numbered(21), batch_size, seed=3), 4 * 21 // batch_size + 1)
    assert drawn.dtype == np.int32 and drawn.shape[1:] == (batch_size, 2)
    rows = drawn.reshape(-1, 2)
    assert (rows[:, 1] == rows[:, 0] + 1000).all()
    epochs = rows[:3 * 21, 0].reshape(3, 21)
    assert (np.sort(epochs, axis=1) == np.arange(21)).all()
    orders = {tuple(epoch) for epoch in [*epochs.tolist(), range(21)]}
    assert len(orders) == 4  # each epoch's own, and none the order of the source


def test_seed_decides_the_order() -> None:
    first, again, other = (draw(batches(numbered(50), 10, seed), 5) for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


def test_shuffle_is_global() -> None:
    order = draw(batches(numbered(1000), 1000, 0), 1)[0, :, 0]
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
    assert np.mean(np.abs(order - np.arange(1000))) == pytest.approx(1000 / 3, rel=0.1)


@pytest.mark.parametrize("count", [1, 3, 100])
def test_small_corpora_repeat(count: int) -> None:
    drawn = draw(batches(numbered(count), 8, 0), 3)[..., 0].ravel()
    assert drawn.shape == (24,)
    assert len(set(drawn[:count])) == min(count, 24)


def share(batch_size: int, process: int, processes: int) -> np.ndarray:
    """The rows of one of several processes."""
    return np.split(np.arange(batch_size), processes)[process]


@pytest.mark.parametrize("rows", [[0, 1, 6, 7], [3], list(range(8))])
def test_any_rows_may_be_a_process_share(rows: list[int]) -> None:
    """On a torus, a host's devices need not be neighbours in the mesh."""
    whole = draw(batches(numbered(21), 8, 0), 5)
    assert (draw(batches(numbered(21), 8, 0, np.array(rows)), 5) == whole[:, rows]).all()


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_processes_share_out_the_global_batch(processes: int) -> None:
    whole = draw(batches(numbered(21), 8, 0), 9)
    parts = [draw(batches(numbered(21), 8, 0, share(8, p, processes)), 9) for p in range(processes)]
    assert (np.concatenate(parts, axis=1) == whole).all()


def test_a_process_reads_only_its_own_rows() -> None:
    class Counting:
        read: list[int] = []

        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: np.ndarray) -> np.ndarray:
            self.read.extend(index.tolist())
            return numbered(64)[index]

    iterator = batches(Counting(), 8, 0, share(8, 1, 4))
    own = draw(iterator, 8)[..., 0].ravel()
    iterator.close()
    assert Counting.read[:own.size] == own.tolist()


@pytest.mark.parametrize("step", [0, 1, 7, 20])
def test_resumes_with_the_exact_next_batch(step: int) -> None:
    whole = draw(batches(numbered(21), 8, 0), 25)
    iterator = batches(numbered(21), 8, 0)
    draw(iterator, step)
    state = iterator.get_state()
    assert state == {"next_index": step}  # read-ahead doesn't count
    draw(iterator, 3)
    iterator.set_state(state)
    assert (draw(iterator, 5) == whole[step:step + 5]).all()


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (4, 2)])
def test_resumes_on_another_process_count(before: int, after: int) -> None:
    whole = draw(batches(numbered(21), 8, 0), 9)
    first = batches(numbered(21), 8, 0, share(8, before - 1, before))
    draw(first, 4)
    parts = []
    for p in range(after):
        iterator = batches(numbered(21), 8, 0, share(8, p, after))
        iterator.set_state(first.get_state())
        parts.append(draw(iterator, 5))
    assert (np.concatenate(parts, axis=1) == whole[4:]).all()


def test_pipeline_errors() -> None:
    with pytest.raises(EsoError, match=r"^data.seed = -1: must be in \[0, 2\*\*32\)$"):
        batches(numbered(20), 10, -1)


@pytest.mark.parametrize(("limit", "expected"), [(4, [0, 2, 5, 7]), (1, [0]), (3, [0, 3, 6]),
                                                 (99, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])])
def test_evenly_spaced(limit: int, expected: list[int]) -> None:
    found = evenly_spaced(numbered(10), limit)
    assert len(found) == len(expected) and found[:][:, 0].tolist() == expected
    assert (found[:][:, 1] == found[:][:, 0] + 1000).all()
    assert found[np.array([0, 0])][:, 0].tolist() == expected[:1] * 2


# The bigram baseline


def test_bigram_by_hand() -> None:
    model = Bigram(np.array([[0, 1, 0], [1, 1, 0]], np.uint16), vocab_size=3, smoothing=0.5)
    # 0 is seen 3 times and 1 too; pairs: 01, 10, 11, 10, and none across windows.
    assert np.exp(model.log_first) == pytest.approx([3.5 / 7.5, 3.5 / 7.5, 0.5 / 7.5])
    assert np.exp(model.log_next) == pytest.approx(
        np.array([[0.5 / 2.5, 1.5 / 2.5, 0.5 / 2.5], [2.5 / 4.5, 1.5 / 4.5, 0.5 / 4.5], [1 / 3, 1 / 3, 1 / 3]]))
    expected = -math.log(3.5 / 7.5 * 1.5 / 4.5) - math.log(0.5 / 7.5 * 1 / 3)  # windows 11 and 20
    assert model.nats(np.array([[1, 1], [2, 0]], np.uint16)) == pytest.approx(expected)


def test_bigram_of_all_bytes_does_not_overflow() -> None:
    windows = np.array([[255, 257], [257, 256]], np.uint16)  # 257 * 258 + 256 is more than a uint16 holds
    model = Bigram(windows, vocab_size=258)
    assert model.log_next[255].argmax() == 257 and model.log_next[257].argmax() == 256
    assert np.exp(model.log_next).sum(axis=1) == pytest.approx(np.ones(258))
    assert np.exp(model.log_first[256]) == pytest.approx(1.1 / (4 + 25.8))


def test_package_needs_no_grain() -> None:
    subprocess.run([sys.executable, "-c", "import sys, eso_jax.data; assert 'grain' not in sys.modules"], check=True,
                   cwd=Path(__file__).parents[1])


def test_files_that_are_no_text_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are read all the same, byte by byte: a model of bytes may want them."""
    source = write(tmp_path, a_dot_txt=b"caf\xc3\xa9", b_dot_gz=gzip.compress(b"text"), c_dot_pyc=b"a\0b")
    for _ in range(2):
        documents(source, "train")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"data.source = {source!r}: 2 of 3 files are no text (b.gz, c.pyc) and are" in said
    documents(write(tmp_path / "good", a_dot_txt=b"caf\xc3\xa9"), "train")
    assert not capsys.readouterr().err
