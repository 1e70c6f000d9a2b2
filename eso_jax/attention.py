"""Attention: who sees whom, computed.

An `Attend` is what the transformer calls in every layer: attend(q, k, v, cache, layer) -> (out, cache). The functions
here make one for each kind of pass, so that the transformer is the same for all of them:

  single_stream(visible)     one sequence and a pattern of eso_jax.masks
  two_streams(block, clean)  a noisy and a clean copy of the sequence (sequential pass, exact likelihood, BD3-LM)

and in eso_jax/cache.py, cached(offset, visible): the next few tokens against a key-value cache.

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

from eso_jax import masks, sharding

Attend = Callable[[Array, Array, Array, Any, Any], tuple[Array, Any]]
Visible = Callable[[Array, Array], Array]  # (query slots, key slots) -> bool

HIDDEN = -1e30  # the score of a key that may not be seen
# Scores at once, of more than a few queries: on CPU, tiles that stay in its cache make long sequences 7 times as fast.
TILE = {"cpu": 2**21}
TILE_ELSEWHERE = 2**28
FEW_QUERIES = 64  # are not tiled: the tiles of a batch copy its keys and values


def dense(q: Float[Array, "B S H K"], k: Float[Array, "B H K L"], v: Float[Array, "B H L K"],
          mask: Bool[Array, "#B S L"]) -> Float[Array, "B S H K"]:
    """Softmax attention under a dense mask [B or 1, S, L] (True: may see). Every query must see some key."""
    queries = heads_first(q)
    batch, heads, slots, size = queries.shape
    most = TILE.get(sharding.platform(), TILE_ELSEWHERE) // (heads * k.shape[-1])  # queries in a tile
    if batch * slots <= most or slots <= FEW_QUERIES:
        return _dense(queries, k, v, mask)
    s = _divisor(slots, most)
    b = _divisor(batch, most // s)

    def rows(xs: tuple[Array, Array, Array, Array | None]) -> Array:
        """b rows, s queries at a time."""
        q, k, v, own = xs
        tiles = jnp.moveaxis(q.reshape(b, heads, -1, s, size), 2, 0)
        shown = mask if own is None else own
        shown = jnp.moveaxis(shown.reshape(shown.shape[0], -1, s, shown.shape[-1]), 1, 0)
        out = jax.lax.map(jax.checkpoint(lambda tile: _dense(tile[0], k, v, tile[1])), (tiles, shown))
        return jnp.moveaxis(out, 0, 1).reshape(b, slots, heads, size)

    xs = tuple(x.reshape(-1, b, *x.shape[1:]) for x in (queries, k, v))
    own = None if mask.shape[0] == 1 else mask.reshape(-1, b, *mask.shape[1:])
    return jax.lax.map(rows, (*xs, own)).reshape(q.shape)


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most` (at least 1)."""
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(most, 1))


def _dense(q: Float[Array, "B H S K"], k: Float[Array, "B H K L"], v: Float[Array, "B H L K"],
           mask: Bool[Array, "#B S L"]) -> Float[Array, "B S H K"]:
    weights, total = joint_softmax(scores(q, k, mask))
    return normalize(weigh(weights[0], v), total, q.dtype)


def heads_first(x: Float[Array, "B S H K"]) -> Float[Array, "B H S K"]:
    """Queries and values, as the products want them."""
    return jnp.swapaxes(x, 1, 2)


def keys_last(k: Float[Array, "B L H K"]) -> Float[Array, "B H K L"]:
    """Keys, as the products want them."""
    return jnp.transpose(k, (0, 2, 3, 1))


def scores(q: Float[Array, "B H S K"], k: Float[Array, "B H K L"],
           mask: Bool[Array, "#B S L"]) -> Float[Array, "B H S L"]:
    """Masked q.k / sqrt(K), in float32."""
    scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    raw = jnp.einsum("bhsk,bhkl->bhsl", scaled, k, precision="highest", preferred_element_type=jnp.float32)
    return jnp.where(mask[:, None], raw, HIDDEN)


def joint_softmax(*parts: Float[Array, "B H S _"]) -> tuple[list[Float[Array, "B H S _"]], Float[Array, "B H S"]]:
    """One softmax over the keys of all parts, unnormalized: exp(score - max) per part, and their sum over all keys."""
    top = jax.lax.stop_gradient(jnp.stack([part.max(-1) for part in parts]).max(0))[..., None]
    weights = [jnp.exp(part - top) for part in parts]
    return weights, jnp.stack([w.sum(-1) for w in weights]).sum(0)


def weigh(weights: Float[Array, "B H S L"], v: Float[Array, "B H L K"]) -> Float[Array, "B H S K"]:
    return jnp.einsum("bhsl,bhlk->bhsk", weights.astype(v.dtype), v, precision="highest",
                      preferred_element_type=jnp.float32)


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
    """Attention of [noisy copy, clean copy], 2L slots, as in eso_jax.masks; `clean` [B] makes it Eso-LM (A)'s.

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
        k_clean, v_clean = keys_last(k_clean), heads_first(v_clean)
        batch, length, heads, size = q_noisy.shape
        out_clean = dense(q_clean, k_clean, v_clean, clean_mask)

        def by_block(x: Array) -> Array:
            return x.reshape(batch * (length // block), block, heads, -1)

        def to_row(x: Array) -> Array:
            return x.reshape(batch, -1, heads, block, x.shape[-1]).swapaxes(1, 2).reshape(batch, heads, length, -1)

        def to_blocks(x: Array) -> Array:
            return x.reshape(batch, heads, -1, block, x.shape[-1]).swapaxes(1, 2).reshape(-1, heads, block, x.shape[-1])

        own = scores(heads_first(by_block(q_noisy)), keys_last(by_block(k_noisy)), jnp.ones((1, block, block), bool))
        clean_scores = scores(heads_first(q_noisy), k_clean, noisy_mask)
        (w_clean, w_own), total = joint_softmax(clean_scores, to_row(own))
        out_own = to_row(weigh(to_blocks(w_own), heads_first(by_block(v_noisy))))
        out_noisy = normalize(weigh(w_clean, v_clean) + out_own, total, q.dtype)
        return jnp.concatenate([out_noisy, out_clean], axis=1)

    def attend(q: Array, k: Array, v: Array, cache: Any, layer: Any) -> tuple[Array, Any]:
        length = q.shape[1] // 2
        return sharding.locally(local, (q, k, v), (_pattern(up_to, length), _pattern(before, length))), cache

    return attend


def _pattern(visible: Visible, length: int) -> Bool[Array, "_ L L"]:
    slots = jnp.arange(length)
    mask = visible(slots[:, None], slots[None, :])
    return mask.reshape(-1, length, length)
