"""Prepared folders: packed windows in ArrayRecord shards, their manifest and their tokenizer.

  manifest.json               what was prepared from what, how, and the checksum of each shard
  tokenizer.json              unless the tokenizer is code alone
  SPLIT-00000.array_record    a record per window: its token ids, little-endian

`eso-jax data prepare` makes one. Nothing else is needed to train on it or to evaluate.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
from jaxtyping import Int

from eso_jax import files
from eso_jax.config import Config
from eso_jax.data import tokenizers
from eso_jax.data.catalog import CORPORA
from eso_jax.data.tokenizers import LibraryTokenizer, Tokenizer, get_tokenizer
from eso_jax.errors import EsoError, RunAgain, require

MANIFEST = "manifest.json"
UNFINISHED = MANIFEST + ".unfinished"


@runtime_checkable
class Windows(Protocol):
    """Packed windows, [windows, length] integers: an array, or something that reads them when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any) -> np.ndarray: ...


class Subset:
    """Some windows by their numbers, which are read when they are asked for."""

    def __init__(self, windows: Windows, numbers: Int[np.ndarray, " M"]) -> None:
        self._windows, self._numbers = windows, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._windows[self._numbers[index]]


def evenly_spaced(windows: Windows, limit: int) -> Windows:
    """At most `limit` windows, evenly spaced and in order, the same in every call.

    Args:
      windows: integers [windows, length]; an array, or anything that is indexed by integers [N].
    """
    count = min(limit, len(windows))
    return Subset(windows, np.arange(count) * len(windows) // count)


class PreparedWindows:
    """Windows read from shards when they are asked for, by number, slice or integers [N].

    Attributes:
      shape: (windows, length).
      dtype: uint16 or uint32.
      checksums: SHA-256 of each shard.
    """

    def __init__(self, folder: Path, shards: list[dict[str, Any]], length: int, dtype: str):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self._folder, self.checksums = folder, [shard["sha256"] for shard in shards]
        self.shape, self.dtype = (sum(shard["windows"] for shard in shards), length), np.dtype(dtype).newbyteorder("<")
        for shard in shards:
            path = folder / shard["file"]
            require(path.is_file(), "data.source", str(path), "this shard is missing; repeat eso-jax data prepare")
            require(path.stat().st_size == shard["bytes"], "data.source", str(path),
                    f"this shard must have {shard['bytes']} bytes, and has {path.stat().st_size}; delete it and repeat "
                    "eso-jax data prepare")
        self._source = ArrayRecordDataSource([f"{folder / shard['file']}[0:{shard['windows']}]" for shard in shards])

    def __repr__(self) -> str:
        return f"PreparedWindows({str(self._folder)!r}, {self.shape})"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: SupportsIndex | slice | np.ndarray) -> np.ndarray:
        numbers = np.arange(*index.indices(len(self))) if isinstance(index, slice) else np.asarray(index)
        numbers = np.where(numbers < 0, numbers + len(self), numbers)
        if not ((numbers >= 0) & (numbers < len(self))).all():
            raise IndexError(f"window {index} of {len(self)}")
        try:
            records = files.reading("data.source", self._folder, lambda: self._source.__getitems__(
                numbers.ravel().tolist()) if numbers.size else [])
        except RunAgain:
            raise
        except Exception as error:  # ArrayRecord has checksums of its own; it raises what its C++ says
            raise EsoError(f"data.source = {str(self._folder)!r}: a shard cannot be read ({error}); eso-jax data check "
                           f"{self._folder} says which") from error
        return np.frombuffer(b"".join(records), self.dtype).reshape(*numbers.shape, self.shape[1])


def is_prepared(source: str, config: Config | None = None) -> bool:
    """Whether a data source is a prepared folder.

    Args:
      config: for an error that says how to make the folder; None: it says TOKENIZER and LENGTH.

    Raises:
      EsoError: its preparation was interrupted; or it is where a published corpus would be, and isn't there.
    """
    tokenizer, length = (config.data.tokenizer, config.model.length) if config else ("TOKENIZER", "LENGTH")
    folder = Path(source)
    require(not (folder / UNFINISHED).is_file(), "data.source", source,
            "its preparation was interrupted; repeat the same eso-jax data prepare, and it goes on")
    published = folder.name in CORPORA and bool(CORPORA[folder.name].urls)
    require(folder.exists() or not published, "data.source", source,
            f"does not exist; eso-jax data prepare {folder.name} --data-dir {folder.parent} --tokenizer "
            f"{tokenizer} --length {length} makes it")
    within = [path.parent for path in sorted(folder.glob(f"*/{MANIFEST}")) if any(path.parent.glob("*.array_record"))]
    require(not within or (folder / MANIFEST).is_file(), "data.source", source,
            f"holds prepared folders; give one: {', '.join(map(str, within))}")
    return (folder / MANIFEST).is_file()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / MANIFEST
    require(path.is_file(), "data.source", str(folder), f"is no prepared folder: it has no {MANIFEST}")
    contents = files.reading("data.source", folder, lambda: path.read_text("utf-8"))
    try:
        manifest: dict[str, Any] = json.loads(contents)
        manifest["splits"], manifest["length"], manifest["tokenizer"]
    except (ValueError, KeyError, TypeError) as error:
        raise EsoError(f"data.source = {str(folder)!r}: {MANIFEST} is not one of eso-jax data prepare "
                       f"({type(error).__name__}: {error})") from error
    return manifest


def prepared_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that a folder was prepared with."""
    manifest = read_manifest(folder)
    path, name = Path(folder) / tokenizers.FILE, manifest["tokenizer"]["name"]
    tokenizer = LibraryTokenizer(name, path.read_text("utf-8")) if path.is_file() else get_tokenizer(name)
    require(tokenizers.sha256(tokenizer) == manifest["tokenizer"]["sha256"], "data.source", str(folder),
            f"its {tokenizers.FILE} is not the one it was prepared with")
    return tokenizer


def prepared_windows(config: Config, folder: str, split: str, tokenizer: Tokenizer) -> PreparedWindows:
    """The windows of one split, or of "all". A folder with one held-out split gives it as validation and as test.

    Raises:
      EsoError: there is no such split, a shard is missing, or the config does not fit.
    """
    manifest = read_manifest(folder)
    require(tokenizers.sha256(tokenizer) == manifest["tokenizer"]["sha256"], "data.tokenizer", tokenizer.name,
            f"{folder} was prepared with another, {manifest['tokenizer']['name']!r}")
    require(manifest["length"] == config.model.length, "model.length", config.model.length,
            f"{folder} was prepared with windows of {manifest['length']} tokens")
    splits = manifest["splits"]
    other = {"validation": "test", "test": "validation"}.get(split, split)
    names = list(splits) if split == "all" else [split if split in splits else other]
    require(names[0] in splits, "split", split, f"{folder} has {', '.join(splits)}")
    shards = [shard for name in names for shard in splits[name]["shards"]]
    return PreparedWindows(Path(folder), shards, manifest["length"], manifest["dtype"])


def check(folder: str | Path) -> dict[str, Any]:
    """Reads every shard and compares checksums; returns the manifest.

    Raises:
      EsoError: a shard is missing or corrupt.
    """
    manifest = read_manifest(folder)
    prepared_tokenizer(folder)
    for part in manifest["splits"].values():
        for shard in part["shards"]:
            require_whole(Path(folder), shard)
    return manifest


def require_whole(folder: Path, shard: dict[str, Any]) -> None:
    """Raises an EsoError unless a shard has its checksum."""
    path = folder / shard["file"]
    require(path.is_file() and file_sha256(path) == shard["sha256"], "data.source", str(path),
            "this shard is missing or corrupt (its checksum is another); delete it and repeat eso-jax data prepare, "
            "which makes it again")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
