"""-log p and its gradient from logits, on GPUs by a kernel that goes over them once.

XLA makes three passes over the float32 logits, which are the largest array of a training step: for their maxima, for
the sums of their exponentials, and for the gradient. A program of this kernel, written in Pallas, takes one row:
maximum and sum together ("online softmax", arXiv:1805.02867), then the gradient, for which most of the row is still in
the GPU's cache.

Axes: N rows, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from eso_jax import sharding

MASK_LOGIT = -1e6
BLOCK = 8192  # logits at once
WARPS = 16
MOST = 2**31  # logits in all: the kernel counts in 32 bits


def here() -> bool:
    """Whether the program being traced can use the kernel: on a GPU with all logits of a row on one device."""
    return sharding.runs_triton() and sharding.tensor_shards() == 1


def nll_and_slope(logits: Float[Array, "N V"], bias: Float[Array, " V"], targets: Int[Array, " N"], mask_id: int,
                  dtype: Any, interpret: bool = False) -> tuple[Float[Array, " N"], Float[Array, " N"],
                                                                Float[Array, "N V"]]:
    """(-log p of the targets, the logits' log-sum-exps, the gradient of -log p by the logits, of type `dtype`).

    Args:
      logits: float32, without the bias, which is added here; the mask's becomes MASK_LOGIT, and its gradient is 0.
    """
    local = functools.partial(_by_row, mask_id=mask_id, dtype=dtype, interpret=interpret)
    if sharding.batch_shards() > 1:
        rows = P(sharding.BATCH)
        local = jax.shard_map(local, in_specs=(rows, P(), rows), out_specs=(rows, rows, rows), check_vma=False)
    return local(logits, bias, targets)


def _by_row(logits: Float[Array, "N V"], bias: Float[Array, " V"], targets: Int[Array, " N"], mask_id: int, dtype: Any,
            interpret: bool) -> tuple[Float[Array, " N"], Float[Array, " N"], Float[Array, "N V"]]:
    number = jax.ShapeDtypeStruct(targets.shape, jnp.float32)
    return tuple(pl.pallas_call(
        functools.partial(_kernel, mask_id=mask_id), grid=targets.shape, name="nll_and_slope", interpret=interpret,
        out_shape=(number, number, jax.ShapeDtypeStruct(logits.shape, dtype)),
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=2),
    )(logits, bias, targets))


def _kernel(logits: Any, bias: Any, targets: Any, values: Any, totals: Any, slopes: Any, *, mask_id: int) -> None:
    """One row. The arguments are references to whole arrays."""
    row, column, size = pl.program_id(0), jnp.arange(BLOCK), logits.shape[1]
    target, count = targets[row], pl.cdiv(size, BLOCK)

    def read(block: Array) -> tuple[Int[Array, " _"], Float[Array, " _"]]:
        place = block * BLOCK + column
        x = (triton.load(logits.at[row, place], mask=place < size, other=MASK_LOGIT)
             + triton.load(bias.at[place], mask=place < size, other=0))
        return place, jnp.where(place == mask_id, MASK_LOGIT, x)

    def add(block: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        (top, total, found), (place, x) = so_far, read(block)
        higher = jnp.maximum(top, x)
        total = total * jnp.exp(top - higher) + jnp.exp(x - higher)
        return higher, total, found + jnp.where(place == target, x, 0)

    nothing = jnp.zeros(BLOCK, jnp.float32)
    top, total, found = jax.lax.fori_loop(0, count, add, (nothing + 2 * MASK_LOGIT, nothing, nothing))
    highest = top.max()
    log_total = highest + jnp.log((total * jnp.exp(top - highest)).sum())
    values[row] = log_total - found.sum()
    totals[row] = log_total

    def write(block: Array, _: None) -> None:
        place, x = read(block)
        p = jnp.exp(x - log_total)
        slope = jnp.where(place == mask_id, 0, jnp.where(place == target, p - 1, p))
        triton.store(slopes.at[row, place], slope.astype(slopes.dtype), mask=place < size)

    jax.lax.fori_loop(0, count, write, None)
