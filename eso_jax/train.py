"""Training, top to bottom: from a config to a work directory.

  W/config.json     the run's config
  W/tokenizer.json  its tokenizer, unless that is code alone (bytes)
  W/checkpoints/    parameters, averages, optimizer and data position, together
  W/metrics.jsonl   a line per `train.log_every` steps and per evaluation
  W/loss.png        drawn at the end

The same command resumes from the last whole checkpoint, and N steps are the same N steps, bit for bit, however often
the run was interrupted. (Logged losses are means since the line before, or since the resumed step.)

Axes: B global batch, A micro-batches, L length.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from eso_jax import checkpoint, families, finetune, metrics, sharding, transformer, workdir
from eso_jax.config import Config, EsoError, require
from eso_jax.data import tokenizer_of, windows_of
from eso_jax.evaluation import perplexity
from eso_jax.noise import Draws
from eso_jax.optim import optimizer, update_ema
from eso_jax.transformer import Params


@struct.dataclass
class TrainState:
    """All that training carries from step to step.

    Attributes:
      step: int32, updates done.
      params: float32 parameters.
      ema: their moving average, which evaluation and sampling use.
      optimizer: optax's state.
    """

    step: Int[Array, ""]
    params: Params
    ema: Params
    optimizer: Any


def init_state(config: Config, params: Params | None = None) -> TrainState:
    """The state at step 0, of given or of random parameters."""
    if params is None:
        params = finetune.random_params(config)
    return TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer(config.train).init(params))


def train_step(config: Config, state: TrainState, tokens: Int[Array, "B L"]) -> tuple[TrainState, dict[str, Array]]:
    """One update on a global batch.

    Metrics are scalars: loss, its terms, gradient norm, and whether these and the new parameters are finite.
    """
    draws_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.train.seed), 1), state.step)

    def loss(params: Params, rows: tuple[Array, Array]) -> tuple[Float[Array, ""], dict[str, Array]]:
        weights = transformer.fold(config.model, params, jnp.dtype(config.train.compute_dtype))
        tokens, index = rows
        terms = families.get(config).loss(weights, config, tokens, Draws(draws_key, index, config.train.batch_size))
        return jnp.sum(jnp.stack(list(terms.values()))), terms

    def add_micro_batch(total: Any, rows: tuple[Array, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss, has_aux=True)(state.params, rows)), None

    micro_batches = jax.tree.map(functools.partial(_split, config), (tokens, jnp.arange(tokens.shape[0])))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(
        jax.value_and_grad(loss, has_aux=True), state.params, jax.tree.map(lambda x: x[0], micro_batches)))
    total, _ = jax.lax.scan(add_micro_batch, zero, micro_batches)
    (mean_loss, terms), gradients = jax.tree.map(lambda x: x / config.train.accumulate, total)

    updates, opt_state = optimizer(config.train).update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    new = TrainState(step, params, update_ema(state.ema, params, step, config.train.ema), opt_state)
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(mean_loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(params))
    return new, {"loss": mean_loss, **terms, "gradient_norm": norm, "finite": finite}


def _split(config: Config, x: Array) -> Array:
    """[B, ...] -> [A, B / A, ...]. Rows that the loss splits by kappa stay together, and no row leaves its device."""
    groups = x.reshape(-1, config.train.accumulate, config.family.split.denominator, *x.shape[1:])
    return jnp.moveaxis(groups, 1, 0).reshape(config.train.accumulate, -1, *x.shape[1:])


def train(config: Config, directory: Path, baselines: dict[str, float] | None = None) -> TrainState:
    """Trains, or goes on training, in a work directory; returns the last state.

    Args:
      baselines: validation bits per byte by name, drawn beside the model's.

    Raises:
      EsoError: the directory holds another run, the data does not fit, or the loss stopped being finite.
    """
    from eso_jax.data.pipeline import batches, eval_batches

    settings = config.train
    tokenizer = workdir.kept_tokenizer(directory, config) or tokenizer_of(config)
    mesh = sharding.mesh(settings.batch_size)
    iterator = batches(windows_of(config, "train", tokenizer=tokenizer), settings.batch_size, config.data.seed,
                       jax.process_index(), jax.process_count())
    held_out = windows_of(config, "validation", tokenizer=tokenizer)
    validation = np.concatenate(list(eval_batches(held_out, 64, settings.eval_windows)))
    resumes = checkpoint.exists(directory)  # and then has parameters of its own
    start = None if resumes else finetune.starting_params(config, tokenizer)
    workdir.claim(directory, config, tokenizer)  # once the data and the start are known to be there
    state = jax.jit(functools.partial(init_state, config), out_shardings=sharding.replicated(mesh))(start)
    step_fn = jax.jit(functools.partial(train_step, config), donate_argnums=0)

    with checkpoint.open_checkpoints(directory, settings.keep) as checkpoints, jax.set_mesh(mesh):
        state = _restore(checkpoints, directory, config, state, iterator)
        first = int(state.step)
        require(first <= settings.steps, "train.steps", settings.steps, f"{directory} is at step {first} already")
        workdir.save_config(directory, config)
        log = metrics.MetricsLog(directory, first)
        count = sum(x.size for x in jax.tree.leaves(state.params))
        metrics.say(f"{config.family.name}: {count:,} parameters, {jax.device_count()} {jax.default_backend()} "
                    f"device(s), step {first} of {settings.steps}, in {directory}")
        meter = _Meter(config, log, lambda: checkpoints.latest)
        bar = metrics.progress(range(first + 1, settings.steps + 1), settings.steps, first, "train")
        for step in bar:
            state, values = step_fn(state, sharding.put_batch(next(iterator), mesh))
            meter.add(step, values)  # reads the step before this one, so that the device is never idle
            if step % settings.eval_every == 0 or step == settings.steps:
                meter.flush()
                weights = transformer.fold(config.model, state.ema, jnp.dtype(settings.compute_dtype))
                found = perplexity.nelbo(weights, config, validation, tokenizer, config.family.alpha_0,
                                         jax.random.key(0))
                log.write(step, **{f"validation_{name}": value for name, value in found.to_json().items()})
                metrics.say(f"step {step}: validation {found.bits_per_byte:.3f} bits per byte")
                meter.restart_clock()
            if step % settings.save_every == 0 or step == settings.steps:
                meter.flush()  # a state is saved only once it is known to be finite
                checkpoints.save_checkpointables_async(step, {**_parts(state), "data": iterator,
                                                              "step": checkpoint.step_part(step, config.model)})
                meter.restart_clock()
    metrics.plot_loss(directory, baselines)
    return state


def _restore(checkpoints: Any, directory: Path, config: Config, state: TrainState, iterator: Any) -> TrainState:
    """The newest checkpoint's state, and the iterator moved to its position; the given ones where there is none."""
    if checkpoints.latest is None:
        return state
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _parts(state))
    loaded = checkpoint.load(checkpoints, directory, config.model, {**abstract, "data": iterator})
    step = jax.device_put(jnp.int32(loaded["step"]), state.step.sharding)
    return TrainState(step, loaded["params"], loaded["ema"], loaded["optimizer"])


def _parts(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "ema": state.ema, "optimizer": state.optimizer}


class _Meter:
    """Reads each step's metrics one step late, checks the loss, and logs means over `log_every` steps."""

    def __init__(self, config: Config, log: metrics.MetricsLog, latest: Callable[[], Any]) -> None:
        self.config, self.log, self.latest = config, log, latest
        self.pending: tuple[int, dict[str, Array]] | None = None
        self.seen: list[dict[str, float]] = []
        self.started = False
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves what happened since the last step (an evaluation, a save) out of tokens/s."""
        self.clock, self.clocked = time.perf_counter(), 0

    def add(self, step: int, values: dict[str, Array]) -> None:
        self.flush()
        self.pending = step, values

    def flush(self) -> None:
        if self.pending is None:
            return
        (step, values), self.pending = self.pending, None
        now = {name: float(value) for name, value in values.items()}
        if not now.pop("finite"):
            latest = self.latest()
            good = f"the last good checkpoint is step {latest.step}" if latest else "there is no checkpoint yet"
            seeds = f"train.seed = {self.config.train.seed}, data.seed = {self.config.data.seed}"
            raise EsoError(f"loss = {now['loss']}, gradient_norm = {now['gradient_norm']} at step {step}: the update "
                           f"is not finite ({seeds}); {good}; rerun in a new --workdir with a lower "
                           "train.learning_rate or train.clip_norm")
        self.seen.append(now)
        if not self.started:  # the first step compiled
            self.started = True
            self.restart_clock()
        else:
            self.clocked += 1
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            seconds = time.perf_counter() - self.clock
            tokens = self.clocked * self.config.train.batch_size * self.config.model.length
            means = {name: float(np.mean([s[name] for s in self.seen])) for name in self.seen[0]}
            speed = {"tokens_per_second": tokens / seconds} if tokens else {}
            self.log.write(step, **means, **speed)
            if not sys.stderr.isatty():  # a terminal has the progress bar
                metrics.say(f"step {step} of {self.config.train.steps}: loss {means['loss']:.3f}"
                            + "".join(f", {tokens_per_second:,.0f} tokens/s" for tokens_per_second in speed.values()))
            self.seen = []
            self.restart_clock()
