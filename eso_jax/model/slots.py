"""Windows of consecutive slots, read and written: all rows at one place, or each row at its own.

Where all rows have one place, these are plain slices, the fastest there are. Elsewhere they are gathers and scatters,
which leave each row on its device.

Axes: B batch, L length, W slots of a window.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

Place = Int[Array, ""] | Int[Array, " B"] | int  # the first slot of a window


def take(x: Shaped[Array, "..."], start: Place, size: int, axis: int = 1, rows: int = 0) -> Shaped[Array, "..."]:
    """The slots start, ..., start + size - 1, which must fit, of an array of rows (axis `rows`) and slots (`axis`)."""
    if jnp.ndim(start) == 0:
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis)

    def one(x: Array, start: Place) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis - (rows < axis))

    return jax.vmap(one, (rows, 0), rows)(x, start)


def put(x: Shaped[Array, "..."], new: Shaped[Array, "..."], start: Place, axis: int = 1,
        rows: int = 0) -> Shaped[Array, "..."]:
    """x with `new` in the slots from `start` on."""
    if jnp.ndim(start) == 0:
        return jax.lax.dynamic_update_slice_in_dim(x, new, start, axis)

    def one(x: Array, new: Array, start: Place) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, new, start, axis - (rows < axis))

    return jax.vmap(one, (rows, rows, 0), rows)(x, new, start)


def numbers(start: Place, size: int) -> Int[Array, "_ W"]:
    """start, ..., start + size - 1; a row for each of the batch, or one for all."""
    return jnp.reshape(jnp.asarray(start), (-1, 1)) + jnp.arange(size)[None]
