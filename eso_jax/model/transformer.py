"""The denoiser: a diffusion transformer whose modulation is constant.

One axis legend for the whole project (a file that counts something else says so at its top):
  B batch   L length   S slots of a pass (L, 2L with two streams, a few when sampling)   V vocabulary, mask included
  D width   H heads    K head size   N layers   T diffusion steps   O orders   C slots of the cache

Everything is a function of *weights*, in which the modulation is folded; see eso_jax/model/params.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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

UNROLLED = 12  # layers in one iteration of the scan, on CPU and GPU


class Training(NamedTuple):
    """What only a training pass does: dropout and rematerialization.

    Attributes:
      dropout: the rate.
      keys: one per row; None if the rate is 0.
      remat: what the backward pass computes again, as `train.remat` has it.
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
      cache: the key-value cache (needs unstacked weights); the tokens are its slots from `offset` on.
      offset: one number for all rows, or one for each.
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
        x, normal = stream_and_norm(x, w.norm1, w.qkv.dtype)
        qkv = linear(normal, w.qkv).reshape(*tokens.shape, *w.qkv.shape[1:])
        with jax.named_scope("attention"):
            if cache is None:
                # Split, not indexed: the gradient is then one concatenation, not a sum of three padded arrays.
                qk, v = jnp.split(qkv, [2], axis=2)
                q, k, v = (part[:, :, 0] for part in (*jnp.split(rotate(qk, rotary), 2, axis=2), v))
                out = attention.attend(q, k, v, view, weights.attention)
            else:  # without the barrier, XLA for GPUs would add up a product's parts once for each of q, k and v
                out, cache = kv.attend(cache, layer, jax.lax.optimization_barrier(qkv), rotary, view, offset)
        x = x + drop(linear(out.reshape(-1, *out.shape[2:]), w.out, axes=2), layer, 0)
        x, normal = stream_and_norm(x, w.norm2, w.qkv.dtype)
        hidden = linear(normal, w.mlp_in.kernel)
        hidden = gelu_linear(hidden + over(w.mlp_in.bias, hidden).astype(hidden.dtype), w.mlp_out.kernel)
        x = x + drop(hidden + over(w.mlp_out.bias, x), layer, 1)
        return (sharding.constrain(x, sharding.BATCH), cache), None

    block = jax.named_scope("block")(block)
    # One axis of rows, here and in the products: on CPU the gradient of a bias is 20 times as fast as with two axes,
    # and that of a product 2.5 times.
    carry = (sharding.constrain(embedding_split(weights.embedding)[tokens.reshape(-1)], sharding.BATCH), cache)
    if (cache is not None and isinstance(cache.backend, Triton) and isinstance(weights.blocks, tuple)
            and few.fits(len(carry[0]), weights.blocks)):  # few rows on one GPU
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
        carry = _scan(block, carry, weights.blocks, "none" if training is None else training.remat)
    x, cache = carry
    x = layer_norm(x, weights.head.norm, weights.head.kernel.dtype)
    return x.reshape(*tokens.shape, -1), cache


def _scan(block: Callable[[Any, Any], tuple[Any, None]], carry: Any, blocks: Block, remat: str) -> Any:
    """The carry after all layers, for stacked weights.

    Unrolled, a step is 30-60% faster on CPU, and on GPU what the backward pass needs is not copied into arrays of all
    layers. Scanned layer by layer, it compiles in half the time on TPU, and rematerialization saves memory.
    """
    count, unroll = blocks.qkv.shape[0], 1
    if remat != "none":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
        block = jax.checkpoint(block, policy=policy, prevent_cse=False)
    elif sharding.platform() != "tpu":
        unroll = max(n for n in range(1, UNROLLED + 1) if count % n == 0)
    return jax.lax.scan(block, carry, (jnp.arange(count), blocks), unroll=unroll)[0]


def head(weights: Weights, hidden: Float[Array, "*s D"], mask_id: int) -> Float[Array, "*s V"]:
    """Float32 logits of hidden states; that of the mask is MASK_LOGIT."""
    return logits_of(head_split(weights.head.kernel), weights.head.bias, hidden, mask_id)


def logits_of(kernel: Float[Array, "D _"], bias: Float[Array, " V"], hidden: Float[Array, "*s D"],
              mask_id: int) -> Float[Array, "*s V"]:
    """The same by a kernel that is already split for its use (params.head_split); columns beyond V are padding."""
    with jax.named_scope("head"):
        logits = linear(hidden, kernel, dtype=jnp.float32)
        logits = sharding.constrain(logits, sharding.BATCH, *[None] * (logits.ndim - 2), "tensor")
        logits = logits[..., :len(bias)] + over(bias, logits)
        return jnp.where(over(jnp.arange(len(bias)) == mask_id, logits), MASK_LOGIT, logits)


def linear(x: Float[Array, "*rows"], w: Float[Array, "*w"], axes: int = 1, dtype: Any = None) -> Float[Array, "*out"]:
    """Contracts the last `axes` axes of x with the first of w.

    With precision="highest" float32 is multiplied as float32 on every backend; bfloat16 is as fast as without. Rows are
    flattened to one axis, which makes the gradient faster on CPU.
    """
    rows = x.shape[:x.ndim - axes]
    out = jnp.tensordot(x.reshape(-1, *x.shape[x.ndim - axes:]), w, axes, precision="highest",
                        preferred_element_type=dtype)
    return out.reshape(*rows, *w.shape[axes:])


def training_of(config: Config, draws: noise.Draws, train: bool) -> Training | None:
    """The `Training` of a pass by these draws; None unless `train`."""
    rate = config.model.dropout
    return Training(rate, draws.per_example(noise.DROPOUT) if rate else None, config.train.remat) if train else None


def natural_positions(tokens: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """0..L-1 in every row."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


@jax.custom_vjp
def gelu_linear(x: Float[Array, "R F"], w: Float[Array, "F D"]) -> Float[Array, "R D"]:
    """gelu(x) w, with GELU by tanh. Only x and w are kept for the gradient, which computes GELU again. It does so by a
    sigmoid, since XLA for CPUs would recognize a second tanh and keep the first; and it adds 0 x gradient, since XLA
    would otherwise compute it in the forward pass and keep that."""
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
    """w with leading axes of size 1, as many axes as x has."""
    return jnp.expand_dims(w, range(x.ndim - w.ndim))
