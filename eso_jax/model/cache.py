"""The exact key-value cache.

Slots are indexed along the order, not by natural position: a decoding step is then an ordinary pass over the next few
slots. It writes the keys and values of the tokens decoded last (now clean) and of this step's masks; the masks' entries
are overwritten by the next step, whose pass begins at those very slots. Nothing is ever approximate: the entries before
a step's window are those of clean tokens, computed from clean tokens alone.

A cache holds as many slots as are in use, rounded up, and grows now and then (`grown`, a copy): a static slice of a
full-size cache would be copied in every step.

Axes: N layers, B batch, C slots of the cache, S slots of a pass, H heads, K head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from eso_jax import sharding
from eso_jax.config import ModelConfig
from eso_jax.model import slots as windows
from eso_jax.model.masks import View
from eso_jax.model.plain import Plain


@struct.dataclass
class KVCache:
    """Keys (rotated by their natural positions) and values of every layer, one array per layer.

    Attributes:
      keys: N arrays with the axes B, C, H, K, in the order of `backend.key_axes` (where C is called L).
      values: N arrays with these axes, in the order of `backend.value_axes`.
      backend: computes attention over them. Static.
    """

    keys: tuple[Float[Array, "_ _ _ _"], ...]
    values: tuple[Float[Array, "_ _ _ _"], ...]
    backend: Plain = struct.field(pytree_node=False)

    @property
    def slots(self) -> int:
        """C."""
        return self.keys[0].shape[self.backend.key_axes.index("L")]

    def map(self, function: Callable[[Any, str], Any]) -> KVCache:
        """The cache with function(array, its axes) in place of each array."""
        return KVCache(tuple(function(k, self.backend.key_axes) for k in self.keys),
                       tuple(function(v, self.backend.value_axes) for v in self.values), self.backend)


def empty(config: ModelConfig, batch: int, slots: int, dtype: Any = jnp.float32, backend: Plain = Plain()) -> KVCache:
    """A cache of zeros with room for `slots`."""
    sizes = {"B": batch, "L": slots, "H": config.heads, "K": config.head_size}

    def zeros(axes: str) -> tuple[Array, ...]:
        return tuple(jnp.zeros([sizes[axis] for axis in axes], dtype) for _ in range(config.layers))

    return KVCache(zeros(backend.key_axes), zeros(backend.value_axes), backend)


def spec(axes: str) -> PartitionSpec:
    """The PartitionSpec of arrays with these axes: split by rows and heads."""
    return PartitionSpec(*({"B": sharding.BATCH, "H": "tensor"}.get(axis) for axis in axes))


def grown(cache: KVCache, slots: int) -> KVCache:
    """The cache with room for `slots`, at least as many as it has, split over the mesh in force."""
    def pad(x: Array, axes: str) -> Array:
        more = [(0, slots - size if axis == "L" else 0) for axis, size in zip(axes, x.shape, strict=True)]
        return sharding.constrain(jnp.pad(x, more), *spec(axes))

    return cache.map(pad)


def attend(cache: KVCache, layer: int, qkv: Float[Array, "B S 3 H K"], rotary: tuple[Array, Array], view: View,
           offset: windows.Place) -> tuple[Float[Array, "B S H K"], KVCache]:
    """Attention of the slots offset, ..., offset + S - 1, which must fit, over a layer of the cache.

    Queries and keys are rotated by the table `rotary` (eso_jax/model/rotary.py). The S keys and values are written at
    `offset`, which is one number for all rows or one for each.

    Returns:
      The output, and the cache with the new keys and values.
    """
    out, keys, values = cache.backend.extend(qkv, rotary, cache.keys[layer], cache.values[layer], view, offset)
    return out, dataclasses.replace(cache, keys=cache.keys[:layer] + (keys,) + cache.keys[layer + 1:],
                                    values=cache.values[:layer] + (values,) + cache.values[layer + 1:])
