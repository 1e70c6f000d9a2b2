"""Lossless speculation: several tokens a pass, by the law of one token a pass.

A pass verifies the drafts of the pass before and makes the next ones. Its window is, of a row that has decoded `at`
tokens, with k drafts:

  clean      the token decoded last, then the drafts of the slots at, ..., at + k - 1, as if they were decoded
  masks      of the slots at, ..., at + 2k; mask m sees all before `at` and the first m drafts, the ones behind mask k
             all drafts and each other

Mask m <= k says p, the law of its slot given everything before it: what the sampler of one token a pass would draw it
by. With it a draft that was drawn by q is accepted with probability min(1, p / q). Where the first one is refused, the
token is drawn by the positive part of p - q instead; where none is, mask k gives one more. So each token has the law p,
whatever q was [1]. The k masks behind the slot where it ended say the laws q of the next drafts. They have not seen the
token that was drawn there; where a draft was refused, they have seen that one.

Masks are written into the cache behind the clean part, where later passes write over them, as over refused drafts; the
keys and values of accepted drafts are those of decoded tokens and stay.

[1] Leviathan, Kalman & Matias, "Fast inference from transformers via speculative decoding", ICML 2023.

Axes: B batch, L length, k drafts, M = k + 1 slots that a pass decodes at most, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from eso_jax.config import ModelConfig
from eso_jax.decoding import categorical
from eso_jax.decoding.decoders import Decoder, Progress, commit, put, take
from eso_jax.decoding.loop import Draw, logits_of
from eso_jax.decoding.passes import Sampler
from eso_jax.decoding.plan import Plan, join
from eso_jax.errors import require
from eso_jax.model import transformer
from eso_jax.model.masks import Drafts, View
from eso_jax.model.params import Weights

MOST = 64  # drafts


class Memory(NamedTuple):
    """The drafts of the next slots.

    Attributes:
      tokens: int32 [B, k].
      laws: float32 [B, k, V], by which they were drawn; nothing but 0 where there is no draft: it is refused.
    """

    tokens: Int[Array, "B k"]
    laws: Float[Array, "B k V"]


@dataclass(frozen=True)
class Speculative(Decoder):
    """Drafts that are verified.

    Attributes:
      drafts: k.
    """

    drafts: int
    sequential = True
    uniforms = 5  # of a slot: two draw a draft, one accepts it, two draw in its place

    def __post_init__(self) -> None:
        require(1 <= self.drafts <= MOST, "speculative", self.drafts, f"the number of drafts must be in 1..{MOST}")

    @classmethod
    def of(cls, number: float) -> Speculative:
        require(float(number).is_integer(), "speculative", number, "must be a whole number of drafts")
        return cls(int(number))

    @property
    def most(self) -> int:
        return self.drafts + 1

    @property
    def window(self) -> int:
        return 3 * self.drafts + 2

    def begin(self, config: ModelConfig, batch: int) -> Memory:
        return Memory(jnp.full((batch, self.drafts), config.mask, jnp.int32),
                      jnp.zeros((batch, self.drafts, config.vocab_size), jnp.float32))

    def plan(self, plan: Plan, found: Plan) -> Plan:
        left = np.broadcast_to(plan.end - np.asarray(plan.given), len(plan.order))
        counts = (np.arange(left.max(initial=0)) < left[:, None]).astype(np.int64)
        return join([Plan(plan.order, counts, plan.diffusion, plan.given)])

    def one_pass(self, weights: Weights, progress: Progress, source: Draw, end: Int[Array, " B"], config: ModelConfig,
                 sampler: Sampler) -> Progress:
        state, at, drafts, k = progress.state, progress.at, progress.memory, self.drafts
        begin, masks = jnp.maximum(at - 1, 0), at[:, None] + jnp.arange(2 * k + 1)[None]
        clean = begin[:, None] + jnp.arange(k + 1)[None]
        tokens = take(put(state.tokens, drafts.tokens, at, jnp.full_like(at, k)), clean)
        tokens = jnp.concatenate([tokens, jnp.full_like(masks, config.mask)], axis=1)
        positions = take(state.positions, jnp.concatenate([clean, masks], axis=1))
        hidden, cache = transformer.trunk(weights, tokens, positions, View(Drafts(drafts=k), at), state.cache, begin)
        logits = logits_of(weights, hidden[:, k + 1:], config)
        laws, uniforms = categorical.law(logits, source.rule), take(source.uniforms, masks)
        accepted, last = verify(laws[:, :k + 1], drafts, uniforms[:, :k + 1])
        number = jnp.arange(k + 1)[None]
        chosen = jnp.where(number < accepted[:, None], jnp.pad(drafts.tokens, [(0, 0), (0, 1)]), last[:, None])
        behind = accepted[:, None] + 1 + number[:, :k]
        laws, uniforms = take(laws, behind), take(uniforms, behind)
        memory = Memory(categorical.pick(laws, uniforms[..., :2]).astype(jnp.int32), laws)
        progress = dataclasses.replace(progress, state=dataclasses.replace(state, cache=cache), memory=memory)
        return commit(progress, chosen, logits[:, :k + 1], jnp.minimum(accepted + 1, end - at), source.rule)


def verify(laws: Float[Array, "B M V"], drafts: Memory,
           uniforms: Float[Array, "B M U"]) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """How many drafts of a row are accepted, one after the other, and the token behind these.

    Args:
      laws: p of each draft's slot, and of the slot behind them.
    """
    def of_draft(laws: Float[Array, "B k V"]) -> Float[Array, "B k"]:
        return jnp.take_along_axis(laws, drafts.tokens[..., None], axis=-1)[..., 0]

    accepts: Bool[Array, "B k"] = uniforms[:, :-1, 2] * of_draft(drafts.laws) < of_draft(laws[:, :-1])
    accepted = jnp.cumprod(accepts.astype(jnp.int32), axis=1).sum(1)

    def there(x: Array) -> Array:
        return take(x, accepted[:, None])[:, 0]

    law = there(laws)
    rest = jnp.maximum(law - there(jnp.pad(drafts.laws, [(0, 0), (0, 1), (0, 0)])), 0)
    rest = jnp.where(rest.any(-1, keepdims=True), rest, law)  # rounding alone leaves nothing
    return accepted, categorical.pick(rest, there(uniforms)[:, 3:]).astype(jnp.int32)
