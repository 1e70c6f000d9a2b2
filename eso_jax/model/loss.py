"""The loss of masked tokens, for all families: some tokens are masked, and each is predicted at its own mask.

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
      x: the tokens, in any order; `masked` and `positions` (natural ones) are in the same order.
      pattern: who sees whom in a pass over the tokens with their masks; with `TwoStreams`, over these and then over the
        clean tokens. In this case none of the first `skip` tokens may be masked.
      share: the share of tokens that are masked, on average.
    """
    skip = pattern.skip if isinstance(pattern, TwoStreams) else 0
    hidden = masked_hidden(weights, mask, x, masked, positions, pattern, training)
    share = min(1.0, share * x.shape[1] / hidden.shape[1])  # among the slots that are not skipped
    values = vocabulary.masked_nll(weights, hidden, x[:, skip:], mask, masked[:, skip:], share)
    return jnp.pad(values, ((0, 0), (skip, 0)))


def masked_hidden(weights: Weights, mask: int, x: Int[Array, "B L"], masked: Bool[Array, "B L"],
                  positions: Int[Array, "B L"], pattern: Pattern | TwoStreams,
                  training: transformer.Training | None = None) -> Float[Array, "B _ D"]:
    """The hidden states from which `masked_nll` predicts, [B, L - skip, D]: those of the noisy tokens that the pattern
    does not skip."""
    noisy, view = jnp.where(masked, mask, x), View(pattern, (~masked).sum(1))
    if not isinstance(pattern, TwoStreams):
        return transformer.trunk(weights, noisy, positions, view, training=training)[0]
    both = (jnp.concatenate([noisy[:, pattern.skip:], x], 1),
            jnp.concatenate([positions[:, pattern.skip:], positions], 1))
    return pattern.split(transformer.trunk(weights, *both, view, training=training)[0])[0]


def slots_for(share: float, length: int) -> int:
    """How many slots the noisy copy gets if each token is masked with probability `share`, and masked ones come last:
    the mean number of masked tokens and six standard deviations, rounded up to a multiple of 128 (XLA for TPUs fails to
    compile some other sizes), or of 16 for a short sequence."""
    part = 128 if length % 128 == 0 and length >= 1024 else 16
    least = share * length + 6 * math.sqrt(share * (1 - share) * length)
    return min(length, -(-math.ceil(least) // part) * part)
