"""Where arrays live: one mesh over all devices, the batch split over it, everything else replicated."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from eso_jax.config import require


def mesh(batch_size: int) -> Mesh:
    """All devices on one "data" axis (Auto: XLA places what is not said)."""
    count = jax.device_count()
    require(batch_size % count == 0, "train.batch_size", batch_size, f"must be a multiple of the {count} devices")
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def put_batch(tokens: np.ndarray, mesh: Mesh) -> jax.Array:
    """A global batch [B, L] from this process's rows."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P("data", None)), tokens)
