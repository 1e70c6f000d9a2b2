"""The corpora as TFDS datasets of documents, in ArrayRecord files: written and read without TensorFlow.

    Corpora(config="lm1b", data_dir="data/documents").download_and_prepare()
    tfds.data_source("corpora/lm1b", split="train", data_dir="data/documents")[0]["text"]
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from eso_jax import console
from eso_jax.data import folders, readers
from eso_jax.data.catalog import CORPORA
from eso_jax.data.rows import Reading
from eso_jax.errors import EsoError, reason_of, require
from eso_jax.files import PASSING, writing


class Corpora(tfds.core.GeneratorBasedBuilder):
    """One config per corpus of catalog.py. An example is {"text": bytes}: a document as published, in its order.

    Args:
      files: local files, folders, globs or archives, instead of a download.
      reading: how they are read.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in CORPORA]

    def __init__(self, *, files: Sequence[str] = (), reading: Reading | None = None, **kwargs: Any):
        self._files = [str(Path(file).expanduser().absolute()) for file in files]
        self._reading = reading or Reading()
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}), disable_shuffling=True,
            metadata=tfds.core.MetadataDict(source=self._files or list(CORPORA[self.builder_config.name].urls),
                                            asked=self._reading.options()))

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        name = self.builder_config.name
        corpus, folder = CORPORA[name], Path(self._data_dir_root)
        if self._files:  # before they are read, so that what changes meanwhile is found
            self.info.metadata["state"] = {"stats": _stats(self._files), "content": _content(self._files)}
        paths = readers.find_files(self._files or self._download(dl_manager), folder / "unpacked", self._reading)
        documents = {split: readers.documents(corpus, split, paths, self._reading) for split in corpus.splits}
        firsts = {split: next(iterator, None) for split, iterator in documents.items()}
        parts = {split: self._generate_examples(itertools.chain([first], documents[split]))
                 for split, first in firsts.items() if first is not None}
        patterns = [pattern for patterns in corpus.splits.values() for pattern in patterns]
        require(bool(parts), "--from", self._files, "holds no text: what was found is empty or blank" if name == "text"
                else f"holds no documents of {name}; its files are called {', '.join(patterns)}")
        return parts

    def _generate_examples(self, documents: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
        return ((number, {"text": text}) for number, text in enumerate(documents))

    def _download(self, dl_manager: Any) -> list[str]:
        """The published files, under their published names (TFDS shortens them)."""
        name = self.builder_config.name
        urls = CORPORA[name].urls
        require(bool(urls), "--from", None, f"{name} has no files of its own; give yours")
        folder = Path(self._data_dir_root) / "downloads" / name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            fetched = dl_manager.download(list(urls))
        except Exception as error:  # of the HTTP client, TFDS or the file system
            raise EsoError(f"{name}: {', '.join(urls)} could not be downloaded ({reason_of(error)}); get the files "
                           "in another way and name them with --from") from error
        named = [folder / url.rpartition("/")[2] for url in urls]
        for link, path in zip(named, fetched, strict=True):
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(path, folder))
        return list(map(str, named))


def _files_in(files: Sequence[str]) -> list[Path]:
    """The files that files, folders and globs stand for, sorted; none where one of them is gone."""
    try:
        return sorted(path for given in files for path in folders.find(Path(given), "--from", below=True)[1])
    except (EsoError, OSError):  # reading them says why
        return []


def _stats(files: Sequence[str]) -> str:
    """A hash of sizes and times: it changes with every change of a file, and sometimes without one."""
    stats = [(str(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
             for path in _files_in(files) if path.exists() for state in [path.stat()]]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _content(files: Sequence[str]) -> str:
    """A hash of the names and the contents of all files."""
    digest = hashlib.sha256()
    for path in _files_in(files):
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:  # reading it says why, or leaves it out
            if error.errno in PASSING:
                raise
            digest.update(b"unreadable")
        digest.update(os.fsencode(path.name) + b"\0")
    return digest.hexdigest()


def documents(name: str, folder: Path, files: Sequence[str], reading: Reading | None = None) -> Corpora:
    """The documents of a corpus, written to `folder` unless they are there.

    Raises:
      EsoError: files are missing or not as they should be, cannot be downloaded, or `folder` holds others.
    """
    reading = reading or Reading()
    builder = Corpora(config=name, data_dir=str(folder), files=files, reading=reading)
    if Path(builder.data_dir).exists():
        kept, new = builder.info.metadata, builder._info().metadata
        require(kept["source"] == new["source"], "--from", new["source"], f"{builder.data_dir} was made from "
                f"{kept['source']}; give that, remove the folder, or give another --data-dir")
        asked = kept.get("asked", Reading().options())
        require(asked == new["asked"], "--from", new["source"], f"{builder.data_dir} was read with {asked}, and "
                f"this command says {new['asked']}; remove the folder, or give another --data-dir")
        state = kept.get("state")  # of earlier versions a line, by which not every change could be seen
        same = not isinstance(state, dict) or not _files_in(builder._files) or state["stats"] == _stats(
            builder._files) or state["content"] == _content(builder._files)
        require(same, "--from", new["source"], f"has changed since {builder.data_dir} was made from it; remove the "
                "folder, to read it again, or give another --data-dir")
        return builder
    with writing("--data-dir", folder), _quiet():
        builder.download_and_prepare()
    reading.report()
    return builder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS logs and prints a line per step; its progress bars stay, on a terminal."""
    if not console.is_terminal():
        tfds.disable_progress_bar()
    level, out = logging.getLogger("absl").level, open(os.devnull, "w", encoding="utf-8")
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        with out, contextlib.redirect_stdout(out):
            yield
    finally:
        logging.getLogger("absl").setLevel(level)
