"""Documents to a prepared folder: tokenized once, in parallel, shard by shard, so that an interrupted run goes on."""

from __future__ import annotations

import concurrent.futures.process
import contextlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from eso_jax import console
from eso_jax.data import prepared, tokenizers
from eso_jax.data.catalog import CORPORA
from eso_jax.data.detokenizers import DETOKENIZERS
from eso_jax.data.packing import WRAPPINGS, Wrapping, cut, require_window
from eso_jax.data.rows import Wish
from eso_jax.data.tokenizers import LibraryTokenizer, Tokenizer, get_tokenizer
from eso_jax.errors import EsoError, require
from eso_jax.files import as_json, write_whole, writing

Streams = Callable[[list[range]], Iterator[np.ndarray]]

CHUNK_BYTES = 2**21  # of text that a process tokenizes at a time
SHARD_CHUNKS = 64  # about 128 MB of text, which is what an interruption loses at most


class Job(NamedTuple):
    """How the documents of a split become windows: all that a process needs to know.

    Attributes:
      documents: folder of a TFDS data set of examples {"text": bytes}.
      split: of that data set.
      tokenizer: its name, and the contents of its tokenizer.json if it has one.
    """

    documents: str
    split: str
    tokenizer: tuple[str, str | None]
    detokenizer: str | None
    wrapping: Wrapping
    length: int


def prepare(name: str, data_dir: Path, tokenizer: Tokenizer, length: int, files: Iterable[str] = (),
            wrapping: str | None = None, held_out: int | None = None, out: Path | None = None,
            processes: int | None = None, wish: Wish | None = None) -> Path:
    """Makes a prepared folder of a corpus, or goes on making it; returns it.

    The documents are kept in data_dir/documents, as published: another tokenizer or length does not read the source
    again, and the folder may be deleted.

    Args:
      name: of catalog.CORPORA.
      files: local files, folders or archives; none: they are downloaded.
      wrapping: of packing.WRAPPINGS; None: the corpus's own.
      held_out: documents at the end that are the validation split, for corpora without one; None: the corpus's own.
      out: the folder; None: data_dir/name.
      processes: that tokenize; None: one per core.
      wish: how the files are read.

    Raises:
      EsoError: the source cannot be had or read, a split is shorter than a window, `out` holds other data, or a shard
        in it is corrupt.
    """
    require(name in CORPORA, "NAME", name, f"choose one of {', '.join(CORPORA)}")
    wrapping = CORPORA[name].wrapping if wrapping is None else wrapping
    require(WRAPPINGS[wrapping].payload(length) >= 1, "--length", length, "leaves no room for text")
    require(held_out is None or CORPORA[name].held_out > 0, "--held-out", held_out, f"{name} has splits of its own")
    held_out = held_out or CORPORA[name].held_out
    from eso_jax.data import builder

    folder = data_dir / name if out is None else out
    corpus = builder.documents(name, data_dir / "documents", list(files), wish)
    state = corpus.info.metadata.get("state")
    manifest: dict[str, Any] = {
        "corpus": name, "source": corpus.info.metadata["source"],
        "content": state["content"] if isinstance(state, dict) else None,
        "split_rule": f"the last {held_out} documents are for validation" if held_out else "as published",
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizers.sha256(tokenizer),
                      "vocab_size": tokenizer.vocab_size, "mask_id": tokenizer.mask_id},
        "detokenizer": CORPORA[name].detokenizer, "length": length, "wrapping": wrapping,
        "dtype": np.dtype(tokenizers.dtype_of(tokenizer)).name}
    parts = _parts(corpus.info.splits, held_out)
    with writing("--out", folder):
        splits = _claim(folder, manifest)
        if tokenizer.json is not None:
            write_whole(folder / tokenizers.FILE, tokenizer.json)

        def save() -> None:
            write_whole(folder / prepared.UNFINISHED, as_json({**manifest, "splits": splits}))

        save()  # from now on the folder is known as ours
        for split, (published, chosen) in parts.items():
            job = Job(str(corpus.data_dir), published, (tokenizer.name, tokenizer.json), CORPORA[name].detokenizer,
                      WRAPPINGS[wrapping], length)
            mean = corpus.info.splits[published].num_bytes // corpus.info.splits[published].num_examples
            size = CHUNK_BYTES // max(1, mean) or 1
            ranges = [chosen[start:start + size] for start in range(0, len(chosen), size)]
            part = splits.setdefault(split, {"documents": len(chosen), "shards": []})
            _write_shards(folder, split, job, ranges, part, tokenizer, processes, save)
            require_window(part["windows"], part["tokens"], length, f"--from: {name}", f"its {split}")
        (folder / prepared.UNFINISHED).replace(folder / prepared.MANIFEST)
    return folder


def _parts(published: Any, held_out: int) -> dict[str, tuple[str, range]]:
    """Each split as documents of a published one."""
    counts = {split: info.num_examples for split, info in published.items()}
    if not held_out:
        return {split: (split, range(count)) for split, count in counts.items()}
    require(held_out < counts["train"], "--held-out", held_out, f"leaves none of {counts['train']} documents to train "
            "on; give a smaller number")
    return {split: ("train", range(counts["train"])[part]) for split, part
            in (("train", slice(None, -held_out)), ("validation", slice(-held_out, None)))}


def _claim(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The splits that are there already, in a folder that is new or holds the same preparation."""
    found = next((path for path in (folder / prepared.UNFINISHED, folder / prepared.MANIFEST) if path.exists()), None)
    if found is None:
        ours = not folder.exists() or folder.is_dir() and all(
            path.suffix == ".partial" or path.name == tokenizers.FILE for path in folder.iterdir())
        require(ours, "--out", str(folder), "exists and is no prepared folder; give another")
        folder.mkdir(parents=True, exist_ok=True)
        return {}
    there = json.loads(found.read_text("utf-8"))
    for field, value in manifest.items():
        require(there.get(field, value) == value, f"{found} {field}", there.get(field),
                f"this command would make {value!r}; give another --out, or delete the folder")
    if found.name == prepared.MANIFEST:
        found.rename(folder / prepared.UNFINISHED)
    splits: dict[str, Any] = there["splits"]
    return splits


def _write_shards(folder: Path, split: str, job: Job, ranges: list[range], part: dict[str, Any], tokenizer: Tokenizer,
                  processes: int | None, save: Callable[[], None]) -> None:
    """Tokenizes ranges of documents and writes the shards that are missing; `part` becomes the split's entry in the
    manifest, saved by `save` after each shard.

    A shard begins with the tokens left over from the one before, whose number is recorded: they are had again by
    tokenizing the last documents before it.
    """
    shards: list[dict[str, Any]] = part["shards"]
    groups = [ranges[i:i + SHARD_CHUNKS] for i in range(0, len(ranges), SHARD_CHUNKS)]
    todo = [number for number in range(len(groups))
            if number >= len(shards) or not (folder / shards[number]["file"]).exists()]
    for shard in shards:
        if (folder / shard["file"]).exists():
            prepared.require_whole(folder, shard)
    with _streams(job, processes, sum(len(groups[number]) for number in todo)) as streams, \
            _progress(split, part["documents"]) as bar:
        lefts = {number: _last_tokens(streams, ranges[:number * SHARD_CHUNKS], shards[number - 1]["left"])
                 for number in todo if number and number - 1 not in todo}
        found = streams([chunk for number in todo for chunk in groups[number]])
        rest = np.empty(0, tokenizers.dtype_of(tokenizer))
        for number, group in enumerate(groups):
            if number not in todo:
                bar.update(sum(map(len, group)))
                continue
            pieces = [lefts.get(number, rest)]
            for chunk in group:
                pieces.append(next(found))
                bar.update(len(chunk))
            windows, rest = cut(np.concatenate(pieces), job.length, job.wrapping, tokenizer.separator_id)
            path = folder / f"{split}-{number:05d}.array_record"
            entry = {"file": path.name, "windows": len(windows), "left": int(rest.size)}
            entry |= _write_records(path, windows)
            if number < len(shards):
                require(shards[number] == entry, "--out", str(path), "came out different from the one that was there: "
                        "the documents or the tokenizer library have changed; give another --out")
            else:
                shards.append(entry)
            save()
    windows_in_all = sum(shard["windows"] for shard in shards)
    remainder = shards[-1]["left"]
    part |= {"tokens": windows_in_all * job.wrapping.payload(job.length) + remainder, "windows": windows_in_all,
             "remainder": remainder}
    save()


def _last_tokens(streams: Streams, ranges: list[range], count: int) -> np.ndarray:
    """The last `count` tokens of the stream of some documents."""
    found = np.empty(0, np.uint16)
    while found.size < count:
        *ranges, chunk = ranges
        found = np.concatenate([next(streams([chunk])), found])
    return found[found.size - count:]


def _write_records(path: Path, windows: np.ndarray) -> dict[str, Any]:
    """Writes an ArrayRecord file, whole or not at all; its size and checksum."""
    from array_record.python.array_record_module import ArrayRecordWriter

    facts: dict[str, Any] = {}

    def write(file: BinaryIO) -> None:
        writer = ArrayRecordWriter(file.name, "group_size:1,uncompressed")  # groups of one: windows are read at random
        for window in windows.astype(windows.dtype.newbyteorder("<")):
            writer.write(window.tobytes())
        writer.close()
        partial = Path(file.name)
        facts.update(bytes=partial.stat().st_size, sha256=prepared.file_sha256(partial))

    write_whole(path, write)
    return facts


@contextlib.contextmanager
def _progress(split: str, documents: int) -> Iterator[Any]:
    if not console.is_terminal():
        console.say(f"{split}: {documents:,} documents")
    with console.bar(total=documents, desc=split, unit=" documents") as bar:
        yield bar


@contextlib.contextmanager
def _streams(job: Job, processes: int | None, chunks: int) -> Iterator[Streams]:
    """A function from ranges of documents to their streams, in order, computed by processes where that pays."""
    processes = processes or os.cpu_count() or 1
    if processes == 1 or chunks < 4 * processes:  # the library has threads of its own
        _start(job)
        yield lambda ranges: map(_encode, ranges)
        return
    # Not fork: this process may hold JAX's threads.
    pool = concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start, (job, True))
    try:
        yield lambda ranges: pool.map(_encode, ranges)
    except concurrent.futures.process.BrokenProcessPool as error:
        raise EsoError(f"--processes = {processes}: one was killed, for want of memory perhaps; repeat the command "
                       "with fewer: it goes on") from error
    finally:
        pool.shutdown(cancel_futures=True)


_job: Any = None  # of this process: a Job, its documents and its tokenizer


def _start(job: Job, one_thread: bool = False) -> None:
    global _job
    if one_thread:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    import tensorflow_datasets as tfds

    name, contents = job.tokenizer
    tokenizer = get_tokenizer(name) if contents is None else LibraryTokenizer(name, contents)
    _job = job, tfds.builder_from_directory(job.documents).as_data_source(job.split), tokenizer


def _encode(chunk: range) -> np.ndarray:
    """The stream of some documents."""
    job, documents, tokenizer = _job
    texts = [example["text"].decode() for example in documents.__getitems__(list(chunk))]
    if job.detokenizer:
        texts = list(map(DETOKENIZERS[job.detokenizer], texts))
    stream: np.ndarray = tokenizer.join(texts, job.wrapping.separator)
    return stream
