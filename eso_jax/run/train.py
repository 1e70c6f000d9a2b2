"""Training, top to bottom: from a config to a work directory.

  W/config.json     the run's config
  W/tokenizer.json  its tokenizer, unless that is code alone (bytes)
  W/data.json       what its data was when it began
  W/checkpoints/    parameters, averages, optimizer and step, together
  W/metrics.jsonl   a line per `train.log_every` steps and per evaluation
  W/loss.png        drawn at the end
  W/profile/        a trace of `train.profile_steps` steps, for TensorBoard or Perfetto
  W/tensorboard/    the metrics once more, if `train.log` says so

The same command resumes from the last whole checkpoint, and N steps are the same N steps, bit for bit, however often
the run was interrupted. (Logged losses are means since the line before, or since the resumed step.) The devices, the
mesh and the number of processes may change in between; the losses then agree to rounding.

Axes: B global batch, A micro-batches, L length.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from eso_jax import families, files, flops, sharding
from eso_jax.config import Config
from eso_jax.console import bar, is_terminal, is_writer, say
from eso_jax.data import Tokenizer, Windows, evenly_spaced, identity, tokenizer_of, windows_of
from eso_jax.engine import perplexity
from eso_jax.engine.model import Model
from eso_jax.engine.rows import Engine, catch_out_of_memory
from eso_jax.errors import EsoError, RunAgain, require
from eso_jax.families import Family
from eso_jax.model import attention
from eso_jax.model.params import (Params, Weights, constrain_params, fold, for_inference, weight_shardings,
                                  with_shardings)
from eso_jax.noise import Draws
from eso_jax.run import checkpoint, initial, metrics, multihost, stopping, workdir
from eso_jax.run.optim import optimizer, update_ema
from eso_jax.run.timing import in_words

REMEDY = ("raise train.accumulate (smaller micro-batches), set train.remat=full, or split the state over more devices "
          "by mesh.fsdp; eso-jax plan says what fits")
TIMED = 10  # steps from which a run estimates how long it will take
EVALUATION = 1 / 3  # of a step's compilation: that of an evaluation (measured, all families: 0.27 to 0.35)
SKIPS_IN_A_ROW = 100  # more steps in a row that are not finite end the run, even with train.non_finite = "skip"


@struct.dataclass
class TrainState:
    """The state that training carries from step to step.

    Attributes:
      step: int32, updates done.
      params: float32 parameters.
      ema: their moving average, which evaluation and sampling use.
      optimizer: optax's state.

    Instead of arrays, the fields may hold their shapes or shardings.
    """

    step: Any
    params: Params
    ema: Params
    optimizer: Any


def init_state(config: Config, params: Params | None = None) -> TrainState:
    """The state at step 0, of given or of random parameters."""
    if params is None:
        params = initial.random_params(config)
    return TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, params), optimizer(config.train).init(params))


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """The shapes, types and shardings of the state."""
    return with_shardings(jax.eval_shape(functools.partial(init_state, config)), mesh)


def shardings(config: Config, mesh: Mesh) -> TrainState:
    """The sharding of each array of the state."""
    return jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))


def begin(config: Config, mesh: Mesh, start: Params | None = None) -> TrainState:
    """The state at step 0, created with its shardings: no device ever holds all of it."""
    return jax.jit(functools.partial(init_state, config), out_shardings=shardings(config, mesh))(start)


def jit_step(config: Config, mesh: Mesh) -> Any:
    """The compiled training step on a mesh: (state, tokens [B, L]) -> (state, metrics); the state is donated."""
    return jax.jit(functools.partial(train_step, config), donate_argnums=0,
                   out_shardings=(shardings(config, mesh), NamedSharding(mesh, P())))


def length_of_step(config: Config, step: int) -> int:
    """How many tokens of each row a step uses: all; or in a share train.random_length of the steps, drawn by
    (train.seed, step), the first 1, 2, ... or 8 eighths, each equally likely (BD3-LM: whole blocks). The loss is the
    mean over these tokens, as if the rows and the model had this length. There are only eight lengths, since each needs
    a program of its own, compiled when the length first occurs."""
    short, eighths = np.random.default_rng([config.train.seed, step]).random(2)
    return config.model.length if short >= config.train.random_length else _eighths(config)[int(8 * eighths)]


def _eighths(config: Config) -> list[int]:
    """1, 2, ... and 8 eighths of the length, rounded up."""
    length, part = config.model.length, families.get(config).block(config) or 1
    return [min(length, -(-length * count // (8 * part)) * part) for count in range(1, 9)]


def compute_weights(config: Config, params: Params) -> Weights:
    """The weights of a training pass, in the compute type."""
    return fold(config.model, params, jnp.dtype(config.train.compute_dtype), config.train.attention)


def jit_fold(config: Config, mesh: Mesh) -> Any:
    """The compiled function from parameters on a mesh to weights on it, for validation."""
    weights_of = functools.partial(compute_weights, config)
    weights = jax.eval_shape(weights_of, abstract_state(config, mesh).params)
    return jax.jit(weights_of, out_shardings=weight_shardings(weights, mesh))


def attention_of(config: Config) -> str:
    """The backends of attention in the training step, on the mesh in force, for a message."""
    return attention.describe((each.pattern for each in families.get(config).passes(config)), config.model,
                              config.train.compute_dtype, config.train.attention)


def lower_step(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """The training step, lowered for a mesh whose devices need not exist here."""
    tokens = jax.ShapeDtypeStruct((config.train.batch_size, config.model.length), jnp.int32,
                                  sharding=NamedSharding(mesh, P(sharding.BATCH, None)))
    with jax.set_mesh(mesh):
        return jit_step(config, mesh).lower(abstract_state(config, mesh), tokens)


def train_step(config: Config, state: TrainState, tokens: Int[Array, "B L"]) -> tuple[TrainState, dict[str, Array]]:
    """One update on a global batch. If it is not finite and train.non_finite = "skip", only the step is counted.

    Returns:
      The new state, and scalar metrics: the loss, its terms, the norms of the gradient (before clipping), of the update
      and of the new parameters, and whether all of these are finite.
    """
    draws_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.train.seed), 1), state.step)

    def loss(params: Params, config: Config, family: Family, tokens: Array,
             draws: Draws) -> tuple[Float[Array, ""], dict[str, Array]]:
        tokens = sharding.constrain(tokens, sharding.BATCH)
        terms = family.loss(compute_weights(config, params), config, tokens, draws)
        return jnp.sum(jnp.stack(list(terms.values()))), terms

    def gradient(params: Params, rows: tuple[Array, Array]) -> Any:
        """Losses and gradients. A loss may leave out slots that draws hardly ever need; a draw that needs them uses the
        complete loss, compiled with remat="full" to take little memory and compile time."""
        family, (tokens, index) = families.get(config), rows
        draws = Draws(draws_key, index, config.train.batch_size)
        of = functools.partial(jax.value_and_grad(loss, has_aux=True), params)
        whole = family.without_skips(config, draws)
        if whole is None:
            return of(config, family, tokens, draws)
        rare = dataclasses.replace(config, train=dataclasses.replace(config.train, remat="full"))
        return jax.lax.cond(whole[1], lambda: of(rare, whole[0], tokens, draws),
                            lambda: of(config, family, tokens, draws))

    def add_micro_batch(total: Any, rows: tuple[Array, Array]) -> tuple[Any, None]:
        values, gradients = gradient(state.params, rows)
        # Each device needs only the gradients of the parameters that it holds.
        return jax.tree.map(jnp.add, total, (values, constrain_params(gradients))), None

    micro_batches = jax.tree.map(functools.partial(_split, config), (tokens, jnp.arange(tokens.shape[0])))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(
        gradient, state.params, jax.tree.map(lambda x: x[0], micro_batches)))
    total, _ = jax.lax.scan(add_micro_batch, (zero[0], constrain_params(zero[1])), micro_batches)
    (mean_loss, terms), gradients = jax.tree.map(lambda x: x / config.train.accumulate, total)

    updates, opt_state = optimizer(config.train).update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    new = TrainState(step, params, update_ema(state.ema, params, step, config.train.ema), opt_state)
    norms = {"gradient_norm": optax.tree.norm(gradients), "update_norm": optax.tree.norm(updates),
             "parameter_norm": optax.tree.norm(params)}
    finite = jnp.isfinite(jnp.stack([mean_loss, norms["gradient_norm"], norms["parameter_norm"]])).all()
    if config.train.non_finite == "skip":
        old = TrainState(step, state.params, state.ema, state.optimizer)
        new = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
    return new, {"loss": mean_loss, **terms, **norms, "finite": finite}


def _split(config: Config, x: Array) -> Array:
    """[B, ...] -> [A, B / A, ...]. Groups of rows stay together, and no row leaves its device."""
    groups = x.reshape(-1, config.train.accumulate, config.family.group_size, *x.shape[1:])
    return jnp.moveaxis(groups, 1, 0).reshape(config.train.accumulate, -1, *x.shape[1:])


def train(config: Config, directory: Path, baselines: dict[str, float] | None = None) -> TrainState:
    """Trains, or resumes training, in a work directory; returns the last state.

    Args:
      directory: shared by all processes of the run.
      baselines: validation bits per byte by name, plotted beside the model's.

    Raises:
      EsoError: the directory holds another run, the data does not fit, the processes have different configs or numbers
        of devices, the loss stopped being finite, a checkpoint could not be written, or the devices ran out of memory.
      RunAgain: the run was asked to stop (SIGTERM), and has saved; another process did not start; or another run holds
        the directory.
    """
    from eso_jax.data.pipeline import batches

    settings = config.train
    files.local(str(directory), "--workdir")
    multihost.check_alone()
    _check_same(config)
    mesh = sharding.mesh(config.mesh)
    sharding.check(config, mesh)
    require(not settings.sample_every or jax.process_count() == 1, "train.sample_every", settings.sample_every,
            "samples come from the devices of one process; leave it 0 where there are several")
    tokenizer = workdir.kept_tokenizer(directory, config) or tokenizer_of(config)
    windows, held_out, data = _read_data(config, tokenizer)
    iterator = batches(windows, settings.batch_size, config.data.seed,
                       sharding.rows_of_process(mesh, settings.batch_size))
    validation = evenly_spaced(held_out, settings.eval_windows)
    resumes = _resumes(directory)  # and then has parameters of its own
    start = None if resumes else initial.starting_params(config, mesh, tokenizer)
    _claim(directory, config, tokenizer, data)  # only once the data and the parameters to start from are known to exist

    preemption = stopping.Preemption()
    with (workdir.lock(directory),
          checkpoint.open_checkpoints(directory, settings.keep, settings.keep_every) as checkpoints,
          jax.set_mesh(mesh), preemption.watch(), stopping.together(functools.partial(checkpoint.last, directory)),
          catch_out_of_memory(f"train.batch_size = {settings.batch_size}", REMEDY),
          checkpoint.Saver(checkpoints, directory, config.model) as saver,
          metrics.elsewhere(directory, config) as send,
          stopping.Watchdog(settings.hang_seconds, saver.last) as watchdog):
        if bool(checkpoint.agreed_steps(directory)) != resumes:  # seen before the lock was ours
            raise RunAgain(f"--workdir = {str(directory)!r}: another run wrote there just now; repeat the command")
        state = _restore(checkpoints, directory, config, mesh) if resumes else begin(config, mesh, start)
        first = int(state.step)
        require(first <= settings.steps, "train.steps", settings.steps, f"{directory} is at step {first} already")
        iterator.set_state({"next_index": first})  # every step draws a batch
        if is_writer():
            workdir.save_config(directory, config)
        _say_start(config, mesh, directory, state, resumes)
        log = metrics.MetricsLog(directory, first, send)
        meter = _Meter(config, log, saver.last, len(validation))
        programs = dict[int, Any]()
        fold = jit_fold(config, mesh)
        traced = max(0, min(settings.profile_steps, settings.steps - first - 3))
        for step in bar(range(first + 1, settings.steps + 1), total=settings.steps, initial=first, desc="train",
                        unit="step"):
            length = length_of_step(config, step)
            compiles = length not in programs
            if compiles:
                meter.flush()  # before the clock counts it
                programs[length] = _step_on(config, mesh, length)
            else:
                watchdog.begin()
            # In a step only explicit transfers between host and devices are allowed.
            with (metrics.profiled(directory, step - first, traced), jax.transfer_guard("disallow"),
                  jax.profiler.StepTraceAnnotation("train", step_num=step)):
                tokens = sharding.put_rows(next(iterator)[:, :length], mesh, settings.batch_size)
                state, values = programs[length](state, tokens)
                # Reads the step before this one, so that the device is never idle.
                meter.add(step, values, length / config.model.length, compiles)
            watchdog.rest()
            saver.check()
            ends, stops = step == settings.steps, preemption.is_asked(step)
            if stops and not ends:  # before all else: there may be seconds left
                meter.flush()
                saver.finish(step, _parts(state))
                raise RunAgain(f"asked to stop (SIGTERM), saved step {step} of {settings.steps}; the same command goes "
                               "on from there")
            if step % settings.eval_every == 0 or ends:
                with meter.paused():
                    found = _evaluate(config, fold(state.ema), mesh, validation, tokenizer)
                    log.write(step, **{f"validation_{name}": value for name, value in found.to_json().items()})
                    say(f"step {step}: validation {found.nats_per_token:.4f} nats per token, {found.bits}")
            if settings.sample_every and step % settings.sample_every == 0:
                with meter.paused():
                    text = _sample(config, state.ema, mesh, step, tokenizer)
                    log.write(step, sample=text)
                    say(f"step {step}: a sample\n{text}")
            if step % settings.save_every == 0 or ends or saver.is_due:
                with meter.paused():  # a state is saved only once it is known to be finite
                    (saver.finish if ends else saver.save)(step, _parts(state))
        if is_writer():
            metrics.plot_loss(directory, baselines)
    multihost.barrier("end")
    return state


def _check_same(config: Config) -> None:
    """Raises an EsoError unless all processes have the same config and number of devices. With another learning rate,
    say, a process would train another model without a word."""
    fields = {f"{section}.{name}": value for section, values in dataclasses.asdict(config).items()
              for name, value in values.items()}
    del fields["data.source"], fields["data.tokenizer"]  # a host may have them elsewhere; their tokens are compared
    multihost.check_same({"number of devices": jax.local_device_count(), **fields})


def _read_data(config: Config, tokenizer: Tokenizer) -> tuple[Windows, Windows, dict[str, Any]]:
    """(training windows, validation windows, the identity of both); the same in all processes.

    Raises:
      EsoError: the data cannot be read, or the processes see different data.
    """
    windows = windows_of(config, "train", tokenizer=tokenizer)
    held_out = windows_of(config, "validation", tokenizer=tokenizer)
    data = {"train": identity.identity(windows), "validation": identity.identity(held_out)}
    seen = multihost.gather("data", f"{len(windows)} and {len(held_out)} windows, {data['train']['sha256'][:8]} and "
                            f"{data['validation']['sha256'][:8]}")
    require(len(set(seen)) == 1, "data.source", config.data.source,
            f"the processes see different data to train on and to validate with: {'; '.join(seen)}")
    return windows, held_out, data


def _resumes(directory: Path) -> bool:
    """Whether the directory has a checkpoint to go on from."""
    saved = checkpoint.agreed_steps(directory)
    require(saved != [0], "--workdir", str(directory), "holds an imported model, without the state of an optimizer; "
            f"train on from it in another --workdir, by train.start_from={directory}")
    return bool(saved)


def _claim(directory: Path, config: Config, tokenizer: Tokenizer, data: dict[str, Any]) -> None:
    """Makes the directory that of this run, with this tokenizer and this data, unless it is that of another."""
    multihost.by_writer("work directory", lambda: workdir.claim(directory, config, tokenizer))
    multihost.by_writer("kept data", lambda: identity.claim(directory, config.data.source, data))
    workdir.check_shared(directory)


def _say_start(config: Config, mesh: Mesh, directory: Path, state: TrainState, resumes: bool) -> None:
    count, first = sum(x.size for x in jax.tree.leaves(state.params)), int(state.step)
    say(f"{config.family.name}: {count:,} parameters on {sharding.describe(mesh)}, step {first} of "
        f"{config.train.steps}, in {directory}; attention: {attention_of(config)}")
    if first >= config.train.steps:
        say("no step is left; with a larger train.steps the run continues")
    if not resumes and (lines := metrics.read(directory)):
        say(f"{directory} has no checkpoint, though its metrics go to step {lines[-1]['step']}: from step 0 again")


def _step_on(config: Config, mesh: Mesh, length: int) -> Any:
    """The training step on the first `length` tokens of each row. All processes must call it."""
    short = dataclasses.replace(config, model=dataclasses.replace(config.model, length=length))
    if jax.process_count() == 1:
        return jit_step(short, mesh)
    # It is compiled before the processes meet in it, where on CPU one waits for the others only 30 s.
    program = lower_step(short, mesh).compile()
    multihost.barrier(f"the first step on {length} tokens")
    return program


def _evaluate(config: Config, weights: Weights, mesh: Mesh, validation: Windows,
              tokenizer: Tokenizer) -> perplexity.Perplexity:
    """The NELBO on the validation windows, with the same random numbers every time."""
    engine = Engine(config, weights, mesh, config.train.batch_size // config.train.accumulate)
    return perplexity.nelbo(engine, validation, tokenizer, families.alpha_0_of(config, None), jax.random.key(0))


def _sample(config: Config, params: Params, mesh: Mesh, step: int, tokenizer: Tokenizer) -> str:
    """A text of the model, decoded with one token per pass."""
    weights = for_inference(config.model, dict(params), jnp.float32, mesh)
    model = Model(config, weights, mesh, 1, step=step, tokenizer=tokenizer)
    samples = model.sample(1, steps=config.model.length, plan=families.get(config).policies[-1], seed=step)
    return tokenizer.decode(samples.tokens[0])


def _restore(checkpoints: Any, directory: Path, config: Config, mesh: Mesh) -> TrainState:
    """The newest whole checkpoint's state."""
    abstract = abstract_state(config, mesh)
    loaded = checkpoint.load(checkpoints, directory, config.model, _parts(abstract), mend=True)
    step = jax.make_array_from_callback((), abstract.step.sharding, lambda _: np.int32(loaded["step"]))
    return TrainState(step, loaded["params"], loaded["ema"], loaded["optimizer"])


def _parts(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "ema": state.ema, "optimizer": state.optimizer}


class _Meter:
    """Reads each step's metrics one step later, checks the loss, and logs means over `log_every` steps. After the first
    steps it prints once how long the others will take."""

    def __init__(self, config: Config, log: metrics.MetricsLog, last: Callable[[], str], windows: int) -> None:
        self.config, self.log, self.last, self.windows = config, log, last, windows
        self.told, self.programs = False, 0
        self.begin, self.first = 0, 0.0  # the step before the first, and the first's seconds, its compilation included
        self.flops = sum(flops.training_step(config).values())
        self.pending: tuple[int, dict[str, Array], float, bool] | None = None
        self.seen: list[dict[str, float]] = []
        self.skipped = self.skipped_in_a_row = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves what happened since the last step (an evaluation, a save) out of tokens/s."""
        self.clock, self.clocked = time.perf_counter(), 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Reads the last step; what happens in the block does not count in tokens/s."""
        self.flush()
        yield
        self.restart_clock()

    def add(self, step: int, values: dict[str, Array], share: float, compiled: bool) -> None:
        """`share`: how much of the model's length the step used. `compiled`: it was compiled first, so it is not
        timed."""
        self.flush()
        self.pending = step, values, share, compiled

    def flush(self) -> None:
        if self.pending is None:
            return
        (step, values, share, compiled), self.pending = self.pending, None
        now = {name: float(value) for name, value in jax.device_get(values).items()}
        if now.pop("finite"):
            self.seen.append(now)
            self.skipped_in_a_row = 0
        else:
            self.skip(step, now)
        if compiled:
            if not self.programs:
                self.begin, self.first = step - 1, time.perf_counter() - self.clock
            self.programs += 1
            self.restart_clock()
        else:
            self.clocked += share
            self.tell(step)
        if step % self.config.train.log_every == 0 or step == self.config.train.steps:
            rate = self.clocked / (time.perf_counter() - self.clock)  # steps per second, on whole rows
            tokens = self.config.train.batch_size * self.config.model.length
            names = self.seen[0] if self.seen else ()
            means = {name: float(np.mean([s[name] for s in self.seen])) for name in names}
            speed = metrics.speed(rate * tokens, rate * self.flops) if rate else {}
            skipped = {"skipped": self.skipped} if self.skipped else {}
            self.log.write(step, **means, **speed, **skipped)
            if not is_terminal():  # a terminal has the progress bar
                parts = [f"loss {means['loss']:.3f}"] if means else []
                parts += [f"{speed['tokens_per_second']:,.0f} tokens/s"] if speed else []
                parts += [f"MFU {speed['mfu']:.1%}"] if "mfu" in speed else []
                parts += [f"{self.skipped} steps skipped"] if self.skipped else []
                say(f"step {step} of {self.config.train.steps}: {', '.join(parts)}")
            self.seen, self.skipped = [], 0
            self.restart_clock()

    def tell(self, step: int) -> None:
        """Prints how long the remaining steps and evaluations will take; a batch of an evaluation counts as half a
        step. What is still to be compiled is guessed from the first step: an evaluation, and steps of other lengths."""
        settings = self.config.train
        if self.told or step == settings.steps:
            return
        lengths = _eighths(self.config)
        shorter = 1 - float(np.mean(lengths)) / self.config.model.length
        mean = 1 - settings.random_length * shorter  # share of the length
        few = mean * min(TIMED, settings.log_every, settings.eval_every, settings.save_every)
        if self.clocked < few:
            return
        self.told, left, every = True, settings.steps - step, settings.eval_every
        each = (time.perf_counter() - self.clock) / self.clocked
        evaluations = -(-settings.steps // every) - step // every
        programs = min(len(set(lengths)) - self.programs, left * settings.random_length)
        if step // every == self.begin // every:  # no evaluation has been compiled yet
            programs += EVALUATION
        seconds = (left * mean + evaluations * self.windows / settings.batch_size / 2) * each
        seconds += programs * max(0, self.first - each)
        say(f"about {in_words(seconds)} for the {left:,} steps that are left and their evaluations, by the first few")

    def skip(self, step: int, now: dict[str, float]) -> None:
        """Counts a step that was not finite.

        Raises:
          EsoError: such steps may not be skipped, or are too many.
        """
        self.skipped += 1
        self.skipped_in_a_row += 1
        settings, many = self.config.train, self.skipped_in_a_row > SKIPS_IN_A_ROW
        if settings.non_finite == "stop" or many:
            seeds = f"train.seed = {settings.seed}, data.seed = {self.config.data.seed}"
            row = f", the last of {self.skipped_in_a_row} in a row" if many else ""
            raise EsoError(f"loss = {now['loss']}, gradient_norm = {now['gradient_norm']} at step {step}{row}: the "
                           f"update is not finite ({seeds}); {self.last()}; rerun in a new --workdir with a lower "
                           "train.learning_rate or train.clip_norm, or skip such steps by train.non_finite=skip")
