"""The noise schedule, the corruption, and the random keys that drive them.

Every draw is keyed by (seed, step, global example index), so a loss curve does not depend on the number of devices,
hosts or micro-batches.

Axes: B batch, L length.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

T_MIN = 1e-3  # t is drawn from [T_MIN, 1], and alpha falls to alpha_0 * T_MIN at t = 1


@struct.dataclass
class Draws:
    """Where the randomness of one batch comes from.

    Attributes:
      key: one key for the whole step, the same on every device and in every micro-batch.
      index: int [B], each row's index in the global batch.
      total: rows in the global batch (of an evaluation: draws in all).
      rank: int [B], each row's place among the evenly spread times. None: a permutation of the index (`spread`), by
        which neighbouring rows, such as those of one device or micro-batch, have evenly spread times too. An evaluation
        shuffles the places, so that a window's time does not depend on its place in the corpus.
    """

    key: Key[Array, ""]
    index: Int[Array, " B"]
    total: Int[Array, ""] | int
    rank: Int[Array, " B"] | None = None

    def per_example(self, purpose: int) -> Key[Array, " B"]:
        """One key per row and purpose (a small constant, below)."""
        key = jax.random.fold_in(self.key, purpose)
        return jax.vmap(jax.random.fold_in, (None, 0))(key, self.index)


TIME, MASK, ORDER, MASK_0, ORDER_0, DROPOUT, RANK, ALPHA_0 = range(8)  # purposes; MASK_0, ORDER_0: sequential pass
Share = float | Float[Array, " B"]  # alpha_0: one for all rows, or one for each


def alpha(t: Float[Array, "*s"], alpha_0: Share) -> Float[Array, "*s"]:
    """Probability that a token is still clean at time t in [0, 1]: alpha_0 (1 - (1 - T_MIN) t)."""
    return alpha_0 * (1 - (1 - T_MIN) * t)


def elbo_weight(t: Float[Array, "*s"], alpha_0: Share) -> Float[Array, "*s"]:
    """Weight of -log p on a masked token in the NELBO, -alpha'_t / (1 - alpha_t) (paper, eq. 7)."""
    return alpha_0 * (1 - T_MIN) / (1 - alpha(t, alpha_0))


def masked_share(alpha_0: float) -> float:
    """The share of tokens that are masked, on average over t."""
    return 1 - alpha_0 * (1 - (1 - T_MIN) * (1 + T_MIN) / 2)


def draw_times(draws: Draws, low: float = T_MIN, high: float = 1.0) -> Float[Array, " B"]:
    """One time per row in [low, high], evenly spread over the global batch: ((u + i) / N) mod 1, scaled."""
    u = jax.random.uniform(jax.random.fold_in(draws.key, TIME))
    rank = spread(draws.index, draws.total) if draws.rank is None else draws.rank
    return low + (high - low) * ((u + rank) / draws.total % 1)


def draw_alpha_0(draws: Draws, low: float, high: float) -> Float[Array, " B"]:
    """One alpha_0 per row in [low, high], its logarithm uniform, evenly spread over the global batch. One uniform draw
    over the whole range shifts all rows, so that a row's alpha_0 is independent of its time."""
    shift = jax.random.uniform(jax.random.fold_in(draws.key, ALPHA_0))
    place = (shift + spread(draws.index, draws.total, math.e - 2) / draws.total) % 1
    return low * (high / low)**place


def spread(index: Int[Array, " B"], total: Int[Array, ""] | int, part: float = 0.618034) -> Int[Array, " B"]:
    """The places of rows in a permutation of 0, ..., total - 1 that puts neighbours far apart: index x step mod total.
    The step is about `part` of the total: the golden section, or another number that is far from all fractions with a
    small denominator. Where `total` is traced, the index itself."""
    if not isinstance(total, int):
        return index
    step = next(n for n in range(round(total * part), total + 2) if math.gcd(n, total) == 1)
    return (index.astype(jnp.uint32) * step % total).astype(jnp.int32)


def draw_masked(keys: Key[Array, " B"], keep: Float[Array, "B #L"], length: int) -> Bool[Array, "B L"]:
    """Which tokens become masks: each stays clean with probability `keep`, by its own draw."""
    return jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys) >= keep


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def dropout(x: Float[Array, "B S D"], rate: float, keys: Key[Array, " B"]) -> Float[Array, "B S D"]:
    """Drops each entry with probability `rate` and rescales the others, by one key per row. The backward pass drops the
    same entries of the gradient; only the keys are kept for it."""
    seeds = jax.vmap(lambda key: jax.random.bits(key, (2,)))(keys)[:, :, None, None]
    place = jnp.arange(math.prod(x.shape[1:]), dtype=jnp.uint32).reshape(1, *x.shape[1:])
    return jnp.where(_hash(place, seeds[:, 0], seeds[:, 1]) >= jnp.uint32(round(rate * 2**32)), x / (1 - rate), 0)


dropout.defvjp(lambda x, rate, keys: (dropout(x, rate, keys), keys),
               lambda rate, keys, gradient: (dropout(gradient, rate, keys), None))


def _hash(place: UInt32[Array, "1 S D"], first: UInt32[Array, "B 1 1"],
          second: UInt32[Array, "B 1 1"]) -> UInt32[Array, "B S D"]:
    """32 random bits for each place, from two seeds for each row: a tenth of threefry's operations. The constants are
    those of "triple32" (Wellons, hash-prospector), without its last step, which changes low bits alone. With two
    products instead of three, entries 12 tokens apart were dropped together too often."""
    x = place + first
    x = (x ^ x >> 17) * jnp.uint32(0xed5ad4bb) + second
    x = (x ^ x >> 11) * jnp.uint32(0xac4c1b51)
    return (x ^ x >> 15) * jnp.uint32(0x31848bab)
