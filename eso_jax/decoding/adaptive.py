"""Decoders whose passes follow the model's certainty: how many tokens a pass decodes, or which ones.

  decoder        of each row, a pass decodes
  entropy:G      the longest run of the order's next tokens whose entropies, less the largest of them, add up to at most
                 G nats (Ben-Hamu et al. 2025, arXiv 2505.24857, eq. 7, along a given order instead of a sorted one)
  confidence:P   the next token of the order, and those behind it as long as their likeliest value has a probability of
                 at least P
  likeliest:N    of all tokens that are left, the N whose likeliest value is most probable
  margin:N       of all tokens that are left, the N whose two likeliest values are furthest apart in probability

One token at least: alone it is drawn exactly, however uncertain it is. Certainty is that of the model's own law: at temperature 1, of the whole distribution, before the
rule by which tokens are drawn. It depends on the tokens of earlier passes, not on those that the pass draws. So the law
of a sample is a product over passes: their tokens are independent, each given the tokens of earlier passes.

`entropy` and `confidence` look at `most` tokens along the order of a plan. A pass is then a step of a plan whose widths
are found as it goes, and the law is that plan's (`families.plan_log_prob`).

`likeliest` and `margin` find the order too, and have to look at all that is left: a pass computes the rest of the
sequence, logits included, not a few slots. In an Eso-LM (B) each place is looked at as if it came next (`masks.LONE`),
so that its law is the sequential one, whatever order is at hand; with N = 1 a sample has the law of one token a pass
along the order that was found. The tokens of a pass follow in the order of their certainty.

Axes: B batch, L length, W slots looked at, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from eso_jax.config import ModelConfig
from eso_jax.decoding import loop
from eso_jax.decoding.decoders import Decoder, Progress
from eso_jax.decoding.loop import Draw
from eso_jax.decoding.passes import Sampler, Shape, Step
from eso_jax.model import masks, slots, transformer, vocabulary
from eso_jax.model.params import Weights


class Adaptive(Decoder):
    """What the decoders here share."""

    @abstractmethod
    def certainty(self, logits: Float[Array, "B W V"]) -> Float[Array, "B W"]:
        """What a pass goes by, of each slot."""

    def look(self, weights: Weights, hidden: Float[Array, "B W D"], config: ModelConfig) -> Float[Array, "B W"]:
        """The certainty of slots, by their hidden states."""
        return vocabulary.in_chunks(lambda hidden: self.certainty(transformer.head(weights, hidden, config.mask)),
                                    config.vocab_size, hidden)


class Along(Adaptive):
    """Decodes a run of the order's next tokens."""

    @abstractmethod
    def fits(self, certainty: Float[Array, "B W"]) -> Bool[Array, "B W"]:
        """Which slots the pass may decode together with those before them. 0 is the certainty of slots that are none of
        the pass's."""

    def one_pass(self, weights: Weights, progress: Progress, source: Draw, end: Int[Array, " B"], config: ModelConfig,
                 sampler: Sampler) -> Progress:
        state, at, length = progress.state, progress.at, config.length
        most = min(self.most, length)
        window = min(2 * most, length) if sampler.cached else length  # what the last pass decoded, and as many masks
        step = Step(jnp.minimum(progress.clean, length - window), at, jnp.zeros_like(at), at)
        shape = Shape(window, most, length)
        hidden, cache = loop.hidden_of(weights, state, step, sampler, shape)
        here = slots.numbers(loop.taken_from(step, shape), most)
        mine = here >= at[:, None]
        fits = self.fits(jnp.where(mine, self.look(weights, hidden, config), 0)) | (here <= at[:, None])
        run = jnp.cumprod(fits, axis=1, dtype=jnp.int32) * (mine & (here < end[:, None]))
        step = dataclasses.replace(step, count=run.sum(1))
        state = dataclasses.replace(state, cache=cache)
        return moved(progress, loop.write(weights, state, step, hidden, source, config, sampler, shape), step.count)


@struct.dataclass
class Entropy(Along):
    """See the top of this file.

    Attributes:
      budget: nats. Data: programs are shared by all budgets.
      most: tokens of a pass.
    """

    budget: Float[Array, ""] | float
    most: int = struct.field(pytree_node=False, default=8)

    def certainty(self, logits: Float[Array, "B W V"]) -> Float[Array, "B W"]:
        return jax.scipy.special.entr(jax.nn.softmax(logits)).sum(-1)

    def fits(self, certainty: Float[Array, "B W"]) -> Bool[Array, "B W"]:
        return jnp.cumsum(certainty, axis=1) - jax.lax.cummax(certainty, axis=1) <= self.budget


@struct.dataclass
class Confidence(Along):
    """See the top of this file.

    Attributes:
      least: the probability. Data: programs are shared by all.
      most: tokens of a pass.
    """

    least: Float[Array, ""] | float
    most: int = struct.field(pytree_node=False, default=8)

    def certainty(self, logits: Float[Array, "B W V"]) -> Float[Array, "B W"]:
        return jax.nn.softmax(logits).max(-1)

    def fits(self, certainty: Float[Array, "B W"]) -> Bool[Array, "B W"]:
        return certainty >= self.least


class Anywhere(Adaptive):
    """Decodes the most certain of all tokens that are left, `number` of them."""

    number: Int[Array, ""] | int

    def one_pass(self, weights: Weights, progress: Progress, source: Draw, end: Int[Array, " B"], config: ModelConfig,
                 sampler: Sampler) -> Progress:
        state, at, length = progress.state, progress.at, config.length
        if sampler.cached:
            sampler = sampler._replace(pattern=masks.LONE)
        window, most = length, min(self.most, length)
        step = Step(jnp.minimum(progress.clean, length - window), at, jnp.minimum(self.number, end - at), at)
        hidden, cache = loop.hidden_of(weights, state, step, sampler, Shape(window, window, length))
        here = slots.numbers(step.start, window)
        rank = jnp.where(here < end[:, None], -self.look(weights, hidden, config), jnp.inf)
        found = jnp.argsort(jnp.where(here < at[:, None], -jnp.inf, rank), axis=1, stable=True)
        positions = jnp.take_along_axis(slots.take(state.positions, step.start, window), found, axis=1)
        state = dataclasses.replace(state, cache=cache, positions=slots.put(state.positions, positions, step.start))
        shape = Shape(window, most, length)
        chosen = slots.take(found, loop.taken_from(step, shape) - step.start, most)
        hidden = jnp.take_along_axis(hidden, chosen[..., None], axis=1)
        return moved(progress, loop.write(weights, state, step, hidden, source, config, sampler, shape), step.count)


@struct.dataclass
class Likeliest(Anywhere):
    """See the top of this file.

    Attributes:
      number: N, tokens of a pass. Data: programs are shared by all.
      most: at least N.
    """

    number: Int[Array, ""] | int
    most: int = struct.field(pytree_node=False, default=16)

    def certainty(self, logits: Float[Array, "B W V"]) -> Float[Array, "B W"]:
        return jax.nn.softmax(logits).max(-1)


@struct.dataclass
class Margin(Anywhere):
    """As `Likeliest`, by another measure."""

    number: Int[Array, ""] | int
    most: int = struct.field(pytree_node=False, default=16)

    def certainty(self, logits: Float[Array, "B W V"]) -> Float[Array, "B W"]:
        first, second = jnp.moveaxis(jax.lax.top_k(jax.nn.softmax(logits), 2)[0], -1, 0)
        return first - second


def moved(progress: Progress, state: loop.State, count: Int[Array, " B"]) -> Progress:
    """The progress after a pass that decoded `count` tokens of each row."""
    at, slot, took_part = progress.at, jnp.arange(progress.step.shape[1])[None], count > 0
    new = (slot >= at[:, None]) & (slot < (at + count)[:, None])
    return dataclasses.replace(
        progress, state=state, at=at + count, clean=jnp.where(took_part, at, progress.clean),
        passes=progress.passes + took_part, step=jnp.where(new, progress.passes[:, None], progress.step))
