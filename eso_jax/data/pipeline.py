"""Windows to training batches, shuffled and resumable."""

from __future__ import annotations

import grain
import numpy as np
from jaxtyping import Int

from eso_jax.data.prepared import Windows
from eso_jax.errors import require


def batches(windows: Windows, batch_size: int, seed: int,
            rows: Int[np.ndarray, " R"] | None = None) -> grain.DatasetIterator[np.ndarray]:
    """An endless iterator over training batches, or over this process's rows of them: int32 [R, length].

    Every epoch holds each window once, in an order of its own. A batch may hold the end of one epoch and the beginning
    of the next, so a corpus may be smaller than a batch. The windows of a batch do not depend on `rows`; only those of
    `rows` are read.

    `get_state()` is {"next_index": batches drawn}, for any `rows`, and `set_state` continues with exactly the next
    batch. Every training step draws one batch, so the step is the position in the data, for any number of processes.

    Args:
      windows: integers [windows, length], windows >= 1; an array, or anything that is indexed by integers [N].
      batch_size: rows over all processes.
      seed: of the shuffle, in [0, 2**32).
      rows: which rows of each batch to give; None: all.

    Raises:
      EsoError: the seed is out of range.
    """
    require(0 <= seed < 2**32, "data.seed", seed, "must be in [0, 2**32)")
    kept = slice(None) if rows is None else rows
    dataset = (
        grain.MapDataset.range(len(windows)).seed(seed).shuffle().repeat()  # a new shuffle for each epoch
        # There is no remainder, but without drop_remainder grain rounds the endless length up to 2**63, too long.
        .batch(batch_size, drop_remainder=True)
        # Windows are read a batch at a time, which for prepared ones is 20 times as fast as one by one.
        .map(lambda numbers: windows[numbers[kept]].astype(np.int32))
    )
    # One read-ahead thread is many times faster than training (experiments/bench_data.py); the small buffer costs a
    # resumed run little to refill.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))
