"""The decoding loop that every sampler shares.

Tokens are kept in the order in which they are decoded ("slots"), so that each step works on a contiguous window of
slots: it runs the denoiser over the window, takes the logits of this step's slots, draws their tokens and writes them.
A family says in a `Sampler` what the window of a step is and who sees whom:

  sampler      window                                        who sees whom              a slot's logits come from
  Eso-LM (B)   the tokens decoded last, then this step's     causal, cached             its own mask
  Eso-LM (A)   all decoded by diffusion, then this step's;   causal, but the former     its own mask
               in the sequential phase as (B)                see each other, cached
  AR           the token decoded last                        causal, cached             the token before it
  BD3-LM       this block; before it, the last one if it     own block and the blocks   its own mask
               has not been cached yet                       before, cached
  MDLM         all                                           everyone, no cache         its own mask

Windows have as many widths as the plan has step sizes, but a compiled loop has one. `schedule` therefore cuts the plan
into runs of consecutive steps whose windows, rounded up, are of one shape. A run is one compiled loop over its steps,
compiled once per shape and reused by later runs and plans (it is a `fori_loop`, whose bounds are data where a
`lax.scan`'s length is shape). A window that is too wide begins earlier or ends later than needed: earlier slots are
recomputed to the same values, later ones cannot be seen and are overwritten, so rounding up costs time and changes
nothing. (Instead, one loop could hold a `lax.switch` over the shapes. On 2 CPU cores, L = 256, T = 256, batch 4, it ran
7% slower; and the cache could not grow with the plan.)

Axes: B batch, L length, S steps, W slots of a window, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from eso_jax import sharding
from eso_jax.config import ModelConfig
from eso_jax.decoding import categorical
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.order import sort, unsort
from eso_jax.decoding.plan import Plan
from eso_jax.model import cache as kv, transformer, vocabulary
from eso_jax.model.masks import Pattern, View
from eso_jax.model.params import Weights

PARTS, PART = 8, 256  # wide windows, and the cache, grow by an eighth of the length; the cache at least by 256 slots


@struct.dataclass
class Step:
    """One step in numbers (or several, as arrays): it decodes `count` slots from `first`, by a window from `start`.

    Attributes:
      start, first, count: as above; the slots' logits are the window's rows from `first - start`.
      diffused: slots before `first` that were decoded by diffusion, not sequentially.
    """

    start: Int[Array, "*S"]
    first: Int[Array, "*S"]
    count: Int[Array, "*S"]
    diffused: Int[Array, "*S"]


class Sampler(NamedTuple):
    """How a family decodes. Programs are compiled by it, so that equal ones must be made of the same functions.

    Attributes:
      window: plan -> (start [S], stop [S]), the slots of each step's pass. With a cache, every slot before `start` must
        have been in an earlier pass that came after its token was decoded.
      pattern: who sees whom; its prefix is the slots that were decoded by diffusion.
      cached: whether keys and values before the window come from a cache.
      start_id: the token before the first, if a slot's logits come from the slot before it (AR); None if they come
        from its own mask.
    """

    window: Callable[[Plan], tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]]]
    pattern: Pattern
    cached: bool = True
    start_id: int | None = None

    @property
    def shift(self) -> int:
        """Tokens in the input before the first slot's own."""
        return 0 if self.start_id is None else 1

    def view(self, step: Step) -> View:
        """Who sees whom in a step."""
        return View(self.pattern, step.diffused[None])


@struct.dataclass
class State:
    """What a step reads and writes.

    Attributes:
      tokens: int [B, L], the input tokens by slot: masks until decoded. AR: [B, L + 1], the start token first.
      positions: int [B, L], the natural position of each slot (the order).
      logp: float32 [B, L], log p of the decoded tokens by slot where they are given (`log_prob`), else None.
      cache: the key-value cache, or None.
    """

    tokens: Int[Array, "B _"]
    positions: Int[Array, "B L"]
    logp: Float[Array, "B L"] | None
    cache: kv.KVCache | None


class Shape(NamedTuple):
    """What a compiled step depends on.

    Attributes:
      window: slots in a pass.
      width: rows whose logits are computed, at least the step's count.
      live: slots of the cache.
    """

    window: int
    width: int
    live: int


class Run(NamedTuple):
    """Consecutive steps low..high - 1 of one shape."""

    low: int
    high: int
    shape: Shape


def sample(weights: Weights, config: ModelConfig, sampler: Sampler, plan: Plan, key: Key[Array, ""],
           rule: Rule = Rule(), rows: Int[Array, " B"] | None = None) -> Int[Array, "B L"]:
    """Decodes a batch along the plan; returns tokens in natural order.

    The draws of row b are keyed by (key, rows[b], slot) and do not depend on the other rows.

    Args:
      weights: of params.fold, unstacked.
      rows: numbers of the rows, 0 to B - 1 by default.
    """
    state = start(weights, config, sampler, plan.order)
    uniforms = draw_uniforms(key, jnp.arange(len(plan.order)) if rows is None else rows, plan.length)
    tokens = _decode(weights, config, sampler, plan, state, uniforms, rule).tokens
    return unsort(tokens[:, sampler.shift:], plan.order)


def log_prob(weights: Weights, config: ModelConfig, sampler: Sampler, plan: Plan,
             tokens: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """log p of each token, in the order, if `tokens` [B, L] were decoded along the plan; by the sampler's own steps."""
    state = start(weights, config, sampler, plan.order)
    state = dataclasses.replace(state, logp=jnp.zeros(tokens.shape, jnp.float32))
    logp = _decode(weights, config, sampler, plan, state, sort(tokens, plan.order), Rule()).logp
    assert logp is not None
    return logp


def _decode(weights: Weights, config: ModelConfig, sampler: Sampler, plan: Plan, state: State,
            source: Float[Array, "B L 2"] | Int[Array, "B L"], rule: Rule) -> State:
    steps, runs = schedule(plan, sampler)
    for run in runs:
        state = grow(state, run.shape)
        state = decode_run(weights, state, steps, run.low, run.high, source, config, sampler, rule, run.shape)
    return state


def start(weights: Weights, config: ModelConfig, sampler: Sampler, order: Int[Array, "B L"]) -> State:
    """The state before the first step: all masks, an empty cache."""
    batch, length = order.shape
    tokens = jnp.full((batch, length), config.mask, jnp.int32)
    if sampler.start_id is not None:
        tokens = jnp.concatenate([jnp.full((batch, 1), sampler.start_id, jnp.int32), tokens], axis=1)
    cache = None
    if sampler.cached:
        cache = kv.empty(config, batch, 0, weights.head.kernel.dtype)
    tokens, positions = (sharding.constrain(x, sharding.BATCH) for x in (tokens, jnp.array(order, jnp.int32)))
    return State(tokens, positions, None, cache)


def grow(state: State, shape: Shape) -> State:
    """The state with room in the cache for a run."""
    if state.cache is None or state.cache.slots == shape.live:
        return state
    return dataclasses.replace(state, cache=_grown(state.cache, shape.live))


_grown = jax.jit(kv.grown, static_argnames="slots")


def schedule(plan: Plan, sampler: Sampler, exact: bool = False) -> tuple[Step, list[Run]]:
    """The steps of a plan as numbers, and their runs; `exact` shapes are not rounded (to measure what rounding costs).
    """
    length, counts, first = plan.length, plan.tokens_per_step, plan.first
    begin, stop = sampler.window(plan)
    # On CPU a product with a single row takes half as long again as with two.
    least = min(length, 2 if plan.order.shape[0] == 1 and sharding.platform() == "cpu" else 1)
    window, width, part = np.maximum(stop - begin, least), counts, 1
    if not exact:
        window, width, part = _rounded(window, length), _rounded(width, length), max(PART, -(-length // PARTS))
        window[:1] = window[:2].max()  # a first step of its own shape would cost a compilation
    begin = np.minimum(begin, length - window)  # a window that is too wide may not run over the end
    live = np.maximum.accumulate(np.minimum(length, -(-(begin + window) // part) * part))
    shapes = np.stack([window, width, live], axis=1)
    changes = np.flatnonzero((shapes[1:] != shapes[:-1]).any(axis=1)) + 1
    runs = [Run(low, high, Shape(*shapes[low].tolist()))
            for low, high in itertools.pairwise([0, *changes.tolist(), len(counts)])]
    # Padded to one size, so that plans of other numbers of steps run the same programs.
    fields = (begin, first, counts, np.minimum(first, plan.diffused))
    return Step(*(jnp.asarray(np.pad(x, (0, length - len(x))), jnp.int32) for x in fields)), runs


def _rounded(n: Int[np.ndarray, " S"], length: int) -> Int[np.ndarray, " S"]:
    """Rounded up to a power of two, or where that is above an eighth of the length to a multiple of an eighth."""
    power, part = 2 ** np.ceil(np.log2(n)).astype(np.int64), -(-length // PARTS)
    return np.minimum(np.where(power <= part, power, -(-n // part) * part), length)


@functools.partial(jax.jit, donate_argnames="state", static_argnames=("config", "sampler", "rule", "shape"))
def decode_run(weights: Weights, state: State, steps: Step, low: Int[Array, ""] | int, high: Int[Array, ""] | int,
               source: Float[Array, "B L 2"] | Int[Array, "B L"], config: ModelConfig, sampler: Sampler, rule: Rule,
               shape: Shape) -> State:
    """Steps low..high - 1 in one compiled loop; the state is donated and updated in place.

    `source` says where tokens come from, by slot: uniforms to draw them by, or the tokens themselves, to score them.
    """

    def body(index: Int[Array, ""], state: State) -> State:
        step = jax.tree.map(lambda field: field[index], steps)
        hidden, cache = hidden_of(weights, state, step, sampler, shape)
        state = dataclasses.replace(state, cache=cache)
        return write(weights, state, step, hidden, source, config, sampler, rule, shape)

    return jax.lax.fori_loop(low, high, body, state)


def hidden_of(weights: Weights, state: State, step: Step, sampler: Sampler,
              shape: Shape) -> tuple[Float[Array, "B W D"], kv.KVCache | None]:
    """One pass over the window: the hidden states of `shape.width` slots, and the cache with the window written."""
    tokens, positions = (jax.lax.dynamic_slice_in_dim(x, step.start, shape.window, axis=1)
                         for x in (state.tokens, state.positions))
    hidden, cache = transformer.trunk(weights, tokens, positions, sampler.view(step), state.cache, step.start)
    return jax.lax.dynamic_slice_in_dim(hidden, taken_from(step, shape) - step.start, shape.width, axis=1), cache


def write(weights: Weights, state: State, step: Step, hidden: Float[Array, "B W D"],
          source: Float[Array, "B L 2"] | Int[Array, "B L"], config: ModelConfig, sampler: Sampler, rule: Rule,
          shape: Shape) -> State:
    """Draws this step's tokens from their logits, or scores the given ones, and writes them into the state."""
    begin = taken_from(step, shape)
    slots = begin + jnp.arange(shape.width)
    mine = (slots >= step.first) & (slots < step.first + step.count)

    def logits_of(hidden: Array) -> Array:
        return sharding.constrain(transformer.head(weights, hidden, config.mask), sharding.BATCH)

    def drawn(hidden: Array, uniforms: Array) -> Array:
        with jax.named_scope("draw"):
            return categorical.draw(logits_of(hidden), uniforms, rule).astype(state.tokens.dtype)

    def scored(hidden: Array, tokens: Array) -> Array:
        return jnp.take_along_axis(jax.nn.log_softmax(logits_of(hidden)), tokens[..., None], axis=-1)[..., 0]

    given, logp = jax.lax.dynamic_slice_in_dim(source, begin, shape.width, axis=1), state.logp
    if logp is None:
        chosen = vocabulary.in_chunks(drawn, config.vocab_size, hidden, given)
    else:
        chosen = given
        logp = _replace(logp, begin, mine, vocabulary.in_chunks(scored, config.vocab_size, hidden, chosen))
    return dataclasses.replace(state, tokens=_replace(state.tokens, begin + sampler.shift, mine, chosen), logp=logp)


def _replace(x: Array, begin: Int[Array, ""], mine: Bool[Array, " W"], new: Array) -> Array:
    """x [B, L] with new [B, W] from `begin` where `mine`."""
    old = jax.lax.dynamic_slice_in_dim(x, begin, len(mine), axis=1)
    return jax.lax.dynamic_update_slice_in_dim(x, jnp.where(mine[None], new, old), begin, axis=1)


def taken_from(step: Step, shape: Shape) -> Int[Array, ""]:
    """First slot whose logits are taken: `step.first`, or earlier where the rows would run over the window's end."""
    return jnp.minimum(step.first, step.start + shape.window - shape.width)


@functools.partial(jax.jit, static_argnames="length")
def draw_uniforms(key: Key[Array, ""], rows: Int[Array, " B"], length: int) -> Float[Array, "B L 2"]:
    """Two uniforms per row and slot, keyed by (key, row number, slot). Drawn before the loop: drawn within it, they
    would make two thirds of every program's compilation."""
    def draw(row: Array, slot: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, row), slot), (2,))

    return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(rows, jnp.arange(length))
