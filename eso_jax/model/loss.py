"""The loss of masked tokens, one for every family: some tokens are hidden, and each is predicted from its own mask.

Axes: B batch, L length, D width.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eso_jax.model import transformer, vocabulary
from eso_jax.model.masks import Pattern, TwoStreams, View
from eso_jax.model.params import Weights


def masked_nll(weights: Weights, mask: int, x: Int[Array, "B L"], masked: Bool[Array, "B L"],
               positions: Int[Array, "B L"], pattern: Pattern | TwoStreams, share: float,
               training: transformer.Training | None = None) -> Float[Array, "B L"]:
    """-log p of the masked tokens in nats, unweighted; 0 on the others.

    Args:
      mask: the mask's id.
      x: the tokens, in whatever order; `masked` and `positions` (natural ones) are in the same.
      pattern: who sees whom in a pass over the tokens with their masks; `TwoStreams`: over these, then over the tokens
        as they are. None of the first `skip` tokens may be masked then.
      share: of the tokens that are masked, on average.
    """
    skip = pattern.skip if isinstance(pattern, TwoStreams) else 0
    hidden = masked_hidden(weights, mask, x, masked, positions, pattern, training)
    share = min(1.0, share * x.shape[1] / hidden.shape[1])  # of the slots that are left
    values = vocabulary.masked_nll(weights, hidden, x[:, skip:], mask, masked[:, skip:], share)
    return jnp.pad(values, ((0, 0), (skip, 0)))


def masked_hidden(weights: Weights, mask: int, x: Int[Array, "B L"], masked: Bool[Array, "B L"],
                  positions: Int[Array, "B L"], pattern: Pattern | TwoStreams,
                  training: transformer.Training | None = None) -> Float[Array, "B _ D"]:
    """The hidden states that `masked_nll` predicts from: those of the tokens with their masks, but for those that a
    pattern skips."""
    noisy, view = jnp.where(masked, mask, x), View(pattern, (~masked).sum(1))
    if not isinstance(pattern, TwoStreams):
        return transformer.trunk(weights, noisy, positions, view, training=training)[0]
    both = (jnp.concatenate([noisy[:, pattern.skip:], x], 1),
            jnp.concatenate([positions[:, pattern.skip:], positions], 1))
    return pattern.split(transformer.trunk(weights, *both, view, training=training)[0])[0]


def slots_for(share: float, length: int) -> int:
    """How many slots the noisy copy gets where so large a share of the tokens is masked, and these come last: their
    mean and six standard deviations of a draw for each token; a multiple of 128, of which XLA for TPUs fails to
    compile some others (of 16 for a short sequence)."""
    part = 128 if length % 128 == 0 and length >= 1024 else 16
    least = share * length + 6 * math.sqrt(share * (1 - share) * length)
    return min(length, -(-math.ceil(least) // part) * part)
