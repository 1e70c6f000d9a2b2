"""The decoding loop that every sampler shares.

Tokens are kept in the order in which they are decoded ("slots"), so that each step works on a contiguous window of
slots: it runs the denoiser over the window, takes the logits of this step's slots, draws their tokens and writes them.

  sampler   window                                         attention           a slot's logits come from
  Eso-LM    the tokens decoded last, then this step's      cached, causal      its own mask
  AR        the token decoded last                         cached, causal      the token before it
  MDLM      all                                            everyone, no cache  its own mask

Windows have as many widths as the plan has step sizes, but a compiled loop has one. `schedule` therefore cuts the plan
into runs of consecutive steps that share a width rounded up to a power of two and a bound on the live cache. A run is
one compiled scan over its steps, compiled once per shape and reused by later runs and plans (it is a `fori_loop`, whose
bounds are data where a `lax.scan`'s length is shape). A window that is too wide begins earlier or ends later than
needed: earlier slots are recomputed to the same values, later ones cannot be seen and are overwritten, so rounding up
costs time and changes nothing.

Axes: B batch, L length, S steps, W slots of a window, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, Key

from eso_jax import cache as kv
from eso_jax import masks, transformer
from eso_jax.attention import single_stream
from eso_jax.config import ModelConfig
from eso_jax.order import unsort
from eso_jax.sampling import categorical
from eso_jax.sampling.categorical import Rule
from eso_jax.sampling.plan import Plan
from eso_jax.transformer import Weights

Kind = Literal["esolm", "ar", "mdlm"]

LIVE_PARTS = 4  # the live cache is read up to a multiple of a quarter of the length


@struct.dataclass
class State:
    """What a step reads and writes.

    Attributes:
      tokens: int [B, L], the input tokens by slot: masks until decoded. AR: [B, L + 1], the start token first.
      positions: int [B, L], the natural position of each slot (the order).
      cache: the key-value cache, or None.
    """

    tokens: Int[Array, "B _"]
    positions: Int[Array, "B L"]
    cache: kv.KVCache | None


@struct.dataclass
class Step:
    """One step in numbers (or several, as arrays): it decodes `count` slots from `first`, by a window from `start`.

    The slots' logits are the window's rows from `first - start`.
    """

    start: Int[Array, "*S"]
    first: Int[Array, "*S"]
    count: Int[Array, "*S"]


class Shape(NamedTuple):
    """What a compiled step depends on.

    Attributes:
      window: slots in a pass.
      width: rows whose logits are computed, at least the step's count.
      live: cache slots that are read.
    """

    window: int
    width: int
    live: int


class Run(NamedTuple):
    """Consecutive steps low..high - 1 of one shape."""

    low: int
    high: int
    shape: Shape


def sample(weights: Weights, config: ModelConfig, kind: Kind, plan: Plan, key: Key[Array, ""], rule: Rule = Rule(),
           first_row: int = 0, start_id: int | None = None) -> Int[Array, "B L"]:
    """Decodes a batch along the plan; returns tokens in natural order.

    The draws of row b are keyed by (key, first_row + b, slot) and do not depend on the other rows.

    Args:
      weights: of transformer.fold, unstacked.
      start_id: AR's token before the first.
    """
    steps, runs = schedule(plan.tokens_per_step, kind)
    state = start(weights, config, kind, plan.order, start_id)
    keys = row_keys(key, first_row, len(plan.order))
    for run in runs:
        state = decode_run(weights, state, steps, run.low, run.high, keys, config, kind, rule, run.shape)
    return unsort(state.tokens[:, 1:] if kind == "ar" else state.tokens, plan.order)


def start(weights: Weights, config: ModelConfig, kind: Kind, order: Int[Array, "B L"],
          start_id: int | None = None) -> State:
    """The state before the first step: all masks, an empty cache."""
    batch, length = order.shape
    tokens = jnp.full((batch, length), config.mask, jnp.int32)
    if kind == "ar":
        first = config.mask if start_id is None else start_id
        tokens = jnp.concatenate([jnp.full((batch, 1), first, jnp.int32), tokens], axis=1)
    cache = None if kind == "mdlm" else kv.empty(config, batch, length, weights["head"]["kernel"].dtype)
    return State(tokens, jnp.array(order, jnp.int32), cache)


def schedule(tokens_per_step: Int[np.ndarray, " S"], kind: Kind) -> tuple[Step, list[Run]]:
    """The steps of a plan as numbers, and their runs."""
    counts = np.asarray(tokens_per_step)
    first = np.cumsum(counts) - counts
    length = int(counts.sum())
    width = _power_of_two(counts, length)
    if kind == "mdlm":
        begin, window = np.zeros_like(first), np.full_like(first, length)
    elif kind == "ar":
        begin, window = first, width
    else:  # one width for both halves of the window: few shapes to compile
        before = np.concatenate([[1], counts[:-1]])
        width = _power_of_two(np.maximum(before, counts), length)
        begin, window = np.concatenate([[0], first[:-1]]), np.minimum(2 * width, length)
    begin = np.minimum(begin, length - window)  # a rounded window may not run over the end
    part = -(-length // LIVE_PARTS)
    live = np.minimum(length, -(-(begin + window) // part) * part)
    shapes = np.stack([window, width, live], axis=1)
    changes = np.flatnonzero((shapes[1:] != shapes[:-1]).any(axis=1)) + 1
    runs = [Run(low, high, Shape(*shapes[low].tolist()))
            for low, high in itertools.pairwise([0, *changes.tolist(), len(counts)])]
    # Padded to one size, so that plans of other numbers of steps run the same programs.
    return Step(*(jnp.asarray(np.pad(x, (0, length - len(x))), jnp.int32) for x in (begin, first, counts))), runs


def _power_of_two(n: Int[np.ndarray, " S"], most: int) -> Int[np.ndarray, " S"]:
    return np.minimum(2 ** np.ceil(np.log2(n)).astype(np.int64), most)


@functools.partial(jax.jit, donate_argnames="state", static_argnames=("config", "kind", "rule", "shape"))
def decode_run(weights: Weights, state: State, steps: Step, low: Int[Array, ""] | int, high: Int[Array, ""] | int,
               keys: Key[Array, " B"], config: ModelConfig, kind: Kind, rule: Rule, shape: Shape) -> State:
    """Steps low..high - 1 in one compiled loop; the state is donated and updated in place."""

    def body(index: Array, state: State) -> State:
        step = jax.tree.map(lambda x: x[index], steps)
        logits, cache = logits_of(weights, state, step, config, kind, shape)
        return write(dataclasses.replace(state, cache=cache), step, logits, keys, kind, rule, shape)

    return jax.lax.fori_loop(low, high, body, state)


def logits_of(weights: Weights, state: State, step: Step, config: ModelConfig, kind: Kind,
              shape: Shape) -> tuple[Float[Array, "B W V"], kv.KVCache | None]:
    """The logits of shape.width slots, from slot `taken_from(step, shape)`, and the cache with the window written."""
    tokens = jax.lax.dynamic_slice_in_dim(state.tokens, step.start, shape.window, axis=1)
    positions = jax.lax.dynamic_slice_in_dim(state.positions, step.start, shape.window, axis=1)
    attend = single_stream(masks.everyone) if kind == "mdlm" else kv.cached(step.start, shape.live)
    hidden, cache = transformer.trunk(weights, tokens, positions, attend, state.cache)
    rows = jax.lax.dynamic_slice_in_dim(hidden, taken_from(step, shape) - step.start, shape.width, axis=1)
    return transformer.head(weights, rows, config.mask), cache


def write(state: State, step: Step, logits: Float[Array, "B W V"], keys: Key[Array, " B"], kind: Kind, rule: Rule,
          shape: Shape) -> State:
    """Draws this step's tokens from their logits and writes them into the state."""
    begin = taken_from(step, shape)
    slots = begin + jnp.arange(shape.width)
    drawn = categorical.draw(logits, _uniforms(keys, slots), rule)
    mine = (slots >= step.first) & (slots < step.first + step.count)
    target = begin + 1 if kind == "ar" else begin
    old = jax.lax.dynamic_slice_in_dim(state.tokens, target, shape.width, axis=1)
    new = jnp.where(mine, drawn.astype(state.tokens.dtype), old)
    tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, new, target, axis=1)
    return dataclasses.replace(state, tokens=tokens)


def taken_from(step: Step, shape: Shape) -> Int[Array, ""]:
    """First slot whose logits are taken: `step.first`, or earlier where the rows would run over the window's end."""
    return jnp.minimum(step.first, step.start + shape.window - shape.width)


def row_keys(key: Key[Array, ""], first_row: int, rows: int) -> Key[Array, " B"]:
    """The keys of rows first_row, first_row + 1, ..."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, first_row + jnp.arange(rows))


def _uniforms(keys: Key[Array, " B"], slots: Int[Array, " W"]) -> Float[Array, "B W 2"]:
    """Two uniforms per row and slot."""
    by_slot = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, slots)
    return jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (2,))))(by_slot)
