"""Attention by the Pallas kernel "splash" that comes with JAX, on TPUs.

It takes any pattern that is known at compile time, and skips blocks of keys that no query sees.

Axes: see eso_jax/model/fused.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eso_jax import sharding
from eso_jax.model.backend import Task
from eso_jax.model.fused import Fused
from eso_jax.model.masks import Pattern

LANES = 128  # slots come in multiples of these
LARGEST_TILE = 512  # slots


@dataclass(frozen=True)
class Splash(Fused):
    """JAX's splash attention.

    Attributes:
      interpret: computes the kernel step by step, anywhere, for tests.
    """

    interpret: bool = False
    name = "splash"
    channels = 1  # the kernel's tiles have 128 lanes, whatever the head size

    def refuse(self, task: Task) -> str | None:
        if not self.interpret and sharding.platform() != "tpu":
            return "for TPUs"
        if task.length % LANES:
            return f"takes multiples of {LANES} slots, not {task.length}"
        exact = self.interpret or task.dtype == jnp.bfloat16
        return None if exact else f"computes in bfloat16, not {jnp.dtype(task.dtype).name}"

    def kernel(self, q: Float[Array, "B S H K"], k: Float[Array, "B L H K"], v: Float[Array, "B L H K"],
               pattern: Pattern, length: Int[Array, " B"] | None, scale: float) -> Float[Array, "B S H K"]:
        # Here, since the module is slow to import, and not there in every build of JAX.
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
        from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

        keys = k.shape[1]
        more = -q.shape[1] % LANES  # slots that were left out and are put back, as queries of zeros
        q = jnp.pad(q, ((0, 0), (more, 0), (0, 0), (0, 0)))
        batch, slots, heads, _ = q.shape
        skip = keys - slots
        mask: masks.Mask
        if pattern.block is None:
            mask = masks.FullMask((slots, keys))
        elif pattern.block == 1:
            mask = masks.CausalMask((slots, keys), offset=skip)
        else:
            # By numpy: JAX would compute it on the mesh in force, whose devices need not be there.
            seen = (np.arange(skip, keys) // pattern.block + 1) * pattern.block
            mask = masks.NumpyMask(np.arange(keys) < seen[:, None])
        queries, tile = tile_of(slots), tile_of(keys)
        attend = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1, interpret=self.interpret,
            block_sizes=splash.BlockSizes(block_q=queries, block_kv=tile, block_q_dkv=queries, block_kv_dkv=tile,
                                          use_fused_bwd_kernel=True))
        segments = None
        if length is not None:  # a query sees the keys of its segment: of 0
            segments = splash.SegmentIds(jnp.zeros((batch, slots), jnp.int32),
                                         (jnp.arange(keys)[None] >= length[:, None]).astype(jnp.int32))
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q * jnp.asarray(scale, q.dtype), k, v))
        with jax.named_scope(f"pairs{computed_pairs(slots, keys, pattern.block)}"):  # for eso_jax/aot/hlo.py
            return jnp.swapaxes(jax.vmap(attend)(q, k, v, segments), 1, 2)[:, more:]


def tile_of(slots: int) -> int:
    """The largest tile that divides the slots."""
    return max(tile for tile in range(LANES, LARGEST_TILE + 1, LANES) if slots % tile == 0)


def computed_pairs(slots: int, keys: int, block: int | None) -> int:
    """Pairs of a query and a key whose scores the kernel makes, of the last `slots` of so many keys: those of the tiles
    in which some query sees some key."""
    queries, tile = tile_of(slots), tile_of(keys)
    last = keys - slots + np.arange(queries, slots + 1, queries) - 1  # query of each row of tiles
    seen = np.full_like(last, keys) if block is None else (last // block + 1) * block
    return int(queries * tile * (-(-seen // tile)).sum())
