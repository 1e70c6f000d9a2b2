"""A plan as passes of few shapes: the numbers that the decoding loop (loop.py) runs on.

A family says in a `Sampler` what the window of a step is and who sees whom. Windows have as many widths as the plan has
step sizes, but a compiled loop has one. `schedule` therefore cuts the plan into runs of passes whose windows are of one
shape. A run is one dispatch of one compiled loop: a `scan` over a fixed number of passes, whose numbers are data. (Were
the bounds of the loop data, a GPU would ask the host after each pass.) Programs are compiled once per shape and length
and used by later runs and plans, so there should be few. A window that is too wide begins earlier or ends later than
needed: earlier slots are recomputed to the same values, later ones cannot be seen and are overwritten. A window that is
too narrow for a step takes several passes. A run that is too long repeats its last pass and decodes nothing, as does a
row that is done, or waits for others. All this costs time and changes nothing.

Where the head costs most, a loop on a CPU chooses pass by pass of how many rows it computes logits (`widths`). A loop
that chose among windows as well ran 7% slower (2 CPU cores, L = 256, T = 256, batch 4), and its cache could not grow
with the plan.

Axes: B batch, L length, S steps of a plan, P passes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import struct
from jaxtyping import Int

from eso_jax import sharding
from eso_jax.config import ModelConfig
from eso_jax.decoding.plan import Counts, Plan
from eso_jax.model import masks, transformer
from eso_jax.model.masks import Pattern, View

# A pass costs as much as its slots and so many more: it reads the weights, elsewhere for all rows of a batch at once.
# On CPU it is multiplied by `row_cost` where the head's weights are more than those of the layers.
FREE, FREE_ELSEWHERE = 8, 256
COARSE = 32  # if a pass costs so many slots more, or above, windows have half as many sizes
WORTH = 1 / 16  # of a plan's cost: what a window of another width must save
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
      denoiser: what computes `trunk` and `head`, as model/transformer.py does.
    """

    window: Callable[[Plan], tuple[Counts, Counts]]
    pattern: Pattern
    cached: bool = True
    start_id: int | None = None
    denoiser: Any = transformer

    @property
    def shift(self) -> int:
        """Tokens in the input before the first slot's own."""
        return 0 if self.start_id is None else 1

    def view(self, step: Step) -> View:
        """Who sees whom in a step."""
        return View(self.pattern, step.diffused.reshape(-1))


class Shape(NamedTuple):
    """What a compiled step depends on.

    Attributes:
      window: slots in a pass.
      width: rows whose logits are computed, at least the step's count; or the most of them, where a loop chooses.
      live: slots of the cache.
    """

    window: int
    width: int
    live: int


class Run(NamedTuple):
    """Consecutive passes of one shape, one dispatch of a compiled loop."""

    steps: Step
    shape: Shape


def row_cost(config: ModelConfig) -> float:
    """What a row of logits costs, in slots of a pass: the products with the head over those with the layers."""
    return config.vocab_size / (12 * config.layers * config.width)


def switches(row: float) -> bool:
    """Whether a loop chooses among widths pass by pass, by `row_cost`: on CPU, where the head costs more than the
    layers. A GPU would wait for the host at each choice."""
    return sharding.platform() == "cpu" and row >= 1


def widths(most: int, row: float) -> list[int]:
    """The widths among which a loop of width `most` chooses, ascending: few, since each is compiled on its own."""
    return sorted({max(1, most // 4), -(-most // 2), most}) if switches(row) else [most]


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
        free = round(FREE * max(1, row)) if cpu else max(FREE, FREE_ELSEWHERE // batch)
        steps, window, width = _cut_steps(steps, stop, needed, length, free, row)
    else:
        steps, window, width = _round_shapes(steps, needed, length)
    runs = _runs(steps, window, width, length, 1 if exact else max(PART, -(-length // PARTS)), bool(np.any(plan.given)))
    behind = int(begin[..., 0].max())
    return [over_given(plan, behind, runs[0].shape.live), *runs] if sampler.cached and behind else runs


def over_given(plan: Plan, stop: int, live: int) -> Run:
    """A pass over all the given tokens that the first step does not look at again. Where a row has fewer, or the window
    is too wide, masks pass as well: they are overwritten before they are seen."""
    none = np.zeros(1, np.int32)
    [window] = _round_up(np.array([max(stop, LEAST_GIVEN)]), plan.length)
    return Run(Step(none, none, none, np.asarray(plan.given, np.int32)[None]), Shape(min(int(window), live), 1, live))


def _round_shapes(steps: Step, needed: Int[np.ndarray, " S"],
                  length: int) -> tuple[Step, Int[np.ndarray, " S"], Int[np.ndarray, " S"]]:
    """One pass a step, of rounded windows and widths."""
    window = _round_up(needed, length)
    window[:1] = window[:2].max()  # a first step of its own shape would cost a compilation
    if steps.first.ndim == 2:
        window = _without_dips(window)
    counts = _most(steps.count)
    width = _per_window(window, lambda of: _sizes(int(counts[of].max()))[-1:].clip(max=window[of][0]))
    return _start_within(steps, window, length), window, width


def _without_dips(window: Int[np.ndarray, " S"]) -> Int[np.ndarray, " S"]:
    """The windows with stretches of fewer than `DIP` steps filled up to the wider ones on both sides. Where each row
    has steps of its own, the widest changes from step to step."""
    before, behind, stretches = DIP // 2, (DIP - 1) // 2, np.lib.stride_tricks.sliding_window_view
    wide = stretches(np.pad(window, (before, behind)), DIP).max(1)
    return stretches(np.pad(wide, (behind, before), constant_values=window.max()), DIP).min(1)


def _cut_steps(steps: Step, stop: Int[np.ndarray, " S"], needed: Int[np.ndarray, " S"], length: int, free: int,
               row: float) -> tuple[Step, Int[np.ndarray, " _"], Int[np.ndarray, " _"]]:
    """Passes of few windows and widths, which cost their slots and `free` more, and `row` for a row of logits.

    A causal window can be cut: its later slots may pass after the earlier ones. So a step that is wider than the window
    of its run takes several passes, and the run needs no shape of its own for it.
    """
    # Where slots are cheap, few sizes are enough: each is compiled on its own.
    window = np.minimum(_cheapest_sizes(needed, free, 4 if free < COARSE else 2, WORTH), length)
    steps, window = _cut_windows(steps, stop, window, length)
    if switches(row):
        return steps, window, window  # of which the loop chooses the rows whose logits it computes
    # A pass inside a step's window must decode all of its slots: the next one begins behind them.
    inner = np.where(np.isin(steps.first + steps.count, stop), 0, steps.count)
    counts = np.maximum(steps.count, 1)

    def width_of(passes: Any) -> Int[np.ndarray, " _"]:
        sizes = _cheapest_sizes(counts[passes], round((free + int(window[passes][0])) / row))
        return np.clip(sizes, inner[passes].max(), window[passes])

    return _cut_counts(steps, window, _per_window(window, width_of))


def _cut_windows(steps: Step, stop: Int[np.ndarray, " S"], window: Int[np.ndarray, " S"],
                 length: int) -> tuple[Step, Int[np.ndarray, " _"]]:
    """Passes of at most `window` slots. The last one of a step ends where the step does, and none begins before a slot
    that an earlier one has decoded, which would no longer be a mask."""
    passes = -(-(stop - steps.start) // window)
    number, (stop, window, several, steps) = _repeat((stop, window, passes > 1, steps), passes)
    begin = steps.start
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
    """The same in runs of so many passes, or fewer where a run has fewer."""
    for steps, shape in runs:
        last = len(steps.count) - 1
        for low in range(0, last + 1, passes):
            index = np.arange(low, low + min(passes, last + 1))
            own = jax.tree.map(lambda x, i=np.minimum(index, last): x[i], steps)
            yield Run(dataclasses.replace(own, count=np.where(index <= last, own.count.T, 0).T), shape)


def _cheapest_sizes(needed: Int[np.ndarray, " S"], free: int, parts: int = 1,
                    worth: float = 1) -> Int[np.ndarray, " S"]:
    """For each step the size of its passes, the same over long stretches: the one that costs least, where steps that
    need more take several passes. A pass costs its size and `free` more. A stretch of its own must save the share
    `worth` of the whole cost. With `free` = 8 and `worth` = 1/16, steps that need 2 2 2 2 2 2 3 16 16 16 16 have the
    sizes 2 2 2 2 2 2 2 16 16 16 16, and the step that needs 3 takes two passes.
    """
    sizes = _sizes(int(needed.max()), parts)
    passes = -(-needed // sizes[:, None])  # of each step, in each size
    cost_until = np.pad(np.cumsum(passes, axis=1), [(0, 0), (1, 0)]) * (sizes + free)[:, None]
    size_of_step, least_saving = np.zeros(len(needed), np.int64), worth * cost_until[:, -1].min()

    def split(low: int, high: int) -> None:
        """Two stretches at the place where they cost least, if they save enough; or one."""
        before = cost_until[:, low:high + 1] - cost_until[:, low:low + 1]
        after = before[:, -1:] - before
        cost = before.min(0) + after.min(0)  # by the place; of the first, one stretch
        place = int(cost.argmin())
        if cost[0] - cost[place] > least_saving:
            split(low, low + place)
            split(low + place, high)
        else:
            size_of_step[low:high] = sizes[len(sizes) - 1 - after[::-1, 0].argmin()]  # of equals, the largest

    split(0, len(needed))
    return size_of_step


def _per_window(window: Int[np.ndarray, " S"], value: Callable[[Any], Int[np.ndarray, " _"]]) -> Int[np.ndarray, " S"]:
    """One value(its passes) for all passes of a window."""
    values = np.empty_like(window)
    for size in np.unique(window):
        values[window == size] = value(window == size)
    return values


def _repeat(tree: Any, times: Int[np.ndarray, " S"]) -> tuple[Int[np.ndarray, " _"], Any]:
    """Each entry of the arrays so many times, and the numbers 0, 1, ... of its copies."""
    number = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
    return number, jax.tree.map(lambda x: np.repeat(x, times, axis=0), tree)


def _start_within(steps: Step, window: Int[np.ndarray, " S"], length: int) -> Step:
    """The steps with windows that end within the length."""
    return dataclasses.replace(steps, start=np.minimum(steps.start.T, length - window).T)


def _most(x: Int[np.ndarray, "S *B"]) -> Int[np.ndarray, " S"]:
    """That of the row that needs most."""
    return x.reshape(len(x), -1).max(1)


def _sizes(most: int, parts: int = 1) -> Int[np.ndarray, " _"]:
    """1, 2, ..., all powers of two and between them steps of a `parts`-th, up to the first that is at least `most`."""
    sizes = [1]
    while sizes[-1] < most:
        power = 2 ** (sizes[-1].bit_length() - 1)
        sizes.append(min(2 * power, sizes[-1] + max(1, power // parts)))
    return np.array(sizes)


def _round_up(n: Int[np.ndarray, " S"], length: int) -> Int[np.ndarray, " S"]:
    """Rounded up to a power of two, or where that is above an eighth of the length to a multiple of an eighth."""
    power, part = 2 ** np.ceil(np.log2(n)).astype(np.int64), -(-length // PARTS)
    return np.minimum(np.where(power <= part, power, -(-n // part) * part), length)
