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

Tokens that are given come first in the order. One pass over them, which decodes nothing, fills the cache; the first
step begins behind them.

Rows may share their steps, or have steps of their own: a row's window then begins where its own step wants it, and is
as wide as the widest of the batch.

passes.py makes of a plan the passes that the compiled loops here run: few programs, each used again and again.

Axes: B batch, L length, S steps of a plan, P passes, W slots of a window, V vocabulary, U uniforms of a slot.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from eso_jax import sharding
from eso_jax.config import ModelConfig
from eso_jax.decoding import categorical, passes, record as records
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.order import sort, unsort
from eso_jax.decoding.passes import Run, Sampler, Shape, Step
from eso_jax.decoding.plan import Plan
from eso_jax.decoding.record import Facts
from eso_jax.model import attention, cache as kv, slots, vocabulary
from eso_jax.model.params import Weights

PACE = 8  # passes between two reports of the tokens so far (to `watch`, `report` and `done`)


@struct.dataclass
class State:
    """What a step reads and writes.

    Attributes:
      tokens: int [B, L], the input tokens by slot: masks until decoded. AR: [B, L + 1], the start token first.
      positions: int [B, L], the natural position of each slot (the order).
      logp: float32 [B, L], log p of the decoded tokens by slot where they are scored, else None.
      cache: the key-value cache, or None.
      facts: of the decoded tokens by slot where they are kept, else None.
    """

    tokens: Int[Array, "B _"]
    positions: Int[Array, "B L"]
    logp: Float[Array, "B L"] | None
    cache: kv.KVCache | None
    facts: Facts | None = None


@struct.dataclass
class Draw:
    """Tokens are drawn by a rule, from two uniforms a slot (U is more for a decoder that draws more)."""

    uniforms: Float[Array, "B L U"]
    rule: Rule = Rule()


@struct.dataclass
class Score:
    """The tokens are given, by slot; their log p is wanted, at temperature 1 and from the whole distribution."""

    tokens: Int[Array, "B L"]


T = TypeVar("T")
Report = Callable[[int], None]
Watch = Callable[[Int[np.ndarray, "B L"]], None]
Done = Callable[[Int[np.ndarray, "B L"], Bool[np.ndarray, "B L"]], Bool[np.ndarray, " B"]]


def sample(weights: Weights, config: ModelConfig, sampler: Sampler, plan: Plan, keys: Key[Array, "..."],
           rule: Rule = Rule(), given: Int[Array, "B L"] | None = None, report: Report | None = None,
           done: Done | None = None, record: bool = False,
           watch: Watch | None = None) -> Int[Array, "B L"] | tuple[Int[Array, "B L"], Facts]:
    """Decodes a batch along the plan; returns tokens in natural order, and on request what was known of them.

    The draws of a row are keyed by (its key, slot) and do not depend on the other rows.

    Args:
      weights: of params.fold, unstacked.
      keys: one for each row; or one, of which row b's is fold_in(key, b).
      given: the tokens that the plan takes for given, by natural position; others are not looked at.
      report: is told every few passes how many more tokens the rows have got; while the next passes are at work.
      record: the facts of each token, [B, L] and [B, L, A], are returned with the tokens.
      done: says of tokens, in natural order with masks, and of which were given, which rows need no more; the plan is
        left when all are done or decoded. It is asked about a run while the next one is at work, which is all that can
        be in vain. A row keeps what it was given meanwhile.
      watch: is told every few passes what the tokens are, in natural order; masks where there is none yet.
    """
    source = Draw(uniforms_of(keys, plan), rule)
    state = start(weights, config, sampler, plan, given)
    if record:
        state = dataclasses.replace(state, facts=records.empty(len(plan.order), plan.length, config.vocab_size))
    states = planned(weights, config, sampler, plan, state, source, PACE if report or done or watch else None)
    for state, _ in follow(states, config, sampler, plan, report, done, watch):
        pass
    tokens = natural(state, sampler)
    return (tokens, jax.tree.map(lambda x: unsort(x, plan.order), state.facts)) if record else tokens


def follow(states: Iterator[tuple[State, T]], config: ModelConfig, sampler: Sampler, plan: Plan, report: Report | None,
           done: Done | None, watch: Watch | None) -> Iterator[tuple[State, T]]:
    """The states with what comes with them, until `done` says that it is enough. For the last three see `sample`."""
    before, count = None, int(plan.known.sum()) if report else 0

    def tell(tokens: Int[np.ndarray, "B L"]) -> None:
        nonlocal count
        if report is not None:
            now = int((tokens != config.mask).sum())
            report(now - count)
            count = now

    for state, more in states:
        yield state, more
        if watch is not None:
            watch(sharding.fetch(natural(state, sampler)))
        if report is not None or done is not None:
            if before is not None:
                tokens = sharding.fetch(before)
                tell(tokens)
                if done is not None and (done(tokens, plan.known) | (
                        (tokens != config.mask).sum(1) >= plan.end)).all():
                    break
            before = natural(state, sampler)
    else:
        if report is not None and before is not None:
            tell(sharding.fetch(before))


def natural(state: State, sampler: Sampler) -> Int[Array, "B L"]:
    """The tokens so far in natural order, with masks."""
    return unsort(state.tokens[:, sampler.shift:], state.positions)


def log_prob(weights: Weights, config: ModelConfig, sampler: Sampler, plan: Plan,
             tokens: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """log p of each token, in the order, if `tokens` [B, L] were decoded along the plan; by the sampler's own steps. 0
    for given ones."""
    state = start(weights, config, sampler, plan, tokens)
    state = dataclasses.replace(state, logp=jnp.zeros(tokens.shape, jnp.float32))
    for state, _ in planned(weights, config, sampler, plan, state, Score(sort(tokens, plan.order))):
        pass
    assert state.logp is not None
    return state.logp


def planned(weights: Weights, config: ModelConfig, sampler: Sampler, plan: Plan, state: State,
            source: Draw | Score, pace: int | None = None) -> Iterator[tuple[State, Run]]:
    """Decodes along the plan, run by run (of `pace` passes, if that is said): the state after each. It is gone when the
    next one is asked for, which updates it in place; what is made of it before that stays."""
    runs = passes.schedule(plan, sampler, row=passes.row_cost(config))
    for run in runs if pace is None else passes.cut(runs, pace):
        state = decode_run(weights, grow(state, run.shape), run.steps, source, config, sampler, run.shape)
        yield state, run


def start(weights: Weights, config: ModelConfig, sampler: Sampler, plan: Plan,
          given: Int[Array, "B L"] | None = None) -> State:
    """The state before the first step: all masks but the given tokens, an empty cache."""
    batch, length = plan.order.shape
    tokens = jnp.full((batch, length), config.mask, jnp.int32)
    if given is not None:
        first = np.arange(length) < np.reshape(plan.given, (-1, 1))
        tokens = jnp.where(first, sort(given, plan.order).astype(jnp.int32), tokens)
    if sampler.start_id is not None:
        tokens = jnp.concatenate([jnp.full((batch, 1), sampler.start_id, jnp.int32), tokens], axis=1)
    cache = None
    if sampler.cached:
        dtype = weights.head.kernel.dtype
        cache = kv.empty(config, batch, 0, dtype, attention.keeper(config, sampler.pattern, dtype, weights.attention))
    tokens, positions = (sharding.constrain(x, sharding.BATCH) for x in (tokens, jnp.array(plan.order, jnp.int32)))
    return State(tokens, positions, None, cache)


def grow(state: State, shape: Shape) -> State:
    """The state with room in the cache for a run."""
    if state.cache is None or state.cache.slots == shape.live:
        return state
    return dataclasses.replace(state, cache=_grown(state.cache, shape.live))


_grown = jax.jit(kv.grown, static_argnames="slots")


@functools.partial(jax.jit, donate_argnames="state", static_argnames=("config", "sampler", "shape"))
def decode_run(weights: Weights, state: State, steps: Step, source: Draw | Score, config: ModelConfig,
               sampler: Sampler, shape: Shape) -> State:
    """The passes `steps` [P] in one compiled loop; the state is donated and updated in place."""

    def body(state: State, step: Step) -> tuple[State, None]:
        hidden, cache = hidden_of(weights, state, step, sampler, shape)

        def write_rows(width: int, state: State) -> State:
            return write(weights, state, step, hidden, source, config, sampler, shape._replace(width=width))

        widths = passes.widths(shape.width, passes.row_cost(config))
        least = (np.array(widths[:-1]) < step.count.max()).sum()
        # Without the cache, which a branch might copy.
        state = jax.lax.switch(least, [functools.partial(write_rows, width) for width in widths],
                               dataclasses.replace(state, cache=None))
        return dataclasses.replace(state, cache=cache), None

    steps = jax.tree.map(lambda x: sharding.constrain(x, None, sharding.BATCH) if x.ndim == 2 else x, steps)
    return jax.lax.scan(body, state, steps)[0]


def hidden_of(weights: Weights, state: State, step: Step, sampler: Sampler,
              shape: Shape) -> tuple[Float[Array, "B W D"], kv.KVCache | None]:
    """One pass over the window: its hidden states, and the cache with the window written."""
    tokens, positions = (slots.take(x, step.start, shape.window) for x in (state.tokens, state.positions))
    hidden, cache = sampler.denoiser.trunk(weights, tokens, positions, sampler.view(step), state.cache, step.start)
    return hidden, cache


def rows_of(hidden: Float[Array, "B W D"], step: Step, shape: Shape) -> Float[Array, "B _ D"]:
    """Of the window's hidden states those of the `shape.width` slots from `taken_from` on."""
    return slots.take(hidden, taken_from(step, shape) - step.start, shape.width)


def write(weights: Weights, state: State, step: Step, hidden: Float[Array, "B W D"],
          source: Draw | Score, config: ModelConfig, sampler: Sampler, shape: Shape) -> State:
    """Draws this step's tokens from their logits, or scores the given ones, and writes them into the state. `hidden`:
    the window's."""
    begin, hidden = taken_from(step, shape), rows_of(hidden, step, shape)

    def draw(hidden: Array, uniforms: Array) -> tuple[Array, Facts | None]:
        assert isinstance(source, Draw)
        with jax.named_scope("draw"):
            logits = logits_of(weights, hidden, config, sampler)
            tokens = categorical.draw(logits, uniforms, source.rule).astype(state.tokens.dtype)
            return tokens, None if state.facts is None else records.facts(logits, tokens, source.rule)

    def score(hidden: Array, tokens: Array) -> Array:
        logs = jax.nn.log_softmax(logits_of(weights, hidden, config, sampler))
        return jnp.take_along_axis(logs, tokens[..., None], axis=-1)[..., 0]

    logp, facts = state.logp, state.facts
    if isinstance(source, Draw):
        chosen, new = vocabulary.in_chunks(draw, config.vocab_size, hidden,
                                           slots.take(source.uniforms, begin, shape.width))
        facts = jax.tree.map(lambda old, new: replace(old, step, shape, new), facts, new)
    else:
        assert logp is not None
        chosen = slots.take(source.tokens, begin, shape.width)
        logp = replace(logp, step, shape, vocabulary.in_chunks(score, config.vocab_size, hidden, chosen))
    tokens = replace(state.tokens, step, shape, chosen, sampler.shift)
    return dataclasses.replace(state, tokens=tokens, logp=logp, facts=facts)


def logits_of(weights: Weights, hidden: Float[Array, "B W D"], config: ModelConfig,
              sampler: Sampler) -> Float[Array, "B W V"]:
    """The logits of hidden states, each row's on its device."""
    return sharding.constrain(sampler.denoiser.head(weights, hidden, config.mask), sharding.BATCH)


def replace(x: Shaped[Array, "B _ *s"], step: Step, shape: Shape, new: Shaped[Array, "B W *s"],
            shift: int = 0) -> Shaped[Array, "B _ *s"]:
    """x with what is `new` of the step's own slots, of the `shape.width` from `taken_from` on. `shift`: where slot 0 is
    in x."""
    begin = taken_from(step, shape)
    here, first = slots.numbers(begin, shape.width), step.first.reshape(-1, 1)
    mine = (here >= first) & (here < first + step.count.reshape(-1, 1))
    old = slots.take(x, begin + shift, shape.width)
    return slots.put(x, jnp.where(mine.reshape(*mine.shape, *[1] * (x.ndim - 2)), new, old), begin + shift)


def taken_from(step: Step, shape: Shape) -> Int[Array, "..."]:
    """First slot whose logits are taken: `step.first`, or earlier where the rows would run over the window's end."""
    return jnp.minimum(step.first, step.start + shape.window - shape.width)


@jax.jit
def row_keys(key: Key[Array, ""], numbers: Int[Array, " B"]) -> Key[Array, " B"]:
    """The keys of rows by their numbers."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)


def uniforms_of(keys: Key[Array, "..."], plan: Plan, count: int = 2) -> Float[Array, "B L U"]:
    """Those of a plan's rows, by a key for each or one for all."""
    if keys.ndim == 0:
        keys = row_keys(keys, jnp.arange(len(plan.order)))
    return draw_uniforms(keys, plan.length, count)


@functools.partial(jax.jit, static_argnames=("length", "count"))
def draw_uniforms(keys: Key[Array, " B"], length: int, count: int = 2) -> Float[Array, "B L U"]:
    """`count` uniforms per row and slot, keyed by (the row's key, slot). Drawn before the loop: drawn within it, they
    would make two thirds of every program's compilation."""
    batch = len(keys)  # flat: two maps, one in the other, take half as long again to compile
    own = jax.vmap(jax.random.fold_in)(jnp.repeat(keys, length), jnp.tile(jnp.arange(length), batch))
    return jax.vmap(lambda key: jax.random.uniform(key, (count,)))(own).reshape(batch, length, count)
