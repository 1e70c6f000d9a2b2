"""Generated or reference texts, and their tokens: what quality is measured on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from eso_jax.data import rows, streams
from eso_jax.data.rows import Reading
from eso_jax.data.tokenizers import encode_shown
from eso_jax.errors import EsoError, require

if TYPE_CHECKING:
    from eso_jax.data.tokenizers import Tokenizer
    from eso_jax.engine.model import Model


@dataclass(frozen=True, eq=False)  # compared by identity: arrays have no plain ==, and features are kept by it
class Texts:
    """N texts as token ids, as strings, or as both; the strings are then what the tokens decode to.

    Attributes:
      tokens: int64 [N, L], of any integers given; None for text that no tokenizer of ours has seen.
      strings: N of them; None where no tokenizer fits the tokens.
      mask: the id that stands for no token, such as after the end of a sample; None: not known.
    """

    tokens: np.ndarray | None
    strings: list[str] | None = None
    mask: int | None = None

    def __post_init__(self) -> None:
        require(self.tokens is not None or self.strings is not None, "texts", None, "give tokens, strings or both")
        require(len(self) >= 1, "texts", 0, "there is nothing to measure")
        if self.tokens is not None:
            require(self.tokens.ndim == 2 and np.issubdtype(self.tokens.dtype, np.integer), "tokens",
                    f"{self.tokens.dtype} {self.tokens.shape}", "must be integers [N, L]")
            object.__setattr__(self, "tokens", self.tokens.astype(np.int64))
            require(self.strings is None or len(self.strings) == len(self.tokens), "strings", len(self.strings or []),
                    f"there are {len(self.tokens)} rows of tokens")

    def __len__(self) -> int:
        return len(self.tokens) if self.tokens is not None else len(self.strings or [])

    def ids(self) -> list[Int[np.ndarray, " _"]]:
        """The tokens of each text, without masks."""
        assert self.tokens is not None
        return [row[row != self.mask] for row in self.tokens]

    def strings_for(self, user: str) -> list[str]:
        """The strings, for `user`, an option that errors name and that reads nothing else."""
        if self.strings is None:
            raise EsoError(f"{user}: reads text, and there are token ids only; use a model of the same vocabulary, or "
                           "give their text")
        return self.strings

    def tokens_for(self, model: Model, user: str) -> Sequence[Int[np.ndarray, " _"]]:
        """The ids of each text in the vocabulary of a model, for `user`, an option that errors name.

        They are the tokens, where these are of that vocabulary: its tokenizer decodes them to the strings or, without
        strings, the ids are in its range. Otherwise they are the strings, encoded; a shown separator becomes one.
        """
        tokenizer, config = model.tokenizer, model.config.model
        if self.tokens is not None:
            fits = all(((row >= 0) & (row < config.vocab_size) & (row != config.mask)).all() for row in self.ids())
            same = self.strings is None or tokenizer is not None and all(
                tokenizer.decode(row) == string for row, string in zip(self.ids(), self.strings, strict=True))
            if fits and same:
                return self.ids()
        if self.strings is None or tokenizer is None:
            raise EsoError(f"{user}: its vocabulary of {config.vocab_size} is not that of the tokens, and "
                           + ("there is no text to encode" if self.strings is None else "it has no tokenizer")
                           + "; use a model of the same vocabulary")
        return [encode_shown(tokenizer, string).astype(np.int64) for string in self.strings]

    def padded_for(self, model: Model, user: str) -> tuple[Int[np.ndarray, "N L"], Int[np.ndarray, " N"]]:
        """(tokens, lengths): the same as an int32 array, cut to the model's length or padded by zeros; and how many
        tokens each text has, those that are cut off included."""
        rows = self.tokens_for(model, user)
        padded = np.zeros((len(rows), model.config.model.length), np.int32)
        for row, tokens in zip(padded, rows, strict=True):
            row[:len(tokens)] = tokens[:len(row)]
        return padded, np.array([len(tokens) for tokens in rows])

    def units(self) -> tuple[str, list[Int[np.ndarray, " _"]]]:
        """(the unit of diversity, each text as numbers of its units): "words", between white space, or "tokens"."""
        if self.strings is None:
            return "tokens", self.ids()
        number: dict[str, int] = {}
        return "words", [np.array([number.setdefault(word, len(number)) for word in string.split()], np.int64)
                         for string in self.strings]


def of_tokens(tokens: np.ndarray, tokenizer: Tokenizer | None) -> Texts:
    """Rows of tokens, and their strings where there is a tokenizer."""
    tokens = np.asarray(tokens)
    if tokenizer is None:
        return Texts(tokens)
    mask = tokenizer.mask_id
    return Texts(tokens, [tokenizer.decode(row[row != mask]) for row in tokens], mask)


def is_workdir(name: str) -> bool:
    """Whether `name` is a work directory of ours. (A folder of the transformers library has a config.json as well.)"""
    path = Path(name) / "config.json"
    try:
        return path.is_file() and "family" in json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return False


def read(name: str, flag: str, limit: int | None = None, reading: Reading | None = None) -> Texts:
    """Texts from a .npz with tokens [N, L], text [N] or both (of eso-jax sample, say), a .npy of tokens, rows with a
    text (JSON lines or an array of JSON, .csv, .tsv, Parquet, Arrow, compressed or not), or a work directory:
    validation windows of its data.source, at most `limit`, evenly spaced.

    Args:
      reading: which field of rows is read, and whether rows without a text are left out.

    Raises:
      EsoError: it cannot be read, a row has no text, or there are none.
    """
    if is_workdir(name):
        return _windows(name, limit)
    name_inside = streams.inner_name(name)
    require(name_inside.endswith((".npy", *rows.COLUMNS, *rows.JSON, *rows.TABLES)), flag, name,
            "give a .npz, .npy, .jsonl, .json, .parquet, .arrow, .csv or .tsv file, or a work directory")
    reading = reading or Reading()
    reading.flag = flag
    try:
        if name_inside.endswith(".npy"):
            return Texts(np.load(name))
        if name_inside.endswith(".npz"):
            with np.load(name) as arrays:
                tokens = arrays["tokens"] if "tokens" in arrays else None
                alone = tokens is not None and (reading.field or "text") not in arrays
                mask = int(arrays["mask"]) if "mask" in arrays else None
            if tokens is not None:
                all_rows = Reading(reading.field, flag=flag)  # a row that was left out would shift the others
                found = None if alone else list(rows.texts(name, streams.of_file(Path(name)), all_rows))
                return Texts(tokens, found, mask)
        strings = list(rows.texts(name, streams.decompress(streams.of_file(Path(name))), reading))
        reading.report()
        return Texts(None, strings)
    except FileNotFoundError as error:
        raise EsoError(f"{flag} = {name!r}: no such file") from error
    except EsoError as error:
        raise error if str(error).startswith(flag) else EsoError(f"{flag} = {name!r}: {error}") from error
    except Exception as error:  # every library raises its own
        reason = " ".join(str(error).split())
        raise EsoError(f"{flag} = {name!r}: not readable ({type(error).__name__}: {reason}); give a .npz with tokens "
                       'or text, a .npy with tokens, or rows such as a .jsonl of {"text": ...}') from error


def _windows(name: str, limit: int | None) -> Texts:
    from eso_jax import config as configs
    from eso_jax.data import evenly_spaced, windows_of
    from eso_jax.run import workdir

    config = configs.from_file(Path(name) / "config.json")
    tokenizer = workdir.kept_tokenizer(Path(name), config)
    windows = windows_of(config, "validation", tokenizer=tokenizer)
    return of_tokens(evenly_spaced(windows, limit or len(windows))[:], tokenizer)
