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

from eso_jax import masks, transformer
from eso_jax.attention import single_stream
from eso_jax.config import ModelConfig
from eso_jax.sampling import loop
from eso_jax.sampling.plan import Plan
from eso_jax.transformer import Weights


def forced_logits(weights: Weights, config: ModelConfig, kind: loop.Kind, plan: Plan,
                  x: Int[Array, "B L"]) -> Iterator[Float[Array, "B _ V"]]:
    """The logits that each step's tokens would be drawn from, if every token drawn were that of `x` (by slot).

    Runs the sampler's own steps, one by one, to compare them with `uncached_logits`.
    """
    steps, runs = loop.schedule(plan.tokens_per_step, kind)
    state = loop.start(weights, config, kind, plan.order)
    for run in runs:
        for index in range(run.low, run.high):
            step = jax.tree.map(lambda field, i=index: field[i], steps)
            logits, cache = _logits_of(weights, state, step, config, kind, run.shape)
            first, count, skip = int(step.first), int(step.count), int(step.first - loop.taken_from(step, run.shape))
            yield logits[:, skip:skip + count]
            target = slice(first + (kind == "ar"), first + count + (kind == "ar"))
            tokens = state.tokens.at[:, target].set(x[:, first:first + count])
            state = dataclasses.replace(state, tokens=tokens, cache=cache)


def uncached_logits(weights: Weights, config: ModelConfig, kind: loop.Kind, plan: Plan,
                    x: Int[Array, "B L"]) -> Iterator[Float[Array, "B _ V"]]:
    """What `forced_logits` must equal: each step by one pass over the whole sequence, without a cache."""
    begin = loop.start(weights, config, kind, plan.order)
    inputs = jnp.concatenate([begin.tokens[:, :1], x], axis=1)[:, :-1] if kind == "ar" else x
    first = 0
    for count in plan.tokens_per_step.tolist():
        known = jnp.arange(x.shape[1]) < first + (kind == "ar")
        yield _pass(weights, jnp.where(known, inputs, config.mask), plan.order, config, kind)[:, first:first + count]
        first += count


_logits_of = jax.jit(loop.logits_of, static_argnames=("config", "kind", "shape"))


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def _pass(weights: Weights, tokens: Int[Array, "B L"], positions: Int[Array, "B L"], config: ModelConfig,
          kind: loop.Kind) -> Float[Array, "B L V"]:
    attend = single_stream(masks.everyone if kind == "mdlm" else masks.causal)
    return transformer.head(weights, transformer.trunk(weights, tokens, positions, attend)[0], config.mask)
