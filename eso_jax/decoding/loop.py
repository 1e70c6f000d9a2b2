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
into runs of passes whose windows are of one shape. A run is one dispatch of one compiled loop: a `scan` over a fixed
number of passes, whose numbers are data. (Were the bounds of the loop data, a GPU would ask the host after each pass.)
Programs are compiled once per shape and length and used by later runs and plans, so there should be few. A window
that is too wide begins earlier or ends later than needed: earlier slots are recomputed to the same values, later ones
cannot be seen and are overwritten. A window that is too narrow for a step takes several passes. A run that is too long
repeats its last pass and decodes nothing. All three cost time and change nothing. (Instead, one loop could hold a
`lax.switch` over the shapes. On 2 CPU cores, L = 256, T = 256, batch 4, it ran 7% slower; and the cache could not grow
with the plan.)

Axes: B batch, L length, S steps of a plan, P passes, W slots of a window, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from eso_jax import sharding
from eso_jax.config import ModelConfig
from eso_jax.decoding import categorical, record as records
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.order import sort, unsort
from eso_jax.decoding.plan import Plan
from eso_jax.decoding.record import Facts
from eso_jax.model import cache as kv, masks, transformer, vocabulary
from eso_jax.model.masks import Pattern, View
from eso_jax.model.params import Weights

# A pass costs as much as its slots and so many more: it reads the weights, elsewhere for all rows of a batch at once.
FREE, FREE_ELSEWHERE = 8, 256
WORTH = 1 / 16  # of a plan's cost: what a window of another width must save
PACE = 8  # passes after which a watcher is told what there is
PARTS, PART = 8, 256  # wide windows, and the cache, grow by an eighth of the length; the cache at least by 256 slots


@struct.dataclass
class Step:
    """One pass in numbers (or several, as arrays): it decodes `count` slots from `first`, by a window from `start`.

    Attributes:
      start, first, count: as above; the slots' logits are the window's rows from `first - start`.
      diffused: slots before `first` that were decoded by diffusion, not sequentially.
    """

    start: Int[Any, "*P"]
    first: Int[Any, "*P"]
    count: Int[Any, "*P"]
    diffused: Int[Any, "*P"]


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
    """Tokens are drawn by a rule, from two uniforms a slot."""

    uniforms: Float[Array, "B L 2"]
    rule: Rule = Rule()


@struct.dataclass
class Score:
    """The tokens are given, by slot; their log p is wanted, at temperature 1 and from the whole distribution."""

    tokens: Int[Array, "B L"]


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
    """Consecutive passes of one shape, one dispatch of a compiled loop."""

    steps: Step
    shape: Shape


Report = Callable[[int], None]
Watch = Callable[[Int[np.ndarray, "B L"]], None]


def sample(weights: Weights, config: ModelConfig, sampler: Sampler, plan: Plan, key: Key[Array, ""],
           rule: Rule = Rule(), rows: Int[Array, " B"] | None = None,
           report: Report | None = None, record: bool = False,
           watch: Watch | None = None) -> Int[Array, "B L"] | tuple[Int[Array, "B L"], Facts]:
    """Decodes a batch along the plan; returns tokens in natural order, and on request what was known of them.

    The draws of row b are keyed by (key, rows[b], slot) and do not depend on the other rows.

    Args:
      weights: of params.fold, unstacked.
      rows: numbers of the rows, 0 to B - 1 by default.
      report: is told after each run how many tokens a row has got in it.
      record: the facts of each token, [B, L] and [B, L, A], are returned with the tokens.
      watch: is told every few passes what the tokens are, in natural order; masks where there is none yet.
    """
    state = start(weights, config, sampler, plan.order)
    uniforms = draw_uniforms(key, jnp.arange(len(plan.order)) if rows is None else rows, plan.length)
    if record:
        state = dataclasses.replace(state, facts=records.empty(len(plan.order), plan.length, config.vocab_size))
    state = _decode(weights, config, sampler, plan, state, Draw(uniforms, rule), report, watch)
    tokens = unsort(state.tokens[:, sampler.shift:], plan.order)
    return (tokens, jax.tree.map(lambda x: unsort(x, plan.order), state.facts)) if record else tokens


def log_prob(weights: Weights, config: ModelConfig, sampler: Sampler, plan: Plan,
             tokens: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """log p of each token, in the order, if `tokens` [B, L] were decoded along the plan; by the sampler's own steps."""
    state = start(weights, config, sampler, plan.order)
    state = dataclasses.replace(state, logp=jnp.zeros(tokens.shape, jnp.float32))
    logp = _decode(weights, config, sampler, plan, state, Score(sort(tokens, plan.order))).logp
    assert logp is not None
    return logp


def _decode(weights: Weights, config: ModelConfig, sampler: Sampler, plan: Plan, state: State,
            source: Draw | Score, report: Report | None = None, watch: Watch | None = None) -> State:
    runs = schedule(plan, sampler, row=row_cost(config))
    for run in runs if watch is None else cut(runs, PACE):
        state = decode_run(weights, grow(state, run.shape), run.steps, source, config, sampler, run.shape)
        if report is not None:
            jax.block_until_ready(state.tokens)
            report(int(run.steps.count.sum()))
        if watch is not None:
            watch(sharding.fetch(unsort(state.tokens[:, sampler.shift:], plan.order)))
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


def row_cost(config: ModelConfig) -> float:
    """What a row of logits costs, in slots of a pass: the products with the head over those with the layers."""
    return config.vocab_size / (12 * config.layers * config.width)


def schedule(plan: Plan, sampler: Sampler, exact: bool = False, row: float = 0.5) -> list[Run]:
    """The runs of a plan.

    A causal window can be cut: its later slots may pass after the earlier ones. So a step that is wider than the window
    of its run takes several passes, and the run needs no shape of its own for it.

    Args:
      exact: shapes fit every step (to measure what sharing them costs).
      row: the cost of a row of logits, `row_cost`; that of the paper's model is about the default.
    """
    length, counts, first = plan.length, plan.tokens_per_step, plan.first
    begin, stop = sampler.window(plan)
    batch, cpu = plan.order.shape[0], sharding.platform() == "cpu"
    # On CPU a product with a single row takes half as long again as with two.
    least = min(length, 2 if batch == 1 and cpu else 1)
    window = needed = np.maximum(stop - begin, least)
    width, steps = counts, Step(np.minimum(begin, length - needed), first, counts, np.minimum(first, plan.diffused))
    if not exact and sampler.cached and sampler.pattern == masks.CAUSAL:
        free = FREE if cpu else max(FREE, FREE_ELSEWHERE // batch)
        window = np.minimum(_few(needed, free, 4, WORTH), length)
        steps, window = _cut_windows(steps, begin, stop, window)
        inner = np.where(np.isin(steps.first + steps.count, stop), 0, steps.count)  # is not cut
        counts = np.maximum(steps.count, 1)
        width = _same(window, lambda of: np.clip(_few(counts[of], round((free + int(window[of][0])) / row)),
                                                 inner[of].max(), window[of]))
        steps, window, width = _cut_counts(steps, window, width)
    elif not exact:
        window = _rounded(needed, length)
        window[:1] = window[:2].max()  # a first step of its own shape would cost a compilation
        steps = dataclasses.replace(steps, start=np.minimum(begin, length - window))
        width = _same(window, lambda of: _sizes(int(width[of].max()))[-1:].clip(max=window[of][0]))
    return _runs(steps, window, width, length, 1 if exact else max(PART, -(-length // PARTS)))


def _same(window: Int[np.ndarray, " S"], value: Callable[[Any], Int[np.ndarray, " _"]]) -> Int[np.ndarray, " S"]:
    """One value(its passes) for all passes of a window."""
    found = np.empty_like(window)
    for size in np.unique(window):
        found[window == size] = value(window == size)
    return found


def _few(needed: Int[np.ndarray, " S"], free: int, parts: int = 1, worth: float = 1) -> Int[np.ndarray, " S"]:
    """For each step the size of its passes, the same over long stretches: the one that costs least, where steps that
    need more take several passes. A pass costs its size and `free` more. A stretch of its own must save the share
    `worth` of the whole cost."""
    sizes = _sizes(int(needed.max()), parts)
    until = np.pad(np.cumsum(-(-needed // sizes[:, None]), axis=1), [(0, 0), (1, 0)]) * (sizes + free)[:, None]
    found, enough = np.zeros(len(needed), np.int64), worth * until[:, -1].min()

    def fill(low: int, high: int) -> None:
        before = until[:, low:high + 1] - until[:, low:low + 1]
        after = before[:, -1:] - before
        cost = before.min(0) + after.min(0)  # cut there
        cut = int(cost.argmin())
        if cost[0] - cost[cut] > enough:
            fill(low, low + cut)
            fill(low + cut, high)
        else:
            found[low:high] = sizes[len(sizes) - 1 - after[::-1, 0].argmin()]

    fill(0, len(needed))
    return found


def _cut_windows(steps: Step, begin: Int[np.ndarray, " S"], stop: Int[np.ndarray, " S"],
                 window: Int[np.ndarray, " S"]) -> tuple[Step, Int[np.ndarray, " _"]]:
    """Passes of at most `window` slots. The last one of a step ends where the step does, and none begins before a slot
    that an earlier one has decoded, which would no longer be a mask."""
    passes, length = -(-(stop - begin) // window), stop[-1]
    number, (begin, stop, window, several, steps) = _repeat((begin, stop, window, passes > 1, steps), passes)
    start = np.where(several, np.minimum(begin + window * number, stop - window), np.minimum(begin, length - window))
    first = np.maximum(steps.first, np.where(number, start, 0))
    end = np.where(np.append(number[1:], 0), np.maximum(steps.first, np.append(start[1:], 0)), stop)
    return dataclasses.replace(steps, start=start, first=first, count=end - first), window


def _cut_counts(steps: Step, window: Int[np.ndarray, " S"],
                width: Int[np.ndarray, " S"]) -> tuple[Step, Int[np.ndarray, " _"], Int[np.ndarray, " _"]]:
    """Passes that decode at most `width` slots: over the same window again, whose last slots come first, since the
    earlier ones do not see them."""
    number, (steps, window, width) = _repeat((steps, window, width), np.maximum(1, -(-steps.count // width)))
    end = steps.first + steps.count - width * number
    first = np.maximum(steps.first, end - width)
    return dataclasses.replace(steps, first=first, count=end - first), window, width


def _repeat(tree: Any, times: Int[np.ndarray, " S"]) -> tuple[Int[np.ndarray, " _"], Any]:
    """Each entry of the arrays so many times, and the numbers 0, 1, ... of its copies."""
    number = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
    return number, jax.tree.map(lambda x: np.repeat(x, times), tree)


def _runs(steps: Step, window: Int[np.ndarray, " S"], width: Int[np.ndarray, " S"], length: int,
          part: int) -> list[Run]:
    """Cut where the shape changes, and in between so often that the cache can grow with the plan. Runs of a window and
    a width have the same number of passes, filled up by the last one again, which then decodes nothing."""
    stop, shapes = steps.start + window, list(zip(window.tolist(), width.tolist(), strict=True))
    edges = [0, *(at for at in range(1, len(shapes)) if shapes[at] != shapes[at - 1]), len(shapes)]
    stretches = list(itertools.pairwise(edges))
    passes = {}
    for shape in set(shapes):
        low, high = np.array([stretch for stretch in stretches if shapes[stretch[0]] == shape]).T
        dispatches = max(1, round(2 * (stop[high - 1] - stop[low]).sum() / part))
        options = _sizes(int(min((high - low).max(), -(-(high - low).sum() // dispatches))), 12)
        costs = ((options + 1) * -(-(high - low)[:, None] // options)).sum(0)  # that of a dispatch: a pass at most
        passes[shape] = int(options[costs.argmin() if len(low) > 1 else -1])
    runs, live = [], 0
    for low, high in stretches:
        for at in range(low, high, passes[shapes[low]]):
            index = np.arange(at, at + passes[shapes[low]])
            own = jax.tree.map(lambda x, i=np.minimum(index, high - 1): x[i].astype(np.int32), steps)
            own = dataclasses.replace(own, count=np.where(index < high, own.count, 0))
            live = max(live, min(length, -(-int(own.start.max() + window[low]) // part) * part))
            runs.append(Run(own, Shape(*shapes[low], live)))
    return runs


def cut(runs: list[Run], passes: int) -> Iterator[Run]:
    """The same in runs of so many passes."""
    for steps, shape in runs:
        for low in range(0, len(steps.count), passes):
            index = np.arange(low, low + passes)
            last = len(steps.count) - 1
            own = jax.tree.map(lambda x, i=np.minimum(index, last): x[i], steps)
            yield Run(dataclasses.replace(own, count=np.where(index <= last, own.count, 0)), shape)


def _sizes(most: int, parts: int = 1) -> Int[np.ndarray, " _"]:
    """1, 2, ..., all powers of two and between them steps of a `parts`-th, up to the first that is at least `most`."""
    found = [1]
    while found[-1] < most:
        power = 2 ** (found[-1].bit_length() - 1)
        found.append(min(2 * power, found[-1] + max(1, power // parts)))
    return np.array(found)


def _rounded(n: Int[np.ndarray, " S"], length: int) -> Int[np.ndarray, " S"]:
    """Rounded up to a power of two, or where that is above an eighth of the length to a multiple of an eighth."""
    power, part = 2 ** np.ceil(np.log2(n)).astype(np.int64), -(-length // PARTS)
    return np.minimum(np.where(power <= part, power, -(-n // part) * part), length)


@functools.partial(jax.jit, donate_argnames="state", static_argnames=("config", "sampler", "shape"))
def decode_run(weights: Weights, state: State, steps: Step, source: Draw | Score, config: ModelConfig,
               sampler: Sampler, shape: Shape) -> State:
    """The passes `steps` [P] in one compiled loop; the state is donated and updated in place."""

    def body(state: State, step: Step) -> tuple[State, None]:
        hidden, cache = hidden_of(weights, state, step, sampler, shape)
        state = dataclasses.replace(state, cache=cache)
        return write(weights, state, step, hidden, source, config, sampler, shape), None

    return jax.lax.scan(body, state, steps)[0]


def hidden_of(weights: Weights, state: State, step: Step, sampler: Sampler,
              shape: Shape) -> tuple[Float[Array, "B W D"], kv.KVCache | None]:
    """One pass over the window: the hidden states of `shape.width` slots, and the cache with the window written."""
    tokens, positions = (jax.lax.dynamic_slice_in_dim(x, step.start, shape.window, axis=1)
                         for x in (state.tokens, state.positions))
    hidden, cache = transformer.trunk(weights, tokens, positions, sampler.view(step), state.cache, step.start)
    return jax.lax.dynamic_slice_in_dim(hidden, taken_from(step, shape) - step.start, shape.width, axis=1), cache


def write(weights: Weights, state: State, step: Step, hidden: Float[Array, "B W D"],
          source: Draw | Score, config: ModelConfig, sampler: Sampler, shape: Shape) -> State:
    """Draws this step's tokens from their logits, or scores the given ones, and writes them into the state."""
    begin = taken_from(step, shape)
    slots = begin + jnp.arange(shape.width)
    mine = (slots >= step.first) & (slots < step.first + step.count)

    def logits_of(hidden: Array) -> Array:
        return sharding.constrain(transformer.head(weights, hidden, config.mask), sharding.BATCH)

    def draw(hidden: Array, uniforms: Array) -> tuple[Array, Facts | None]:
        assert isinstance(source, Draw)
        with jax.named_scope("draw"):
            logits = logits_of(hidden)
            tokens = categorical.draw(logits, uniforms, source.rule).astype(state.tokens.dtype)
            return tokens, None if state.facts is None else records.facts(logits, tokens, source.rule)

    def score(hidden: Array, tokens: Array) -> Array:
        return jnp.take_along_axis(jax.nn.log_softmax(logits_of(hidden)), tokens[..., None], axis=-1)[..., 0]

    def own(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, begin, shape.width, axis=1)

    logp, facts = state.logp, state.facts
    if isinstance(source, Draw):
        chosen, new = vocabulary.in_chunks(draw, config.vocab_size, hidden, own(source.uniforms))
        facts = jax.tree.map(lambda old, new: _replace(old, begin, mine, new), facts, new)
    else:
        assert logp is not None
        chosen = own(source.tokens)
        logp = _replace(logp, begin, mine, vocabulary.in_chunks(score, config.vocab_size, hidden, chosen))
    tokens = _replace(state.tokens, begin + sampler.shift, mine, chosen)
    return dataclasses.replace(state, tokens=tokens, logp=logp, facts=facts)


def _replace(x: Array, begin: Int[Array, ""], mine: Bool[Array, " W"], new: Array) -> Array:
    """x [B, L, ...] with new [B, W, ...] from `begin` where `mine`."""
    old = jax.lax.dynamic_slice_in_dim(x, begin, len(mine), axis=1)
    mine = mine.reshape(1, -1, *[1] * (x.ndim - 2))
    return jax.lax.dynamic_update_slice_in_dim(x, jnp.where(mine, new, old), begin, axis=1)


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
