"""Windows to batches: shuffled and resumable for training, fixed for evaluation."""

from __future__ import annotations

from collections.abc import Iterator

import grain
import numpy as np

from eso_jax.config import require
from eso_jax.data.prepared import Windows


def batches(windows: Windows, batch_size: int, seed: int, process_index: int = 0,
            process_count: int = 1) -> grain.DatasetIterator[np.ndarray]:
    """An endless iterator over this process's rows of the training batches, int32 [batch_size / process_count, length].

    Every epoch holds each window once, in an order of its own. An epoch runs on into the next in mid-batch, so a corpus
    may be smaller than a batch. Process p gets rows [p b, (p + 1) b) of the batch that one process alone would get
    (b = batch_size / process_count), and reads no others.

    `get_state()` is {"next_index": batches drawn}, whatever the process count, and `set_state` continues with exactly
    the next batch. Orbax saves and restores the iterator as it is, but in one file per process: to go on with another
    process count, use `set_state` with the step.

    Args:
      windows: integers [windows, length], windows >= 1; an array, or anything that is indexed by integers [N].
      batch_size: rows over all processes.
      seed: of the shuffle, in [0, 2**32).

    Raises:
      EsoError: the batch doesn't divide among the processes, or the seed is out of range.
    """
    require(batch_size % process_count == 0, "train.batch_size", batch_size,
            f"must be a multiple of the {process_count} processes")
    require(0 <= seed < 2**32, "data.seed", seed, "must be in [0, 2**32)")
    local = batch_size // process_count
    dataset = (
        grain.MapDataset.range(len(windows)).seed(seed).shuffle().repeat()  # a new shuffle for each epoch
        # Batches of local size: every process_count of them make up a global one. There is no remainder, but without
        # drop_remainder grain rounds the length of the endless dataset up to 2**63, too long to slice.
        .batch(local, drop_remainder=True)[process_index::process_count]
        # Windows are read a batch at a time, which for prepared ones is 20 times as fast as one by one.
        .map(lambda rows: windows[rows].astype(np.int32))
    )
    # One read-ahead thread is many times faster than training (experiments/bench_data.py); the small buffer costs a
    # resumed run little to refill.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


def eval_batches(windows: Windows, batch_size: int, limit: int) -> Iterator[np.ndarray]:
    """At most `limit` windows, evenly spaced and in order, the same in every call.

    Args:
      windows: integers [windows, length]; an array, or anything that is indexed by integers [N].
      batch_size: rows in a batch.
      limit: windows in all.

    Yields:
      int32 [<= batch_size, length]; only the last batch may be smaller.
    """
    count = min(limit, len(windows))
    chosen = np.arange(count) * len(windows) // count
    for start in range(0, count, batch_size):
        yield windows[chosen[start:start + batch_size]].astype(np.int32)
