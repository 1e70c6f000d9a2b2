"""The engine: a model's weights on a mesh, and the one way in which rows of data pass through them.

Sampling, scores, bounds, conditionals, features and training's validation give the engine a function of a batch. The
engine decides the batch size, pads the rows to divide over the devices, places them, and removes the padding.

Axes: R rows in all, B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from eso_jax import console, sharding
from eso_jax.config import Config
from eso_jax.errors import EsoError, require
from eso_jax.model.params import Weights

BATCH_SIZE = 64  # rows in a batch, by default
REMEDY = ("give a smaller --batch-size (of validation while training: a larger train.accumulate), or split each copy "
          "of the model over more devices by --tensor (mesh.tensor)")


@dataclass(frozen=True, eq=False)
class Engine:
    """A model ready to run.

    Attributes:
      config: the run's.
      weights: folded, and laid out on `mesh` (params.weight_shardings).
      mesh: the devices that share the rows (axes data and fsdp) and the weights (tensor).
      batch_size: rows in a batch, over all devices; rounded up to a multiple of the devices that share the rows.
        Results do not depend on it, except for rounding.
    """

    config: Config
    weights: Weights
    mesh: Mesh
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "must be at least 1")

    def size(self, rows: int, batch_size: int | None = None) -> int:
        """The batch size B for `rows` rows: as few batches as possible, all of one size, for one compilation."""
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        most = _up(batch_size or self.batch_size, shards)
        return _up(-(-rows // -(-rows // most)), shards)

    def rows(self, function: Callable[..., Any], count: int, read: Callable[[np.ndarray], Sequence[np.ndarray]],
             label: str | None = None, size: int | None = None, keep: bool = False) -> Any:
        """Computes function(weights, *arrays) for all rows, batch by batch.

        Args:
          function: from arrays [B, ...] on the mesh to a tree of arrays [B, ...]; called with the mesh in force. Row
            b of its result may depend only on row b of its arguments, since some rows are padding.
          count: R.
          read: gives the arrays [n, ...] of n rows by their numbers, int [n]; each process reads its own rows.
          label: of the progress bar that a terminal shows if there are several batches; None: no bar.
          size: B; None: `self.size(count)`.
          keep: after an interrupt (Ctrl-C) the rows of the finished batches are returned. If none is finished, the
            interrupt is raised.

        Returns:
          The tree with numpy arrays [R, ...], in all processes.

        Raises:
          EsoError: the devices ran out of memory.
        """
        require(count >= 1, "rows", count, "there must be at least one")
        size = self.size(count) if size is None else size
        own, results = sharding.rows_of_process(self.mesh, size), list[Any]()
        with jax.set_mesh(self.mesh), catch_out_of_memory(f"batch_size = {size}", REMEDY):
            try:
                for low in console.bar(range(0, count, size), label is not None and count > size, desc=label,
                                       unit="batch", leave=False):
                    numbers = np.resize(np.arange(low, min(low + size, count)), size)  # padded by rows of the batch
                    arrays = [sharding.put_rows(array, self.mesh, size) for array in read(numbers[own])]
                    found = sharding.fetch(function(self.weights, *arrays))
                    results.append(jax.tree.map(lambda x, low=low: x[:count - low], found))
            except KeyboardInterrupt:
                if not (keep and results):
                    raise
        return jax.tree.map(lambda *parts: np.concatenate(parts), *results)


def _up(n: int, multiple: int) -> int:
    """n rounded up to a multiple."""
    return -(-n // multiple) * multiple


@contextmanager
def catch_out_of_memory(what: str, remedy: str) -> Iterator[None]:
    """Raises an EsoError `what: ... remedy` where a device runs out of memory in its block."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")[:150]
        raise EsoError(f"{what}: not enough memory on a device ({reason}); {remedy}") from error
