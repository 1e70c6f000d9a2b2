"""Lossless speculation: several tokens a pass, with the law (distribution) of one token a pass.

A pass verifies the drafts of the pass before and makes the next ones. For a row that has decoded `at` tokens, with k
drafts, its window is:

  clean      the token decoded last, then the drafts of the slots at, ..., at + k - 1, as if they were decoded
  masks      of the slots at, ..., at + 2k; mask m sees all slots before `at` and the first m drafts; the masks after
             mask k see all drafts, and the masks from k on before them

A row with fewer drafts than the k of the pass has more clean slots before `at`, whose results are the same as before,
and masks for these, which are not used. So its tokens are the same as in a batch of its own.

Mask m <= k gives p, the law of its slot given everything before it: that of the sampler of one token a pass. A draft
that was drawn from q is accepted with probability min(1, p / q). At the first refused draft, the token is drawn from
the positive part of p - q, normalized; if none is refused, mask k gives one more token. So each token has the law p,
for any q [1]. The k masks after the last new token give the laws q of the next drafts. They have not seen this token;
if a draft was refused, they have seen that draft instead.

Keys and values of masks are written into the cache after the clean part, where later passes overwrite them, as they do
those of refused drafts; the keys and values of accepted drafts are those of decoded tokens, and stay.

k is fixed, or each row finds its own. `PACE` passes have one k, found from that of the `PACE` passes before the last
ones: twice as many if more than three in four of their drafts were accepted, half as many if less than half. (The last
ones are still at work when the host decides; the first two k are the same.) Drafts beyond these are dropped. Nothing of
this depends on a token that is not decoded yet, so the law stays p.

[1] Leviathan, Kalman & Matias, "Fast inference from transformers via speculative decoding", ICML 2023.

Axes: B batch, L length, k drafts, M = k + 1 slots that a pass decodes at most, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from eso_jax import sharding
from eso_jax.config import ModelConfig
from eso_jax.decoding import categorical
from eso_jax.decoding.decoders import Decoder, Progress, commit, put, take
from eso_jax.decoding.loop import PACE, Draw, logits_of
from eso_jax.decoding.passes import Sampler
from eso_jax.decoding.plan import Counts, Plan, join
from eso_jax.errors import require
from eso_jax.model.masks import Drafts, View
from eso_jax.model.params import Weights

MOST = 64  # drafts
FIRST, LARGEST = 4, 16  # drafts of a row that adapts its own k


class Memory(NamedTuple):
    """The drafts of the next slots, and how many of a row's earlier drafts were accepted.

    Attributes:
      tokens: int32 [B, k], the drafts.
      laws: float32 [B, k, V], the laws from which they were drawn.
      drafted: int32 [B], how many drafts, the first of the k, the row has.
      wanted: int32 [B], how many drafts a pass makes for the row.
      verified: int32 [B], how many drafts were verified since `wanted` was set.
      accepted: int32 [B], how many of these were accepted.
    """

    tokens: Int[Array, "B k"]
    laws: Float[Array, "B k V"]
    drafted: Int[Array, " B"]
    wanted: Int[Array, " B"]
    verified: Int[Array, " B"]
    accepted: Int[Array, " B"]


@dataclass(frozen=True)
class Speculative(Decoder):
    """Speculative decoding; see the top of this file.

    Attributes:
      drafts: k of a pass.
      by_row: each row adapts its own k, at most `LARGEST`; `drafts` is then the largest of the batch. Programs do not
        depend on it.
    """

    drafts: int
    by_row: bool = field(default=False, compare=False)
    sequential = True
    uniforms = 5  # of a slot: two draw a draft, one accepts it, two draw a token in its place

    def __post_init__(self) -> None:
        require(1 <= self.drafts <= MOST, "speculative", self.drafts, f"the number of drafts must be in 1..{MOST}")

    @classmethod
    def of(cls, number: float | None = None) -> Speculative:
        """The decoder with this number of drafts; without a number, each row adapts its own."""
        if number is None:
            return cls(FIRST, by_row=True)
        require(float(number).is_integer(), "speculative", number, "must be a whole number of drafts")
        return cls(int(number))

    @property
    def most(self) -> int:
        return self.drafts + 1

    @property
    def window(self) -> int:
        return 3 * (LARGEST if self.by_row else self.drafts) + 2

    def begin(self, config: ModelConfig, batch: int) -> Memory:
        none, laws = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, self.drafts, config.vocab_size), jnp.float32)
        return Memory(jnp.zeros((batch, self.drafts), jnp.int32), laws, none, none + self.drafts, none, none)

    def noted(self, memory: Memory) -> tuple[Array, ...]:
        return (memory.wanted, memory.verified, memory.accepted) if self.by_row else ()

    def adapt(self, progress: Progress, noted: tuple[np.ndarray, ...],
              left: Bool[np.ndarray, " B"]) -> tuple[Speculative, Progress]:
        if not self.by_row:
            return self, progress
        wanted = wanted_after(*noted)
        most = int(wanted[left].max())
        memory = adapted(progress.memory, wanted.clip(max=most), most)
        return dataclasses.replace(self, drafts=most), dataclasses.replace(progress, memory=memory)

    def windows(self, found: Plan, sampler: Sampler) -> tuple[Counts, Counts]:
        """The windows that a row would have in a batch of its own."""
        counts, starts, stops = found.tokens_per_step, [], []
        none = np.zeros(counts.shape[:-1], int)
        wanted, drafted, verified, accepted = none + self.drafts, none, none, none
        last = wanted, verified, accepted
        for number, at in enumerate(np.moveaxis(found.first, -1, 0)):
            if self.by_row and number % PACE == 0:
                before, last = last, (wanted, verified, accepted)
                wanted, verified, accepted = wanted_after(*before), none, none
                drafted = np.minimum(drafted, wanted)
            starts.append(np.maximum(at + drafted - wanted - 1, 0))
            stops.append(starts[-1] + 3 * wanted + 2)
            verified, accepted = verified + drafted, accepted + counts[..., number] - 1
            drafted = wanted
        return np.stack(starts, axis=-1), np.stack(stops, axis=-1)

    def plan(self, plan: Plan, found: Plan) -> Plan:
        left = np.broadcast_to(plan.end - np.asarray(plan.given), len(plan.order))
        counts = (np.arange(left.max(initial=0)) < left[:, None]).astype(np.int64)
        return join([Plan(plan.order, counts, plan.diffusion, plan.given)])

    def one_pass(self, weights: Weights, progress: Progress, source: Draw, end: Int[Array, " B"], config: ModelConfig,
                 sampler: Sampler) -> Progress:
        state, at, drafts, k = progress.state, progress.at, progress.memory, self.drafts
        behind = at + drafts.drafted  # decoded tokens and drafts
        begin, mask = jnp.maximum(behind - k - 1, 0), jnp.arange(2 * k + 1)[None]
        clean, masks = begin[:, None] + jnp.arange(k + 1)[None], (behind - k)[:, None] + mask
        tokens = take(put(state.tokens, drafts.tokens, at, drafts.drafted), clean)
        tokens = jnp.concatenate([tokens, jnp.full_like(masks, config.mask)], axis=1)
        positions = take(state.positions, jnp.concatenate([clean, masks], axis=1))
        view = View(Drafts(drafts=k), behind)
        hidden, cache = sampler.denoiser.trunk(weights, tokens, positions, view, state.cache, begin)
        from_at = take(hidden[:, k + 1:], (k - drafts.drafted)[:, None] + mask)
        logits = logits_of(weights, from_at, config, sampler)
        laws, uniforms = categorical.law(logits, source.rule), take(source.uniforms, at[:, None] + mask)
        accepted, last = verify(laws[:, :k + 1], drafts, uniforms[:, :k + 1])
        number = jnp.arange(k + 1)[None]
        chosen = jnp.where(number < accepted[:, None], jnp.pad(drafts.tokens, [(0, 0), (0, 1)]), last[:, None])
        following = accepted[:, None] + 1 + number[:, :k]
        laws, uniforms = take(laws, following), take(uniforms, following)
        memory = Memory(categorical.pick(laws, uniforms[..., :2]).astype(jnp.int32), laws, drafts.wanted, drafts.wanted,
                        drafts.verified + drafts.drafted, drafts.accepted + accepted)
        progress = dataclasses.replace(progress, state=dataclasses.replace(state, cache=cache), memory=memory)
        return commit(progress, chosen, logits[:, :k + 1], jnp.minimum(accepted + 1, end - at), source.rule)


def wanted_after(wanted: Int[np.ndarray, "..."], verified: Int[np.ndarray, "..."],
                 accepted: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    """A row's k after passes of this k, by what was verified and accepted in them."""
    fewer = np.where(2 * accepted < verified, wanted // 2, wanted)
    return np.where(4 * accepted > 3 * verified, 2 * wanted, fewer).clip(1, LARGEST)


@functools.partial(jax.jit, static_argnames="drafts")
def adapted(memory: Memory, wanted: Int[Array, " B"], drafts: int) -> Memory:
    """The memory with `wanted` drafts for each row, in arrays of `drafts`."""
    def fit(x: Array) -> Array:
        return jnp.pad(x[:, :drafts], [(0, 0), (0, max(0, drafts - x.shape[1]))] + [(0, 0)] * (x.ndim - 2))

    rows = (jnp.minimum(memory.drafted, wanted), wanted, jnp.zeros_like(wanted), jnp.zeros_like(wanted))
    return jax.tree.map(lambda x: sharding.constrain(x, sharding.BATCH),
                        Memory(fit(memory.tokens), fit(memory.laws), *rows))


def verify(laws: Float[Array, "B M V"], drafts: Memory,
           uniforms: Float[Array, "B M U"]) -> tuple[Int[Array, " B"], Int[Array, " B"]]:
    """(how many drafts of each row are accepted, [B]; the token after these, [B]).

    Args:
      laws: p of each draft's slot, and of the slot after them.
    """
    def of_draft(laws: Float[Array, "B k V"]) -> Float[Array, "B k"]:
        return jnp.take_along_axis(laws, drafts.tokens[..., None], axis=-1)[..., 0]

    there_is = jnp.arange(drafts.tokens.shape[1])[None] < drafts.drafted[:, None]
    accepts: Bool[Array, "B k"] = there_is & (uniforms[:, :-1, 2] * of_draft(drafts.laws) < of_draft(laws[:, :-1]))
    accepted = jnp.cumprod(accepts.astype(jnp.int32), axis=1).sum(1)

    def there(x: Array) -> Array:
        return take(x, accepted[:, None])[:, 0]

    law, refused = there(laws), there(jnp.pad(drafts.laws * there_is[..., None], [(0, 0), (0, 1), (0, 0)]))
    rest = jnp.maximum(law - refused, 0)
    rest = jnp.where(rest.any(-1, keepdims=True), rest, law)  # it is 0 only by rounding
    return accepted, categorical.pick(rest, there(uniforms)[:, 3:]).astype(jnp.int32)
