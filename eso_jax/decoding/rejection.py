"""The entropy by which degenerate samples are drawn again, on request.

Some published numbers are of samples that were drawn again, up to ten times, while the last 256 tokens had an entropy
below 4 nats (BD3-LM's code does so for every model). That flatters a sampler. So by default nothing is drawn again
here, and every new draw is counted.

Axes: N samples, L length.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def unigram_entropy(tokens: Int[np.ndarray, "N L"], last: int = 256,
                    mask: int | None = None) -> Float[np.ndarray, " N"]:
    """Entropy in nats of the distribution of ids among the `last` tokens of each sample that are not the mask."""
    def entropy(row: np.ndarray) -> float:
        _, counts = np.unique(row[row != mask][-last:], return_counts=True)
        p = counts / counts.sum()
        return float(-(p * np.log(p)).sum())

    return np.array([entropy(row) for row in tokens])
