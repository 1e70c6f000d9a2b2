"""Attention of a decoding step as one kernel, on NVIDIA GPUs, written in Pallas.

A step's window has few slots, so that a pass waits for kernel launches and for memory, not for products. One kernel
rotates the window's queries and keys, attends over the window and the cache before it, and writes the window's
keys and values into the cache in place. Only tiles of keys that some query sees are read.

The grid is rows x heads x splits. A split takes its share of the tiles; their results are put together by the
logarithms of their sums of exponentials ("flash decoding", Dao et al., 2023). The scores of a tile are made, used and
forgotten, with running maxima and sums ("online softmax", arXiv:1805.02867).

Axes: B batch, S slots of a pass, C slots of the cache, H heads, K head size, P splits, R queries of the kernel (S, and
more that repeat the last), T keys of a tile.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from eso_jax import sharding
from eso_jax.model import masks, slots as windows
from eso_jax.model.backend import Task
from eso_jax.model.masks import Pattern, View
from eso_jax.model.plain import HIDDEN, Plain

MOST_SLOTS = 16  # of a window; wider ones are left to products by XLA. Tensor cores take no fewer than 16 rows
TILE, TILE_BYTES = 64, 2**13  # of keys, at most, so that tiles fit a processor's shared memory
PROGRAMS = 264  # to keep a GPU busy: two for each of an H100's processors
WARPS, STAGES = 4, 3


@dataclass(frozen=True)
class Triton(Plain):
    """The kernel, by Pallas's lowering to Triton; for wide windows what `plain` does.

    Attributes:
      interpret: computes the kernel step by step, anywhere, for tests.
    """

    interpret: bool = False
    name = "triton"
    key_axes = value_axes = "BHLK"

    def refuse(self, task: Task) -> str | None:
        if not self.interpret and not sharding.runs_triton():
            return "for NVIDIA GPUs from Ampere on"
        size = task.head_size
        return None if size >= 16 and size & (size - 1) == 0 else f"takes heads of 16, 32, 64, ..., not {size}"

    def cached(self, q: Float[Array, "B S H K"], k: Float[Array, "B H C K"], v: Float[Array, "B H C K"],
               view: View, offset: windows.Place) -> Float[Array, "B S H K"]:
        return super().cached(q, jnp.swapaxes(k, 2, 3), v, view, offset)

    def one_stream(self, q: Float[Array, "B L H K"], k: Float[Array, "B L H K"], v: Float[Array, "B L H K"],
                   view: View) -> Float[Array, "B L H K"]:
        return Plain().one_stream(q, k, v, view)

    def extend(self, qkv: Float[Array, "B S 3 H K"], rotary: tuple[Array, Array], keys: Float[Array, "B H C K"],
               values: Float[Array, "B H C K"], view: View, offset: windows.Place) -> tuple[Array, Array, Array]:
        batch, slots, _, heads, size = qkv.shape
        if slots > MOST_SLOTS:
            return super().extend(qkv, rotary, keys, values, view, offset)
        assert isinstance(view.pattern, Pattern)
        # The arrays as they are, and half of each table: anything else would need a kernel to make it.
        clean = None if view.pattern == masks.CAUSAL else view.clean
        numbers = tuple(None if x is None else jnp.atleast_1d(x) for x in (offset, clean, view.length))
        table = rotary[0][:, :, 0, 0, :size // 2], rotary[1][:, :, 0, 0, size // 2:]
        step = functools.partial(_step, pattern=view.pattern, interpret=self.interpret)
        if (shards := sharding.batch_shards()) * (tensor := sharding.tensor_shards()) > 1:
            rows = sharding.BATCH if batch % shards == 0 else None
            head = "tensor" if heads % tensor == 0 else None
            kept, own = P(rows, head), jax.tree.map(lambda x: P(rows if len(x) > 1 else None), numbers)
            step = jax.shard_map(step, in_specs=(P(rows, None, None, head), P(rows), kept, kept, own),
                                 out_specs=(P(rows, None, head), kept, kept), check_vma=False)
        return step(qkv, table, keys, values, numbers)


def _step(qkv: Float[Array, "B S 3 H K"], table: tuple[Float[Array, "B S _"], Float[Array, "B S _"]],
          keys: Float[Array, "B H C K"], values: Float[Array, "B H C K"], numbers: tuple[Int[Array, " _"] | None, ...],
          pattern: Pattern,
          interpret: bool) -> tuple[Float[Array, "B S H K"], Float[Array, "B H C K"], Float[Array, "B H C K"]]:
    """The output of the window's queries, and the keys and values with the window written in.

    Args:
      table: cosines and sines, K / 2 of each.
      numbers: the offset, clean slots and length, one for each row or one for all; or None.
    """
    batch, slots, _, heads, size = qkv.shape
    tile = max(16, min(TILE, TILE_BYTES // (size * keys.dtype.itemsize)))
    splits = max(1, min(PROGRAMS // (batch * heads), -(-keys.shape[2] // tile)))
    kernel = functools.partial(_kernel, pattern=pattern, splits=splits, width=tile)
    parts = jax.ShapeDtypeStruct((splits, batch, slots, heads, size), qkv.dtype if splits == 1 else jnp.float32)
    out, total, keys, values = pl.pallas_call(
        kernel, grid=(splits, heads, batch), name="decode_attention", interpret=interpret,
        out_shape=(parts, jax.ShapeDtypeStruct(parts.shape[:-1], jnp.float32),
                   *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (keys, values))),
        input_output_aliases={3: 2, 4: 3}, compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
    )(qkv, *table, keys, values, numbers)
    return out[0] if splits == 1 else _together(out, total, qkv.dtype, interpret), keys, values


def _together(parts: Float[Array, "P B S H K"], total: Float[Array, "P B S H"], dtype: Any,
              interpret: bool) -> Float[Array, "B S H K"]:
    """The mean of the splits' results, weighted by their sums of exponentials, whose logarithms are `total`."""
    splits, batch, slots, heads, size = parts.shape
    most = pl.next_power_of_2(splits)

    def kernel(parts: Any, total: Any, out: Any) -> None:
        row, slot, head = (pl.program_id(axis) for axis in range(3))
        part, dims = jnp.minimum(jnp.arange(most), splits - 1), jnp.arange(size)
        logs = jnp.where(jnp.arange(most) < splits, total[part, row, slot, head], -jnp.inf)
        share = jnp.exp(logs - logs.max())
        result = share[:, None] * parts[part[:, None], row, slot, head, dims[None]]
        out[row, slot, head, dims] = (result.sum(0) / share.sum()).astype(dtype)

    return pl.pallas_call(kernel, grid=(batch, slots, heads), name="put_together", interpret=interpret,
                          out_shape=jax.ShapeDtypeStruct(parts.shape[1:], dtype),
                          compiler_params=triton.CompilerParams(num_warps=WARPS))(parts, total)


def _kernel(qkv: Any, cos: Any, sin: Any, keys: Any, values: Any, numbers: Any, out: Any, total: Any, new_keys: Any,
            new_values: Any, *, pattern: Pattern, splits: int, width: int) -> None:
    """One split of a head of a row. The arguments are references to whole arrays."""
    split, head, row = (pl.program_id(axis) for axis in range(3))
    _, slots, _, _, size = qkv.shape
    length = keys.shape[2]
    offset, clean, stop = (otherwise if each is None else each[row if each.shape[0] > 1 else 0]
                           for each, otherwise in zip(numbers, (0, 0, length), strict=True))
    dims, number = jnp.arange(size), jnp.arange(MOST_SLOTS)
    slot = jnp.minimum(number, slots - 1)[:, None]

    def taken(which: int) -> Float[Array, "R K"]:
        return qkv[row, slot, which, head, dims[None]]

    def turned(which: int) -> Float[Array, "R K"]:  # as rotary.rotate
        half = size // 2
        opposite = qkv[row, slot, which, head, (dims[None] + half) % size].astype(jnp.float32)
        x, y = (angles[row, slot, dims[None] % half] for angles in (cos, sin))
        wide = taken(which).astype(jnp.float32) * x + opposite * jnp.where(dims[None] < half, -y, y)
        return wide.astype(qkv.dtype)

    q = turned(0) * jnp.asarray(size**-0.5, qkv.dtype)
    query = offset + slot

    def merge(carry: tuple[Array, Array, Array], k: Array, v: Array, sees: Array) -> tuple[Array, Array, Array]:
        """The running maxima [R], sums [R] and results [R, K] with some more keys."""
        top, weight, result = carry
        score = jnp.where(sees, _product(q, k.T), HIDDEN)
        higher = jnp.maximum(top, score.max(1))
        new, old = jnp.where(sees, jnp.exp(score - higher[:, None]), 0), jnp.exp(top - higher)
        return higher, old * weight + new.sum(1), old[:, None] * result + _product(new.astype(v.dtype), v)

    # The window's own keys and values are the first split's.
    own_k, own_v = turned(1).astype(keys.dtype), taken(2).astype(values.dtype)
    place = offset + number
    mine = (number < slots) & (split == 0)
    for reference, new in ((new_keys, own_k), (new_values, own_v)):
        triton.store(reference.at[row, head, place[:, None], dims[None]], new,
                     mask=mine[:, None] & (dims >= 0)[None])

    nothing = jnp.full(MOST_SLOTS, HIDDEN), jnp.zeros(MOST_SLOTS), jnp.zeros((MOST_SLOTS, size))
    carry = merge(nothing, own_k.astype(q.dtype), own_v.astype(q.dtype),
                  pattern(query, place[None], clean) & (mine & (place < stop))[None])

    def tile(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        key = index * width + jnp.arange(width)
        at = jnp.minimum(key, length - 1)[:, None]
        k, v = (each[row, head, at, dims[None]].astype(q.dtype) for each in (keys, values))
        others = ((key < offset) | (key >= offset + slots)) & (key < jnp.minimum(stop, length))
        return merge(carry, k, v, pattern(query, key[None], clean) & others[None])

    end = jnp.minimum(_seen(pattern, offset + slots, clean, length), stop)
    tiles = (end + width - 1) // width
    share = (tiles + splits - 1) // splits
    top, weight, result = jax.lax.fori_loop(split * share, jnp.minimum((split + 1) * share, tiles), tile, carry)
    weight = jnp.maximum(weight, 1e-30)  # of a split that sees nothing
    there = (number < slots)[:, None]
    triton.store(out.at[split, row, number[:, None], head, dims[None]], (result / weight[:, None]).astype(out.dtype),
                 mask=there & (dims >= 0)[None])
    triton.store(total.at[split, row, number, head], top + jnp.log(weight), mask=number < slots)


def _seen(pattern: Pattern, end: Array, clean: Any, length: int) -> Array:
    """A bound on the keys: no query of a window that ends at `end` sees the slots from here on."""
    if pattern.block is None:
        return jnp.int32(length)
    last = jnp.minimum((end + pattern.block - 1) // pattern.block * pattern.block, length)
    return jnp.maximum(last, clean) if pattern.prefix else last


def _product(a: Float[Array, "m n"], b: Float[Array, "n k"]) -> Float[Array, "m k"]:
    return jnp.dot(a, b, precision="highest", preferred_element_type=jnp.float32)
