"""Prompts, templates and arrays, as rows of given tokens of a model's length. The mask marks unknown tokens.

A prompt is the beginning of a row. A template is text with blanks, [MASK:n] for n tokens and [MASK] for one; nothing is
decoded after its end. The text between blanks is encoded piece by piece, so that a blank has exactly n tokens. Escapes
are not interpreted. A separator is written as decoded text shows it: a form feed on a line of its own.

Axes: N rows, L length, K tokens of a shorter row.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from eso_jax.config import ModelConfig
from eso_jax.data import rows, streams
from eso_jax.data.tokenizers import Tokenizer, encode_shown
from eso_jax.errors import EsoError, reason_of, require

BLANK = re.compile(r"\[MASK(?::(\d+))?\]")
BYTES = 36  # of a sample's token on the host, before the first pass: its place in the order, what is given, copies
MISTYPED = re.compile(r"\[MASK(\s*:[^\]]*|\s+\d+\s*)\]")  # where a blank was meant
FIELDS = ("prompt", "template", *rows.FIELDS)  # of a row of a file; the first there is


class Given(NamedTuple):
    """Rows to be completed.

    Attributes:
      tokens: int32 [N, L], the mask where nothing is given.
      end: int [N], positions from here on are not to be decoded.
    """

    tokens: Int[np.ndarray, "N L"]
    end: Int[np.ndarray, " N"]

    def repeat(self, num_samples: int) -> Given:
        """So many rows in place of each, next to each other.

        Raises:
          EsoError: there are none, or they are sure not to fit into the memory of this machine.
        """
        require(num_samples >= 1, "num_samples", num_samples, "must be at least 1")
        wanted = num_samples * self.tokens.size * BYTES
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        require(wanted <= memory, "num_samples", num_samples, f"all of them together take {wanted // 10**9:,} GB of "
                f"memory, and this machine has {memory // 10**9:,}; draw fewer at a time, each time by another seed")
        return Given(*(np.repeat(part, num_samples, axis=0) for part in self))


def of_prompt(text: str, tokenizer: Tokenizer | None, model: ModelConfig, name: str = "prompt") -> Given:
    """One row that begins with a text.

    Raises:
      EsoError: there is no tokenizer, it has no ids for the text, or they are more than the model's length.
    """
    return _of_one({"prompt": text}, name, text, tokenizer, model)


def of_template(text: str, tokenizer: Tokenizer | None, model: ModelConfig, name: str = "template") -> Given:
    """One row with blanks.

    Raises:
      EsoError: as of a prompt; or there is no blank, or one of no token.
    """
    return _of_one({"template": text}, name, text, tokenizer, model)


def of_rows(path: str, tokenizer: Tokenizer | None, model: ModelConfig, name: str = "prompts") -> Given:
    """A row for each row of a file, such as JSON lines of {"prompt": ...}, {"template": ...} or {"text": ...} (a
    prompt), or a table with a column of such a name.

    Raises:
      EsoError: there is no row, or one that is none of these or raises as in `of_prompt` and `of_template`.
    """
    tokenizer = _checked(tokenizer, name, path)
    found = []
    try:
        opener = streams.decompress(streams.of_bytes(Path(path).read_bytes()))  # read once: it may be a pipe
        for place, row in rows.each(path, opener, rows.Reading(flag=name, known=FIELDS)):
            try:
                found.append(_row(row, tokenizer, model))
            except (rows.BadRow, EsoError) as error:
                raise EsoError(f"{name} = {path!r}: {place} {error}") from error
    except EsoError:
        raise
    except Exception as error:  # every library raises its own
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error) if isinstance(
            error, rows.NotText) else f"cannot be read ({getattr(error, 'strerror', None) or reason_of(error)})"
        raise EsoError(f"{name} = {path!r}: {reason}") from error
    require(bool(found), name, path, 'holds no rows; write one {"prompt": ...} a line')
    return _stacked(found, model)


def of_array(tokens: np.ndarray, model: ModelConfig, name: str = "given") -> Given:
    """Rows of ids, int [N, K] with K <= L; positions from K on are unknown.

    Raises:
      EsoError: the array is not of this form, or an id is out of range.
    """
    tokens = np.asarray(tokens)
    require(tokens.ndim == 2 and np.issubdtype(tokens.dtype, np.integer) and len(tokens) > 0, name,
            f"{tokens.dtype} {tokens.shape}", f"must be integers [N >= 1, L], the mask {model.mask} for the unknown")
    require(tokens.shape[1] <= model.length, name, tokens.shape, f"the model has length {model.length}")
    bad = (tokens < 0) | (tokens >= model.vocab_size)
    if bad.any():
        row, column = np.argwhere(bad)[0].tolist()
        raise EsoError(f"{name}[{row}, {column}] = {tokens[row, column]}: ids must be in [0, {model.vocab_size})")
    return _stacked([(row, model.length) for row in tokens], model)


def _of_one(row: dict[str, str], name: str, text: str, tokenizer: Tokenizer | None, model: ModelConfig) -> Given:
    tokenizer = _checked(tokenizer, name, text)
    try:
        return _stacked([_row(row, tokenizer, model)], model)
    except rows.BadRow as error:
        raise EsoError(f"{name} = {_short(text)!r}: {error}") from error


def _row(row: Any, tokenizer: Tokenizer, model: ModelConfig) -> tuple[np.ndarray, int]:
    """(the ids of a row of a file, with masks; the position from which on nothing is decoded).

    Raises:
      BadRow: it has no text, or one that cannot be used.
    """
    if isinstance(row, rows.BadRow):
        raise row
    field = next((known for known in FIELDS if isinstance(row, dict) and known in row), None)
    text = rows.text_of(row, field or "prompt")
    pieces = list(_pieces(text, model.mask)) if field == "template" else [text]
    ids = np.concatenate([np.empty(0, np.int64), *(encode_shown(tokenizer, piece) if isinstance(piece, str) else piece
                                                   for piece in pieces)])
    if len(ids) > model.length:
        raise rows.BadRow(f"is {len(ids)} tokens, and the model has length {model.length}; shorten it")
    return ids, len(ids) if field == "template" else model.length


def _pieces(text: str, mask: int) -> Any:
    """The pieces of a template in turn: texts, and arrays of masks."""
    found = BLANK.split(text)  # text, number or None, text, ...
    if len(found) == 1 and not MISTYPED.search(text):
        raise rows.BadRow("has no blank; write [MASK:n] for n unknown tokens, or give it as a prompt")
    for at, piece in enumerate(found):
        if at % 2 == 0:
            if wrong := MISTYPED.search(piece):
                raise rows.BadRow(f"has {wrong[0]!r}, which is no blank; write [MASK:n] for n unknown tokens")
            yield piece
        else:
            # Seven digits are enough of a huge number, which is then refused by its length, without using much memory.
            count = 1 if piece is None else int(piece.lstrip("0")[:7] or 0)
            if count == 0:
                raise rows.BadRow("has a blank [MASK:0] of no token; leave it out")
            yield np.full(count, mask)


def _stacked(found: Sequence[tuple[np.ndarray, int]], model: ModelConfig) -> Given:
    tokens = np.full((len(found), model.length), model.mask, np.int32)
    for row, (ids, _) in zip(tokens, found, strict=True):
        row[:len(ids)] = ids
    return Given(tokens, np.array([end for _, end in found]))


def _checked(tokenizer: Tokenizer | None, name: str, text: str) -> Tokenizer:
    if tokenizer is None:
        raise EsoError(f"{name} = {_short(text)!r}: the model has no tokenizer, so that text has no ids; give ids by "
                       "--given")
    return tokenizer


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
