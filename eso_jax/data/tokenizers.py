"""Bytes to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eso_jax.config import EsoError, require


class ByteTokenizer:
    """Ids 0 to 255 are bytes; two more ids stand for no text: the separator after each document, and the mask."""

    name = "bytes"
    vocab_size = 258
    separator_id = 256
    mask_id = 257

    _shown = [bytes([i]) for i in range(256)] + [b"\n\f\n", "▒".encode()]

    def encode(self, text: bytes | str) -> np.ndarray:
        """The bytes of `text` (UTF-8 if a str) as ids, uint16 [S]. Any byte is allowed, NUL included."""
        return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(np.uint16)

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Text to read: bytes as UTF-8 (invalid ones shown as U+FFFD), separators as a form feed on its own line,
        masks as '▒'.

        Args:
          ids: integers [S].

        Raises:
          EsoError: an id is out of range.
        """
        ids = np.asarray(ids)
        wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
        if wrong.size:
            raise EsoError(f"token id = {wrong[0]}: must be in [0, {self.vocab_size}) for tokenizer {self.name!r}")
        return b"".join(self._shown[i] for i in ids.tolist()).decode("utf-8", errors="replace")

    def num_bytes(self, tokens: np.ndarray) -> int:
        """Bytes of text that `tokens`, integers of any shape, stand for: separators and masks count as none."""
        return int(np.count_nonzero(np.asarray(tokens) < self.separator_id))


def get_tokenizer(name: str) -> ByteTokenizer:
    """The tokenizer called `name`; EsoError if there is none."""
    require(name == ByteTokenizer.name, "data.tokenizer", name, f"choose {ByteTokenizer.name}")
    return ByteTokenizer()
