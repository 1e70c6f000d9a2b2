"""Documents to windows of equal length."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from eso_jax.config import EsoError
from eso_jax.data.tokenizers import ByteTokenizer


def pack(documents: Iterable[tuple[str, bytes]], tokenizer: ByteTokenizer, length: int) -> np.ndarray:
    """Documents end to end, a separator after each, cut into windows; the last tokens, short of a window, are dropped.

    Args:
      documents: (name, content), as eso_jax.data.documents gives them.
      tokenizer: its ids fit in uint16.
      length: tokens in a window.

    Returns:
      uint16 [windows, length].

    Raises:
      EsoError: there is less than one window.
    """
    separator = np.array([tokenizer.separator_id], np.uint16)
    parts = [part for _, content in documents for part in (tokenizer.encode(content), separator)]
    tokens = np.concatenate([np.empty(0, np.uint16), *parts])
    windows = tokens.size // length
    if windows == 0:
        raise EsoError(f"data.source: holds {tokens.size} tokens in this split, fewer than one window of "
                       f"model.length = {length}; give more text, or a smaller model.length")
    return tokens[:windows * length].reshape(windows, length)
