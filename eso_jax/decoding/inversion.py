"""The token that two uniforms choose of a row's logits under a rule, in few kernels, on one NVIDIA GPU, in Pallas.

The function is that of eso_jax/decoding/categorical.py, with sums in another order: tokens may differ where a uniform,
or the nucleus's edge, is as near as that.

A row is shared out among programs, or one row would be read by one processor. A round of the search for the nucleus's
edge is one kernel: a program first adds up what all have found in the round before.

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


def fits() -> bool:
    """Whether the mesh in force is one NVIDIA GPU."""
    return sharding.on_gpu() and sharding.batch_shards() * sharding.tensor_shards() == 1


def choose(logits: Float[Array, "R V"], uniforms: Float[Array, "R 2"], temperature: float, top_p: float, min_p: float,
           interpret: bool = False) -> Int[Array, " R"]:
    """A token for each row, by a rule of this temperature, nucleus and min_p."""
    (rows, vocabulary), size = logits.shape, max(1, math.isqrt(logits.shape[1]))
    count, width, programs = -(-vocabulary // size), pl.next_power_of_2(size), -(-vocabulary // TILE)
    high = max(1, TILE // width)  # blocks of a program
    call = functools.partial(pl.pallas_call, interpret=interpret,
                             compiler_params=triton.CompilerParams(num_warps=WARPS))

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), jnp.float32)

    def ints() -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows,), jnp.int32)

    top, found = logits.max(1) / temperature, None
    for index in range(ROUNDS if top_p < 1 else 0):
        narrow = functools.partial(_narrow, index=index, temperature=temperature, top_p=top_p)
        low, held = call(narrow, grid=(rows, programs), out_shape=(ints(), floats(programs, 2**DIGIT)), name="narrow")(
            logits, top, found)
        found = (held if found is None else found[0]), low, held
    add = functools.partial(_add, high=high, width=width, size=size, temperature=temperature, top_p=top_p, min_p=min_p)
    edge, sums = call(add, grid=(rows, -(-count // high)), out_shape=(floats(), floats(count)), name="add")(
        logits, top, found)
    one = functools.partial(_choose, width=width, size=size, temperature=temperature)
    return call(one, grid=(rows,), out_shape=ints(), name="choose")(logits, top, edge, sums, uniforms)


def _narrow(logits: Any, top: Any, found: Any, low: Any, held: Any, *, index: int, temperature: float,
            top_p: float) -> None:
    """The mass from each threshold of a round on, of a program's entries. The arguments are references to whole arrays,
    here and below."""
    row, program, value = pl.program_id(0), pl.program_id(1), jnp.arange(2**DIGIT)
    mass = _masses(logits, top, temperature, program * TILE + jnp.arange(TILE), True)
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


def _masses(logits: Any, top: Any, temperature: float, entry: Int[Array, "*s"],
            there: Bool[Array, "*_"] | bool) -> Float[Array, "*s"]:
    row = pl.program_id(0)
    logit = triton.load(logits.at[row, entry], mask=(entry < logits.shape[1]) & there, other=-jnp.inf)
    return jnp.exp(logit / temperature - top[row])


def _add(logits: Any, top: Any, found: Any, edge: Any, sums: Any, *, high: int, width: int, size: int,
         temperature: float, top_p: float, min_p: float) -> None:
    """The masses that are kept, of a program's blocks, and the least that is."""
    row, block, lane = pl.program_id(0), pl.program_id(1) * high + jnp.arange(high), jnp.arange(width)
    mass = _masses(logits, top, temperature, block[:, None] * size + lane[None], (lane < size)[None])
    least = jnp.float32(min_p)
    if found is not None:
        least = jnp.maximum(jax.lax.bitcast_convert_type(_narrowed(found, ROUNDS, top_p), jnp.float32), least)
    edge[row] = least
    triton.store(sums.at[row, block], jnp.where(mass >= least, mass, 0).sum(1), mask=block < sums.shape[1])


def _choose(logits: Any, top: Any, edge: Any, sums: Any, uniforms: Any, out: Any, *, width: int, size: int,
            temperature: float) -> None:
    row, blocks = pl.program_id(0), jnp.arange(pl.next_power_of_2(sums.shape[1]))
    block = _invert(triton.load(sums.at[row, blocks], mask=blocks < sums.shape[1], other=0), uniforms[row, 0])
    lane = jnp.arange(width)
    mass = _masses(logits, top, temperature, block * size + lane, lane < size)
    out[row] = block * size + _invert(jnp.where(mass >= edge[row], mass, 0), uniforms[row, 1])


def _invert(mass: Float[Array, " M"], u: Float[Array, ""]) -> Int[Array, ""]:
    """As categorical._invert."""
    cumulative, index = jnp.cumsum(mass), jnp.arange(mass.shape[0])
    total = jnp.max(cumulative)  # the last
    first = jnp.min(jnp.where((cumulative > u * total) & (mass > 0), index, np.iinfo(np.int32).max))
    return jnp.minimum(first, jnp.max(jnp.where(mass > 0, index, 0)))
