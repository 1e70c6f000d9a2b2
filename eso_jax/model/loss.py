"""The loss of masked tokens, one for every family: some tokens are hidden, and each is predicted from its own mask.

Axes: B batch, L length, D width.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eso_jax.model import transformer, vocabulary
from eso_jax.model.masks import Pattern, TwoStreams, View
from eso_jax.model.params import Weights


def masked_nll(weights: Weights, mask: int, x: Int[Array, "B L"], masked: Bool[Array, "B L"],
               positions: Int[Array, "B L"], pattern: Pattern | TwoStreams,
               training: transformer.Training | None = None) -> Float[Array, "B L"]:
    """-log p of the masked tokens in nats, unweighted; 0 on the others.

    Args:
      mask: the mask's id.
      x: the tokens, in whatever order; `masked` and `positions` (natural ones) are in the same.
      pattern: who sees whom in a pass over the tokens with their masks; `TwoStreams`: over these, then over the tokens
        as they are.
    """
    hidden = masked_hidden(weights, mask, x, masked, positions, pattern, training)
    return jnp.where(masked, vocabulary.nll(weights, hidden, x, mask), 0)


def masked_hidden(weights: Weights, mask: int, x: Int[Array, "B L"], masked: Bool[Array, "B L"],
                  positions: Int[Array, "B L"], pattern: Pattern | TwoStreams,
                  training: transformer.Training | None = None) -> Float[Array, "B L D"]:
    """The hidden states that `masked_nll` predicts from: those of the tokens with their masks."""
    noisy = jnp.where(masked, mask, x)
    if isinstance(pattern, TwoStreams):
        noisy, positions = jnp.concatenate([noisy, x], 1), jnp.concatenate([positions, positions], 1)
    view = View(pattern, (~masked).sum(1))
    return transformer.trunk(weights, noisy, positions, view, training=training)[0][:, :x.shape[1]]
