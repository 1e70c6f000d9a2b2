"""Decoders that choose as they go: each pass decides how many tokens it decodes, for each row separately.

The planned loop (loop.py) runs passes whose numbers are known beforehand. Here the order of a row is still that of its
plan, given tokens first, but its next pass depends on the earlier ones. `PACE` passes run in one compiled loop. The
host reads how many tokens the rows have while the next loop is at work. Further passes do not change a row that is
done.

Tokens are drawn by uniforms that are keyed by (the row's key, slot), as in the planned loop, so that a row gets the
same tokens in every batch.

Axes: B batch, L length, S passes, M slots that a pass decodes at most, U uniforms of a slot, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from eso_jax import sharding
from eso_jax.config import ModelConfig
from eso_jax.decoding import loop, passes, record as records
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.loop import PACE, Done, Draw, Report, State, Watch
from eso_jax.decoding.order import unsort
from eso_jax.decoding.passes import Sampler
from eso_jax.decoding.plan import Counts, Plan, join
from eso_jax.decoding.record import Facts
from eso_jax.errors import EsoError
from eso_jax.model.params import Weights


@struct.dataclass
class Progress:
    """The state that a pass reads and writes.

    Attributes:
      state: tokens by slot, the order, the cache, facts; see loop.State.
      at: int32 [B], how many tokens of a row, the first of its order, are given or decoded.
      clean: int32 [B], for how many slots, the first, the cache holds keys and values of clean tokens.
      passes: int32 [B], in how many passes the row has decoded something.
      step: int32 [B, L], by slot, which of these passes decoded it, from 0; -1 where none did.
      memory: what a decoder carries from pass to pass, a tree of arrays [B, ...].
    """

    state: State
    at: Int[Array, " B"]
    clean: Int[Array, " B"]
    passes: Int[Array, " B"]
    step: Int[Array, "B L"]
    memory: Any = None


class Decoder(ABC):
    """A way to decode; a frozen dataclass, since it is a static argument of compiled programs.

    Attributes:
      uniforms: U, the uniforms of a slot, at least 2.
      sequential: whether it needs the exact conditionals of one token a pass.
    """

    uniforms: ClassVar[int] = 2
    sequential: ClassVar[bool] = False

    @property
    @abstractmethod
    def most(self) -> int:
        """M, the most slots that a pass decodes for one row."""

    @property
    @abstractmethod
    def window(self) -> int:
        """Slots of a pass; the cache has as many more than the length."""

    def begin(self, config: ModelConfig, batch: int) -> Any:
        """The memory before the first pass."""

    def noted(self, memory: Any) -> Any:
        """What `adapt` goes by, a tree of arrays [B]."""

    def adapt(self, progress: Progress, noted: Any, left: Bool[np.ndarray, " B"]) -> tuple[Decoder, Progress]:
        """The decoder of the next `PACE` passes, and the progress for it.

        Args:
          noted: numpy arrays of what `noted` gave before the last `PACE` passes; at first, of the beginning.
          left: rows that may not be done.
        """
        return self, progress

    @abstractmethod
    def one_pass(self, weights: Weights, progress: Progress, source: Draw, end: Int[Array, " B"], config: ModelConfig,
                 sampler: Sampler) -> Progress:
        """The progress after one pass. A row is done where `at` has reached `end`."""

    def windows(self, found: Plan, sampler: Sampler) -> tuple[Counts, Counts]:
        """(the first slot, the slot after the last) that each pass computes, each [S] or [B, S]. `found` is the plan
        whose steps are the passes."""
        return np.zeros_like(found.first), np.full_like(found.first, found.length)

    def follows_a_plan(self, sampler: Sampler) -> bool:
        """Whether the samples have the law of some plan, the one that `plan` gives."""
        return True

    def plan(self, plan: Plan, found: Plan) -> Plan:
        """The plan whose law the samples have; `plan` is the one that they began with, `found` that of their passes."""
        return found


def plan_of_passes(plan: Plan, order: Int[np.ndarray, "B L"], step: Int[np.ndarray, "B L"]) -> Plan:
    """The plan whose steps are the passes that decoded each slot, `step`, along the order that was followed."""
    counts = np.stack([np.bincount(row[row >= 0], minlength=step.max(initial=-1) + 1) for row in step])
    return join([Plan(jnp.asarray(order), counts, None, plan.given)])


class Decoded(NamedTuple):
    """A decoded batch.

    Attributes:
      tokens: int32 [B, L], in natural order.
      facts: of these tokens, on request; else None.
      order: int32 [B, L], the order that was followed; None: the plan's.
      step: int32 [B, L], by slot, as in `Progress`; None: the plan's.
    """

    tokens: Any
    facts: Facts | None
    order: Any = None
    step: Any = None


def sample(weights: Weights, config: ModelConfig, sampler: Sampler, plan: Plan, keys: Key[Array, "..."],
           decoder: Decoder, rule: Rule = Rule(), given: Int[Array, "B L"] | None = None, report: Report | None = None,
           done: Done | None = None, record: bool = False, watch: Watch | None = None) -> Decoded:
    """Decodes a batch in the order of the plan, as loop.sample does along it."""
    source = Draw(loop.uniforms_of(keys, plan, decoder.uniforms), rule)
    progress = start(weights, config, sampler, plan, source, decoder, given, record)
    states = ((each.state, each)
              for each in until_done(weights, config, sampler, plan, progress, source, decoder))
    for _, progress in loop.follow(states, config, sampler, plan, report, done, watch):
        pass
    state = progress.state
    facts = jax.tree.map(lambda x: unsort(x, state.positions), state.facts)
    return Decoded(loop.natural(state, sampler), facts, state.positions, progress.step)


def start(weights: Weights, config: ModelConfig, sampler: Sampler, plan: Plan, source: Draw, decoder: Decoder,
          given: Int[Array, "B L"] | None = None, record: bool = False) -> Progress:
    """The progress before the first pass: given tokens are in the cache."""
    batch, length = plan.order.shape
    state, room = loop.start(weights, config, sampler, plan, given), length + decoder.window
    if record:
        state = dataclasses.replace(state, facts=records.empty(batch, length, config.vocab_size))
    known = np.broadcast_to(np.asarray(plan.given, np.int32), batch)
    run = passes.over_given(plan, int(known.max(initial=0)), room)
    state = loop.grow(state, run.shape)
    if known.any():
        two = dataclasses.replace(source, uniforms=source.uniforms[..., :2])  # the planned loop's; nothing is decoded
        state = loop.decode_run(weights, state, run.steps, two, config, sampler, run.shape)
    none = np.full((batch, length), -1, np.int32)
    rows = (known, known, np.zeros_like(known), none, decoder.begin(config, batch))
    return Progress(state, *jax.tree.map(lambda x: sharding.constrain(jnp.array(x), sharding.BATCH), rows))


def until_done(weights: Weights, config: ModelConfig, sampler: Sampler, plan: Plan, progress: Progress, source: Draw,
               decoder: Decoder) -> Iterator[Progress]:
    """Yields the progress after every `PACE` passes. The next iteration updates its arrays in place.

    The host reads how far the rows are, and what a decoder adapts to, while the next passes are at work, so that no
    device waits for it. The last `PACE` passes may therefore decode nothing. A CPU is the host itself: there it looks
    for the end after the last passes, and wastes none.
    """
    def copied(progress: Progress) -> Any:
        return jax.tree.map(jnp.copy, (progress.at, decoder.noted(progress.memory)))

    end = np.broadcast_to(np.asarray(plan.end, np.int32), len(plan.order))
    on_device, at_work, waits = jnp.asarray(end), 0, host_is_device()
    before = last = copied(progress)
    while True:
        at, noted = sharding.fetch((last[0] if waits else before[0], before[1]))
        left = at + at_work < end  # a pass decodes a token at least
        if not left.any():
            return
        decoder, progress = decoder.adapt(progress, noted, left)
        progress = decode_passes(weights, progress, source, on_device, config, sampler, decoder)
        before, last, at_work = last, copied(progress), 0 if waits else PACE
        yield progress


@functools.partial(jax.jit, donate_argnames="progress", static_argnames=("config", "sampler", "decoder"))
def decode_passes(weights: Weights, progress: Progress, source: Draw, end: Int[Array, " B"], config: ModelConfig,
                  sampler: Sampler, decoder: Decoder) -> Progress:
    """`PACE` passes in one compiled loop; the progress is donated and updated in place."""
    def body(progress: Progress, _: None) -> tuple[Progress, None]:
        return decoder.one_pass(weights, progress, source, end, config, sampler), None

    return jax.lax.scan(body, progress, length=PACE)[0]


def host_is_device() -> bool:
    """Whether the host would gain nothing by reading earlier passes: on CPU."""
    return sharding.platform() == "cpu"


def commit(progress: Progress, tokens: Int[Array, "B M"], logits: Float[Array, "B M V"], count: Int[Array, " B"],
           rule: Rule) -> Progress:
    """The progress once each row has decoded the first `count` [B] of these tokens, at its next slots, by these logits.
    `clean` is then what was decoded before."""
    state, at = progress.state, progress.at

    def written(old: Shaped[Array, "B L *s"], new: Shaped[Array, "B M *s"]) -> Shaped[Array, "B L *s"]:
        return put(old, new.astype(old.dtype), at, count)

    facts = None
    if state.facts is not None:
        facts = jax.tree.map(written, state.facts, records.facts(logits, tokens, rule))
    state = dataclasses.replace(state, tokens=written(state.tokens, tokens), facts=facts)
    number = jnp.broadcast_to(progress.passes[:, None], tokens.shape)
    return dataclasses.replace(progress, state=state, at=at + count, clean=at, step=written(progress.step, number),
                               passes=progress.passes + (count > 0))


def take(x: Shaped[Array, "B L *s"], index: Int[Array, "B M"]) -> Shaped[Array, "B M *s"]:
    """x[b, index[b]] for each row; the last slot for indices after the end."""
    return jax.vmap(lambda x, index: x[index])(x, jnp.minimum(index, x.shape[1] - 1))


def put(x: Shaped[Array, "B L *s"], new: Shaped[Array, "B M *s"], at: Int[Array, " B"],
        count: Int[Array, " B"]) -> Shaped[Array, "B L *s"]:
    """x with the first `count` entries of `new` in the slots from `at` on, in each row; those after the end are
    dropped."""
    number = jnp.arange(new.shape[1])[None]
    index = jnp.where(number < count[:, None], at[:, None] + number, x.shape[1])
    return jax.vmap(lambda x, index, new: x.at[index].set(new, mode="drop"))(x, index, new)


def names() -> dict[str, Callable[..., Decoder]]:
    """By name, the function that makes a decoder from the number after its name (optional for `speculative`)."""
    from eso_jax.decoding.adaptive import Confidence, Entropy, Likeliest, Margin
    from eso_jax.decoding.speculative import Speculative

    return {"speculative": Speculative.of, "entropy": Entropy, "confidence": Confidence, "likeliest": Likeliest.of,
            "margin": Margin.of}


def named(text: str) -> Decoder:
    """The decoder that a text NAME:NUMBER, or `speculative` alone, names.

    Raises:
      EsoError: there is none of the name, or the number is out of its range.
    """
    name, _, number = text.partition(":")
    known = names()
    if name not in known:
        ways = ", ".join(["speculative", *(f"{each}:NUMBER" for each in known)])
        raise EsoError(f"decoder = {text!r}: choose one of {ways}")
    if text == "speculative":
        return known[text]()
    try:
        value = float(number)
    except ValueError:
        raise EsoError(f"decoder = {text!r}: needs a number, as in {name}:1") from None
    try:
        return known[name](value)
    except EsoError as error:  # which names a field of the class, where the user has given the text
        raise EsoError(f"decoder = {text!r}: {str(error).partition(': ')[2]}") from error
