"""Documents to windows of equal length."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from eso_jax.data.tokenizers import Tokenizer
from eso_jax.errors import EsoError


class Wrapping(NamedTuple):
    """How documents, end to end, are cut into windows. Separators and ends are one token, the tokenizer's separator.

    Attributes:
      separator: one follows each document.
      ends: each window begins and ends with one, around length - 2 tokens of the stream.
    """

    separator: bool
    ends: bool

    def payload(self, length: int) -> int:
        """Tokens of the stream in a window."""
        return length - 2 * self.ends


# The paper's (authors' code: insert_eos, insert_special).
WRAPPINGS = {
    "lm1b": Wrapping(separator=True, ends=True),  # [CLS] first, last and after each sentence
    "openwebtext": Wrapping(separator=True, ends=False),
    "zero-shot": Wrapping(separator=False, ends=True),
    "plain": Wrapping(separator=False, ends=False),  # text8
}


def cut(stream: np.ndarray, length: int, wrapping: Wrapping, separator_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(a stream of tokens [S] as windows [W, length], the tokens that are left over, too few for a window)."""
    payload = wrapping.payload(length)
    used = stream.size // payload * payload
    windows = stream[:used].reshape(-1, payload)
    if wrapping.ends:
        windows = np.pad(windows, ((0, 0), (1, 1)), constant_values=separator_id)
    return windows, stream[used:]


def pack(documents: Iterable[tuple[str, bytes]], tokenizer: Tokenizer, length: int,
         wrapping: Wrapping = WRAPPINGS["openwebtext"], where: str = "data.source") -> np.ndarray:
    """Documents end to end, cut into windows; the last tokens, short of a window, are dropped.

    (The authors drop such a remainder after every thousand documents, an artefact of their batches.)

    Args:
      documents: (name, content), as eso_jax.data.documents gives them.
      length: tokens in a window.
      where: the text is from, for errors.

    Returns:
      uint16 [windows, length]; uint32 where the vocabulary needs it.

    Raises:
      EsoError: there is less than one window.
    """
    stream = tokenizer.join([content for _, content in documents], wrapping.separator)
    windows, _ = cut(stream, length, wrapping, tokenizer.separator_id)
    require_window(len(windows), stream.size, length, where)
    return windows


def require_window(windows: int, tokens: int, length: int, where: str, split: str = "this",
                   field: str = "model.length") -> None:
    """Raises an EsoError unless there is at least one window."""
    if windows == 0:
        raise EsoError(f"{where}: holds {tokens} tokens in {split} split, fewer than one window of "
                       f"{field} = {length}; give more text, or a smaller {field}")
