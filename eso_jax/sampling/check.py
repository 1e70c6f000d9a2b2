"""Is the cache exact? The sampler's own steps, and the same by whole passes without a cache, to be compared.

Axes: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eso_jax import transformer
from eso_jax.attention import single_stream
from eso_jax.config import ModelConfig
from eso_jax.sampling import loop
from eso_jax.sampling.loop import Sampler, Step
from eso_jax.sampling.plan import Plan
from eso_jax.transformer import Weights


def forced_logits(weights: Weights, config: ModelConfig, sampler: Sampler, plan: Plan,
                  x: Int[Array, "B L"]) -> Iterator[Float[Array, "B _ V"]]:
    """The logits that each step's tokens would be drawn from, if every token drawn were that of `x` (by slot).

    Runs the sampler's own steps, one by one, to compare them with `uncached_logits`.
    """
    steps, runs = loop.schedule(plan, sampler)
    state = loop.start(weights, config, sampler, plan.order)
    for run in runs:
        state = loop.grow(state, run.shape)
        for index in range(run.low, run.high):
            step = _at(steps, index)
            logits, cache = _logits_of(weights, state, step, config, sampler, run.shape)
            first, count, skip = int(step.first), int(step.count), int(step.first - loop.taken_from(step, run.shape))
            yield logits[:, skip:skip + count]
            target = slice(first + sampler.shift, first + count + sampler.shift)
            tokens = state.tokens.at[:, target].set(x[:, first:first + count])
            state = dataclasses.replace(state, tokens=tokens, cache=cache)


def uncached_logits(weights: Weights, config: ModelConfig, sampler: Sampler, plan: Plan,
                    x: Int[Array, "B L"]) -> Iterator[Float[Array, "B _ V"]]:
    """What `forced_logits` must equal: each step by one pass over the whole sequence, without a cache."""
    begin = loop.start(weights, config, sampler, plan.order)
    inputs = jnp.concatenate([begin.tokens[:, :sampler.shift], x], axis=1)[:, :x.shape[1]]
    steps, _ = loop.schedule(plan, sampler)
    for index, count in enumerate(plan.tokens_per_step.tolist()):
        step = _at(steps, index)
        known = jnp.arange(x.shape[1]) < step.first + sampler.shift
        logits = _pass(weights, jnp.where(known, inputs, config.mask), plan.order, step, config, sampler)
        yield logits[:, int(step.first):int(step.first) + count]


def _at(steps: Step, index: int) -> Step:
    return jax.tree.map(lambda field: field[index], steps)


_logits_of = jax.jit(loop.logits_of, static_argnames=("config", "sampler", "shape"))


@functools.partial(jax.jit, static_argnames=("config", "sampler"))
def _pass(weights: Weights, tokens: Int[Array, "B L"], positions: Int[Array, "B L"], step: Step, config: ModelConfig,
          sampler: Sampler) -> Float[Array, "B L V"]:
    attend = single_stream(lambda query, key: sampler.visible(query, key, step))
    return transformer.head(weights, transformer.trunk(weights, tokens, positions, attend)[0], config.mask)
