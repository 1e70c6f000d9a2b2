"""The exact key-value cache.

Slots are indexed along the order, not by natural position: a decoding step is then an ordinary pass over the next few
slots. It writes the keys and values of the tokens decoded last (now clean) and of this step's masks; the masks' entries
are overwritten by the next step, whose pass begins at those very slots. Nothing is ever approximate: the entries before
a step's window are those of clean tokens, computed from clean tokens alone.

A cache holds as many slots as are in use, rounded up, and grows now and then (`grown`, a copy) where a static slice of
a full one would be copied in every step.

Axes: N layers, B batch, C slots of the cache, S slots of a pass, H heads, K head size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from eso_jax.config import ModelConfig
from eso_jax.model.attention import Attend, Visible, dense, heads_first, keys_last


@struct.dataclass
class KVCache:
    """Keys (rotated by their natural positions) and values of every layer, one array per layer.

    Attributes:
      keys: N arrays [B, H, K, C].
      values: N arrays [B, H, C, K].
    """

    keys: tuple[Float[Array, "B H K C"], ...]
    values: tuple[Float[Array, "B H C K"], ...]


def empty(config: ModelConfig, batch: int, slots: int, dtype: Any = jnp.float32) -> KVCache:
    """A cache of zeros with room for `slots`."""
    def zeros(*last: int) -> tuple[Array, ...]:
        return tuple(jnp.zeros((batch, config.heads, *last), dtype) for _ in range(config.layers))

    return KVCache(zeros(config.head_size, slots), zeros(slots, config.head_size))


def grown(cache: KVCache, slots: int) -> KVCache:
    """The same with room for `slots`, at least as many as before."""
    def pad(x: Array, axis: int) -> Array:
        widths = [(0, 0)] * 4
        widths[axis] = (0, slots - x.shape[axis])
        return jnp.pad(x, widths)

    return KVCache(tuple(pad(k, 3) for k in cache.keys), tuple(pad(v, 2) for v in cache.values))


def cached(offset: Int[Array, ""] | int, visible: Visible) -> Attend:
    """Attention of the slots offset, ..., offset + S - 1, which must fit, over the cache under a pattern of slots.

    Writes the S keys and values at `offset` first.
    """

    def attend(q: Array, k: Array, v: Array, cache: KVCache, layer: int) -> tuple[Array, KVCache]:
        def write(old: Array, new: Array, axis: int) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), offset, axis)

        keys = write(cache.keys[layer], keys_last(k), 3)
        values = write(cache.values[layer], heads_first(v), 2)
        mask = visible(offset + jnp.arange(q.shape[1])[:, None], jnp.arange(keys.shape[3])[None, :])
        out = dense(q, keys.astype(q.dtype), values.astype(q.dtype), mask[None])
        replaced = dataclasses.replace(cache, keys=cache.keys[:layer] + (keys,) + cache.keys[layer + 1:],
                                       values=cache.values[:layer] + (values,) + cache.values[layer + 1:])
        return out, replaced

    return attend
