"""What is made of logits over the vocabulary, in chunks, so that they never are in memory all at once.

Axes: B batch, L length (or slots of a step), V vocabulary, D width, R parts into which devices split the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eso_jax import sharding
from eso_jax.model.params import Weights, head_split
from eso_jax.model.transformer import head, linear, logits_of, over

LOGITS_AT_ONCE = 2**27  # on a device: half a gigabyte in float32


def nll(weights: Weights, hidden: Float[Array, "B L D"], targets: Int[Array, "B L"],
        mask_id: int) -> Float[Array, "B L"]:
    """-log p of the targets, in nats.

    For the gradient logits are made again, chunk by chunk. That of the kernel and the bias is summed in float32 over
    all rows, whatever the compute type, and rounded once.
    """
    with jax.named_scope("loss"):
        return _nll(head_split(weights.head.kernel), weights.head.bias, hidden, targets, mask_id)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _nll(kernel: Array, bias: Array, hidden: Array, targets: Array, mask_id: int) -> Array:
    return _nll_forward(kernel, bias, hidden, targets, mask_id)[0]


def _nll_forward(kernel: Array, bias: Array, hidden: Array, targets: Array, mask_id: int) -> tuple[Array, Any]:
    """-log p, and what the gradient needs: the probabilities only where they are one chunk."""
    def chunk(hidden: Array, targets: Array) -> tuple[Array, Array, Array]:
        logits = logits_of(kernel, bias, hidden, mask_id)
        # A sum, so that each device looks among its own share of the vocabulary.
        target = jnp.where(over(jnp.arange(len(bias)), logits) == targets[..., None], logits, 0).sum(-1)
        top = logits.max(-1)
        mass = jnp.exp(logits - top[..., None])
        total = mass.sum(-1)
        return top + jnp.log(total) - target, top + jnp.log(total), mass / total[..., None]

    if chunks(hidden, len(bias)) == 1:
        values, total, p = chunk(hidden, targets)
        return values, (kernel, bias, hidden, targets, total, p)
    values, total = in_chunks(lambda *part: chunk(*part)[:2], len(bias), hidden, targets)
    return values, (kernel, bias, hidden, targets, total, None)


def _nll_backward(mask_id: int, residuals: Any, slope: Float[Array, "B L"]) -> tuple[Array, Array, Array, None]:
    """The gradient of a logit is slope x (p - 1 at the target); its two products are of the compute type."""
    kernel, bias, hidden, targets, total, p = residuals
    vocab, shards = len(bias), sharding.batch_shards()

    def chunk(p: Array, hidden: Array, targets: Array, slope: Array) -> tuple[Array, Array, Array]:
        ids = over(jnp.arange(vocab), p)
        change = slope[..., None] * jnp.where(ids == targets[..., None], p - 1, p)
        change = sharding.constrain(jnp.where(ids == mask_id, 0, change), sharding.BATCH, None, "tensor")
        to_bias = change.reshape(shards, -1, vocab).sum(1)
        change = change.astype(hidden.dtype)
        # By the device that holds the rows: what each has is added to the others' once, behind the last chunk.
        to_kernel = jnp.einsum("rnd,rnv->rdv", hidden.reshape(shards, -1, hidden.shape[-1]),
                               change.reshape(shards, -1, vocab), precision="highest",
                               preferred_element_type=jnp.float32)
        return linear(change, kernel.T), sharding.constrain(to_kernel, sharding.BATCH, None, "tensor"), to_bias

    if p is not None:
        to_hidden, to_kernel, to_bias = chunk(p, hidden, targets, slope)
    else:
        def add(sums: tuple[Array, Array], part: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            hidden, targets, total, slope = part
            p = jnp.exp(logits_of(kernel, bias, hidden, mask_id) - total[..., None])
            to_hidden, to_kernel, to_bias = chunk(p, hidden, targets, slope)
            return (sums[0] + to_kernel, sums[1] + to_bias), to_hidden

        none = (sharding.constrain(jnp.zeros((shards, *kernel.shape), jnp.float32), sharding.BATCH, None, "tensor"),
                sharding.constrain(jnp.zeros((shards, vocab), jnp.float32), sharding.BATCH, "tensor"))
        (to_kernel, to_bias), parts = jax.lax.scan(
            add, none, _split(chunks(hidden, vocab), hidden, targets, total, slope))
        to_hidden = _join(parts)
    return to_kernel.sum(0).astype(kernel.dtype), to_bias.sum(0).astype(bias.dtype), to_hidden, None


_nll.defvjp(_nll_forward, _nll_backward)


def likeliest(weights: Weights, hidden: Float[Array, "B L D"], mask_id: int) -> Int[Array, "B L"]:
    """The token of the largest logit."""
    return in_chunks(lambda part: head(weights, part, mask_id).argmax(-1), len(weights.head.bias), hidden)


def in_chunks(function: Callable[..., Any], vocab: int, hidden: Float[Array, "B L D"], *args: Array) -> Any:
    """function(hidden, *args) -> arrays [B, L] for args [B, L, ...], which makes logits of all its slots; chunk by
    chunk along L."""
    count = chunks(hidden, vocab)
    if count == 1:
        return function(hidden, *args)
    return jax.tree.map(_join, jax.lax.map(lambda part: function(*part), _split(count, hidden, *args)))


def chunks(hidden: Float[Array, "B L D"], vocab: int) -> int:
    """The fewest equal parts of the length with at most LOGITS_AT_ONCE on a device, or parts of one slot."""
    batch, length = hidden.shape[:2]
    logits = batch * length * vocab // (sharding.batch_shards() * sharding.tensor_shards())
    return next(n for n in range(1, length + 1) if n == length or length % n == 0 and logits <= n * LOGITS_AT_ONCE)


def _split(count: int, *args: Array) -> tuple[Array, ...]:
    """[B, L, ...] -> [count, B, L / count, ...]"""
    return tuple(jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0) for x in args)


def _join(x: Array) -> Array:
    """The inverse."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])
