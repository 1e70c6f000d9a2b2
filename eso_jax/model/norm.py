"""Layer normalization of the residual stream, and on GPUs a kernel of its own for the gradient.

XLA computes that gradient in five passes over memory, since its kernels reduce along rows or along columns. Written in
Pallas it is one pass: rows are read once, and the sums over rows are accumulated on the way.

Axes: N rows, D width, P programs of the kernel, T rows of a tile.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from eso_jax import sharding
from eso_jax.model.params import Norm

EPSILON = 1e-5
TILE, TILES = 2, 16  # rows of a tile, tiles of a program
WARPS = 4


def layer_norm(x: Float[Array, "N D"], norm: Norm, dtype: Any) -> Float[Array, "N D"]:
    """Layer normalization, computed in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + EPSILON)
    return (normal * norm.scale[None] + norm.bias[None]).astype(dtype)


def stream_and_norm(x: Float[Array, "N D"], norm: Norm, dtype: Any) -> tuple[Float[Array, "N D"], Float[Array, "N D"]]:
    """(x, its `layer_norm`). Use the returned x as the residual stream: the kernel of the norm's gradient then also
    adds the stream's gradient."""
    return _fused(x, norm, dtype, False) if sharding.runs_triton() else (x, layer_norm(x, norm, dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _fused(x: Float[Array, "N D"], norm: Norm, dtype: Any, interpret: bool) -> tuple[Array, Array]:
    return x, layer_norm(x, norm, dtype)


def _forward(x: Array, norm: Norm, dtype: Any, interpret: bool) -> tuple[tuple[Array, Array], Any]:
    return _fused(x, norm, dtype, interpret), (x, norm)


def _backward(dtype: Any, interpret: bool, residuals: tuple[Array, Norm],
              gradients: tuple[Array, Array]) -> tuple[Array, Norm]:
    x, norm = residuals
    local = functools.partial(_gradient, interpret=interpret)
    if sharding.batch_shards() > 1:
        rows = P(sharding.BATCH)
        local = jax.shard_map(local, in_specs=(rows, P(), rows, rows), out_specs=(rows, rows, rows), check_vma=False)
    to_x, to_scale, to_bias = local(x, norm.scale, *gradients)
    return to_x, Norm(to_scale.sum(0), to_bias.sum(0))


_fused.defvjp(_forward, _backward)


def _gradient(x: Float[Array, "N D"], scale: Float[Array, " D"], passed: Float[Array, "N D"],
              gradient: Float[Array, "N D"], interpret: bool) -> tuple[Array, Array, Array]:
    """The gradient of x, `passed` included, and those of scale and bias in P parts."""
    rows, width = x.shape
    parts = jax.ShapeDtypeStruct((-(-rows // (TILE * TILES)), width), jnp.float32)
    return tuple(pl.pallas_call(
        functools.partial(_kernel, width=width), grid=parts.shape[:1], name="norm_gradient", interpret=interpret,
        out_shape=(jax.ShapeDtypeStruct(x.shape, x.dtype), parts, parts),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=2),
    )(x, scale, passed, gradient))


def _kernel(x: Any, scale: Any, passed: Any, gradient: Any, to_x: Any, to_scale: Any, to_bias: Any, *,
            width: int) -> None:
    """One program's rows. The arguments are references to whole arrays; Triton's arrays are of powers of 2."""
    program, column = pl.program_id(0), jnp.arange(2**math.ceil(math.log2(width)))
    inside = column < width
    factor = triton.load(scale.at[column], mask=inside, other=0)

    def tile(number: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        row = (program * TILES + number) * TILE + jnp.arange(TILE)
        at, there = (row[:, None], column[None]), (row < x.shape[0])[:, None] & inside[None]

        def read(ref: Any) -> Float[Array, "T _"]:
            return triton.load(ref.at[at], mask=there, other=0).astype(jnp.float32)

        def mean(values: Array) -> Float[Array, "T 1"]:
            return values.sum(1)[:, None] / width

        wide, slope = read(x), read(gradient)
        centred = jnp.where(there, wide - mean(wide), 0)
        rate = jax.lax.rsqrt(mean(centred * centred) + EPSILON)
        normal, scaled = centred * rate, slope * factor[None]
        back = rate * (scaled - mean(scaled) - normal * mean(scaled * normal))
        triton.store(to_x.at[at], (read(passed) + back).astype(x.dtype), mask=there)
        return sums[0] + (slope * normal).sum(0), sums[1] + slope.sum(0)

    nothing = jnp.zeros(column.shape, jnp.float32)
    for ref, total in zip((to_scale, to_bias), jax.lax.fori_loop(0, TILES, tile, (nothing, nothing)), strict=True):
        triton.store(ref.at[program, column], total, mask=inside)
