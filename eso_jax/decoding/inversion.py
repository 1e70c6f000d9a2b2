"""The token that two uniforms choose of a row's logits under a rule, as one kernel: on one NVIDIA GPU, in
Pallas.

The function is that of eso_jax/decoding/categorical.py, with sums in another order: tokens may differ where a uniform,
or the nucleus's edge, is as near as that.

A program has a row. It reads tiles of some blocks of the vocabulary, which stay in the processor's own memory while
they are read again.

Axes: R rows, V vocabulary, N blocks of it, E entries of a block (both rounded up to a power of two).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

from eso_jax import sharding

TILE = 2**14  # masses
DIGIT, BITS = 2, 30  # bits of the nucleus's threshold that a round finds, of those of floats up to 1
WARPS = 16


def fits() -> bool:
    """Whether the mesh in force is one NVIDIA GPU."""
    return sharding.on_gpu() and sharding.batch_shards() * sharding.tensor_shards() == 1


def choose(logits: Float[Array, "R V"], uniforms: Float[Array, "R 2"], temperature: float, top_p: float, min_p: float,
           interpret: bool = False) -> Int[Array, " R"]:
    """A token for each row, by a rule of this temperature, nucleus and min_p."""
    kernel = functools.partial(_kernel, size=max(1, math.isqrt(logits.shape[1])), temperature=temperature, top_p=top_p,
                               min_p=min_p, barrier=not interpret)
    return pl.pallas_call(
        kernel, grid=logits.shape[:1], name="draw", interpret=interpret,
        out_shape=(jax.ShapeDtypeStruct(logits.shape[:1], jnp.int32), jax.ShapeDtypeStruct(logits.shape, jnp.float32)),
        compiler_params=triton.CompilerParams(num_warps=WARPS))(logits, uniforms)[0]


def _kernel(logits: Any, uniforms: Any, out: Any, mass: Any, *, size: int, temperature: float, top_p: float,
            min_p: float, barrier: bool) -> None:
    """The token of one row. The arguments are references to whole arrays; `mass` is for the kernel's own use."""
    row, vocabulary = pl.program_id(0), logits.shape[1]
    count, width = -(-vocabulary // size), pl.next_power_of_2(size)
    blocks = pl.next_power_of_2(count)
    high = min(blocks, max(1, TILE // width))  # blocks in a tile
    lane = jnp.arange(width)

    def entries(block: Int[Array, " N"]) -> tuple[Int[Array, "N E"], Bool[Array, "N E"]]:
        entry = block[:, None] * size + lane[None]
        return entry, (lane < size)[None] & (entry < vocabulary)

    def of_blocks(block: Int[Array, " N"], source: Any = mass, other: float = 0.0) -> Float[Array, "N E"]:
        entry, there = entries(block)
        return triton.load(source.at[row, entry], mask=there, other=other)

    def over_tiles(function: Any, start: Any, *source: Any) -> Any:
        """function(a tile, its blocks, what the tiles before made) of all tiles."""
        def step(index: Array, carry: Any) -> Any:
            block = index * high + jnp.arange(high)
            return function(of_blocks(block, *source), block, carry)

        return jax.lax.fori_loop(0, -(-count // high), step, start)

    nothing = jnp.zeros((high, width))
    top = over_tiles(lambda tile, _, most: jnp.maximum(most, tile), nothing - jnp.inf, logits, -jnp.inf).max()

    def scale(tile: Array, block: Array, carry: Array) -> Array:
        entry, there = entries(block)
        triton.store(mass.at[row, entry], jnp.exp(tile / temperature - top / temperature), mask=there)
        return carry

    over_tiles(scale, jnp.int32(0), logits, -jnp.inf)
    if barrier:  # what one thread has written is read by others
        triton.debug_barrier()
    threshold = jnp.float32(min_p)
    if top_p < 1:
        budget = top_p * over_tiles(lambda tile, _, total: total + tile, nothing).sum()

        def narrow(index: Array, low: Array) -> Array:
            place = BITS - DIGIT * (index + 1)
            edges = [jax.lax.bitcast_convert_type(low + (value << place), jnp.float32)
                     for value in range(1, 2**DIGIT)]
            held = over_tiles(lambda tile, _, totals: tuple(
                total + jnp.where(tile >= edge, tile, 0) for total, edge in zip(totals, edges, strict=True)),
                (nothing,) * len(edges))
            return low + (sum((each.sum() > budget).astype(jnp.int32) for each in held) << place)

        bits = jax.lax.fori_loop(0, BITS // DIGIT, narrow, jnp.int32(0))
        threshold = jnp.maximum(threshold, jax.lax.bitcast_convert_type(bits, jnp.float32))

    def kept(tile: Array) -> Array:
        return jnp.where(tile >= threshold, tile, 0)

    def note(tile: Array, block: Array, sums: Float[Array, " N"]) -> Float[Array, " N"]:
        place = jnp.arange(blocks)[:, None] == block[None]
        return sums + jnp.where(place, kept(tile).sum(1)[None], 0).sum(1)

    block = _invert(over_tiles(note, jnp.zeros(blocks)), uniforms[row, 0])
    chosen = kept(of_blocks(block + jnp.zeros(1, jnp.int32))).sum(0)
    out[row] = block * size + _invert(chosen, uniforms[row, 1])


def _invert(mass: Float[Array, " M"], u: Float[Array, ""]) -> Int[Array, ""]:
    """As categorical._invert."""
    cumulative, index = jnp.cumsum(mass), jnp.arange(mass.shape[0])
    total = jnp.max(cumulative)  # the last
    first = jnp.min(jnp.where((cumulative > u * total) & (mass > 0), index, np.iinfo(np.int32).max))
    return jnp.minimum(first, jnp.max(jnp.where(mass > 0, index, 0)))
