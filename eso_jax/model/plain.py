"""Attention as it is written down: for every platform and every pattern, and what the other backends are compared with.

Products and softmax in float32 tiles that keep the scores small. It alone keeps keys and values for the decoding loop,
and owns their layout: the key-value cache (eso_jax/model/cache.py) asks it.

Axes: B batch, S query slots, L key slots (or the length), H heads, K head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from eso_jax import sharding
from eso_jax.model import slots as windows
from eso_jax.model.backend import Backend, Task
from eso_jax.model.masks import Pattern, TwoStreams, View
from eso_jax.model.rotary import rotate

HIDDEN = -1e30  # the score of a key that may not be seen
# Scores at once, of more than a few queries: on CPU, tiles that stay in its cache make long sequences 7 times as fast.
TILE = {"cpu": 2**21}
TILE_ELSEWHERE = 2**28
PART, PARTS = 256, 4  # queries, and their parts, at most: more save little, and each is compiled on its own
FEW_QUERIES = 64  # are not tiled: the tiles of a batch copy its keys and values


def arrange(x: Float[Array, "B L H K"], axes: str) -> Float[Array, "_ _ _ _"]:
    """Keys or values, laid out as a backend keeps them."""
    return jnp.transpose(x, tuple("BLHK".index(axis) for axis in axes))


@dataclass(frozen=True)
class Plain(Backend):
    """Products and a softmax, as they are written down. Both products read keys and values in order: 10 times as fast
    as kept in [B, L, H, K] on CPU, batch 16.

    Attributes:
      key_axes: the axes of keys as the cache keeps them, a permutation of "BLHK".
      value_axes: those of values.
    """

    name = "plain"
    key_axes = "BHKL"
    value_axes = "BHLK"

    def refuse(self, task: Task) -> str | None:
        return None

    def one_stream(self, q: Float[Array, "B L H K"], k: Float[Array, "B L H K"], v: Float[Array, "B L H K"],
                   view: View) -> Float[Array, "B L H K"]:
        return self.cached(q, arrange(k, self.key_axes), arrange(v, self.value_axes), view, 0)

    def cached(self, q: Float[Array, "B S H K"], k: Float[Array, "B H K L"], v: Float[Array, "B H L K"],
               view: View, offset: windows.Place) -> Float[Array, "B S H K"]:
        """Attention of the slots offset, ..., offset + S - 1 (of each row, where there is an offset for each) over
        keys and values in the layout of the cache."""
        assert isinstance(view.pattern, Pattern)
        return dense(q, k, v, view, view.pattern, offset)

    def extend(self, qkv: Float[Array, "B S 3 H K"], rotary: tuple[Array, Array], keys: Float[Array, "_ _ _ _"],
               values: Float[Array, "_ _ _ _"], view: View,
               offset: windows.Place) -> tuple[Float[Array, "B S H K"], Array, Array]:
        """As eso_jax.model.cache.attend: what the queries get, and the keys and values with those of the window."""
        qk, v = jnp.split(qkv, [2], axis=2)
        q, k, v = (part[:, :, 0] for part in (*jnp.split(rotate(qk, rotary), 2, axis=2), v))

        def write(old: Array, new: Array, axes: str) -> Array:
            return windows.put(old, arrange(new, axes).astype(old.dtype), offset, axes.index("L"), axes.index("B"))

        keys, values = write(keys, k, self.key_axes), write(values, v, self.value_axes)
        return self.cached(q, keys.astype(q.dtype), values.astype(q.dtype), view, offset), keys, values

    def two_streams(self, q: Float[Array, "B S H K"], k: Float[Array, "B S H K"], v: Float[Array, "B S H K"],
                    view: View) -> Float[Array, "B S H K"]:
        """Never 2L x 2L: a clean row scores L keys, and a noisy row L clean keys and the noisy keys of its block."""
        pattern = view.pattern
        assert isinstance(pattern, TwoStreams)
        (q_noisy, q_clean), (k_noisy, k_clean), (v_noisy, v_clean) = (pattern.split(x) for x in (q, k, v))
        k, v = arrange(k_clean, self.key_axes), arrange(v_clean, self.value_axes)
        return jnp.concatenate([dense(q_noisy, k, v, view, pattern.noisy, pattern.skip, (k_noisy, v_noisy),
                                      pattern.block), dense(q_clean, k, v, view, pattern.clean)], axis=1)


def dense(q: Float[Array, "B S H K"], k: Float[Array, "B H K L"], v: Float[Array, "B H L K"], view: View,
          pattern: Pattern, offset: windows.Place = 0, noisy: tuple[Array, Array] | None = None,
          block: int = 1) -> Float[Array, "B S H K"]:
    """Softmax attention of the slots offset, ..., offset + S - 1 under a pattern of a view. Every query must see some
    key.

    Args:
      noisy: further keys and values [B, S, H, K], one for each query, who sees those of its own block as well.
      block: queries in a block; divides S.
    """
    mine = tuple(heads_first(x) for x in (q, *(noisy or ())))  # [B, H, S, K] each: what is split with the queries
    batch, heads, slots, size = mine[0].shape
    length = k.shape[-1]
    most = TILE.get(sharding.platform(), TILE_ELSEWHERE) // heads  # pairs in a tile
    parts = _parts(slots, offset, length, pattern)
    if len(parts) == 1 and (batch * slots * length <= most or slots <= FEW_QUERIES):
        return _dense(mine, k, v, view.table(pattern, windows.numbers(offset, slots), jnp.arange(length)), block)
    b = _divisor(batch, most // (slots * length))

    def rows(xs: tuple[tuple[Array, ...], Array, Array, View, tuple[Array, ...]]) -> Array:
        """b rows, a tile of queries at a time."""
        mine, k, v, view, own = xs
        begin = own[0] if own else offset

        def part(start: int, stop: int, seen: int) -> Array:
            # Tiles of one turn would not be a loop for XLA, which holds those of all parts in memory at once.
            blocks = (stop - start) // block
            s = block * _divisor(blocks, min(most // (b * seen * block), blocks // min(2, len(parts))))

            def tile(xs: tuple[tuple[Array, ...], Array]) -> Array:
                mine, first = xs
                mask = view.table(pattern, windows.numbers(begin + first, s), jnp.arange(seen))
                return _dense(mine, k[..., :seen], v[..., :seen, :], mask, block)

            tiles = tuple(jnp.moveaxis(x[:, :, start:stop].reshape(b, heads, -1, s, size), 2, 0) for x in mine)
            out = jax.lax.map(jax.checkpoint(tile), (tiles, jnp.arange(start, stop, s)))
            return jnp.moveaxis(out, 0, 1).reshape(b, stop - start, heads, size)

        return jnp.concatenate([part(*each) for each in parts], axis=1)

    view = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), view)
    own = () if jnp.ndim(offset) == 0 else (offset,)
    xs = jax.tree.map(lambda x: x.reshape(-1, b, *x.shape[1:]), (mine, k, v, view, own))
    return jax.lax.map(rows, xs).reshape(q.shape)


def _parts(slots: int, offset: windows.Place, length: int, pattern: Pattern) -> list[tuple[int, int, int]]:
    """The queries in parts, and how many keys some query of a part may see: (first, last + 1, keys)."""
    if not isinstance(offset, int) or not pattern.ordered:
        return [(0, slots, length)]
    block = pattern.block or 1
    size = block * -(-max(PART, length // PARTS) // block)
    ends = [*range(size - offset % size, slots, size), slots]
    return [(start, end, min(length, offset + end)) for start, end in zip([0, *ends], ends, strict=False)]


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
    """Queries, and the noisy keys and values, as the products want them."""
    return jnp.swapaxes(x, 1, 2)


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
