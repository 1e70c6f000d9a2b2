"""The entropy by which degenerate samples are drawn again, on request.

Some published numbers are of samples that were drawn again, up to ten times, while the last 256 tokens had an entropy
below 4 nats (BD3-LM's code does so for every model). That flatters a sampler. So by default nothing is drawn again
here, and every new draw is counted.

Axes: N samples, L length, R rows.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float, Int

from eso_jax.decoding.decoders import Decoded


def unigram_entropy(tokens: Int[np.ndarray, "N L"], last: int = 256,
                    mask: int | None = None) -> Float[np.ndarray, " N"]:
    """Entropy in nats of the distribution of ids among the `last` tokens of each sample that are not the mask."""
    def entropy(row: np.ndarray) -> float:
        _, counts = np.unique(row[row != mask][-last:], return_counts=True)
        p = counts / counts.sum()
        return float(-(p * np.log(p)).sum())

    return np.array([entropy(row) for row in tokens])


def draw_again(draw: Callable[[int, Int[np.ndarray, " R"]], Decoded],
               low: Callable[[Int[np.ndarray, "N L"]], Int[np.ndarray, " R"]], num_samples: int, num_tries: int,
               keep: bool) -> tuple[Decoded, Int[np.ndarray, " N"], bool]:
    """Draws all samples, then again those of low entropy, up to `num_tries` draws in all.

    Args:
      draw: draws these rows, int [R]; the number of the draw, from 0, chooses the random numbers. An interrupt may end
        it after some of the rows, the first.
      low: which rows of these tokens, int [N, L], are to be drawn again.
      keep: an interrupt while samples are drawn again ends the work, and is not raised.

    Returns:
      (the samples, fewer if an interrupt ended the first draw; how often each was drawn, int32; whether an interrupt
      ended the work).
    """
    found = draw(0, np.arange(num_samples))
    tries, cut = np.ones(len(found.tokens), np.int32), len(found.tokens) < num_samples
    for attempt in range(1, 1 if cut else num_tries):
        try:
            rows = low(found.tokens)
            if not len(rows):
                break
            again = draw(attempt, rows)
        except KeyboardInterrupt:
            if not keep:
                raise
            cut = True
            break
        ready = rows[:len(again.tokens)]
        for whole, part in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
            whole[ready] = part
        tries[ready] += 1
        cut = len(ready) < len(rows)
        if cut:
            break
    return found, tries, cut
