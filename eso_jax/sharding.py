"""Where arrays live: one mesh, Auto axes (XLA places what is not said).

Training splits the batch over "data", which holds all devices, and replicates everything else. Sampling splits the
batch over "data" and the attention heads and the hidden layer of the MLP over "tensor".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from eso_jax.config import ModelConfig, require


def mesh(batch_size: int) -> Mesh:
    """All devices on one "data" axis."""
    count = jax.device_count()
    require(batch_size % count == 0, "train.batch_size", batch_size, f"must be a multiple of the {count} devices")
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))


def sampling_mesh(config: ModelConfig, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices (or those given) on "data" x "tensor", `tensor` of them to a copy of the model."""
    count = len(devices or jax.devices())
    require(tensor >= 1 and count % tensor == 0, "tensor", tensor, f"must divide the {count} devices")
    require(config.heads % tensor == 0, "tensor", tensor, f"must divide the {config.heads} heads")
    return jax.make_mesh((count // tensor, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2,
                         devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def put_batch(tokens: np.ndarray, mesh: Mesh) -> jax.Array:
    """A global batch [B, L] from this process's rows."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P("data", None)), tokens)


OVER_TENSOR = {"qkv": P(None, None, "tensor"), "out": P("tensor"), "mlp_in.kernel": P(None, "tensor"),
               "mlp_in.bias": P("tensor"), "mlp_out.kernel": P("tensor")}


def put_weights(weights: Any, mesh: Mesh) -> Any:
    """Unstacked weights on a sampling mesh: heads and hidden units over "tensor", the rest on every device."""
    def put(path: tuple[Any, ...], w: Array) -> Array:
        name = ".".join(str(part.key) for part in path if hasattr(part, "key")).removeprefix("blocks.")
        return jax.device_put(w, NamedSharding(mesh, OVER_TENSOR.get(name, P())))

    return jax.tree_util.tree_map_with_path(put, weights)


def constrain(x: Array, *axes: str | None) -> Array:
    """x laid out over these axes of the mesh in force (jax.set_mesh); x itself where there is none."""
    names = jax.sharding.get_abstract_mesh().axis_names
    return jax.lax.with_sharding_constraint(x, P(*(a if a in names else None for a in axes))) if names else x
