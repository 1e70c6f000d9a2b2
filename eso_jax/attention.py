"""Attention: who sees whom, computed.

An `Attend` is what the transformer calls in every layer: attend(q, k, v, cache, layer) -> (out, cache). The functions
here make one for each kind of pass, so that the transformer is the same for all of them:

  single_stream(visible)     one sequence and a pattern of eso_jax.masks
  two_streams(block, clean)  a noisy and a clean copy of the sequence (sequential pass, exact likelihood, BD3-LM)

and in eso_jax/cache.py, cached(offset): the next few tokens against a key-value cache.

Scores and softmax are float32 whatever the compute type. `dense` is the slow, plain path that the others are tested
against (so far there are no others).

Axes: B batch, S query slots, L key slots (or the length), H heads, K head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eso_jax import masks

Attend = Callable[[Array, Array, Array, Any, Any], tuple[Array, Any]]
Visible = Callable[[Array, Array], Array]  # (query slots, key slots) -> bool

HIDDEN = -1e30  # the score of a key that may not be seen


def dense(q: Float[Array, "B S H K"], k: Float[Array, "B L H K"], v: Float[Array, "B L H K"],
          mask: Bool[Array, "#B S L"]) -> Float[Array, "B S H K"]:
    """Softmax attention under a dense mask [B or 1, S, L] (True: may see). Every query must see some key."""
    weights, total = joint_softmax(scores(q, k, mask))
    return normalize(weigh(weights[0], v), total, q.dtype)


def scores(q: Float[Array, "B S H K"], k: Float[Array, "B L H K"],
           mask: Bool[Array, "#B S L"]) -> Float[Array, "B H S L"]:
    """Masked q.k / sqrt(K), in float32."""
    scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    raw = jnp.einsum("bshk,blhk->bhsl", scaled, k, precision="highest", preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None], raw, HIDDEN)


def joint_softmax(*parts: Float[Array, "B H S _"]) -> tuple[list[Float[Array, "B H S _"]], Float[Array, "B H S"]]:
    """One softmax over the keys of all parts, unnormalized: exp(score - max) per part, and their sum over all keys."""
    top = jax.lax.stop_gradient(jnp.stack([part.max(-1) for part in parts]).max(0))[..., None]
    weights = [jnp.exp(part - top) for part in parts]
    return weights, jnp.stack([w.sum(-1) for w in weights]).sum(0)


def weigh(weights: Float[Array, "B H S L"], v: Float[Array, "B L H K"]) -> Float[Array, "B S H K"]:
    return jnp.einsum("bhsl,blhk->bshk", weights.astype(v.dtype), v, precision="highest",
                      preferred_element_type=jnp.float32)


def normalize(out: Float[Array, "B S H K"], total: Float[Array, "B H S"], dtype: Any) -> Float[Array, "B S H K"]:
    return (out / jnp.swapaxes(total, 1, 2)[..., None]).astype(dtype)


def single_stream(visible: Visible) -> Attend:
    """Attention within one sequence. `visible` may close over per-row arrays of shape [B, 1, 1]."""

    def attend(q: Array, k: Array, v: Array, cache: Any, layer: Any) -> tuple[Array, Any]:
        return dense(q, k, v, _pattern(visible, q.shape[1])), cache

    return attend


def two_streams(block: int, clean: Int[Array, " B"] | None = None) -> Attend:
    """Attention of [noisy copy, clean copy], 2L slots, as in eso_jax.masks; `clean` [B] makes it Eso-LM (A)'s.

    Never 2L x 2L: a clean row scores L keys, and a noisy row L clean keys and the `block` noisy keys of its block.
    """

    def up_to(query: Array, key: Array) -> Array:
        if clean is not None:
            return masks.prefix(query, key, clean[:, None, None])
        return masks.blocks_up_to(query, key, block)

    def before(query: Array, key: Array) -> Array:
        return masks.blocks_before(query, key, block)

    def attend(q: Array, k: Array, v: Array, cache: Any, layer: Any) -> tuple[Array, Any]:
        (q_noisy, q_clean), (k_noisy, k_clean), (v_noisy, v_clean) = (jnp.split(x, 2, axis=1) for x in (q, k, v))
        batch, length, heads, size = q_noisy.shape
        out_clean = dense(q_clean, k_clean, v_clean, _pattern(up_to, length))

        blocks = (batch * (length // block), block, heads, size)
        own = scores(q_noisy.reshape(blocks), k_noisy.reshape(blocks), jnp.ones((1, block, block), bool))
        own = own.reshape(batch, -1, heads, block, block).swapaxes(1, 2).reshape(batch, heads, length, block)
        (w_clean, w_own), total = joint_softmax(scores(q_noisy, k_clean, _pattern(before, length)), own)
        w_own = w_own.reshape(batch, heads, -1, block, block).swapaxes(1, 2).reshape(-1, heads, block, block)
        out_noisy = weigh(w_clean, v_clean) + weigh(w_own, v_noisy.reshape(blocks)).reshape(q_noisy.shape)
        return jnp.concatenate([normalize(out_noisy, total, q.dtype), out_clean], axis=1), cache

    return attend


def _pattern(visible: Visible, length: int) -> Bool[Array, "_ L L"]:
    slots = jnp.arange(length)
    mask = visible(slots[:, None], slots[None, :])
    return mask.reshape(-1, length, length)
