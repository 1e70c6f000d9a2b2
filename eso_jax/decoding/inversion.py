"""The token that two uniforms choose of a row's logits under a rule, in few kernels, on one NVIDIA GPU, in Pallas.

The function is that of eso_jax/decoding/categorical.py, with sums in another order: tokens may differ where a uniform,
or the nucleus's edge, is as near as that.

Many rows are a program each, of one kernel; it reads tiles of the vocabulary again and again. Few rows are shared out
among programs, or most processors would have nothing to do; a round of the search for the nucleus's edge is then a
kernel, whose programs first add up what all have found in the round before.

Axes: R rows, V vocabulary, G programs of a row, N blocks of the vocabulary, E entries of a block or of a program,
T thresholds.
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

TILE = 2048  # entries of a program
DIGIT = 4  # bits of the nucleus's threshold that a round finds
ROUNDS = -(-31 // DIGIT)
WARPS = 8
FEW = 32  # rows; more are a program each
ROW_TILE, ROW_WARPS = 2**14, 16
ROW_DIGIT, BITS = 2, 30  # bits that a round finds, of those of floats up to 1


def fits() -> bool:
    """Whether the mesh in force is one NVIDIA GPU that has the kernels."""
    return sharding.runs_triton() and sharding.batch_shards() * sharding.tensor_shards() == 1


def choose(logits: Float[Array, "R V"], uniforms: Float[Array, "R 2"], temperature: float, top_p: float, min_p: float,
           interpret: bool = False) -> Int[Array, " R"]:
    """A token for each row, by a rule of this temperature, nucleus and min_p."""
    if len(logits) > FEW:
        return _by_row(logits, uniforms, temperature, top_p, min_p, interpret)
    (rows, vocabulary), size = logits.shape, max(1, math.isqrt(logits.shape[1]))
    count, width, programs = -(-vocabulary // size), pl.next_power_of_2(size), -(-vocabulary // TILE)
    high = max(1, TILE // width)  # blocks of a program
    call = functools.partial(pl.pallas_call, interpret=interpret,
                             compiler_params=triton.CompilerParams(num_warps=WARPS))

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), jnp.float32)

    def ints() -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows,), jnp.int32)

    scaled, found = logits / temperature, None
    # Made once: numbers that were made again in every kernel might not be the same to the last bit.
    mass = jax.lax.optimization_barrier(jnp.exp(scaled - scaled.max(1, keepdims=True)))
    for index in range(ROUNDS if top_p < 1 else 0):
        narrow = functools.partial(_narrow, index=index, top_p=top_p)
        low, held = call(narrow, grid=(rows, programs), out_shape=(ints(), floats(programs, 2**DIGIT)), name="narrow")(
            mass, found)
        found = (held if found is None else found[0]), low, held
    add = functools.partial(_add, high=high, width=width, size=size, top_p=top_p, min_p=min_p)
    edge, sums = call(add, grid=(rows, -(-count // high)), out_shape=(floats(), floats(count)), name="add")(
        mass, found)
    one = functools.partial(_choose, width=width, size=size)
    return call(one, grid=(rows,), out_shape=ints(), name="choose")(mass, edge, sums, uniforms)


def _narrow(masses: Any, found: Any, low: Any, held: Any, *, index: int, top_p: float) -> None:
    """The mass from each threshold of a round on, of a program's entries. The arguments are references to whole arrays,
    here and below."""
    row, program, value = pl.program_id(0), pl.program_id(1), jnp.arange(2**DIGIT)
    mass = _read(masses, program * TILE + jnp.arange(TILE), True)
    start = _narrowed(found, index, top_p)
    edges = jax.lax.bitcast_convert_type(start + (value << _place(index)), jnp.float32)[:, None]
    low[row] = start  # the same of all programs
    held[row, program, value] = jnp.where(mass[None] >= edges, mass[None], 0).sum(1)


def _place(index: int) -> int:
    return max(31 - DIGIT * (index + 1), 0)


def _narrowed(found: Any, index: int, top_p: float) -> Int[Array, ""]:
    """The threshold's bits by the rounds before `index`: the largest from which on there is more than the budget.

    Args:
      found: what the first round found, the threshold before the last round, and what that one found.
    """
    if found is None:
        return jnp.int32(0)
    first, low, held = found
    row, value, count = pl.program_id(0), jnp.arange(2**DIGIT), held.shape[1]
    program = jnp.arange(pl.next_power_of_2(count))[:, None]
    there = (program < count) & (value >= 0)[None]
    total, sums = (triton.load(of.at[row, program, value[None]], mask=there, other=0).sum(0) for of in (first, held))
    budget = top_p * total.max()  # from 0 on
    return low[row] + (((sums > budget) & (value > 0)).astype(jnp.int32).sum() << _place(index - 1))


def _read(masses: Any, entry: Int[Array, "*s"], there: Bool[Array, "*_"] | bool) -> Float[Array, "*s"]:
    return triton.load(masses.at[pl.program_id(0), entry], mask=(entry < masses.shape[1]) & there, other=0)


def _add(masses: Any, found: Any, edge: Any, sums: Any, *, high: int, width: int, size: int, top_p: float,
         min_p: float) -> None:
    """The masses that are kept, of a program's blocks, and the least that is."""
    row, block, lane = pl.program_id(0), pl.program_id(1) * high + jnp.arange(high), jnp.arange(width)
    mass = _read(masses, block[:, None] * size + lane[None], (lane < size)[None])
    least = jnp.float32(min_p)
    if found is not None:
        least = jnp.maximum(jax.lax.bitcast_convert_type(_narrowed(found, ROUNDS, top_p), jnp.float32), least)
    edge[row] = least
    triton.store(sums.at[row, block], jnp.where(mass >= least, mass, 0).sum(1), mask=block < sums.shape[1])


def _choose(masses: Any, edge: Any, sums: Any, uniforms: Any, out: Any, *, width: int, size: int) -> None:
    row, blocks = pl.program_id(0), jnp.arange(pl.next_power_of_2(sums.shape[1]))
    block = _invert(triton.load(sums.at[row, blocks], mask=blocks < sums.shape[1], other=0), uniforms[row, 0])
    lane = jnp.arange(width)
    mass = _read(masses, block * size + lane, lane < size)
    out[row] = block * size + _invert(jnp.where(mass >= edge[row], mass, 0), uniforms[row, 1])


def _by_row(logits: Float[Array, "R V"], uniforms: Float[Array, "R 2"], temperature: float, top_p: float, min_p: float,
            interpret: bool) -> Int[Array, " R"]:
    """The same as `choose`, with one program for each row."""
    kernel = functools.partial(_row, size=max(1, math.isqrt(logits.shape[1])), temperature=temperature, top_p=top_p,
                               min_p=min_p, barrier=not interpret)
    return pl.pallas_call(
        kernel, grid=logits.shape[:1], name="draw", interpret=interpret,
        out_shape=(jax.ShapeDtypeStruct(logits.shape[:1], jnp.int32), jax.ShapeDtypeStruct(logits.shape, jnp.float32)),
        compiler_params=triton.CompilerParams(num_warps=ROW_WARPS))(logits, uniforms)[0]


def _row(logits: Any, uniforms: Any, out: Any, mass: Any, *, size: int, temperature: float, top_p: float,
            min_p: float, barrier: bool) -> None:
    """The token of one row; `mass` is for the kernel's own use."""
    row, vocabulary = pl.program_id(0), logits.shape[1]
    count, width = -(-vocabulary // size), pl.next_power_of_2(size)
    blocks = pl.next_power_of_2(count)
    high = min(blocks, max(1, ROW_TILE // width))  # blocks in a tile
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
            place = BITS - ROW_DIGIT * (index + 1)
            edges = [jax.lax.bitcast_convert_type(low + (value << place), jnp.float32)
                     for value in range(1, 2**ROW_DIGIT)]
            held = over_tiles(lambda tile, _, totals: tuple(
                total + jnp.where(tile >= edge, tile, 0) for total, edge in zip(totals, edges, strict=True)),
                (nothing,) * len(edges))
            return low + (sum((each.sum() > budget).astype(jnp.int32) for each in held) << place)

        bits = jax.lax.fori_loop(0, BITS // ROW_DIGIT, narrow, jnp.int32(0))
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
