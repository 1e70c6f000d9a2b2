"""A layer over the few rows of a decoding step, on one NVIDIA GPU: four products as one kernel each, in Pallas.

A product of few rows is as fast as its weights are read. XLA normalizes, multiplies, adds up parts, adds a bias and the
residual in kernels of their own, each of which takes as long to be launched as to run. Here what comes before and after
a product is in its kernel.

A kernel takes little more time than one read from memory. So a program starts all its reads before it waits for any of
them, and there are enough programs to read all of the weights at once. If one program for each group of columns would
be too few, the sum over D is cut as well: the parts are written separately, and the next kernel adds them up. The
residual stream between the layers is kept in such parts, in float32.

Axes: P parts of a sum, R rows, D entries of a row, N columns.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Float32

from eso_jax import sharding
from eso_jax.model.norm import EPSILON
from eso_jax.model.params import Block, Norm


class Cut(NamedTuple):
    """How a product is shared out among programs.

    Attributes:
      columns: of a program.
      parts: that the sum over D is cut into, at most; 1 where a norm or a GELU is in the kernel.
      warps: of a program.
    """

    columns: int
    parts: int
    warps: int


class Cuts(NamedTuple):
    """The cuts of the four products of a layer."""

    qkv: Cut
    out: Cut
    mlp_in: Cut
    mlp_out: Cut


# By the number of rows up to which they are taken. More than the last are left to products by XLA.
CUTS = {8: Cuts(qkv=Cut(32, 1, 4), out=Cut(32, 2, 4), mlp_in=Cut(32, 1, 8), mlp_out=Cut(32, 4, 8))}
CHUNK = 256  # entries that are multiplied at once
MOST_BYTES = 2048  # of a column in a program, whose weights are all in registers: 1,024 entries in bfloat16


def fits(rows: int, blocks: Sequence[Block]) -> bool:
    """Whether `layers` can compute so many rows on the mesh in force."""
    cuts, w = _cuts(rows), blocks[0]
    if cuts is None or sharding.batch_shards() * sharding.tensor_shards() > 1:
        return False
    depth, size = w.qkv.shape[0], math.prod(w.out.shape[:2])
    hidden = w.mlp_out.kernel.shape[0]
    shapes = (depth, 3 * size), (size, depth), (depth, hidden), (hidden, depth)
    most = MOST_BYTES // w.qkv.dtype.itemsize
    return all(entries % 16 == 0 and entries // _parts(entries, cut) <= most and columns % cut.columns == 0
               for (entries, columns), cut in zip(shapes, cuts, strict=True))


def layers(x: Float[Array, "R D"], blocks: Sequence[Block], attend: Callable[[int, Array], Array],
           interpret: bool = False) -> Float32[Array, "R D"]:
    """The residual stream after all layers of the transformer.

    Args:
      attend: (a layer's number, its queries, keys and values [R, 3 H K]) -> the heads' output, R x H K numbers.
    """
    (rows, depth), cuts = x.shape, _cuts(len(x))
    assert cuts is not None, "ask `fits`"
    run, stream = functools.partial(product, interpret=interpret), x[None].astype(jnp.float32)
    for number, w in enumerate(blocks):
        qkv, = run(stream, w.qkv.reshape(depth, -1), cuts.qkv, w.norm1)
        heads = attend(number, qkv).reshape(1, rows, -1)
        stream = run(heads, w.out.reshape(-1, depth), cuts.out, residual=stream)
        hidden = run(stream, w.mlp_in.kernel, cuts.mlp_in, w.norm2, w.mlp_in.bias, gelu=True)
        stream = run(hidden, w.mlp_out.kernel, cuts.mlp_out, bias=w.mlp_out.bias, residual=stream)
    return stream.sum(0)


def product(x: Float[Array, "_ R D"], w: Float[Array, "D N"], cut: Cut, norm: Norm | None = None,
            bias: Float[Array, " N"] | None = None, gelu: bool = False, residual: Float[Array, "_ R N"] | None = None,
            interpret: bool = False) -> Float[Array, "P R N"]:
    """gelu(norm(x) w + bias) + residual, each of them if it is given; of the weights' type, or float32 with a residual.

    An array with a first axis of parts stands for their sum.
    """
    rows, columns, parts = x.shape[1], w.shape[1], _parts(x.shape[2], cut)
    assert parts == 1 or residual is not None and norm is None and not gelu, cut
    return pl.pallas_call(
        functools.partial(_kernel, cut=cut, gelu=gelu), grid=(columns // cut.columns, parts), name="product",
        out_shape=jax.ShapeDtypeStruct((parts, rows, columns), w.dtype if residual is None else jnp.float32),
        interpret=interpret, compiler_params=triton.CompilerParams(num_warps=cut.warps))(x, w, norm, bias, residual)


def _cuts(rows: int) -> Cuts | None:
    return next((cuts for most, cuts in CUTS.items() if rows <= most), None)


def _parts(entries: int, cut: Cut) -> int:
    return math.gcd(entries // 16, cut.parts)


def _kernel(x: Any, w: Any, norm: Any, bias: Any, residual: Any, out: Any, *, cut: Cut, gelu: bool) -> None:
    """Some columns of a part of the product. The arguments are references to whole arrays."""
    _, rows, depth = x.shape
    part, share = pl.program_id(1), depth // out.shape[0]
    chunk, tile = math.gcd(share, CHUNK), pl.next_power_of_2(rows)
    entries = [part * share + first + jnp.arange(chunk) for first in range(0, share, chunk)]
    column = pl.program_id(0) * cut.columns + jnp.arange(cut.columns)
    height = max(16, tile)  # tensor cores take no fewer rows

    def total(parts: Any, at: Array, height: int) -> Float[Array, "R _"]:
        row = jnp.minimum(jnp.arange(height), rows - 1)[:, None]
        return _sum(parts[index, row, at[None]].astype(jnp.float32) for index in range(parts.shape[0]))

    def over_rows(vector: Any, at: Array, height: int) -> Float[Array, "R _"]:
        """Read as what it meets, since to repeat it is to wait for all warps."""
        return vector[jnp.broadcast_to(at[None], (height, len(at)))].astype(jnp.float32)

    # All that is read, before all else.
    weights = [w[at[:, None], column[None]] for at in entries]
    pieces = [total(x, at, tile) for at in entries]
    affine = [] if norm is None else [(over_rows(norm.scale, at, tile), over_rows(norm.bias, at, tile))
                                      for at in entries]
    nothing = jnp.zeros((height, cut.columns))
    added = nothing if bias is None else jnp.where(part == 0, over_rows(bias, column, height), 0)
    before = nothing if residual is None else jnp.where(part == 0, total(residual, column, height), 0)
    if norm is not None:  # as norm.layer_norm
        mean = _sum(pieces).sum(1, keepdims=True) / depth
        pieces = [piece - mean for piece in pieces]
        slope = jax.lax.rsqrt(_sum(piece**2 for piece in pieces).sum(1, keepdims=True) / depth + EPSILON)
        pieces = [piece * slope * scale + shift for piece, (scale, shift) in zip(pieces, affine, strict=True)]

    def repeated(piece: Float[Array, "_ _"]) -> Float[Array, "R _"]:
        return jnp.broadcast_to(piece.astype(w.dtype)[None], (height // tile, tile, chunk)).reshape(height, chunk)

    result = added + _sum(jnp.dot(repeated(piece), weight, precision="highest", preferred_element_type=jnp.float32)
                          for piece, weight in zip(pieces, weights, strict=True))
    result = (nn.gelu(result, approximate=True) if gelu else result) + before
    number = jnp.arange(height)[:, None]
    triton.store(out.at[part, number, column[None]], result.astype(out.dtype),
                 mask=(number < rows) & (column >= 0)[None])


def _sum(arrays: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, arrays)
