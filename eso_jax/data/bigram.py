"""The baseline that every language model should beat: each token given only the one before it."""

from __future__ import annotations

import numpy as np


class Bigram:
    """Counts of pairs of tokens, smoothed, as a model of windows.

    p(w) = p(w_1) prod_i p(w_i | w_{i-1}): the first token of a window by how often it is seen at any position, the
    rest by pairs within a window. `smoothing` is added to every count; its default is a customary value, tuned on
    nothing.

    Attributes:
      log_first: float64 [V], log p(first token).
      log_next: float64 [V, V], log p(next token | token), rows by the token before.
    """

    def __init__(self, windows: np.ndarray, vocab_size: int, smoothing: float = 0.1):
        """Counts over `windows`, integers in [0, vocab_size) of shape [windows, length]."""
        pairs = windows[:, :-1].astype(np.int64) * vocab_size + windows[:, 1:]
        first = np.bincount(windows.ravel(), minlength=vocab_size) + smoothing
        following = np.bincount(pairs.ravel(), minlength=vocab_size**2).reshape(vocab_size, vocab_size) + smoothing
        self.log_first = np.log(first / first.sum())
        self.log_next = np.log(following / following.sum(axis=1, keepdims=True))

    def nats(self, windows: np.ndarray) -> float:
        """Total -log p of `windows`, integers [windows, length], in nats."""
        first = self.log_first[windows[:, 0]].sum()
        following = self.log_next[windows[:, :-1], windows[:, 1:]].sum()
        return float(-first - following)
