"""Orders: `order[b, i]` is the natural position of the i-th token in row b's order.

Axes: B batch, L length, O orders.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key, Shaped

from eso_jax.errors import EsoError


def clean_first(keys: Key[Array, " B"], masked: Bool[Array, "B L"], *, shuffle_clean: bool,
                shuffle_masked: bool) -> Int[Array, "B L"]:
    """An order with the clean tokens first and the masked ones last, each group shuffled or in natural order.

    Eso-LM (B) shuffles both groups in its diffusion pass (paper, eq. 24) and the clean ones in its sequential pass
    (eq. 26); Eso-LM (A)'s sequential pass shuffles neither.
    """
    length = masked.shape[1]
    shuffled = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)
    natural = jnp.arange(length)[None] / length
    rank = jnp.where(masked, 1 + (shuffled if shuffle_masked else natural), shuffled if shuffle_clean else natural)
    return jnp.argsort(rank, axis=1)


def random_then_ascending(key: Key[Array, ""], length: int, num_random: Int[Array, ""] | int) -> Int[Array, " L"]:
    """`num_random` random positions in random order, then the rest ascending (paper, eq. 22)."""
    shuffled = jax.random.permutation(key, length)
    rank = jnp.argsort(shuffled)  # rank[p]: when position p comes in the shuffle
    return jnp.argsort(jnp.where(rank < num_random, rank, length + jnp.arange(length)))


def likelihood_orders(key: Key[Array, ""], num_orders: int, batch: int, length: int, alpha_0: float,
                      first: int = 0, block: int | None = None) -> Int[Array, "O B L"]:
    """Independent orders for the importance-weighted bound: a Binomial(L, alpha_0)-sized random subset in random
    order, then the rest ascending (paper, eq. 22). Order n, counted from `first`, of a row is keyed by (n, row). With
    `block`, BD3-LM's orders: blocks of that many positions ascending, random within each."""

    def one(index: Int[Array, ""], row: Int[Array, ""]) -> Int[Array, " L"]:
        if block is not None:
            key_here = jax.random.fold_in(jax.random.fold_in(key, index), row)
            blocks = jnp.arange(length).reshape(-1, block)
            return jax.random.permutation(key_here, blocks, axis=1, independent=True).reshape(-1)
        count_key, order_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, index), row))
        count = jnp.sum(jax.random.uniform(count_key, (length,)) < alpha_0)
        return random_then_ascending(order_key, length, count)

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(first + jnp.arange(num_orders), jnp.arange(batch))


def sort(x: Shaped[Array, "B L"], order: Int[Array, "B L"]) -> Shaped[Array, "B L"]:
    """From natural positions to the order: out[b, i] = x[b, order[b, i]]."""
    return jnp.take_along_axis(x, order, axis=1)


@jax.jit
def unsort(x: Shaped[Array, "B L *s"], order: Int[Array, "B L"]) -> Shaped[Array, "B L *s"]:
    """The inverse of `sort`: out[b, order[b, i]] = x[b, i]."""
    index = jnp.argsort(order, axis=1)
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def check_permutations(orders: np.ndarray, length: int) -> None:
    """Raises an EsoError unless every row of orders [..., L] is a permutation of 0..L-1."""
    if orders.shape[-1] != length or not np.issubdtype(orders.dtype, np.integer):
        raise EsoError(f"orders: shape {orders.shape} of {orders.dtype}; must be integers with last axis {length}")
    bad = np.any(np.sort(orders, axis=-1) != np.arange(length), axis=-1)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise EsoError(f"orders[{', '.join(map(str, where))}]: not a permutation of 0..{length - 1}")
