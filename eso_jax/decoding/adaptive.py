"""Decoders whose passes follow the model's certainty: how many tokens a pass decodes, or which ones.

  decoder        of each row, a pass decodes
  entropy:G      the order's next tokens, as many as keep the sum of their entropies, without the largest, within G nats
                 (Ben-Hamu et al. 2025, arXiv 2505.24857, who sort the tokens first)
  confidence:P   the order's next token, and those after it as long as their likeliest value has probability >= P
  likeliest:N    of all tokens that are left, the N whose likeliest value is most probable
  margin:N       of all tokens that are left, the N whose likeliest value has the largest lead over the second

A pass decodes at least one token, however uncertain: one token alone is drawn exactly. Certainty is that of the model's
own law (distribution): at temperature 1, of all tokens, before the rule by which tokens are drawn. It depends only on
the tokens of earlier passes. So the law of a sample is a product over passes, whose tokens are independent given the
tokens of earlier passes.

`entropy` and `confidence` look at a few tokens along the order of a plan. Their passes are the steps of a plan, chosen
as they go, and log p of a sample is that of this plan (`families.plan_log_prob`).

`likeliest` and `margin` choose the order too, so they look at all tokens that are left. A pass computes the whole
sequence and all its logits. In an Eso-LM (B) each position is scored as if it came next (`masks.LONE`), so that its law
is that of one token a pass in any order; among the tokens of a pass, the most certain one comes first in the order. Of
tokens that are as certain (to 1/4096), the one is taken that was more certain in the passes before; at first, the first
of the plan. With N = 1, log p of a sample is that of one token a pass along the order that was chosen. With more it is
only in the record, since in a plan the masks of a step see those before them.

Axes: B batch, L length, W slots that a pass considers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from eso_jax.config import ModelConfig
from eso_jax.decoding import categorical
from eso_jax.decoding.decoders import Decoder, Progress, commit, take
from eso_jax.decoding.loop import Draw, logits_of
from eso_jax.decoding.passes import Sampler
from eso_jax.decoding.plan import Counts, Plan
from eso_jax.errors import require
from eso_jax.model import masks, vocabulary
from eso_jax.model.masks import View
from eso_jax.model.params import Weights

MOST = 8  # tokens of a pass, by default: along the order, the time of a pass on a CPU grows with it
GRID = 2**12  # certainties are compared as multiples of 1 / GRID


@dataclass(frozen=True)
class Along(Decoder):
    """Decodes the order's next tokens, as many as `fits` says.

    Attributes:
      bound: the number after the name. It is data (`begin`), so that one program serves all bounds.
    """

    bound: float = field(compare=False)
    most: int = MOST

    @property
    def window(self) -> int:
        """The most tokens that the last pass can have decoded, and as many masks."""
        return 2 * self.most

    def begin(self, config: ModelConfig, batch: int) -> Float[Array, " B"]:
        return jnp.full(batch, self.bound, jnp.float32)

    def windows(self, found: Plan, sampler: Sampler) -> tuple[Counts, Counts]:
        if not sampler.cached:
            return super().windows(found, sampler)
        start = np.concatenate([found.first[..., :1], found.first[..., :-1]], axis=-1)
        return start, start + self.window

    @abstractmethod
    def fits(self, logits: Float[Array, "B W V"], bound: Float[Array, "B 1"]) -> Bool[Array, "B W"]:
        """Which of a pass's tokens may be decoded together with all those before them."""

    def one_pass(self, weights: Weights, progress: Progress, source: Draw, end: Int[Array, " B"], config: ModelConfig,
                 sampler: Sampler) -> Progress:
        state, at, number = progress.state, progress.at, jnp.arange(self.most)[None]
        begin = progress.clean if sampler.cached else jnp.zeros_like(at)
        here = begin[:, None] + jnp.arange(self.window if sampler.cached else config.length)[None]
        hidden, cache = sampler.denoiser.trunk(weights, take(state.tokens, here), take(state.positions, here),
                                               View(sampler.pattern, at), state.cache, begin)
        hidden = take(hidden, (at - begin)[:, None] + number)
        logits = logits_of(weights, hidden, config, sampler)
        run = jnp.cumprod(self.fits(logits, progress.memory[:, None]) | (number == 0), axis=1, dtype=jnp.int32)
        tokens = categorical.draw(logits, take(source.uniforms, at[:, None] + number), source.rule)
        progress = dataclasses.replace(progress, state=dataclasses.replace(state, cache=cache))
        return commit(progress, tokens, logits, jnp.minimum(run.sum(1), end - at), source.rule)


@dataclass(frozen=True)
class Entropy(Along):
    """`entropy`: see the top of this file."""

    def __post_init__(self) -> None:
        require(0 <= self.bound < math.inf, "entropy", self.bound, "the budget in nats must be at least 0, and finite")

    def fits(self, logits: Float[Array, "B W V"], bound: Float[Array, "B 1"]) -> Bool[Array, "B W"]:
        entropy = jax.scipy.special.entr(jax.nn.softmax(logits)).sum(-1)
        return jnp.cumsum(entropy, axis=1) - jax.lax.cummax(entropy, axis=1) <= bound


@dataclass(frozen=True)
class Confidence(Along):
    """`confidence`: see the top of this file."""

    def __post_init__(self) -> None:
        require(0 <= self.bound <= 1, "confidence", self.bound, "the probability must be in [0, 1]")

    def fits(self, logits: Float[Array, "B W V"], bound: Float[Array, "B 1"]) -> Bool[Array, "B W"]:
        return jax.nn.softmax(logits).max(-1) >= bound


@dataclass(frozen=True)
class Anywhere(Decoder):
    """Decodes the most certain of all tokens that are left.

    Attributes:
      count: N. It is data, as `Along.bound` is.
      most: M, at least N.
    """

    count: int = field(compare=False)
    most: int = MOST
    window = 0  # a pass computes the whole sequence, and needs no room after it

    def __post_init__(self) -> None:
        require(1 <= self.count <= self.most, type(self).__name__.lower(), self.count,
                f"the number of tokens must be in 1..{self.most}")

    @classmethod
    def of(cls, number: float) -> Anywhere:
        """The decoder for this N; all N up to the same power of two share their programs."""
        require(1 <= number <= 2**20 and number == int(number), cls.__name__.lower(), number,
                f"must be a whole number of tokens, from 1 to {2**20}")
        return cls(int(number), max(MOST, 1 << (int(number) - 1).bit_length()))

    def begin(self, config: ModelConfig, batch: int) -> Int[Array, " B"]:
        return jnp.full(batch, self.count, jnp.int32)

    def follows_a_plan(self, sampler: Sampler) -> bool:
        return self.count == 1 or not sampler.cached

    @abstractmethod
    def certainty(self, logits: Float[Array, "B L V"]) -> Float[Array, "B L"]:
        """How certain each token is: the largest are decoded."""

    def one_pass(self, weights: Weights, progress: Progress, source: Draw, end: Int[Array, " B"], config: ModelConfig,
                 sampler: Sampler) -> Progress:
        state, at = progress.state, progress.at
        slot, number = jnp.arange(config.length)[None], jnp.arange(min(self.most, config.length))[None]
        view = View(masks.LONE if sampler.cached else sampler.pattern, at)
        hidden, cache = sampler.denoiser.trunk(weights, state.tokens, state.positions, view, state.cache)

        certainty = vocabulary.in_chunks(lambda hidden: self.certainty(logits_of(weights, hidden, config, sampler)),
                                         config.vocab_size, hidden)
        # To the grid: of tokens that are as certain (all are in the first pass), rounding errors would choose one, on
        # each machine and mesh another. Beside the edge of a cell they still do.
        certainty = jnp.round(certainty * GRID)
        rank = jnp.where(slot < at[:, None], -jnp.inf, jnp.where(slot < end[:, None], -certainty, jnp.inf))
        order = jnp.argsort(rank, axis=1, stable=True)  # decoded slots stay in place, and so do those never decoded
        next_slots = at[:, None] + number
        logits = logits_of(weights, take(hidden, take(order, next_slots)), config, sampler)
        tokens = categorical.draw(logits, take(source.uniforms, next_slots), source.rule)
        state = dataclasses.replace(state, cache=cache, positions=take(state.positions, order))
        return commit(dataclasses.replace(progress, state=state), tokens, logits,
                      jnp.minimum(progress.memory, end - at), source.rule)


@dataclass(frozen=True)
class Likeliest(Anywhere):
    """`likeliest`: see the top of this file."""

    def certainty(self, logits: Float[Array, "B L V"]) -> Float[Array, "B L"]:
        return jax.nn.softmax(logits).max(-1)


@dataclass(frozen=True)
class Margin(Anywhere):
    """`margin`: see the top of this file."""

    def certainty(self, logits: Float[Array, "B L V"]) -> Float[Array, "B L"]:
        first, second = jnp.moveaxis(jax.lax.top_k(jax.nn.softmax(logits), 2)[0], -1, 0)
        return first - second
