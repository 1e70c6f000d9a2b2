"""Stops: texts at which a sample ends. The first stop and everything after it are cut off.

A stop counts only if it begins after the given tokens, so that those of a prompt do not. The first of several is the
one that ends first, so that tokens decoded after it, for other rows of the batch, change nothing. The text is cut at
the character; the tokens that lie wholly before it are kept.

Axes: B rows, L length.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from eso_jax.data.tokenizers import Tokenizer
from eso_jax.errors import EsoError, require


@dataclass(frozen=True)
class Stops:
    """Texts at which samples end; a separator is written as decoded text shows it.

    Attributes:
      texts: none of them empty; without any, samples end after their last decoded token.
      tokenizer: that of the samples.
    """

    texts: tuple[str, ...]
    tokenizer: Tokenizer

    def done(self, tokens: Int[np.ndarray, "B L"], known: Bool[np.ndarray, "B L"]) -> Bool[np.ndarray, " B"]:
        """Which rows, with masks where nothing is decoded yet, have a stop."""
        return np.array([self._stop(row, own)[0] is not None for row, own in zip(tokens, known, strict=True)])

    @staticmethod
    def of(texts: Sequence[str], tokenizer: Tokenizer | None) -> Stops | None:
        """The stops of these texts; None without a tokenizer.

        Raises:
          EsoError: a text is empty, or there are texts but no tokenizer.
        """
        texts = (texts,) if isinstance(texts, str) else texts
        for text in texts:
            require(bool(text), "stop", text, "must not be empty")
            if tokenizer is None:
                raise EsoError(f"stop = {text!r}: the model has no tokenizer, so that there is no text to stop at")
        return None if tokenizer is None else Stops(tuple(texts), tokenizer)

    def cut(self, tokens: Int[np.ndarray, " L"], known: Bool[np.ndarray, " L"]) -> str:
        """Writes masks into a row from its stop on; returns its text up to there, or up to its last decoded token."""
        place, text, begin = self._stop(tokens, known)
        if place is None:
            decoded = np.flatnonzero(tokens != self.tokenizer.mask_id)
            return self.tokenizer.decode(tokens[:decoded[-1] + 1 if len(decoded) else 0])
        sizes = range(len(tokens) + 1)
        kept = bisect.bisect_right(sizes, place, begin, key=lambda n: len(self.tokenizer.decode(tokens[:n]))) - 1
        tokens[kept:] = self.tokenizer.mask_id
        return text[:place]

    def _stop(self, tokens: np.ndarray, known: np.ndarray) -> tuple[int | None, str, int]:
        """(the place of the first stop in the text of all tokens before the first mask, or None; that text; how many
        tokens stand before the first that was not given)."""
        begin, masks = int((~known).argmax()), np.flatnonzero(tokens == self.tokenizer.mask_id)
        end = int(masks[0]) if len(masks) else len(tokens)
        if known.all() or end <= begin or not self.texts:
            return None, "", begin
        text, before = self.tokenizer.decode(tokens[:end]), len(self.tokenizer.decode(tokens[:begin]))
        found = [(place + len(stop), place) for stop in self.texts if (place := text.find(stop, before)) >= 0]
        return min(found, default=(0, None))[1], text, begin
