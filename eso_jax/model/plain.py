"""The reference attention: for every platform and every pattern. The other backends are tested against it.

Scores and softmax are float32, in tiles, so that few scores are in memory at once. `Plain` and its subclasses also keep
keys and values for the decoding loop: the key-value cache (eso_jax/model/cache.py) has their layout.

Axes: B batch, S query slots, L key slots (or the length), H heads, K head size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from eso_jax import sharding
from eso_jax.model import slots as windows
from eso_jax.model.backend import Backend, Task
from eso_jax.model.masks import Pattern, TwoStreams, View
from eso_jax.model.rotary import rotate

HIDDEN = -1e30  # the score of a key that the query does not see
# Scores in one tile: on CPU, tiles that fit its cache make long sequences 7 times as fast.
TILE = {"cpu": 2**21}
TILE_ELSEWHERE = 2**28
PART, PARTS = 256, 4  # least queries of a part, most parts: more save little, and each is compiled on its own
FEW_QUERIES = 64  # so few are not tiled: the tiles of a batch copy its keys and values


def arrange(x: Float[Array, "B L H K"], axes: str) -> Float[Array, "_ _ _ _"]:
    """Keys or values with their axes in the order `axes`, a permutation of "BLHK"."""
    return jnp.transpose(x, tuple("BLHK".index(axis) for axis in axes))


@dataclass(frozen=True)
class Plain(Backend):
    """Products and a softmax. The layout lets both products read keys and values in order: on CPU, batch 16, 10 times
    as fast as from [B, L, H, K].

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
        """Attention of a window over one layer's cache, as eso_jax.model.cache.attend has it.

        Returns:
          The output, and the layer's keys and values with those of the window written in.
        """
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
      noisy: further keys and values [B, S, H, K], one for each query; a query also sees those of its own block.
      block: queries in a block; divides S.
    """
    mine = tuple(heads_first(x) for x in (q, *(noisy or ())))  # [B, H, S, K] each: these are split into tiles
    batch, heads, slots, _ = mine[0].shape
    length = k.shape[-1]
    most = TILE.get(sharding.platform(), TILE_ELSEWHERE) // heads  # pairs in a tile
    parts = _parts(slots, offset, length, pattern)
    if len(parts) == 1 and (batch * slots * length <= most or slots <= FEW_QUERIES):
        mask = view.table(pattern, windows.numbers(offset, slots), jnp.arange(length))
        out, total, _ = _dense(mine, k, v, mask, block)
        return jnp.swapaxes(out / total[..., None], 1, 2).astype(q.dtype)
    rows = _divisor(batch, most // (slots * length))

    def tiled(part: _Part) -> _Part:
        # Tiles of one turn would not be a loop for XLA, which holds those of all parts in memory at once.
        blocks = (part.stop - part.start) // block
        fitting = min(most // (rows * part.keys * block), blocks // min(2, len(parts)))
        return part._replace(tile=block * _divisor(blocks, fitting))

    first, by_row = (offset, None) if isinstance(offset, int) else (0, jnp.reshape(offset, -1))
    numbers = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), (view.clean, view.length, by_row))
    return _tiled(mine, k, v, numbers, _Tiles(pattern, first, block, rows, tuple(map(tiled, parts))))


class _Part(NamedTuple):
    """The queries start, ..., stop - 1, in tiles of `tile`; they see only keys among the first `keys`."""

    start: int
    stop: int
    keys: int
    tile: int = 1


class _Tiles(NamedTuple):
    """How attention is cut: `rows` rows at a time, their queries in parts, and these in tiles."""

    pattern: Pattern
    offset: int  # the first query's slot; 0 if each row has its own
    block: int
    rows: int
    parts: tuple[_Part, ...]


def _parts(slots: int, offset: windows.Place, length: int, pattern: Pattern) -> list[_Part]:
    """One part; up to PARTS, of at least PART queries, if no query sees later blocks."""
    if not isinstance(offset, int) or not pattern.ordered:
        return [_Part(0, slots, length)]
    block = pattern.block or 1
    size = block * -(-max(PART, length // PARTS) // block)
    ends = [*range(size - offset % size, slots, size), slots]
    return [_Part(start, end, min(length, offset + end)) for start, end in zip([0, *ends], ends, strict=False)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _tiled(mine: tuple[Float[Array, "B H S K"], ...], k: Float[Array, "B H K L"], v: Float[Array, "B H L K"],
           numbers: Any, tiles: _Tiles) -> Float[Array, "B S H K"]:
    """Attention in tiles. Its gradient computes the scores again, from their log-sum-exps, which are kept (as in
    arXiv:2205.14135).

    Args:
      mine: queries, and the noisy keys and values if there are any.
      numbers: the view's `clean` and `length`, and the first query's slot; each by row, or None.
    """
    return _tiled_forward(mine, k, v, numbers, tiles)[0]


def _tiled_forward(mine: tuple[Array, ...], k: Array, v: Array, numbers: Any, tiles: _Tiles) -> tuple[Array, Any]:
    def some_rows(xs: Any) -> tuple[Array, Array]:
        mine, k, v, numbers = xs

        def part(part: _Part) -> tuple[Array, Array]:
            def tile(xs: tuple[tuple[Array, ...], Array]) -> tuple[Array, Array]:
                mine, first = xs
                mask = _mask(numbers, tiles, part, first)
                out, total, top = _dense(mine, k[..., :part.keys], v[..., :part.keys, :], mask, tiles.block)
                return (out / total[..., None]).astype(v.dtype), top + jnp.log(total)

            return _untile(jax.lax.map(tile, (_tile(mine, part), _firsts(part))))

        return jax.tree.map(lambda *xs: jnp.concatenate(xs, 2), *map(part, tiles.parts))

    out, sums = jax.tree.map(_merge, jax.lax.map(some_rows, _groups((mine, k, v, numbers), tiles)))
    out = jnp.swapaxes(out, 1, 2)
    return out, (mine, k, v, numbers, out, sums)


def _tiled_backward(tiles: _Tiles, residuals: Any, gradient: Float[Array, "B S H K"]) -> tuple[Any, ...]:
    """With p = exp(scores - log-sum-exp), out = p v and sum p = 1. The gradient is that of out, plus that of sum p
    times -(gradient . out), which accounts for the normalization. It overwrites queries, keys and values, some rows at
    a time: arrays of its own would be in memory from the beginning of the step."""
    mine, k, v, numbers, out, sums = residuals
    shift = jnp.swapaxes(-(gradient.astype(jnp.float32) * out).sum(-1), 1, 2)
    given = _groups((jnp.swapaxes(gradient, 1, 2), sums, shift, numbers), tiles)

    def some_rows(number: Array, arrays: Any) -> Any:
        mine, k, v = jax.tree.map(lambda x: x[number], arrays)
        *split, numbers = jax.tree.map(lambda x: x[number], given)
        to_k, to_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
        to_mine = []
        for part in tiles.parts:
            def tile(so_far: tuple[Array, Array], xs: Any, part: _Part = part) -> tuple[tuple[Array, Array], Any]:
                mine, (gradient, sums, shift), first = xs
                mask = _mask(numbers, tiles, part, first)
                _, back = jax.vjp(lambda mine, k, v: _dense(mine, k, v, mask, tiles.block, sums)[:2], mine,
                                  k[..., :part.keys], v[..., :part.keys, :])
                to_mine, to_k, to_v = back((gradient.astype(jnp.float32), shift))
                return (so_far[0] + to_k, so_far[1] + to_v), to_mine

            seen = to_k[..., :part.keys], to_v[..., :part.keys, :]
            (more_k, more_v), to_tiles = jax.lax.scan(tile, seen, (_tile(mine, part), _tile(tuple(split), part),
                                                                   _firsts(part)))
            to_k, to_v = to_k.at[..., :part.keys].set(more_k), to_v.at[..., :part.keys, :].set(more_v)
            to_mine.append(_untile(to_tiles))
        new = (jax.tree.map(lambda *xs: jnp.concatenate(xs, 2), *to_mine), to_k.astype(k.dtype), to_v.astype(v.dtype))
        return jax.tree.map(lambda x, y: x.at[number].set(y), arrays, new)

    arrays = jax.lax.fori_loop(0, len(k) // tiles.rows, some_rows, _groups((mine, k, v), tiles))
    return *jax.tree.map(_merge, arrays), None


_tiled.defvjp(_tiled_forward, _tiled_backward)


def _groups(tree: Any, tiles: _Tiles) -> Any:
    """[B, ...] -> [B / rows, rows, ...]"""
    return jax.tree.map(lambda x: x.reshape(-1, tiles.rows, *x.shape[1:]), tree)


def _merge(x: Shaped[Array, "G R *s"]) -> Shaped[Array, "B *s"]:
    """The inverse of `_groups`, of one array."""
    return x.reshape(-1, *x.shape[2:])


def _tile(xs: tuple[Array, ...], part: _Part) -> tuple[Array, ...]:
    """A part's queries of arrays [R, H, S, ...], tile by tile: [tiles, R, H, T, ...]."""
    return tuple(jnp.moveaxis(x[:, :, part.start:part.stop].reshape(*x.shape[:2], -1, part.tile, *x.shape[3:]), 2, 0)
                 for x in xs)


def _untile(tree: Any) -> Any:
    """The inverse of `_tile`: [R, H, queries of the part, ...]."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, *x.shape[4:]), tree)


def _firsts(part: _Part) -> Int[Array, " _"]:
    """The first query of each tile."""
    return jnp.arange(part.start, part.stop, part.tile)


def _mask(numbers: Any, tiles: _Tiles, part: _Part, first: Int[Array, ""]) -> Bool[Array, "_ _ _"]:
    """The truth table [B or 1, T, keys] of the tile whose first query is `first`."""
    clean, length, offset = numbers
    queries = windows.numbers((tiles.offset if offset is None else offset) + first, part.tile)
    return View(tiles.pattern, clean, length).table(tiles.pattern, queries, jnp.arange(part.keys))


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most` (at least 1)."""
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(most, 1))


def _dense(mine: tuple[Float[Array, "B H S K"], ...], k: Float[Array, "B H K L"], v: Float[Array, "B H L K"],
           mask: Bool[Array, "#B S L"], block: int,
           top: Float[Array, "B H S"] | None = None) -> tuple[Float[Array, "B H S K"], Float[Array, "B H S"], Array]:
    """(sum of values weighted by exp(score - top), sum of these weights, top). Without `top`, it is the highest score
    of each query."""
    q, *noisy = mine
    parts = [scores(q, k, mask)]
    if noisy:
        q_block, k_block, v_block = (x.reshape(*x.shape[:2], -1, block, x.shape[-1]) for x in mine)  # [B, H, J, n, K]
        own = multiply("bhjqk,bhjlk->bhjql", scaled(q_block), k_block)
        parts.append(own.reshape(*q.shape[:3], block))
    if top is None:
        top = jax.lax.stop_gradient(jnp.stack([part.max(-1) for part in parts]).max(0))
    weights = [jnp.exp(part - top[..., None]) for part in parts]
    out = multiply("bhsl,bhlk->bhsk", weights[0].astype(v.dtype), v)
    if noisy:
        own_weights = weights[1].reshape(own.shape).astype(v.dtype)
        out += multiply("bhjql,bhjlk->bhjqk", own_weights, v_block).reshape(q.shape)
    return out, jnp.stack([w.sum(-1) for w in weights]).sum(0), top


def heads_first(x: Float[Array, "B S H K"]) -> Float[Array, "B H S K"]:
    """The layout in which products take queries, and the noisy keys and values."""
    return jnp.swapaxes(x, 1, 2)


def scaled(q: Float[Array, "*s K"]) -> Float[Array, "*s K"]:
    """q / sqrt(K)."""
    return q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)


def multiply(dims: str, a: Array, b: Array) -> Array:
    """einsum(dims, a, b), with a float32 result."""
    return jnp.einsum(dims, a, b, precision="highest", preferred_element_type=jnp.float32)


def scores(q: Float[Array, "B H S K"], k: Float[Array, "B H K L"],
           mask: Bool[Array, "#B S L"]) -> Float[Array, "B H S L"]:
    """Masked q.k / sqrt(K), in float32."""
    return jnp.where(mask[:, None], multiply("bhsk,bhkl->bhsl", scaled(q), k), HIDDEN)
