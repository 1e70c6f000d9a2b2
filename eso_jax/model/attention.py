"""Attention: who sees whom, computed.

An `Attend` is what the transformer calls in every layer: attend(q, k, v, cache, layer) -> (out, cache). The functions
here make one for each kind of pass, so that the transformer is the same for all of them:

  single_stream(visible)     one sequence and a pattern of eso_jax.model.masks
  two_streams(block, clean)  a noisy and a clean copy of the sequence (sequential pass, exact likelihood, BD3-LM)

and in eso_jax/model/cache.py, cached(offset, visible): the next few tokens against a key-value cache.

Scores and softmax are float32 whatever the compute type. `dense` is the one path so far: plain, in tiles that keep the
scores small.

Axes: B batch, S query slots, L key slots (or the length), H heads, K head size. Keys are kept as [B, H, K, L] and
values as [B, H, L, K], in which both products read memory in order (10 times as fast as [B, L, H, K] on CPU, batch 16).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eso_jax import sharding
from eso_jax.model import masks

Attend = Callable[[Array, Array, Array, Any, Any], tuple[Array, Any]]
Visible = Callable[[Array, Array], Array]  # (query slots, key slots) -> bool

HIDDEN = -1e30  # the score of a key that may not be seen
# Scores at once, of more than a few queries: on CPU, tiles that stay in its cache make long sequences 7 times as fast.
TILE = {"cpu": 2**21}
TILE_ELSEWHERE = 2**28
FEW_QUERIES = 64  # are not tiled: the tiles of a batch copy its keys and values


def dense(q: Float[Array, "B S H K"], k: Float[Array, "B H K L"], v: Float[Array, "B H L K"],
          mask: Bool[Array, "#B S L"], noisy: tuple[Array, Array] | None = None,
          block: int = 1) -> Float[Array, "B S H K"]:
    """Softmax attention under a dense mask [B or 1, S, L] (True: may see). Every query must see some key.

    Args:
      noisy: further keys and values [B, S, H, K], one for each query, who sees those of its own block as well.
      block: queries in a block; divides S.
    """
    mine = tuple(heads_first(x) for x in (q, *(noisy or ())))  # [B, H, S, K] each: what is split with the queries
    batch, heads, slots, size = mine[0].shape
    most = TILE.get(sharding.platform(), TILE_ELSEWHERE) // (heads * k.shape[-1])  # queries in a tile
    if batch * slots <= most or slots <= FEW_QUERIES:
        return _dense(mine, k, v, mask, block)
    s = block * _divisor(slots // block, most // block)
    b = _divisor(batch, most // s)

    def rows(xs: tuple[tuple[Array, ...], Array, Array, Array | None]) -> Array:
        """b rows, s queries at a time."""
        mine, k, v, own = xs
        tiles = tuple(jnp.moveaxis(x.reshape(b, heads, -1, s, size), 2, 0) for x in mine)
        shown = mask if own is None else own
        shown = jnp.moveaxis(shown.reshape(shown.shape[0], -1, s, shown.shape[-1]), 1, 0)
        out = jax.lax.map(jax.checkpoint(lambda tile: _dense(tile[0], k, v, tile[1], block)), (tiles, shown))
        return jnp.moveaxis(out, 0, 1).reshape(b, slots, heads, size)

    own = None if mask.shape[0] == 1 else mask
    xs = jax.tree.map(lambda x: x.reshape(-1, b, *x.shape[1:]), (mine, k, v, own))
    return jax.lax.map(rows, xs).reshape(q.shape)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most` (at least 1)."""
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(most, 1))


def _dense(mine: tuple[Float[Array, "B H S K"], ...], k: Float[Array, "B H K L"], v: Float[Array, "B H L K"],
           mask: Bool[Array, "#B S L"], block: int) -> Float[Array, "B S H K"]:
    q, *noisy = mine
    if not noisy:
        (weights,), total = joint_softmax(scores(q, k, mask))
        return normalize(weigh(weights, v), total, q.dtype)
    q_block, k_block, v_block = (x.reshape(*x.shape[:2], -1, block, x.shape[-1]) for x in mine)  # [B, H, J, block, K]
    own = multiply("bhjqk,bhjlk->bhjql", scaled(q_block), k_block)
    (weights, own_weights), total = joint_softmax(scores(q, k, mask), own.reshape(*q.shape[:3], block))
    own_weights = own_weights.reshape(own.shape).astype(v.dtype)
    out = multiply("bhjql,bhjlk->bhjqk", own_weights, v_block).reshape(q.shape)
    return normalize(weigh(weights, v) + out, total, q.dtype)


def heads_first(x: Float[Array, "B S H K"]) -> Float[Array, "B H S K"]:
    """Queries and values, as the products want them."""
    return jnp.swapaxes(x, 1, 2)


def keys_last(k: Float[Array, "B L H K"]) -> Float[Array, "B H K L"]:
    """Keys, as the products want them."""
    return jnp.transpose(k, (0, 2, 3, 1))


def scaled(q: Float[Array, "*s K"]) -> Float[Array, "*s K"]:
    return q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)


def multiply(dims: str, a: Array, b: Array) -> Array:
    """A product of the compute type in float32."""
    return jnp.einsum(dims, a, b, precision="highest", preferred_element_type=jnp.float32)


def scores(q: Float[Array, "B H S K"], k: Float[Array, "B H K L"],
           mask: Bool[Array, "#B S L"]) -> Float[Array, "B H S L"]:
    """Masked q.k / sqrt(K), in float32."""
    return jnp.where(mask[:, None], multiply("bhsk,bhkl->bhsl", scaled(q), k), HIDDEN)


def joint_softmax(*parts: Float[Array, "B H S _"]) -> tuple[list[Float[Array, "B H S _"]], Float[Array, "B H S"]]:
    """One softmax over the keys of all parts, unnormalized: exp(score - max) per part, and their sum over all keys."""
    top = jax.lax.stop_gradient(jnp.stack([part.max(-1) for part in parts]).max(0))[..., None]
    weights = [jnp.exp(part - top) for part in parts]
    return weights, jnp.stack([w.sum(-1) for w in weights]).sum(0)


def weigh(weights: Float[Array, "B H S L"], v: Float[Array, "B H L K"]) -> Float[Array, "B H S K"]:
    return multiply("bhsl,bhlk->bhsk", weights.astype(v.dtype), v)


def normalize(out: Float[Array, "B H S K"], total: Float[Array, "B H S"], dtype: Any) -> Float[Array, "B S H K"]:
    return jnp.swapaxes(out / total[..., None], 1, 2).astype(dtype)


def single_stream(visible: Visible) -> Attend:
    """Attention within one sequence. `visible` may close over per-row arrays of shape [B, 1, 1]."""

    def local(q: Array, k: Array, v: Array, mask: Array) -> Array:
        return dense(q, keys_last(k), heads_first(v), mask)

    def attend(q: Array, k: Array, v: Array, cache: Any, layer: Any) -> tuple[Array, Any]:
        return sharding.locally(local, (q, k, v), (_pattern(visible, q.shape[1]),)), cache

    return attend


def two_streams(block: int, clean: Int[Array, " B"] | None = None) -> Attend:
    """Attention of [noisy copy, clean copy], 2L slots, as in eso_jax.model.masks; `clean` [B] makes it Eso-LM (A)'s.

    Never 2L x 2L: a clean row scores L keys, and a noisy row L clean keys and the `block` noisy keys of its block.
    """

    def up_to(query: Array, key: Array) -> Array:
        if clean is not None:
            return masks.prefix(query, key, clean[:, None, None])
        return masks.blocks_up_to(query, key, block)

    def before(query: Array, key: Array) -> Array:
        return masks.blocks_before(query, key, block)

    def local(q: Array, k: Array, v: Array, clean_mask: Array, noisy_mask: Array) -> Array:
        (q_noisy, q_clean), (k_noisy, k_clean), (v_noisy, v_clean) = (jnp.split(x, 2, axis=1) for x in (q, k, v))
        keys, values = keys_last(k_clean), heads_first(v_clean)
        return jnp.concatenate([dense(q_noisy, keys, values, noisy_mask, (k_noisy, v_noisy), block),
                                dense(q_clean, keys, values, clean_mask)], axis=1)

    def attend(q: Array, k: Array, v: Array, cache: Any, layer: Any) -> tuple[Array, Any]:
        length = q.shape[1] // 2
        return sharding.locally(local, (q, k, v), (_pattern(up_to, length), _pattern(before, length))), cache

    return attend


def _pattern(visible: Visible, length: int) -> Bool[Array, "_ L L"]:
    slots = jnp.arange(length)
    return visible(slots[None, :, None], slots[None, None, :])
