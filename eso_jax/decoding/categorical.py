"""Drawing tokens from logits, exactly but for float32 rounding.

`jax.random.categorical` adds Gumbel noise to every vocabulary entry: slow, and its 24-bit uniforms cut off the tail of
a joint draw over tokens and masks. Positions are drawn first here (the plan), and a token takes two uniforms: one finds
the block of the vocabulary, the other the entry in it, each by inverting a cumulative sum.

Axes: V vocabulary.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from eso_jax import sharding
from eso_jax.decoding import inversion
from eso_jax.errors import require

# Bits of the nucleus's threshold that a round finds. An accelerator compares with 15 thresholds as fast as with one,
# and each round costs kernel launches; on a CPU the comparisons take the time.
DIGIT = {"cpu": 1}
DIGIT_ELSEWHERE = 4


@struct.dataclass
class Rule:
    """How tokens are drawn. The nucleus and min_p are computed at the temperature, each on the whole distribution.

    Attributes:
      temperature: logits are divided by it; 0 takes the most likely token.
      top_p: nucleus mass in (0, 1]; 1 keeps every token.
      min_p: tokens less likely than min_p times the most likely one are dropped; 0 keeps every token.
      banned: ids that are never drawn: they are removed, and the rest renormalized, before all of the above.
    """

    temperature: float = struct.field(pytree_node=False, default=1.0)
    top_p: float = struct.field(pytree_node=False, default=1.0)
    min_p: float = struct.field(pytree_node=False, default=0.0)
    banned: tuple[int, ...] = struct.field(pytree_node=False, default=())

    def __post_init__(self) -> None:
        require(self.temperature == 0 or 1e-4 <= self.temperature <= 100, "temperature", self.temperature,
                "must be 0 (greedy) or in [1e-4, 100]")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be in (0, 1]; 1 turns the nucleus off")
        require(0 <= self.min_p < 1, "min_p", self.min_p, "must be in [0, 1); 0 turns it off")

    def check_vocabulary(self, size: int, mask: int) -> None:
        """Raises an EsoError for banned ids outside the vocabulary, or if they leave no token to draw."""
        for token in self.banned:
            require(0 <= token < size, "banned", token, f"ids are in [0, {size})")
        require(len({*self.banned, mask}) < size, "banned", f"{len(self.banned)} ids", "leave a token to be drawn")


def draw(logits: Float[Array, "*s V"], uniforms: Float[Array, "*s 2"], rule: Rule) -> Int[Array, "*s"]:
    """One token id per row of float32 logits, from two uniforms in [0, 1) per row."""
    logits = without_banned(logits, rule)
    if rule.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    if inversion.fits():
        rows = logits.reshape(-1, logits.shape[-1]), uniforms.reshape(-1, 2)
        return inversion.choose(*rows, rule.temperature, rule.top_p, rule.min_p).reshape(logits.shape[:-1])
    return pick(masses(logits, rule), uniforms)


def law(logits: Float[Array, "*s V"], rule: Rule) -> Float[Array, "*s V"]:
    """The probabilities with which `draw` draws each token."""
    logits = without_banned(logits, rule)
    if rule.temperature == 0:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    mass = masses(logits, rule)
    return mass / mass.sum(-1, keepdims=True)


def masses(logits: Float[Array, "*s V"], rule: Rule) -> Float[Array, "*s V"]:
    """Unnormalized probabilities at a temperature above 0: the largest is 1, those of dropped and banned tokens are
    0."""
    scaled = logits / rule.temperature
    mass = jnp.exp(scaled - scaled.max(-1, keepdims=True))
    return jnp.where(kept(mass, rule), mass, 0)


def pick(mass: Float[Array, "*s V"], uniforms: Float[Array, "*s 2"]) -> Int[Array, "*s"]:
    """One token id per row, with probabilities proportional to non-negative masses."""
    size = max(1, math.isqrt(mass.shape[-1]))
    blocks = jnp.pad(mass, [(0, 0)] * (mass.ndim - 1) + [(0, -mass.shape[-1] % size)])
    blocks = blocks.reshape(*mass.shape[:-1], -1, size)
    block = _invert(blocks.sum(-1), uniforms[..., 0])
    chosen = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    return block * size + _invert(chosen, uniforms[..., 1])


def without_banned(logits: Float[Array, "*s V"], rule: Rule) -> Float[Array, "*s V"]:
    """Logits with those of banned tokens at -inf."""
    if not rule.banned:
        return logits
    banned = np.isin(np.arange(logits.shape[-1]), rule.banned)
    return jnp.where(banned.reshape(*[1] * (logits.ndim - 1), -1), -jnp.inf, logits)


def kept(mass: Float[Array, "*s V"], rule: Rule) -> Bool[Array, "*s V"]:
    """Which tokens a rule keeps, given their masses at its temperature, of which the largest is 1."""
    found = mass >= rule.min_p
    return found & nucleus(mass, rule.top_p) if rule.top_p < 1 else found


def _invert(mass: Float[Array, "*s M"], u: Float[Array, "*s"]) -> Int[Array, "*s"]:
    """The first index whose cumulative mass exceeds u times the total; never one without mass."""
    cumulative = jnp.cumsum(mass, axis=-1)
    beyond = (cumulative > u[..., None] * cumulative[..., -1:]) & (mass > 0)
    # By rounding, no index may exceed it: then the last index with mass is taken.
    last = mass.shape[-1] - 1 - jnp.argmax(mass[..., ::-1] > 0, axis=-1)
    return jnp.where(beyond.any(-1), jnp.argmax(beyond, axis=-1), last)


def nucleus(mass: Float[Array, "*s V"], top_p: float) -> Bool[Array, "*s V"]:
    """The smallest set of largest masses that exceeds `top_p` of the total (ties at its edge are all kept).

    A token is kept if the tokens above it hold at most top_p of the mass. The threshold is the largest float such that
    the masses >= it exceed that. It is found digit by digit in the bit patterns of non-negative floats, which are
    ordered as integers: exact, and without a sort of V entries.
    """
    mass = jax.lax.optimization_barrier(mass)  # or XLA for GPUs computes small masses again for each threshold
    digit, budget = DIGIT.get(sharding.platform(), DIGIT_ELSEWHERE), top_p * mass.sum(-1)

    def from_on(bits: Int[Array, "*s"]) -> Bool[Array, "*s V"]:
        return mass >= jax.lax.bitcast_convert_type(bits, jnp.float32)[..., None]

    def narrow(index: Int[Array, ""] | int, low: Int[Array, "*s"]) -> Int[Array, "*s"]:
        place = jnp.maximum(31 - digit * (index + 1), 0)
        parts = [jnp.where(from_on(low + (value << place)), mass, 0) for value in range(1, 2**digit)]
        # One reduction of them all, so that the masses are read once.
        held = jax.lax.reduce(parts, [np.float32(0)] * len(parts), lambda a, b: [*map(jnp.add, a, b)],
                              (mass.ndim - 1,))
        return low + (sum((each > budget).astype(jnp.int32) for each in held) << place)

    start = jnp.zeros(mass.shape[:-1], jnp.int32)
    return from_on(jax.lax.fori_loop(0, -(-31 // digit), narrow, start, unroll=digit > 1))
