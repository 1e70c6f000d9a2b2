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

Windows have as many widths as the plan has step sizes, but a compiled loop has one. `schedule` therefore cuts the plan
into runs of passes whose windows are of one shape. A run is one dispatch of one compiled loop: a `scan` over a fixed
number of passes, whose numbers are data. (Were the bounds of the loop data, a GPU would ask the host after each pass.)
Programs are compiled once per shape and length and used by later runs and plans, so there should be few. A window
that is too wide begins earlier or ends later than needed: earlier slots are recomputed to the same values, later ones
cannot be seen and are overwritten. A window that is too narrow for a step takes several passes. A run that is too long
repeats its last pass and decodes nothing, as does a row that is done, or waits for others. All this costs time and
changes nothing. (Instead, one loop could hold a `lax.switch` over the shapes. On 2 CPU cores, L = 256, T = 256, batch
4, it ran 7% slower; and the cache could not grow with the plan.)

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
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from eso_jax import sharding
from eso_jax.config import ModelConfig
from eso_jax.decoding import categorical, record as records
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.order import sort, unsort
from eso_jax.decoding.plan import Counts, Plan
from eso_jax.decoding.record import Facts
from eso_jax.model import cache as kv, masks, slots, transformer, vocabulary
from eso_jax.model.masks import Pattern, View
from eso_jax.model.params import Weights

# A pass costs as much as its slots and so many more: it reads the weights, elsewhere for all rows of a batch at once.
FREE, FREE_ELSEWHERE = 8, 256
WORTH = 1 / 16  # of a plan's cost: what a window of another width must save
PACE = 8  # passes after which a watcher is told what there is, and whoever ends rows is asked
LEAST_GIVEN = 16  # slots of a pass over given tokens
DIP = 16  # steps: so many that need a narrower window than those around them may have it
PARTS, PART = 8, 256  # wide windows, and the cache, grow by an eighth of the length; the cache at least by 256 slots


@struct.dataclass
class Step:
    """One pass in numbers (or several, as arrays): it decodes `count` slots from `first`, by a window from `start`.

    Each is one number for the batch (of several passes: [P]) or one for each row (of several: [P, B]).

    Attributes:
      start, first, count: as above; the slots' logits are the window's rows from `first - start`.
      diffused: slots before `first` that were given or decoded by diffusion, not sequentially.
    """

    start: Int[Any, "..."]
    first: Int[Any, "..."]
    count: Int[Any, "..."]
    diffused: Int[Any, "..."]

    def at(self, index: Any) -> Step:
        """Some of the passes."""
        return jax.tree.map(lambda x: x[index], self)


class Sampler(NamedTuple):
    """How a family decodes. Programs are compiled by it, so that equal ones must be made of the same functions.

    Attributes:
      window: plan -> (start, stop), the slots of each step's pass, [S] or [B, S]. With a cache, every slot before
        `start` must have been in an earlier pass that came after its token was decoded, or be given: slots before the
        first `start` pass beforehand.
      pattern: who sees whom; its prefix is the slots that were given or decoded by diffusion.
      cached: whether keys and values before the window come from a cache.
      start_id: the token before the first, if a slot's logits come from the slot before it (AR); None if they come
        from its own mask.
    """

    window: Callable[[Plan], tuple[Counts, Counts]]
    pattern: Pattern
    cached: bool = True
    start_id: int | None = None

    @property
    def shift(self) -> int:
        """Tokens in the input before the first slot's own."""
        return 0 if self.start_id is None else 1

    def view(self, step: Step) -> View:
        """Who sees whom in a step."""
        return View(self.pattern, step.diffused.reshape(-1))


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
      report: is told after each run how many tokens the rows have got in it.
      record: the facts of each token, [B, L] and [B, L, A], are returned with the tokens.
      done: says of tokens, in natural order with masks, and of which were given, which rows need no more; the plan is
        left when all are done or decoded. It is asked about a run while the next one is at work, which is all that can
        be in vain. A row keeps what it was given meanwhile.
      watch: is told every few passes what the tokens are, in natural order; masks where there is none yet.
    """
    if keys.ndim == 0:
        keys = row_keys(keys, jnp.arange(len(plan.order)))
    source = Draw(draw_uniforms(keys, plan.length), rule)
    state = start(weights, config, sampler, plan, given)
    if record:
        state = dataclasses.replace(state, facts=records.empty(len(plan.order), plan.length, config.vocab_size))

    def natural(state: State) -> Int[Array, "B L"]:
        return unsort(state.tokens[:, sampler.shift:], plan.order)

    before, orders = None, sharding.fetch(plan.order)
    known = np.take_along_axis(np.arange(plan.length) < np.broadcast_to(plan.given, len(orders))[:, None],
                               orders.argsort(axis=1), axis=1)
    for state, run in planned(weights, config, sampler, plan, state, source, PACE if done or watch else None):
        if report is not None:
            jax.block_until_ready(state.tokens)
            report(int(run.steps.count.sum()) * (len(plan.order) if run.steps.count.ndim == 1 else 1))
        if watch is not None:
            watch(sharding.fetch(natural(state)))
        if done is not None:
            if before is not None:
                tokens = sharding.fetch(before)
                if (done(tokens, known) | ((tokens != config.mask).sum(1) >= plan.end)).all():
                    break
            before = natural(state)
    tokens = natural(state)
    return (tokens, jax.tree.map(lambda x: unsort(x, plan.order), state.facts)) if record else tokens


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
    runs = schedule(plan, sampler, row=row_cost(config))
    for run in runs if pace is None else cut(runs, pace):
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
        cache = kv.empty(config, batch, 0, weights.head.kernel.dtype)
    tokens, positions = (sharding.constrain(x, sharding.BATCH) for x in (tokens, jnp.array(plan.order, jnp.int32)))
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
    """The runs of a plan: one over the given tokens, if the cache must hold them, and those of its steps.

    Args:
      exact: shapes fit every step (to measure what sharing them costs).
      row: the cost of a row of logits, `row_cost`; that of the paper's model is about the default.
    """
    if plan.nfe == 0:
        return []
    length, batch, cpu = plan.length, len(plan.order), sharding.platform() == "cpu"
    begin, stop = (np.array(x) for x in sampler.window(plan))
    if begin.ndim == 2:  # a row that is done needs no window
        begin, stop = (np.where(plan.first == np.reshape(plan.end, (-1, 1)), 0, x) for x in (begin, stop))
    diffused = np.minimum(plan.first, np.asarray(plan.diffused)[..., None])
    steps = Step(begin.T, plan.first.T, plan.tokens_per_step.T, diffused.T)
    # On CPU a product with a single row takes half as long again as with two.
    needed = np.maximum(_most((stop - begin).T), min(length, 2 if batch == 1 and cpu else 1))
    if exact:
        window, width = needed, _most(steps.count)
        steps = _start_within(steps, window, length)
    elif sampler.cached and sampler.pattern == masks.CAUSAL and steps.first.ndim == steps.count.ndim == 1:
        free = FREE if cpu else max(FREE, FREE_ELSEWHERE // batch)
        steps, window, width = _cut(steps, stop, needed, length, free, row)
    else:
        steps, window, width = _round(steps, needed, length)
    runs = _runs(steps, window, width, length, 1 if exact else max(PART, -(-length // PARTS)), bool(np.any(plan.given)))
    behind = int(begin[..., 0].max())
    return [_over_given(plan, behind, runs[0].shape.live), *runs] if sampler.cached and behind else runs


def _over_given(plan: Plan, stop: int, live: int) -> Run:
    """A pass over all the given tokens that the first step does not look at again. Where a row has fewer, or the window
    is too wide, masks pass as well: they are overwritten before they are seen."""
    none = np.zeros(1, np.int32)
    [window] = _rounded(np.array([max(stop, LEAST_GIVEN)]), plan.length)
    return Run(Step(none, none, none, np.asarray(plan.given, np.int32)[None]), Shape(min(int(window), live), 1, live))


def _start_within(steps: Step, window: Int[np.ndarray, " S"], length: int) -> Step:
    """The steps with windows that end within the length."""
    return dataclasses.replace(steps, start=np.minimum(steps.start.T, length - window).T)


def _most(x: Int[np.ndarray, "S *B"]) -> Int[np.ndarray, " S"]:
    """That of the row that needs most."""
    return x.reshape(len(x), -1).max(1)


def _round(steps: Step, needed: Int[np.ndarray, " S"],
           length: int) -> tuple[Step, Int[np.ndarray, " S"], Int[np.ndarray, " S"]]:
    """One pass a step, of rounded windows and widths."""
    window = _rounded(needed, length)
    window[:1] = window[:2].max()  # a first step of its own shape would cost a compilation
    if steps.first.ndim == 2:
        window = _without_dips(window)
    counts = _most(steps.count)
    width = _same(window, lambda of: _sizes(int(counts[of].max()))[-1:].clip(max=window[of][0]))
    return _start_within(steps, window, length), window, width


def _without_dips(window: Int[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
    """The windows with stretches of fewer than `DIP` steps filled up to the wider ones on both sides. Where each row
    has steps of its own, the widest changes from step to step."""
    before, behind, stretches = DIP // 2, (DIP - 1) // 2, np.lib.stride_tricks.sliding_window_view
    wide = stretches(np.pad(window, (before, behind)), DIP).max(1)
    return stretches(np.pad(wide, (behind, before), constant_values=window.max()), DIP).min(1)


def _cut(steps: Step, stop: Int[np.ndarray, " S"], needed: Int[np.ndarray, " S"], length: int, free: int,
         row: float) -> tuple[Step, Int[np.ndarray, " _"], Int[np.ndarray, " _"]]:
    """Passes of few windows and widths, which cost their slots and `free` more, and `row` for a row of logits.

    A causal window can be cut: its later slots may pass after the earlier ones. So a step that is wider than the window
    of its run takes several passes, and the run needs no shape of its own for it.
    """
    window = np.minimum(_few(needed, free, 4, WORTH), length)
    steps, window = _cut_windows(steps, steps.start, stop, window, length)
    inner = np.where(np.isin(steps.first + steps.count, stop), 0, steps.count)  # is not cut
    counts = np.maximum(steps.count, 1)
    width = _same(window, lambda of: np.clip(_few(counts[of], round((free + int(window[of][0])) / row)),
                                             inner[of].max(), window[of]))
    return _cut_counts(steps, window, width)


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
                 window: Int[np.ndarray, " S"], length: int) -> tuple[Step, Int[np.ndarray, " _"]]:
    """Passes of at most `window` slots. The last one of a step ends where the step does, and none begins before a slot
    that an earlier one has decoded, which would no longer be a mask."""
    passes = -(-(stop - begin) // window)
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
    return number, jax.tree.map(lambda x: np.repeat(x, times, axis=0), tree)


def _runs(steps: Step, window: Int[np.ndarray, " S"], width: Int[np.ndarray, " S"], length: int,
          part: int, few: bool) -> list[Run]:
    """Cut where the shape changes, and in between so often that the cache can grow with the plan. Runs of a window and
    a width have the same number of passes, filled up by the last one again, which then decodes nothing; `few`: one of
    the few numbers that plans behind any number of given tokens share."""
    stop, shapes = _most(steps.start) + window, list(zip(window.tolist(), width.tolist(), strict=True))
    edges = [0, *(at for at in range(1, len(shapes)) if shapes[at] != shapes[at - 1]), len(shapes)]
    stretches = list(itertools.pairwise(edges))
    passes = {}
    for shape in set(shapes):
        low, high = np.array([stretch for stretch in stretches if shapes[stretch[0]] == shape]).T
        dispatches = max(1, round(2 * (stop[high - 1] - stop[low]).sum() / part))
        options = _sizes(int(min((high - low).max(), -(-(high - low).sum() // dispatches))), 1 if few else 12)
        costs = ((options + 1) * -(-(high - low)[:, None] // options)).sum(0)  # that of a dispatch: a pass at most
        passes[shape] = int(options[costs.argmin() if few or len(low) > 1 else -1])
    runs, live = [], 0
    for low, high in stretches:
        for at in range(low, high, passes[shapes[low]]):
            index = np.arange(at, at + passes[shapes[low]])
            own = jax.tree.map(lambda x: x.astype(np.int32), steps.at(np.minimum(index, high - 1)))
            own = dataclasses.replace(own, count=np.where(index < high, own.count.T, 0).T)
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
            yield Run(dataclasses.replace(own, count=np.where(index <= last, own.count.T, 0).T), shape)


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

    steps = jax.tree.map(lambda x: sharding.constrain(x, None, sharding.BATCH) if x.ndim == 2 else x, steps)
    return jax.lax.scan(body, state, steps)[0]


def hidden_of(weights: Weights, state: State, step: Step, sampler: Sampler,
              shape: Shape) -> tuple[Float[Array, "B W D"], kv.KVCache | None]:
    """One pass over the window: the hidden states of `shape.width` slots, and the cache with the window written."""
    tokens, positions = (slots.take(x, step.start, shape.window) for x in (state.tokens, state.positions))
    hidden, cache = transformer.trunk(weights, tokens, positions, sampler.view(step), state.cache, step.start)
    return slots.take(hidden, taken_from(step, shape) - step.start, shape.width), cache


def write(weights: Weights, state: State, step: Step, hidden: Float[Array, "B W D"],
          source: Draw | Score, config: ModelConfig, sampler: Sampler, shape: Shape) -> State:
    """Draws this step's tokens from their logits, or scores the given ones, and writes them into the state."""
    begin = taken_from(step, shape)

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


@functools.partial(jax.jit, static_argnames="length")
def draw_uniforms(keys: Key[Array, " B"], length: int) -> Float[Array, "B L 2"]:
    """Two uniforms per row and slot, keyed by (the row's key, slot). Drawn before the loop: drawn within it, they would
    make two thirds of every program's compilation."""
    def draw(key: Array, slot: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, slot), (2,))

    return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(keys, jnp.arange(length))
