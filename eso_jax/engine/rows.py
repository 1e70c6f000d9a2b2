"""The engine: a model's weights on a mesh, and the one way in which rows of data pass through them.

Sampling, scores, bounds, conditionals, features and training's validation all say what is to be computed of a batch;
how many rows a batch has, how they are padded to divide over the devices, where they are put and what becomes of the
padding is decided here.

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

BATCH_SIZE = 64  # rows that pass together, where nobody says
REMEDY = ("give a smaller --batch-size (of validation while training: a larger train.accumulate), or split each copy "
          "of the model over more devices by --tensor (mesh.tensor)")


@dataclass(frozen=True, eq=False)
class Engine:
    """A model ready to run.

    Attributes:
      config: the run's.
      weights: folded, where `mesh` wants them (params.weight_shardings).
      mesh: the devices that share the rows (axes data and fsdp) and the weights (tensor).
      batch_size: rows that pass together, over all devices; rounded up to a multiple of the devices that share the
        rows. Results do not depend on it, but for rounding.
    """

    config: Config
    weights: Weights
    mesh: Mesh
    batch_size: int = BATCH_SIZE

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "must be at least 1")

    def size(self, rows: int, batch_size: int | None = None) -> int:
        """The rows of a batch when so many are to pass: as few batches as may be, of one size for one compilation."""
        shards = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        most = _up(batch_size or self.batch_size, shards)
        return _up(-(-rows // -(-rows // most)), shards)

    def rows(self, function: Callable[..., Any], count: int, read: Callable[[np.ndarray], Sequence[np.ndarray]],
             label: str | None = None, size: int | None = None, keep: bool = False) -> Any:
        """function(weights, *arrays) of all rows, batch by batch.

        Args:
          function: of arrays [B, ...] on the mesh to a tree of arrays [B, ...]; called with the mesh in force. Row b of
            its result may depend on row b of its arguments alone: some rows are padding.
          count: R.
          read: gives the arrays [n, ...] of n rows by their numbers, int [n]; of several processes, each reads its own.
          label: of the progress bar that a terminal shows of several batches; None: there is none.
          size: B, if not that of `self.size(count)`.
          keep: an interrupt (Ctrl-C) ends the work, and the first rows, whose batches are done, are returned. An
            interrupt before there is any is raised.

        Returns:
          The tree, of numpy arrays [R, ...]; on all processes.

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
