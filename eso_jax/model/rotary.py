"""Rotary position embeddings (arXiv:2104.09864).

Axes: B batch, S slots of a pass, H heads, K head size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eso_jax import sharding


def rotary_table(positions: Int[Array, "B S"],
                 head_size: int) -> tuple[Float[Array, "B S 1 1 K"], Float[Array, "B S 1 1 K"]]:
    """(cosines, sines) of position x frequency, base 10^4, float32; each for both halves of a head. The sines of the
    first half are negated."""
    frequencies = 1e4 ** -(np.arange(0, head_size, 2, dtype=np.float32) / head_size)
    angles = positions[..., None, None, None].astype(jnp.float32) * frequencies[None, None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    # Concatenated to arrays: otherwise XLA for CPUs computes them again for every number that they rotate.
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


@jax.custom_vjp
def rotate(x: Float[Array, "B S 2 H K"], rotary: tuple[Array, Array]) -> Float[Array, "B S 2 H K"]:
    """Queries and keys with the pairs (x_j, x_{j + K/2}) rotated by their angles, in float32. The gradient is rotated
    back."""
    cos, sin = rotary
    return (x.astype(jnp.float32) * cos + _swap_halves(x) * sin).astype(x.dtype)


rotate.defvjp(lambda x, rotary: (rotate(x, rotary), rotary),
              lambda rotary, gradient: (rotate(gradient, (rotary[0], -rotary[1])), None))


def _swap_halves(x: Float[Array, "B S 2 H K"]) -> Float[Array, "B S 2 H K"]:
    """x_{j + K/2} in the place of x_j, float32.

    On TPUs by a product with a matrix of ones and zeros, which is exact and is fused with what follows: a swap by
    moving the halves would go through memory, a fifth of the traffic of a training step. Elsewhere by a flip; a roll is
    a concatenation for XLA, which is slower on CPUs.
    """
    size = x.shape[-1]
    if sharding.platform() != "tpu":
        return jnp.flip(x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1), -2).reshape(x.shape)
    swap = jnp.asarray(np.roll(np.eye(size), size // 2, 0), x.dtype)
    return jnp.tensordot(x, swap, 1, precision="highest", preferred_element_type=jnp.float32)
