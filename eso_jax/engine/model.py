"""The model of a work directory as an object.

    model = eso_jax.load("W")
    samples = model.sample(4, steps=64, alpha_0=0.25)
    print(model.tokenizer.decode(samples.tokens[0]))
    log_p = model.log_likelihood(tokens, orders)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from eso_jax import families, likelihood, sharding
from eso_jax.config import ATTENTION, Config
from eso_jax.console import say
from eso_jax.data.prompts import Given, of_array
from eso_jax.data.stops import Stops
from eso_jax.data.tokenizers import Tokenizer, token_ids
from eso_jax.decoding import decoders, loop
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.decoders import Decoded, Decoder
from eso_jax.decoding.plan import Plan, join, leave
from eso_jax.decoding.record import Facts, Record, steps as steps_of
from eso_jax.decoding.rejection import draw_again, unigram_entropy
from eso_jax.engine import choice, windows
from eso_jax.engine.rows import BATCH_SIZE, Engine, catch_out_of_memory
from eso_jax.errors import require
from eso_jax.model.attention import describe
from eso_jax.model.params import Weights, for_inference
from eso_jax.run import workdir
from eso_jax.run.timing import Stopwatch
from eso_jax.viewer.caption import Caption, caption
from eso_jax.viewer.page import Page, page


Watch = Callable[[Int[np.ndarray, " B"], Int[np.ndarray, "B L"]], None]


class Samples(NamedTuple):
    """Generated sequences and how they were decoded.

    Attributes:
      tokens: int32 [N, L]; masks at positions that were not to be decoded, or after the end of a sample.
      order: int32 [N, L], each sample's decoding order.
      tokens_per_step: int [steps], how many tokens each step decodes; [N, steps] if samples differ.
      diffusion: how many tokens the diffusion phase decodes, one number or int [N]. It, the two above and `given` are
        the plan.
      given: bool [N, L], the tokens that were given.
      tries: int [N], how often each sample was drawn.
      tokens_per_pass: int [passes] or [N, passes], how many tokens each pass decodes. It differs from tokens_per_step
        for speculation, whose law is that of one token a step.
      seconds: wall time of decoding, compilation included.
      compile_seconds: the part of these for tracing and compiling.
      record: on request, when each token was decoded and its log p; see decoding/record.py.
      caption: with a record, what else a page that plays the generation needs; see viewer/caption.py.
      text: the decoded text of each sample, up to the first stop or the last decoded token; empty without a tokenizer.
      law_of_plan: whether the tokens have the law of `plan`. False for decoders that choose the order and decode
        several tokens a pass, each by its own probabilities alone.
      interrupted: whether an interrupt ended the work: samples, or draws of low entropy to be replaced, are missing.
    """

    tokens: np.ndarray
    order: np.ndarray
    tokens_per_step: np.ndarray
    diffusion: int | np.ndarray
    given: np.ndarray
    tries: np.ndarray
    tokens_per_pass: np.ndarray
    seconds: float
    compile_seconds: float
    record: Record | None = None
    caption: Caption | None = None
    text: Sequence[str] = ()
    law_of_plan: bool = True
    interrupted: bool = False

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays in the .npz of `eso-jax sample`, except the text."""
        found = {name: getattr(self, name) for name in ("tokens", "order", "tokens_per_step", "diffusion", "tries")}
        if self.tokens_per_pass is not self.tokens_per_step:
            found["tokens_per_pass"] = self.tokens_per_pass
        if not self.law_of_plan:
            found["law_of_plan"] = np.array(False)
        if self.given.any():
            found["given"] = self.given.sum(1)
        if self.record is None or self.caption is None:
            return found
        seconds = np.array(self.seconds - self.compile_seconds)
        return {**found, **self.record._asdict(), **self.caption._asdict(), "seconds": seconds}

    def show(self) -> Page:
        """The page that plays the generation: a string of HTML that a notebook displays.

        Raises:
          EsoError: it was sampled without a record.
        """
        require(self.record is not None, "record", False, "a page needs one; sample with record=True")
        return page({"": self.arrays()})

    @property
    def passes(self) -> Int[np.ndarray, " N"]:
        """The number of passes in which each sample decoded something, its NFE: int [N]."""
        return (np.broadcast_to(self.tokens_per_pass, (len(self.tokens), self.tokens_per_pass.shape[-1])) > 0).sum(1)

    @property
    def plan(self) -> Plan:
        """The plan that the samples were decoded along."""
        return join([Plan(jnp.asarray(self.order), self.tokens_per_step, self.diffusion, self.given.sum(1))])


@dataclasses.dataclass(frozen=True, eq=False)
class Model(Engine):
    """A trained or imported model, ready to sample and score.

    Attributes:
      config: the run's.
      weights: the folded, unstacked weights that sampling and scoring use, of the `dtype` of `load`.
      mesh: the devices.
      batch_size: rows in a batch; results do not depend on it, except for float32 rounding.
      step: how many steps the parameters were trained for.
      tokenizer: that of the training data; None if none fits the vocabulary (an import).
    """

    _: dataclasses.KW_ONLY
    step: int
    tokenizer: Tokenizer | None

    def sample(self, num_samples: int, steps: int = 128, alpha_0: float | None = None, top_p: float = 1.0,
               temperature: float = 1.0, seed: int = 0, batch_size: int | None = None, *, min_p: float = 0.0,
               plan: str | Plan | None = None, decoder: str | Decoder | None = None, num_tries: int = 1,
               min_entropy: float | None = None, keep: bool = False, record: bool = False,
               banned: int | str | Sequence[int | str] = (), given: np.ndarray | Given | None = None,
               max_tokens: int | None = None, stop: Sequence[str] = (), done: loop.Done | None = None,
               watch: Watch | None = None) -> Samples:
        """Samples by the family's own sampler, the batch split over the devices.

        If tokens are given, the others are drawn exactly as if the given ones had been decoded first. A sample then
        depends on the seed, on what it was given, and on how many samples before it were given the same.

        Args:
          num_samples: N; with `given`, the samples of each of its M rows, next to each other: N = M num_samples.
          steps: T, diffusion steps (AR has none).
          alpha_0: expected share of tokens decoded by diffusion; None: the training value. Eso-LMs take any.
          top_p, temperature, min_p: how a token is drawn; see eso_jax.decoding.categorical.Rule.
          batch_size: rows decoded together; None: the model's.
          plan: a policy of eso_jax/decoding/plan.py (None: the family's own), or a plan with an order per sample.
          decoder: chooses how many tokens each pass decodes, such as "speculative:4"; see
            eso_jax/decoding/decoders.py. The plan then gives only the order (None: one-by-one), and there is no T.
          num_tries: samples whose last 256 tokens have a unigram entropy below `min_entropy` nats are drawn again,
            along the same plan, up to this many draws in all. 1: no sample is drawn again.
          banned: tokens that are never drawn (the mask never is), by their ids or as texts.
          keep: after an interrupt (Ctrl-C), return the samples of the finished batches, if there are any.
          watch: called every few passes with the numbers of the batch's rows, int [B], and their tokens so far, int
            [B, L], with masks where there is none yet.
          record: keep each token's step, its log p, the entropy and the likeliest tokens.
          given: int [M, K <= L], known tokens by natural position; the mask id marks the others. Or the result of a
            function of eso_jax.data.prompts. Family.check_known says what a family can be given.
          max_tokens: how many of the unknown tokens of each row, from the first, are decoded, by a plan over these
            alone. Later ones, and those after the end of a template, stay masks and take no pass.
          stop: texts at which a sample ends, see eso_jax/data/stops.py; tokens from there on are masks.
          done: called every few passes with the tokens of a batch so far, int [B, L] with masks, and which of them were
            given, bool [B, L]; returns which rows need no more tokens, bool [B]. A batch ends when all its rows are
            done or decoded, so how many tokens a row has then depends on the other rows. (`stop` works so, and cuts the
            surplus tokens.)

        Raises:
          EsoError: an argument is out of range, the family cannot follow the plan or be given these tokens, or the
            devices ran out of memory.
        """
        require(batch_size is None or batch_size >= 1, "batch_size", batch_size, "must be at least 1")
        require(steps >= 1, "steps", steps, "T must be at least 1")
        require(0 <= seed < 2**32, "seed", seed, "must be in [0, 2**32)")
        _check_tries(num_tries, min_entropy)
        config, model, family = self.config, self.config.model, families.get(self.config)
        alpha_0 = families.alpha_0_of(config, alpha_0)
        rule = Rule(temperature, top_p, min_p, token_ids(banned, self.tokenizer, "banned"))
        rule.check_vocabulary(model.vocab_size, model.mask)
        require(max_tokens is None or max_tokens >= 1, "max_tokens", max_tokens, "must be at least 1")
        given, known, asked = _rows_of(config, given, num_samples, max_tokens)
        stops = Stops.of(stop, self.tokenizer)
        require(done is None or not stop, "stop", list(stop), "give this or done, not both")
        if isinstance(decoder, str):
            decoder = decoders.named(decoder)
        if decoder is not None:
            family.check_decoder(decoder)
            plan = "one-by-one" if plan is None else plan

        plan_key, draw_key = jax.random.split(jax.random.key(seed))
        if not isinstance(plan, Plan):
            policy: Any = {} if plan is None else {"policy": plan}
            plan = _plan(config, _keys_of(plan_key, given, known), plan_key, ~asked, steps, alpha_0, **policy)
            plan = plan if (known | asked).all() else leave(plan, known, asked)
        else:
            require(max_tokens is None, "max_tokens", max_tokens, "a plan that is given says what is decoded")
        require(plan.order.shape == given.shape, "plan", plan.order.shape,
                f"its order must have shape [{len(given)}, {model.length}]")
        plan.check_given(known)

        size = self.size(len(given), batch_size)  # also for the few that are drawn again, to compile only once

        def draw(attempt: int, rows: np.ndarray) -> Decoded:
            keys = _keys_of(jax.random.fold_in(draw_key, attempt), given, known)
            return decode(self, plan, keys, rule, rows, size, keep, given if known.any() else None,
                          stops.done if stops and stop else done, record, watch, decoder)

        low = functools.partial(_of_low_entropy, known=known, stops=stops, mask=model.mask, least=min_entropy or 0.0)
        with Stopwatch() as clock:
            found, tries, cut = draw_again(draw, low, len(given), num_tries, keep)

        tokens, known, planned = found.tokens, known[:len(tries)], plan.rows(np.arange(len(tries)))
        passes = planned if decoder is None else decoders.plan_of_passes(planned, found.order, found.step)
        followed = planned if decoder is None else decoder.plan(planned, passes)
        text = [stops.cut(*row) for row in zip(tokens, known, strict=True)] if stops else []
        kept = None if found.facts is None else _record(found.facts, passes, tokens, model.mask)
        told = None if kept is None else caption(config, passes, tokens, kept, self.tokenizer, decoder)
        return Samples(tokens, np.asarray(followed.order), followed.tokens_per_step, followed.diffused - followed.given,
                       known, tries, passes.tokens_per_step, clock.seconds, clock.compile_seconds, kept, told, text,
                       decoder is None or decoder.follows_a_plan(family.sampler(config)), cut)

    def lengthen(self, given: Given | np.ndarray, max_tokens: int, overlap: int | None = None,
                 **how: Any) -> windows.Long:
        """Texts that are longer than the model, window after window; see eso_jax/engine/windows.py."""
        return windows.lengthen(self, given, max_tokens, overlap, **how)

    def log_likelihood(self, tokens: np.ndarray, orders: np.ndarray) -> np.ndarray:
        """log p(tokens | order) in nats, float32 [O, B], for tokens [B, L] and orders [O, B, L]; see likelihood.py."""
        return likelihood.log_prob(self, tokens, orders)

    def plan_log_prob(self, tokens: np.ndarray, plan: Plan) -> np.ndarray:
        """log p of each token of tokens [B, L] in nats, float32 [B, L] along the order, if decoded along the plan; its
        sum is log p of a sample given its plan. In one pass where the family can; see likelihood.plan_log_prob."""
        return likelihood.plan_log_prob(self, tokens, plan)

    def choose(self, context: str | np.ndarray, options: Sequence[str | np.ndarray]) -> choice.Choice:
        """How likely each of several continuations or infillings of a context is; see eso_jax/engine/choice.py."""
        return choice.choose(self, context, options)


def _check_tries(num_tries: int, min_entropy: float | None) -> None:
    require(num_tries >= 1, "num_tries", num_tries, "must be at least 1")
    require(num_tries == 1 or min_entropy is not None, "num_tries", num_tries,
            "needs min_entropy, the nats below which a sample is drawn again")
    require(num_tries > 1 or min_entropy is None, "min_entropy", min_entropy, "goes with num_tries > 1")
    require(min_entropy is None or math.isfinite(min_entropy), "min_entropy", min_entropy, "must be finite")


def _rows_of(config: Config, given: np.ndarray | Given | None, num_samples: int,
             max_tokens: int | None) -> tuple[Int[np.ndarray, "N L"], Bool[np.ndarray, "N L"], Bool[np.ndarray, "N L"]]:
    """(the given tokens, with masks elsewhere; which tokens are given; which are to be decoded) for the arguments of
    `Model.sample`."""
    model = config.model
    rows = given if isinstance(given, Given) else of_array(
        np.zeros((1, 0), int) if given is None else np.asarray(given), model)
    families.get(config).check_known(config, rows.tokens != model.mask)
    tokens, end = rows.repeat(num_samples)
    known = tokens != model.mask
    asked = ~known & (np.arange(model.length) < end[:, None])
    return tokens, known, asked & (asked.cumsum(1) <= (max_tokens or model.length))


def _plan(config: Config, keys: Key[Array, " N"], key: Key[Array, ""], known: Bool[np.ndarray, "N L"], steps: int,
          alpha_0: float, **policy: Any) -> Plan:
    """The family's plan for rows of `known` tokens. Each row with known tokens is planned by its own key; the others
    share one plan by `key`, as if they were the only rows."""
    family, free = families.get(config), ~known.any(axis=1)
    parts = [family.plan(key, config, int(free.sum()), steps, alpha_0, **policy)] if free.any() else []
    if free.all():
        return parts[0]
    there = np.flatnonzero(~free)
    parts.append(family.plan(keys[there], config, len(there), steps, alpha_0, **policy, known=known[there]))
    return join(parts).rows(np.argsort(np.argsort(~free, kind="stable")))


def _keys_of(key: Key[Array, ""], given: Int[np.ndarray, "N L"], known: Bool[np.ndarray, "N L"]) -> Key[Array, " N"]:
    """A key for each row, made of its given tokens and of its number among the rows that are given the same."""
    names = [row.astype("<i4").tobytes() for row in given]
    seen = Counter[bytes]()
    numbers = np.zeros(len(names), np.int32)
    for index, name in enumerate(names):
        numbers[index] = seen[name]
        seen[name] += 1
    plain = loop.row_keys(key, numbers)
    if not known.any():
        return plain
    prompts = loop.row_keys(key, np.array([zlib.crc32(name) for name in names], np.uint32).view(np.int32))
    own = jax.vmap(jax.random.fold_in)(prompts, numbers)
    return jnp.where(known.any(axis=1), own, plain)


def _of_low_entropy(tokens: Int[np.ndarray, "N L"], known: Bool[np.ndarray, "N L"], stops: Stops | None, mask: int,
                    least: float) -> Int[np.ndarray, " R"]:
    """The rows whose unigrams have an entropy below `least` nats. Tokens after a row's stop, decoded while other rows
    went on, do not count."""
    ended = tokens.copy()
    if stops is not None:
        for row, own in zip(ended, known, strict=True):
            stops.cut(row, own)
    return np.flatnonzero(unigram_entropy(ended, mask=mask) < least)


def _record(facts: Facts, passes: Plan, tokens: Int[np.ndarray, "N L"], mask: int) -> Record:
    """The record, without what a stop has cut: how far a row was decoded depends on the other rows."""
    found = Record(steps_of(passes), *facts)
    for fact, none in zip(found, (-1, 0, 0, 0, 0, 0), strict=True):
        fact[tokens == mask] = none
    return found


def decode(engine: Engine, plan: Plan, keys: Key[Array, " N"], rule: Rule, rows: Int[np.ndarray, " R"], size: int,
           keep: bool = False, given: Int[np.ndarray, "N L"] | None = None,
           done: loop.Done | None = None, record: bool = False,
           watch: Watch | None = None, decoder: Decoder | None = None) -> Decoded:
    """Draws the tokens of the rows `rows` of a plan, `size` at a time, each row by its own key; a terminal shows a
    progress bar. `keep`: see Engine.rows; `given` and `done`: eso_jax.decoding.loop.sample."""
    from tqdm import tqdm

    order, bits = np.asarray(plan.order), np.asarray(jax.random.key_data(keys))
    terminal = sys.stderr.isatty() and watch is None
    unknown = np.broadcast_to(plan.end - np.asarray(plan.given), len(order))[rows].mean()

    def read(index: np.ndarray) -> list[np.ndarray]:
        return [array[rows[index]] for array in (order, np.arange(len(order), dtype=np.int32), bits, given)
                if array is not None]

    def draw(weights: Weights, order: Array, index: Array, bits: Array,
             given: Array | None = None) -> Decoded:
        here = dataclasses.replace(plan.rows(sharding.fetch(index)), order=order)
        found = families.sample(weights, engine.config, here, jax.random.wrap_key_data(bits), rule, given,
                               bar.update if terminal else None, done, record,
                               None if watch is None else functools.partial(watch, sharding.fetch(index)), decoder)
        if decoder is not None:
            return found
        return Decoded(*found) if record else Decoded(found, None)

    with tqdm(total=round(-(-len(rows) // size) * size * unknown), desc="sampling", unit="token", leave=False,
              disable=not terminal) as bar:
        found: Decoded = engine.rows(draw, len(rows), read, size=size, keep=keep)
    return found


def load(directory: str | Path, ema: bool = True, dtype: str = "float32", tensor: int = 1,
         batch_size: int = BATCH_SIZE, attention: str = "auto") -> Model:
    """The model of a work directory, at its newest checkpoint, on all devices.

    Parameters are read onto the devices that use them, and folded there: no device ever holds more than its share,
    which is the whole model if `tensor` is 1.

    Args:
      ema: the averaged parameters rather than the raw ones.
      dtype: of products and cache: "float32", or "bfloat16" (half the bytes per step; `eso-jax check-cache --dtype
        bfloat16` says what it costs in accuracy on this model). Softmax, norms and logits are float32 in either.
      tensor: devices that share one copy of the model; the others hold further copies.
      batch_size: rows in a batch, over all devices, unless a method is given another.
      attention: the backend, one of eso_jax.config.ATTENTION. A line says which one is used instead if it cannot be.

    Raises:
      EsoError: the directory is not a run's, holds no whole checkpoint, or an argument is out of range; or the model
        does not fit into the devices' memory.
    """
    require(dtype in ("float32", "bfloat16"), "dtype", dtype, "choose float32 or bfloat16")
    require(batch_size >= 1, "batch_size", batch_size, "must be at least 1")
    require(attention in ATTENTION, "attention", attention, f"choose one of {', '.join(ATTENTION)}")
    config = workdir.read_config(directory)
    mesh = sharding.inference_mesh(config.model, tensor)
    with catch_out_of_memory(f"--tensor = {tensor}", "give a larger one, which splits each copy of the model over more "
                             "devices; sample and check-cache also take --dtype bfloat16"):
        config, step, params = workdir.read(directory, ema, mesh)
        weights = jax.block_until_ready(for_inference(config.model, params, jnp.dtype(dtype), mesh, attention))
    with jax.set_mesh(mesh):
        used = describe((each.pattern for each in families.get(config).passes(config)), config.model, dtype, attention)
    if attention not in ("auto", used):
        say(f"attention = {attention!r}: without a cache, {used} computes it")
    tokenizer = workdir.kept_tokenizer(Path(directory), config)
    return Model(config, weights, mesh, batch_size, step=step, tokenizer=tokenizer)
