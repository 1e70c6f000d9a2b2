"""Documents to a prepared folder: tokenized once, in parallel, shard by shard, so that an interrupted run can
resume."""

from __future__ import annotations

import concurrent.futures.process
import contextlib
import json
import multiprocessing
import os
import shutil
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
from eso_jax.data.rows import Reading
from eso_jax.data.tokenizers import LibraryTokenizer, Tokenizer, get_tokenizer
from eso_jax.errors import EsoError, require
from eso_jax.files import as_json, one_at_a_time, write_whole, writing

Tokenize = Callable[[list[range]], Iterator[np.ndarray]]  # ranges of documents to the tokens of each [S]

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
            processes: int | None = None, reading: Reading | None = None) -> Path:
    """Makes a prepared folder of a corpus, or resumes making it; returns its path.

    The documents are kept in data_dir/documents, as published: another tokenizer or length does not read the source
    again, and the folder may be deleted.

    Args:
      name: of catalog.CORPORA.
      files: local files, folders or archives; none: they are downloaded.
      wrapping: of packing.WRAPPINGS; None: the corpus's own.
      held_out: documents at the end that are the validation split, for corpora without one; None: the corpus's own.
      out: the folder; None: data_dir/name.
      processes: that tokenize; None: one per core.
      reading: how the files are read.

    Raises:
      EsoError: the source cannot be had or read, a split is shorter than a window, `out` holds other data, or a shard
        in it is corrupt.
    """
    require(name in CORPORA, "NAME", name, f"choose one of {', '.join(CORPORA)}")
    wrapping = CORPORA[name].wrapping if wrapping is None else wrapping
    require(WRAPPINGS[wrapping].payload(length) >= 1, "--length", length, "leaves no room for text")
    require(held_out is None or CORPORA[name].held_out > 0, "--held-out", held_out, f"{name} has splits of its own")
    held_out, fields = held_out or CORPORA[name].held_out, CORPORA[name].fields
    require(reading is None or reading.field is None or not fields, "--field", reading and reading.field,
            f"of {name}, {' and '.join(fields)} are read; leave it out, or prepare your own text")
    documents = data_dir / "documents"
    with one_at_a_time(documents, "--data-dir"):
        for left in documents.glob("corpora/*/incomplete.*"):  # by one that was killed
            shutil.rmtree(left, ignore_errors=True)
        return _prepare(name, data_dir, tokenizer, length, list(files), wrapping, held_out, out or data_dir / name,
                        processes, reading)


def _prepare(name: str, data_dir: Path, tokenizer: Tokenizer, length: int, files: list[str], wrapping: str,
             held_out: int, folder: Path, processes: int | None, reading: Reading | None) -> Path:
    """`prepare`, while no other process prepares in data_dir, and with no argument left to its default but
    `processes` and `reading`."""
    from eso_jax.data import builder

    corpus = builder.documents(name, data_dir / "documents", files, reading)
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
        splits = _claim(folder, manifest, tokenizer.json)
        if tokenizer.json is not None:
            write_whole(folder / tokenizers.FILE, tokenizer.json)
        else:
            (folder / tokenizers.FILE).unlink(missing_ok=True)  # of a try that came to nothing

        def save() -> None:
            write_whole(folder / prepared.UNFINISHED, as_json({**manifest, "splits": splits}))

        save()  # from now on the folder is known as ours
        for split, (published, numbers) in parts.items():
            job = Job(str(corpus.data_dir), published, (tokenizer.name, tokenizer.json), CORPORA[name].detokenizer,
                      WRAPPINGS[wrapping], length)
            mean = corpus.info.splits[published].num_bytes // corpus.info.splits[published].num_examples
            size = CHUNK_BYTES // max(1, mean) or 1
            chunks = [numbers[start:start + size] for start in range(0, len(numbers), size)]
            part = splits.setdefault(split, {"documents": len(numbers), "shards": []})
            _write_shards(folder, split, job, chunks, part, tokenizer, processes, save)
            require_window(part["windows"], part["tokens"], length, f"--from: {name}", f"its {split}", "--length")
        (folder / prepared.UNFINISHED).replace(folder / prepared.MANIFEST)
    return folder


def _parts(published: Any, held_out: int) -> dict[str, tuple[str, range]]:
    """Each split as (a published split, numbers of documents in it)."""
    counts = {split: info.num_examples for split, info in published.items()}
    if not held_out:
        return {split: (split, range(count)) for split, count in counts.items()}
    require(held_out < counts["train"], "--held-out", held_out, f"leaves none of {counts['train']} documents to train "
            "on; " + ("give a smaller number" if counts["train"] > 1 else
                      "a file of text is one: give several files, rows (.jsonl), or the file itself as data.source"))
    return {split: ("train", range(counts["train"])[part]) for split, part
            in (("train", slice(None, -held_out)), ("validation", slice(-held_out, None)))}


def _claim(folder: Path, manifest: dict[str, Any], tokenizer: str | None) -> dict[str, Any]:
    """The splits that a folder has so far: none if it is new.

    Args:
      tokenizer: contents of its tokenizer.json if it has one.

    Raises:
      EsoError: it holds something else than this preparation.
    """
    path = next((path for path in (folder / prepared.UNFINISHED, folder / prepared.MANIFEST) if path.exists()), None)
    if path is None:
        is_free = not folder.exists() or folder.is_dir() and all(
            file.suffix == ".partial"
            or file.name == tokenizers.FILE and file.read_text("utf-8", "replace") == tokenizer
            for file in folder.iterdir())
        require(is_free, "--out", str(folder), "exists and is no prepared folder; give another")
        folder.mkdir(parents=True, exist_ok=True)
        return {}
    recorded = json.loads(path.read_text("utf-8"))
    if not any(shard["windows"] for part in recorded["splits"].values() for shard in part["shards"]):
        return {}  # a try that came to nothing keeps none from the next
    for field, value in manifest.items():
        require(recorded.get(field, value) == value, f"{path} {field}", recorded.get(field),
                f"this command would make {value!r}; give another --out, or delete the folder")
    if path.name == prepared.MANIFEST:
        path.rename(folder / prepared.UNFINISHED)
    splits: dict[str, Any] = recorded["splits"]
    return splits


def _write_shards(folder: Path, split: str, job: Job, chunks: list[range], part: dict[str, Any], tokenizer: Tokenizer,
                  processes: int | None, save: Callable[[], None]) -> None:
    """Tokenizes chunks of documents and writes the shards that are missing; `part` becomes the split's entry in the
    manifest, which `save` writes after each shard.

    A shard begins with the tokens left over from the one before. How many is recorded; if that shard is not made again,
    they come from tokenizing its last documents once more.
    """
    shards: list[dict[str, Any]] = part["shards"]
    groups = [chunks[i:i + SHARD_CHUNKS] for i in range(0, len(chunks), SHARD_CHUNKS)]
    missing = [number for number in range(len(groups))
               if number >= len(shards) or not (folder / shards[number]["file"]).exists()]
    for shard in shards:
        if (folder / shard["file"]).exists():
            prepared.require_whole(folder, shard)
    if not console.is_terminal():
        console.say(f"{split}: {part['documents']:,} documents")
    with _workers(job, processes, sum(len(groups[number]) for number in missing)) as tokenize, \
            console.bar(total=part["documents"], desc=split, unit=" documents") as bar:
        left_over = {number: _last_tokens(tokenize, chunks[:number * SHARD_CHUNKS], shards[number - 1]["left"])
                     for number in missing if number and number - 1 not in missing}
        tokens_of_chunks = tokenize([chunk for number in missing for chunk in groups[number]])
        rest = np.empty(0, tokenizers.dtype_of(tokenizer))
        for number, group in enumerate(groups):
            if number not in missing:
                bar.update(sum(map(len, group)))
                continue
            pieces = [left_over.get(number, rest)]
            for chunk in group:
                pieces.append(next(tokens_of_chunks))
                bar.update(len(chunk))
            windows, rest = cut(np.concatenate(pieces), job.length, job.wrapping, tokenizer.separator_id)
            path = folder / f"{split}-{number:05d}.array_record"
            entry = {"file": path.name, "windows": len(windows), "left": rest.size, **_write_records(path, windows)}
            if number < len(shards):
                require(shards[number] == entry, "--out", str(path), "came out different from the one that was there: "
                        "the documents or the tokenizer library have changed; give another --out")
            else:
                shards.append(entry)
            save()
    count, remainder = sum(shard["windows"] for shard in shards), shards[-1]["left"]
    part |= {"tokens": count * job.wrapping.payload(job.length) + remainder, "windows": count, "remainder": remainder}
    save()


def _last_tokens(tokenize: Tokenize, chunks: list[range], count: int) -> np.ndarray:
    """The last `count` tokens of the stream that some documents make."""
    tokens = np.empty(0, np.uint16)
    while tokens.size < count:
        *chunks, last = chunks
        tokens = np.concatenate([next(tokenize([last])), tokens])
    return tokens[tokens.size - count:]


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
def _workers(job: Job, processes: int | None, chunks: int) -> Iterator[Tokenize]:
    """A function that tokenizes chunks in order, by several processes where the number of chunks makes that pay."""
    processes = processes or os.cpu_count() or 1
    if processes == 1 or chunks < 4 * processes:  # the library has threads of its own
        _start_worker(job)
        yield lambda chunks: map(_tokenize, chunks)
        return
    # Not fork: this process may hold JAX's threads.
    pool = concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker,
                                                  (job, True))
    try:
        yield lambda chunks: pool.map(_tokenize, chunks)
    except concurrent.futures.process.BrokenProcessPool as error:
        raise EsoError(f"--processes = {processes}: one was killed, for want of memory perhaps; repeat the command "
                       "with fewer: it goes on") from error
    finally:
        pool.shutdown(cancel_futures=True)


_job: Any = None  # of this process: a Job, its documents and its tokenizer


def _start_worker(job: Job, one_thread: bool = False) -> None:
    global _job
    if one_thread:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a process
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    import tensorflow_datasets as tfds

    name, contents = job.tokenizer
    tokenizer = get_tokenizer(name) if contents is None else LibraryTokenizer(name, contents)
    _job = job, tfds.builder_from_directory(job.documents).as_data_source(job.split), tokenizer


def _tokenize(chunk: range) -> np.ndarray:
    """The tokens [S] of some documents."""
    job, documents, tokenizer = _job
    texts = [example["text"].decode() for example in documents.__getitems__(list(chunk))]
    if job.detokenizer:
        texts = list(map(DETOKENIZERS[job.detokenizer], texts))
    stream: np.ndarray = tokenizer.join(texts, job.wrapping.separator)
    return stream
