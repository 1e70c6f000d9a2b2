"""The exact key-value cache.

Slots are indexed along the order, not by natural position: a decoding step is then an ordinary causal pass over the
next few slots. It writes the keys and values of the tokens decoded last (now clean) and of this step's masks; the
masks' entries are overwritten by the next step, whose pass begins at those very slots. Nothing is ever approximate:
the entries before a step's window are those of clean tokens, computed causally from clean tokens alone.

Axes: N layers, B batch, C slots of the cache, S slots of a pass, H heads, K head size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from eso_jax import masks
from eso_jax.attention import Attend, dense
from eso_jax.config import ModelConfig


@struct.dataclass
class KVCache:
    """Keys (rotated by their natural positions) and values of every layer, one array per layer.

    Attributes:
      keys: N arrays [B, C, H, K].
      values: N arrays [B, C, H, K].
    """

    keys: tuple[Float[Array, "B C H K"], ...]
    values: tuple[Float[Array, "B C H K"], ...]


def empty(config: ModelConfig, batch: int, slots: int, dtype: Any = jnp.float32) -> KVCache:
    """A cache of zeros: N x [batch, slots, H, K] of keys and of values."""
    shape = (batch, slots, config.heads, config.head_size)
    return KVCache(*(tuple(jnp.zeros(shape, dtype) for _ in range(config.layers)) for _ in range(2)))


def cached(offset: Int[Array, ""] | int, live: int | None = None) -> Attend:
    """Attention of the slots offset, ..., offset + S - 1 over the cache and causally over themselves.

    `live` (static) bounds the slots in use, offset + S <= live <= C; later slots are not read. Writes the S keys and
    values at `offset`.
    """

    def attend(q: Array, k: Array, v: Array, cache: KVCache, layer: int) -> tuple[Array, KVCache]:
        keys = jax.lax.dynamic_update_slice_in_dim(cache.keys[layer], k.astype(cache.keys[layer].dtype), offset, 1)
        values = jax.lax.dynamic_update_slice_in_dim(cache.values[layer], v.astype(keys.dtype), offset, 1)
        width = keys.shape[1] if live is None else live
        mask = masks.causal(offset + jnp.arange(q.shape[1])[:, None], jnp.arange(width)[None, :])
        out = dense(q, keys[:, :width].astype(q.dtype), values[:, :width].astype(q.dtype), mask[None])
        replaced = dataclasses.replace(cache, keys=cache.keys[:layer] + (keys,) + cache.keys[layer + 1:],
                                       values=cache.values[:layer] + (values,) + cache.values[layer + 1:])
        return out, replaced

    return attend
