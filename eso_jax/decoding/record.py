"""Facts about each token that was drawn, recorded on request: its log p, the entropy, and the alternatives.

Axes: B batch, L length, A alternatives, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eso_jax import sharding
from eso_jax.decoding import categorical
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.plan import Plan

ALTERNATIVES = 5


class Facts(NamedTuple):
    """Facts about each drawn token, in nats. All but `logp_rule` are of the whole distribution at temperature 1.

    Attributes:
      logp: float32 [B, L], log p of the token.
      logp_rule: float32 [B, L], the same under the rule it was drawn by.
      entropy: float32 [B, L], of the distribution.
      alternatives: int32 [B, L, A], the five likeliest tokens, the likeliest first (fewer in a smaller vocabulary).
      alternatives_logp: float32 [B, L, A], their log p.
    """

    logp: Any
    logp_rule: Any
    entropy: Any
    alternatives: Any
    alternatives_logp: Any


class Record(NamedTuple):
    """A generation, by natural position: the step that decoded each token, and its `Facts`.

    Attributes:
      step: int32 [B, L], the step of the plan that decoded it, from 0; -1 where it was given, or is a mask: then
        its facts are 0.
    """

    step: Any
    logp: Any
    logp_rule: Any
    entropy: Any
    alternatives: Any
    alternatives_logp: Any


def empty(batch: int, length: int, vocab_size: int) -> Facts:
    """Room for the facts of a batch."""
    def room(*shape: int, dtype: Any = jnp.float32) -> Array:
        return sharding.constrain(jnp.zeros((batch, length, *shape), dtype), sharding.BATCH)

    count = min(ALTERNATIVES, vocab_size - 1)  # the mask is no alternative
    return Facts(room(), room(), room(), room(count, dtype=jnp.int32), room(count))


def facts(logits: Float[Array, "*s V"], tokens: Int[Array, "*s"], rule: Rule) -> Facts:
    """The facts of tokens that were drawn from these logits: arrays [*s] and [*s, A]."""
    def of_token(x: Array) -> Array:
        return jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0]

    logs = jax.nn.log_softmax(logits)
    logp = of_token(logs)
    likeliest, ids = jax.lax.top_k(logs, min(ALTERNATIVES, logits.shape[-1] - 1))
    if rule.temperature == 0:
        by_rule = jnp.zeros_like(logp)
    else:
        scaled = categorical.without_banned(logits, rule) / rule.temperature
        kept = categorical.kept(jnp.exp(scaled - scaled.max(-1, keepdims=True)), rule)
        by_rule = of_token(scaled) - jax.nn.logsumexp(scaled, axis=-1, where=kept)
    return Facts(logp, by_rule, -(jnp.exp(logs) * logs).sum(-1), ids.astype(jnp.int32), likeliest)


def steps(plan: Plan) -> Int[np.ndarray, "B L"]:
    """The step that decodes each natural position, int32; -1 where no step does."""
    order = np.asarray(plan.order)
    counts = np.broadcast_to(plan.tokens_per_step, (len(order), np.shape(plan.tokens_per_step)[-1]))
    found = np.full(order.shape, -1, np.int32)
    for row, numbers, count, given in zip(found, order, counts, np.broadcast_to(plan.given, len(order)), strict=True):
        row[numbers[given:given + count.sum()]] = np.repeat(np.arange(len(count)), count)
    return found
