"""A layer over the few rows of a decoding step, on one NVIDIA GPU: four products as one kernel each, in Pallas.

A product of few rows is as fast as its weights are read. XLA normalizes, multiplies, adds up parts, adds a bias and the
residual in kernels of their own, each of which takes as long to be launched as to run. Here what comes before and after
a product is in its kernel.

Axes: R rows, D entries of a row, N columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from eso_jax import sharding
from eso_jax.model.params import Block, Norm

MOST_ROWS = 32
COLUMNS, CHUNK = 32, 256  # of the weights that a program reads at once; of float32, half as long a part
WARPS, STAGES = 4, 3  # of 32 rows one less: all then fits a processor's shared memory, 99 KiB on the smaller cards


def fits(rows: int, w: Block) -> bool:
    """Whether `layer` can compute so many rows on the mesh in force."""
    depths = w.mlp_in.kernel.shape[0], w.mlp_out.kernel.shape[0], math.prod(w.out.shape[:2])
    return (rows <= MOST_ROWS and all(math.gcd(depth, CHUNK) >= 16 for depth in depths)
            and sharding.batch_shards() * sharding.tensor_shards() == 1)


def layer(x: Float[Array, "R D"], w: Block, attend: Callable[[Array], Array], interpret: bool) -> Float[Array, "R D"]:
    """A layer of the transformer, where `attend` makes of queries, keys and values [R, 3 H K] what the heads get."""
    rows, depth = x.shape
    heads = attend(product(x, w.qkv.reshape(depth, -1), w.norm1, interpret=interpret)).reshape(rows, -1)
    x = product(heads, w.out.reshape(-1, depth), residual=x, interpret=interpret)
    hidden = product(x, w.mlp_in.kernel, w.norm2, w.mlp_in.bias, True, interpret=interpret)
    return product(hidden, w.mlp_out.kernel, bias=w.mlp_out.bias, residual=x, interpret=interpret)


def product(x: Float[Array, "R D"], w: Float[Array, "D N"], norm: Norm | None = None,
            bias: Float[Array, " N"] | None = None, gelu: bool = False, residual: Float[Array, "R N"] | None = None,
            interpret: bool = False) -> Float[Array, "R N"]:
    """gelu(norm(x) w + bias) + residual, of what is given; of the weights' type, or of the residual's."""
    (rows, depth), columns = x.shape, w.shape[1]
    tile, chunk = max(16, pl.next_power_of_2(rows)), math.gcd(depth, max(16, 2 * CHUNK // w.dtype.itemsize))
    kernel = functools.partial(_kernel, tile=tile, chunk=chunk, gelu=gelu)
    return pl.pallas_call(
        kernel, grid=(-(-columns // COLUMNS),), name="product", interpret=interpret,
        out_shape=jax.ShapeDtypeStruct((rows, columns), (w if residual is None else residual).dtype),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES - (tile > 16)),
    )(x, w, norm, bias, residual)


def _kernel(x: Any, w: Any, norm: Any, bias: Any, residual: Any, out: Any, *, tile: int, chunk: int,
            gelu: bool) -> None:
    """Some columns of the product. The arguments are references to whole arrays."""
    (rows, depth), columns = x.shape, w.shape[1]
    row, chunks = jnp.minimum(jnp.arange(tile), rows - 1)[:, None], depth // chunk
    column = pl.program_id(0) * COLUMNS + jnp.arange(COLUMNS)
    at = jnp.minimum(column, columns - 1)

    def entries(index: Any) -> Array:
        return index * chunk + jnp.arange(chunk)

    def part(index: Any) -> Float[Array, "R _"]:
        return x[row, entries(index)[None]].astype(jnp.float32)

    def over_parts(function: Any) -> Float[Array, " R"]:
        return jax.lax.fori_loop(0, chunks, lambda i, total: total + function(part(i)).sum(1), jnp.zeros(tile)) / depth

    if norm is not None:  # as transformer._layer_norm
        mean = over_parts(lambda piece: piece)[:, None]
        slope = jax.lax.rsqrt(over_parts(lambda piece: (piece - mean)**2) + 1e-5)[:, None]

    def add(index: Any, total: Float[Array, "R _"]) -> Float[Array, "R _"]:
        piece = part(index)
        if norm is not None:
            piece = (piece - mean) * slope * norm.scale[entries(index)][None] + norm.bias[entries(index)][None]
        weight = w[entries(index)[:, None], at[None]]
        return total + jnp.dot(piece.astype(weight.dtype), weight, precision="highest",
                               preferred_element_type=jnp.float32)

    total = jax.lax.fori_loop(0, chunks, add, jnp.zeros((tile, COLUMNS)))
    if bias is not None:
        total += bias[at][None].astype(jnp.float32)
    if gelu:
        total = nn.gelu(total, approximate=True)
    if residual is not None:
        total += residual[row, at[None]]
    number = jnp.arange(tile)[:, None]
    triton.store(out.at[number, column[None]], total.astype(out.dtype), mask=(number < rows) & (column < columns)[None])
