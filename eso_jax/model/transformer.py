"""The denoiser: a diffusion transformer whose modulation is constant.

One axis legend for the whole project (a file that counts something else says so at its top):
  B batch   L length   S slots of a pass (L, 2L with two streams, a few when sampling)   V vocabulary, mask included
  D width   H heads    K head size   N layers   T diffusion steps   O orders   C slots of the cache

Everything is a function of *weights*, in which the modulation is folded; see eso_jax/model/params.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from eso_jax import noise, sharding
from eso_jax.config import Config
from eso_jax.model import attention, cache as kv, few
from eso_jax.model.masks import View
from eso_jax.model.norm import layer_norm, stream_and_norm
from eso_jax.model.params import Block, Weights, embedding_split, head_split
from eso_jax.model.rotary import rotary_table, rotate
from eso_jax.model.slots import Place
from eso_jax.model.softmax import MASK_LOGIT
from eso_jax.model.triton import Triton

UNROLLED = 12  # layers in one turn of the scan, on CPU and GPU


class Training(NamedTuple):
    """What a training pass does that others do not.

    Attributes:
      dropout: the rate.
      keys: one per row; None if the rate is 0.
      remat: what the backward pass computes again, train.remat.
    """

    dropout: float
    keys: Key[Array, " B"] | None
    remat: str


def trunk(weights: Weights, tokens: Int[Array, "B S"], positions: Int[Array, "B S"], view: View,
          cache: kv.KVCache | None = None, offset: Place = 0,
          training: Training | None = None) -> tuple[Float[Array, "B S D"], kv.KVCache | None]:
    """Everything but the head.

    Args:
      weights: of `fold`, stacked or unstacked.
      tokens: ids in [0, V).
      positions: natural positions in [0, L), for the rotary embedding.
      view: who sees whom.
      cache: the tokens are then its slots from `offset` on, one number for all rows or one for each (needs unstacked
        weights).
      training: dropout and rematerialization of a training pass.

    Returns:
      The hidden states after the last normalization, and the cache.
    """
    rotary = rotary_table(positions, weights.head_size)
    batch = tokens.shape[0]

    def drop(x: Array, layer: Any, site: int) -> Array:
        if training is None or training.keys is None:
            return x
        keys = jax.vmap(lambda key: jax.random.fold_in(key, 2 * layer + site))(training.keys)
        return noise.dropout(x.reshape(batch, -1, x.shape[1]), training.dropout, keys).reshape(x.shape)

    def block(carry: tuple[Array, Any], scanned: tuple[Any, Block]) -> tuple[tuple[Array, Any], None]:
        (x, cache), (layer, w) = carry, scanned  # x: [B S, D]
        # Split, not indexed: the gradient is then one array put together, not three padded and added.
        x, normal = stream_and_norm(x, w.norm1, w.qkv.dtype)
        qkv = linear(normal, w.qkv).reshape(*tokens.shape, *w.qkv.shape[1:])
        with jax.named_scope("attention"):
            if cache is None:
                qk, v = jnp.split(qkv, [2], axis=2)
                q, k, v = (part[:, :, 0] for part in (*jnp.split(rotate(qk, rotary), 2, axis=2), v))
                out = attention.attend(q, k, v, view, weights.attention)
            else:  # with a barrier, or a GPU ends the product, if it is made in parts, once for each
                out, cache = kv.attend(cache, layer, jax.lax.optimization_barrier(qkv), rotary, view, offset)
        x = x + drop(linear(out.reshape(-1, *out.shape[2:]), w.out, axes=2), layer, 0)
        x, normal = stream_and_norm(x, w.norm2, w.qkv.dtype)
        hidden = linear(normal, w.mlp_in.kernel)
        hidden = gelu_linear(hidden + over(w.mlp_in.bias, hidden).astype(hidden.dtype), w.mlp_out.kernel)
        x = x + drop(hidden + over(w.mlp_out.bias, x), layer, 1)
        return (sharding.constrain(x, sharding.BATCH), cache), None

    block = jax.named_scope("block")(block)
    # One row axis, here and in the products: on CPU the gradient of a bias is 20 times as fast as with two, and that of
    # a product 2.5 times.
    carry = (sharding.constrain(embedding_split(weights.embedding)[tokens.reshape(-1)], sharding.BATCH), cache)
    if (cache is not None and isinstance(cache.backend, Triton) and isinstance(weights.blocks, tuple)
            and few.fits(len(carry[0]), weights.blocks)):
        kept = cache

        def attend(layer: int, qkv: Array) -> Array:
            nonlocal kept
            shaped = qkv.reshape(*tokens.shape, 3, -1, weights.head_size)
            out, kept = kv.attend(kept, layer, shaped, rotary, view, offset)
            return out

        x = few.layers(carry[0], weights.blocks, attend, cache.backend.interpret)
        carry = x, kept
    elif isinstance(weights.blocks, tuple):
        for scanned in enumerate(weights.blocks):
            carry, _ = block(carry, scanned)
    else:
        count, remat = weights.blocks.qkv.shape[0], "none" if training is None else training.remat
        # Unrolled, a step is 30-60% faster on CPU, and on GPU what the backward pass needs is not copied into arrays of
        # all layers; scanned, it compiles in half the time on TPU, and however deep the model is. Rematerialization
        # saves memory under a scan alone.
        unroll = 1
        if remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
            block = jax.checkpoint(block, policy=policy, prevent_cse=False)
        elif sharding.platform() != "tpu":
            unroll = max(n for n in range(1, UNROLLED + 1) if count % n == 0)
        carry, _ = jax.lax.scan(block, carry, (jnp.arange(count), weights.blocks), unroll=unroll)
    x, cache = carry
    x = layer_norm(x, weights.head.norm, weights.head.kernel.dtype)
    return x.reshape(*tokens.shape, -1), cache


def head(weights: Weights, hidden: Float[Array, "*s D"], mask_id: int) -> Float[Array, "*s V"]:
    """Float32 logits of hidden states, the mask's set to MASK_LOGIT."""
    return logits_of(head_split(weights.head.kernel), weights.head.bias, hidden, mask_id)


def logits_of(kernel: Float[Array, "D _"], bias: Float[Array, " V"], hidden: Float[Array, "*s D"],
              mask_id: int) -> Float[Array, "*s V"]:
    """As `head`, by a kernel that is laid out for its use (params.head_split); columns beyond V are padding."""
    with jax.named_scope("head"):
        logits = linear(hidden, kernel, dtype=jnp.float32)
        logits = sharding.constrain(logits, sharding.BATCH, *[None] * (logits.ndim - 2), "tensor")
        logits = logits[..., :len(bias)] + over(bias, logits)
        return jnp.where(over(jnp.arange(len(bias)) == mask_id, logits), MASK_LOGIT, logits)


def linear(x: Float[Array, "*rows"], w: Float[Array, "*w"], axes: int = 1, dtype: Any = None) -> Float[Array, "*out"]:
    """Contracts the last `axes` axes of x with the first of w.

    Float32 is multiplied as float32 on every backend; bfloat16 costs no more for it. Rows are flattened first: on CPU
    the gradient of a product with one row axis is 2.5 times as fast as with two.
    """
    rows = x.shape[:x.ndim - axes]
    out = jnp.tensordot(x.reshape(-1, *x.shape[x.ndim - axes:]), w, axes, precision="highest",
                        preferred_element_type=dtype)
    return out.reshape(*rows, *w.shape[axes:])


def training_of(config: Config, draws: noise.Draws, train: bool) -> Training | None:
    """What is special about a training pass; None for others."""
    rate = config.model.dropout
    return Training(rate, draws.per_example(noise.DROPOUT) if rate else None, config.train.remat) if train else None


def natural_positions(tokens: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """0..L-1 in every row."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


@jax.custom_vjp
def gelu_linear(x: Float[Array, "R F"], w: Float[Array, "F D"]) -> Float[Array, "R D"]:
    """GELU by tanh, and a product. For its gradient x alone is kept, and what that needs is made again: by a sigmoid,
    since XLA for CPUs finds a second tanh and keeps the first; and of the gradient too, or it makes that at once."""
    return linear(nn.gelu(x, approximate=True), w)


def _gelu_linear_gradient(kept: tuple[Array, Array], gradient: Float[Array, "R D"]) -> tuple[Array, Array]:
    (x, w), slope = kept, 2 * math.sqrt(2 / math.pi)
    wide = x.astype(jnp.float32) + 0 * gradient[:, :1]
    s = nn.sigmoid(slope * (wide + 0.044715 * wide**3))  # (1 + tanh) / 2
    _, back = jax.vjp(linear, (wide * s).astype(x.dtype), w)
    to_hidden, to_w = back(gradient)
    return (to_hidden * s * (1 + wide * (1 - s) * slope * (1 + 3 * 0.044715 * wide**2))).astype(x.dtype), to_w


gelu_linear.defvjp(lambda x, w: (gelu_linear(x, w), (x, w)), _gelu_linear_gradient)


def over(w: Array, x: Array) -> Array:
    """w with as many axes as x, to be repeated over the first ones."""
    return jnp.expand_dims(w, range(x.ndim - w.ndim))
