"""Is the cache exact? Compares the sampler's own steps with passes over the whole sequence, without a cache.

Axes: B batch, L length, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from eso_jax import sharding
from eso_jax.config import ModelConfig
from eso_jax.decoding import loop, passes
from eso_jax.decoding.loop import State
from eso_jax.decoding.order import unsort
from eso_jax.decoding.passes import Sampler, Shape, Step
from eso_jax.decoding.plan import Plan
from eso_jax.engine.rows import Engine
from eso_jax.model import slots
from eso_jax.model.params import Weights


def forced_logits(weights: Weights, config: ModelConfig, sampler: Sampler, plan: Plan,
                  x: Int[Array, "B L"]) -> Iterator[Float[Array, "B _ V"]]:
    """Yields for each step the logits [B, tokens of the step, V] of its tokens, if every token drawn were that of `x`
    (by slot); zeros where a row has fewer tokens in the step than another.

    Runs the sampler's own steps, one by one, to compare them with `uncached_logits`.
    """
    state, index = loop.start(weights, config, sampler, plan, unsort(x, plan.order)), 0
    last = jnp.zeros((*x.shape, weights.head.kernel.shape[0]), weights.head.kernel.dtype)  # hidden states by slot
    # A step may take several passes, not always in the order of its slots.
    left = np.atleast_2d(plan.tokens_per_step).sum(0)
    for run in passes.schedule(plan, sampler, row=passes.row_cost(config)):
        state = loop.grow(state, run.shape)
        for number in range(len(run.steps.count)):
            step = jax.tree.map(jnp.asarray, run.steps.at(number))
            state, last = _forced_pass(weights, state, last, step, x, sampler, run.shape)
            if step.count.any():
                left[index] -= int(step.count.sum())
                if left[index] == 0:
                    yield _logits(weights, config, sampler, plan, index, last)
                    index += 1


def uncached_logits(weights: Weights, config: ModelConfig, sampler: Sampler, plan: Plan, x: Int[Array, "B L"],
                    indices: Sequence[int] | None = None) -> Iterator[Float[Array, "B _ V"]]:
    """Yields what `forced_logits` must equal: the logits of each step (or of the steps `indices`) by one pass over the
    whole sequence, without a cache."""
    begin = loop.start(weights, config, sampler, plan, unsort(x, plan.order))
    inputs = jnp.concatenate([begin.tokens[:, :sampler.shift], x], axis=1)[:, :x.shape[1]]
    for index in range(plan.nfe) if indices is None else indices:
        first = jnp.asarray(plan.first[..., index])
        diffused = jnp.asarray(np.minimum(plan.first[..., index], plan.diffused))
        known = jnp.arange(x.shape[1])[None] < first.reshape(-1, 1) + sampler.shift
        step = Step(jnp.zeros_like(first), first, jnp.asarray(plan.tokens_per_step[..., index]), diffused)
        hidden = _pass(weights, jnp.where(known, inputs, config.mask), plan.order, step, sampler)
        yield _logits(weights, config, sampler, plan, index, hidden)


def _logits(weights: Weights, config: ModelConfig, sampler: Sampler, plan: Plan, index: int,
            hidden: Float[Array, "B L D"]) -> Float[Array, "B _ V"]:
    """The logits of a step's slots."""
    first, count = (jnp.asarray(x[..., index]).reshape(-1, 1) for x in (plan.first, plan.tokens_per_step))
    return _head(weights, hidden, first, count, int(count.max()), config.mask, sampler.denoiser)


class Difference(NamedTuple):
    """The worst difference between logits, and the largest logit (the mask's left out)."""

    worst: float
    largest: float

    @property
    def relative(self) -> float:
        """0 if there is none, infinite or nan where the logits are."""
        return self.worst / self.largest if self.largest else self.worst and math.inf


def compare(ours: Iterable[Array], theirs: Iterable[Array], mask_id: int) -> Difference:
    """Two runs of logits [B, _, V], step by step."""
    worst, largest = 0.0, 0.0
    for pair in zip(ours, theirs, strict=True):
        a, b = (np.delete(np.asarray(x), mask_id, axis=-1) for x in pair)
        # Not Python's max, which drops nan.
        worst, largest = float(np.maximum(worst, np.abs(a - b).max())), float(np.maximum(largest, np.abs(b).max()))
    return Difference(worst, largest)


def cache_error(engine: Engine, sampler: Sampler, plan: Plan, x: Int[np.ndarray, "B L"], most: int = 64) -> Difference:
    """Cached against uncached logits, at up to `most` steps spread over the plan."""
    indices = np.unique(np.linspace(0, plan.nfe - 1, min(most, plan.nfe)).astype(int)).tolist()
    chosen, rows, mask = set(indices), slice(len(x)), engine.config.model.mask
    with jax.set_mesh(engine.mesh):
        arguments = _filled(engine, sampler, plan, x)
        cached = (logits[rows] for index, logits in enumerate(forced_logits(*arguments)) if index in chosen)
        return compare(cached, (logits[rows] for logits in uncached_logits(*arguments, indices)), mask)


def batch_error(engine: Engine, sampler: Sampler, plan: Plan, x: Int[np.ndarray, "B L"], size: int) -> Difference:
    """Logits of the first `size` rows decoded by themselves, against the same rows in the whole batch."""
    few = plan.rows(np.arange(size)), x[:size]
    with jax.set_mesh(engine.mesh):
        part, whole = ((logits[:size] for logits in forced_logits(*_filled(engine, sampler, *rows)))
                       for rows in (few, (plan, x)))
        return compare(part, whole, engine.config.model.mask)


def precision_error(engine: Engine, exact: Engine, sampler: Sampler, plan: Plan,
                    x: Int[np.ndarray, "B L"]) -> Difference:
    """Cached logits of one engine against those of another, `exact`, with the same parameters in another type."""
    with jax.set_mesh(engine.mesh):
        ours, theirs = ((logits[:len(x)] for logits in forced_logits(*_filled(one, sampler, plan, x)))
                        for one in (engine, exact))
        return compare(ours, theirs, engine.config.model.mask)


def _filled(engine: Engine, sampler: Sampler, plan: Plan,
            x: np.ndarray) -> tuple[Weights, ModelConfig, Sampler, Plan, Array]:
    """The arguments of `forced_logits`, with rows repeated until they divide over the devices, and put there."""
    size = engine.size(len(x), len(x))
    rows = np.resize(np.arange(len(x)), size)
    own = rows[sharding.rows_of_process(engine.mesh, size)]
    order, tokens = (sharding.put_rows(np.asarray(array, np.int32)[own], engine.mesh, size)
                     for array in (plan.order, x))
    return engine.weights, engine.config.model, sampler, dataclasses.replace(plan.rows(rows), order=order), tokens


@functools.partial(jax.jit, static_argnames=("most", "mask_id", "denoiser"))
def _head(weights: Weights, hidden: Float[Array, "B L D"], first: Int[Array, "#B 1"], count: Int[Array, "#B 1"],
          most: int, mask_id: int, denoiser: Any) -> Float[Array, "B S V"]:
    number = jnp.arange(most)[None]
    own = jnp.broadcast_to(jnp.minimum(first + number, hidden.shape[1] - 1), (len(hidden), most))
    logits = denoiser.head(weights, jnp.take_along_axis(hidden, own[..., None], axis=1), mask_id)
    return sharding.constrain(jnp.where((number < count)[..., None], logits, 0), sharding.BATCH)


@functools.partial(jax.jit, static_argnames=("sampler", "shape"))
def _forced_pass(weights: Weights, state: State, last: Float[Array, "B L D"], step: Step, x: Int[Array, "B L"],
                 sampler: Sampler, shape: Shape) -> tuple[State, Float[Array, "B L D"]]:
    hidden, cache = loop.hidden_of(weights, state, step, sampler, shape)
    tokens = loop.replace(state.tokens, step, shape, slots.take(x, loop.taken_from(step, shape), shape.width),
                          sampler.shift)
    return dataclasses.replace(state, tokens=tokens, cache=cache), loop.replace(
        last, step, shape, loop.rows_of(hidden, step, shape))


@functools.partial(jax.jit, static_argnames="sampler")
def _pass(weights: Weights, tokens: Int[Array, "B L"], positions: Int[Array, "B L"], step: Step,
          sampler: Sampler) -> Float[Array, "B L D"]:
    return sampler.denoiser.trunk(weights, tokens, positions, sampler.view(step))[0]
