"""Functions of logits over the vocabulary, computed in chunks, so that all logits are never in memory at once.

Axes: B batch, L length (or slots of a step), V vocabulary, D width, R parts into which devices split the rows,
T tokens of a part, C the tokens of a part for which logits are computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from eso_jax import sharding
from eso_jax.model import softmax
from eso_jax.model.params import Weights, head_split
from eso_jax.model.softmax import MASK_LOGIT
from eso_jax.model.transformer import head, linear, logits_of, over

# Logits in memory, on a device: half a gigabyte in float32, and eight on GPUs, where in one chunk a training step of
# 32 x 1,024 tokens took 76 ms instead of 80 (AR of the paper's size, H200).
LOGITS_AT_ONCE = 2**27
LOGITS_ON_GPU = softmax.MOST
ROOM = 128  # the room for masked tokens is a multiple of this
if_fits = jax.lax.cond  # under a name that a test replaces, to count the operations of the usual branch


def nll(weights: Weights, hidden: Float[Array, "B L D"], targets: Int[Array, "B L"],
        mask_id: int) -> Float[Array, "B L"]:
    """-log p of the targets, in nats.

    The gradient computes the logits again, chunk by chunk. The gradients of kernel and bias are summed in float32 over
    all rows, whatever the compute type, and rounded once.
    """
    return masked_nll(weights, hidden, targets, mask_id, jnp.ones(targets.shape, bool), 1.0)


def masked_nll(weights: Weights, hidden: Float[Array, "B L D"], targets: Int[Array, "B L"], mask_id: int,
               masked: Bool[Array, "B L"], share: float) -> Float[Array, "B L"]:
    """-log p of the masked targets, in nats; 0 for the others, for which no logits are computed.

    Every device gathers its own masked tokens into an array of `room` tokens, nearly always enough. If one device has
    more, the logits of all tokens are computed instead.

    Args:
      share: the share of tokens that are masked, on average.
    """
    batch, length, _ = hidden.shape
    shards = sharding.batch_shards()
    size = room(batch // shards, length, share)
    if batch % shards or size >= batch // shards * length:
        with jax.named_scope("loss"):
            values = _nll(*_padded_head(weights), hidden, targets, mask_id)
        return jnp.where(masked, values, 0)
    with jax.named_scope("loss"):
        by_device = (sharding.constrain(x.reshape(shards, -1, *x.shape[2:]), sharding.BATCH)
                     for x in (hidden, targets, masked))
        values = _some_nll(*_padded_head(weights), *by_device, mask_id, size)
    return values.reshape(batch, length)


def _padded_head(weights: Weights) -> tuple[Float[Array, "D _"], Float[Array, " _"]]:
    """Kernel and bias; on GPUs padded with columns of probability 0, since products of bfloat16 are fast there only if
    rows begin at multiples of 16 bytes. With 50,258 columns the three of the paper's head took 25.7 ms for 32 x 1,024
    tokens on an H200."""
    kernel, bias = head_split(weights.head.kernel), weights.head.bias
    more = -kernel.shape[1] % (128 if sharding.on_gpu() else 1)
    width = kernel.shape[1] + more
    return jnp.pad(kernel, ((0, 0), (0, more))), jnp.pad(bias, (0, width - len(bias)), constant_values=MASK_LOGIT)


def room(rows: int, length: int, share: float) -> int:
    """For how many masked tokens of `rows` rows logits are computed: their mean number, six standard deviations, and
    one row more, since rows may be masked to different degrees. A multiple of 128, or all tokens."""
    tokens = rows * length
    least = share * tokens + 6 * math.sqrt(share * (1 - share) * tokens) + length
    return tokens if share == 1 else min(tokens, -(-math.ceil(least) // ROOM) * ROOM)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _nll(kernel: Array, bias: Array, hidden: Array, targets: Array, mask_id: int) -> Array:
    return _forward(kernel, bias, hidden, targets, mask_id, keep=False)[0]


def _nll_forward(kernel: Array, bias: Array, hidden: Array, targets: Array, mask_id: int) -> tuple[Array, Any]:
    values, total, slopes = _forward(kernel, bias, hidden, targets, mask_id)
    return values, (kernel, bias, hidden, targets, total, slopes)


def _nll_backward(mask_id: int, residuals: Any, factor: Float[Array, "B L"]) -> tuple[Array, Array, Array, None]:
    kernel, bias, hidden, targets, total, slopes = residuals
    return *_backward(kernel, bias, hidden, targets, total, slopes, factor, mask_id), None


_nll.defvjp(_nll_forward, _nll_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _some_nll(kernel: Array, bias: Array, hidden: Float[Array, "R T D"], targets: Int[Array, "R T"],
              masked: Bool[Array, "R T"], mask_id: int, size: int) -> Float[Array, "R T"]:
    """`masked_nll` of T tokens for each of R devices, with room for `size` of them."""
    return _some_forward(kernel, bias, hidden, targets, masked, mask_id, size, keep=False)[0]


def _some_forward(kernel: Array, bias: Array, hidden: Array, targets: Array, masked: Array, mask_id: int,
                  size: int, keep: bool = True) -> tuple[Array, Any]:
    index = jnp.argsort(~masked, axis=1)[:, :size]  # stable: the masked ones, then some others
    fits = masked.sum(1).max() <= size

    def some() -> tuple[Array, Array, tuple[Array, ...] | None]:
        values, total, slopes = _forward(kernel, bias, _take(hidden, index), _take(targets, index), mask_id,
                                          keep)
        return _put(values, index, masked), _put(total, index, masked), slopes

    def every() -> tuple[Array, Array, tuple[Array, ...] | None]:
        values, total, _ = _forward(kernel, bias, hidden, targets, mask_id, keep=False)
        unused = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(some)[2])
        return jnp.where(masked, values, 0), total, unused

    values, total, slopes = if_fits(fits, some, every)
    return values, (kernel, bias, hidden, targets, masked, index, fits, total, slopes)


def _some_backward(mask_id: int, size: int, residuals: Any, factor: Float[Array, "R T"]) -> tuple[Any, ...]:
    kernel, bias, hidden, targets, masked, index, fits, total, slopes = residuals
    factor, total = jnp.where(masked, factor, 0), jnp.where(masked, total, jnp.inf)  # so that the others add nothing

    def some() -> tuple[Array, Array, Array]:
        h, t, z, f = (_take(x, index) for x in (hidden, targets, total, factor))
        to_kernel, to_bias, to_hidden = _backward(kernel, bias, h, t, z, slopes, f, mask_id)
        return to_kernel, to_bias, _put(to_hidden, index, masked)

    def every() -> tuple[Array, Array, Array]:
        return _backward(kernel, bias, hidden, targets, total, None, factor, mask_id)

    return *if_fits(fits, some, every), None, None


_some_nll.defvjp(_some_forward, _some_backward)


def _take(x: Shaped[Array, "R T *s"], index: Int[Array, "R C"]) -> Shaped[Array, "R C *s"]:
    """x[r, index[r]] for each part r."""
    return jnp.take_along_axis(x, _over_rows(index, x), axis=1)


def _put(x: Shaped[Array, "R C *s"], index: Int[Array, "R C"], masked: Bool[Array, "R T"]) -> Shaped[Array, "R T *s"]:
    """The inverse of `_take` for masked tokens; 0 for the others."""
    place = jnp.where(masked, jnp.cumsum(masked, axis=1) - 1, 0)
    return jnp.where(_over_rows(masked, x), _take(x, jnp.minimum(place, index.shape[1] - 1)), 0)


def _over_rows(rows: Array, x: Array) -> Array:
    """rows [R, T] with as many axes as x."""
    return rows.reshape(*rows.shape, *[1] * (x.ndim - 2))


def _forward(kernel: Array, bias: Array, hidden: Array, targets: Array, mask_id: int,
             keep: bool = True) -> tuple[Array, Array, tuple[Array, ...] | None]:
    """(-log p, the logits' log-sum-exps, the gradient of -log p by the logits in chunks, or None).

    The gradient has the compute type. It is kept where that saves time: on GPUs, where all chunks of float32 logits
    would be too large but these, of half the size, are not; elsewhere only if there is one chunk.

    Args:
      keep: whether the gradient may be kept.
    """
    def chunk(hidden: Array, targets: Array) -> tuple[Array, Array, Array]:
        logits = logits_of(kernel, bias, hidden, mask_id)
        # A sum, so that each device uses only its own share of the vocabulary.
        target = jnp.where(over(jnp.arange(len(bias)), logits) == targets[..., None], logits, 0).sum(-1)
        top = logits.max(-1)
        total = top + jnp.log(jnp.exp(logits - top[..., None]).sum(-1))
        return total - target, total, _slope(logits, total, targets, mask_id, hidden.dtype)

    def fused(hidden: Array, targets: Array) -> tuple[Array, Array, Array]:
        with jax.named_scope("head"):
            logits = linear(hidden.reshape(-1, hidden.shape[-1]), kernel, dtype=jnp.float32)
        values, total, slope = softmax.nll_and_slope(logits, bias, targets.reshape(-1), mask_id, hidden.dtype)
        return values.reshape(targets.shape), total.reshape(targets.shape), slope.reshape(*targets.shape, -1)

    count = chunks(hidden, len(bias))
    if not keep or count > 1 and not sharding.on_gpu():
        return *in_chunks(lambda *part: chunk(*part)[:2], len(bias), hidden, targets), None
    parts = [(fused if softmax.here() else chunk)(*part) for part in zip(*_split(count, hidden, targets), strict=True)]
    values, total, slopes = zip(*parts, strict=True)
    return jnp.concatenate(values, 1), jnp.concatenate(total, 1), slopes


def _slope(logits: Array, total: Array, targets: Array, mask_id: int, dtype: Any) -> Array:
    """The gradient of -log p by the logits: p - 1 at the target, else p; 0 at the mask, whose logit is constant."""
    ids, p = over(jnp.arange(logits.shape[-1]), logits), jnp.exp(logits - total[..., None])
    slope = jnp.where(ids == targets[..., None], p - 1, p)
    return sharding.constrain(jnp.where(ids == mask_id, 0, slope), sharding.BATCH, None, "tensor").astype(dtype)


def _backward(kernel: Array, bias: Array, hidden: Array, targets: Array, total: Array,
              slopes: tuple[Array, ...] | None, factor: Array, mask_id: int) -> tuple[Array, Array, Array]:
    """The gradients of kernel, bias and hidden states, of the sum of factor x -log p.

    They are products of the slope, which is of the compute type; the factor goes to the other side, which is smaller.
    To the bias it goes as two numbers of the compute type and six zeros, as if they were hidden states: a sum over the
    rows took as long as the product with the hidden states on an H200.
    """
    shards = sharding.batch_shards()

    def product(rows: Array, slope: Array) -> Array:
        """The product over each device's own rows; the devices' results are added up once, after the last chunk."""
        out = jnp.einsum("rnd,rnv->rdv", rows.astype(hidden.dtype).reshape(shards, -1, rows.shape[-1]),
                         slope.reshape(shards, -1, len(bias)), precision="highest", preferred_element_type=jnp.float32)
        return sharding.constrain(out, sharding.BATCH, None, "tensor")

    def chunk(slope: Array, hidden: Array, factor: Array) -> tuple[Array, tuple[Array, Array]]:
        factor = factor[..., None]
        high = factor.astype(hidden.dtype)
        parts = jnp.concatenate([high, factor - high, jnp.zeros((*high.shape[:2], 6))], -1)
        to_hidden = (linear(slope, kernel.T) * factor).astype(hidden.dtype)
        return to_hidden, (product(hidden * factor, slope), product(parts, slope))

    if slopes is not None:
        by_chunk = [chunk(*part) for part in zip(slopes, *_split(len(slopes), hidden, factor), strict=True)]
        to_hidden = jnp.concatenate([part for part, _ in by_chunk], 1)
        to_head = jax.tree.map(lambda *parts: sum(parts), *(part for _, part in by_chunk))
    else:
        def add(so_far: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            hidden, targets, total, factor = part
            slope = _slope(logits_of(kernel, bias, hidden, mask_id), total, targets, mask_id, hidden.dtype)
            to_hidden, to_head = chunk(slope, hidden, factor)
            return (so_far[0] + to_head[0], so_far[1] + to_head[1]), to_hidden

        kernel_none, bias_none = (sharding.constrain(jnp.zeros((shards, rows, len(bias)), jnp.float32), sharding.BATCH,
                                                     None, "tensor") for rows in (len(kernel), 8))
        to_head, parts = jax.lax.scan(add, (kernel_none, bias_none),
                                      _split(chunks(hidden, len(bias)), hidden, targets, total, factor))
        to_hidden = _join(parts)
    return to_head[0].sum(0).astype(kernel.dtype), to_head[1].sum((0, 1)).astype(bias.dtype), to_hidden


def likeliest(weights: Weights, hidden: Float[Array, "B L D"], mask_id: int) -> Int[Array, "B L"]:
    """The token with the largest logit."""
    return in_chunks(lambda part: head(weights, part, mask_id).argmax(-1), len(weights.head.bias), hidden)


def in_chunks(function: Callable[..., Any], vocab: int, hidden: Float[Array, "B L D"], *args: Array) -> Any:
    """function(hidden, *args), computed chunk by chunk along L. It takes args [B, L, ...], computes the logits of all
    its slots, and returns arrays [B, L, ...]."""
    count = chunks(hidden, vocab)
    if count == 1:
        return function(hidden, *args)
    return jax.tree.map(_join, jax.lax.map(lambda part: function(*part), _split(count, hidden, *args)))


def chunks(hidden: Float[Array, "B L D"], vocab: int) -> int:
    """The smallest number of equal parts of the length whose logits fit the limit of a device; at most parts of one
    slot."""
    batch, length = hidden.shape[:2]
    logits = batch * length * vocab // (sharding.batch_shards() * sharding.tensor_shards())
    most = LOGITS_ON_GPU if sharding.on_gpu() else LOGITS_AT_ONCE
    return next(n for n in range(1, length + 1) if n == length or length % n == 0 and logits <= n * most)


def _split(count: int, *args: Array) -> tuple[Array, ...]:
    """[B, L, ...] -> [count, B, L / count, ...]"""
    return tuple(jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0) for x in args)


def _join(x: Array) -> Array:
    """The inverse of `_split`, of one array."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
