"""The work directory of a run, and the model in it as an object.

    model = eso_jax.load("W")
    samples = model.sample(4, steps=64, alpha_0=0.25)
    print(model.tokenizer.decode(samples.tokens[0]))
    log_p = model.log_likelihood(tokens, orders)
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from eso_jax import config as configs
from eso_jax import families, likelihood, multihost, sharding, transformer
from eso_jax.config import Config, EsoError, RunAgain, require
from eso_jax.data import tokenizers
from eso_jax.data.tokenizers import Tokenizer
from eso_jax.sampling.categorical import Rule
from eso_jax.sampling.plan import Plan
from eso_jax.sampling.rejection import unigram_entropy
from eso_jax.timing import Stopwatch
from eso_jax.transformer import Params, Weights

CONFIG = "config.json"
LOCK = "run.lock"
# What may differ when a run goes on: of train, and all of mesh. None of it changes what is computed, but for rounding.
MAY_CHANGE = ("steps", "accumulate", "remat", "non_finite", "log_every", "eval_every", "eval_windows", "save_every",
              "keep", "keep_every", "hang_seconds", "profile_steps")


def claim(directory: Path, config: Config, tokenizer: Tokenizer | None = None) -> None:
    """Makes a work directory with a config and a tokenizer, or checks that the one there is of the same run.

    Raises:
      EsoError: the directory holds another config, or things that are not a run's.
    """
    path = directory / CONFIG
    if path.exists():
        there, here = (dataclasses.asdict(c) for c in (configs.from_file(path), config))
        for section, fields in here.items():
            for name, value in fields.items():
                may_change = section == "mesh" or section == "train" and name in MAY_CHANGE
                same = there[section][name] == value or may_change
                require(same, f"{section}.{name}", value,
                        f"--workdir {directory} holds a run with {there[section][name]!r}; repeat that, or give "
                        "another --workdir")
    try:
        if path.exists():
            return keep_tokenizer(directory, tokenizer)
        ours = not directory.exists() or directory.is_dir() and all(p.suffix == ".partial" for p in directory.iterdir())
        if not ours:
            raise EsoError(f"--workdir = {str(directory)!r}: exists and is not a run's (no {CONFIG}); give another one")
        directory.mkdir(parents=True, exist_ok=True)
        save_config(directory, config)
        keep_tokenizer(directory, tokenizer)
    except OSError as error:
        raise EsoError(f"--workdir = {str(directory)!r}: cannot be written ({error.strerror})") from error


def check_shared(directory: Path, wait: int = 30) -> None:
    """Raises an EsoError, in all processes, unless all of them see the directory that the writer made."""
    deadline = time.monotonic() + wait  # a network file system may take its time
    while not (seen := (directory / CONFIG).is_file()) and time.monotonic() < deadline:
        time.sleep(0.5)
    problem = multihost.agreed("shared", None if seen else "does not see it; give a directory that all hosts share")
    if problem:
        raise EsoError(f"--workdir = {str(directory)!r}: {problem}")


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Keeps other runs out of a work directory for its block, where the file system knows locks (on a bucket mounted
    by gcsfuse, only those of the same host). A killed process holds nothing.

    Raises:
      RunAgain: in all processes, if another run holds it, or so it seems: a network file system may not know at once
        that a host is gone.
    """
    import fcntl

    with (directory / LOCK).open("a") as file:

        def take() -> None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise RunAgain(f"--workdir = {str(directory)!r}: another run is training there; stop it, or give "
                               f"another one (if there is none, a host that was lost may still hold {LOCK}: delete "
                               "that file)") from error
            except OSError:  # no locks there
                pass

        multihost.by_writer("lock", take)
        yield


def save_config(directory: Path, config: Config) -> None:
    """Writes config.json, whole or not at all."""
    _write(directory / CONFIG, config.to_json())


def keep_tokenizer(directory: Path, tokenizer: Tokenizer | None) -> None:
    """Writes tokenizer.json, so that the work directory needs no other; nothing for a tokenizer that is code alone."""
    if tokenizer is not None and tokenizer.json is not None:
        _write(directory / tokenizers.FILE, tokenizer.json)


def kept_tokenizer(directory: Path, config: Config) -> Tokenizer | None:
    """The tokenizer of a work directory; None where it has none that fits the model (an import), or is not made yet."""
    path, name = directory / tokenizers.FILE, config.data.tokenizer
    if path.is_file():
        found: Tokenizer = tokenizers.LibraryTokenizer(name.partition("=")[0], path.read_text())
    elif name in tokenizers.CODE:
        found = tokenizers.CODE[name]()
    else:
        return None
    return found if (found.vocab_size, found.mask_id) == (config.model.vocab_size, config.model.mask) else None


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


class Samples(NamedTuple):
    """Generated sequences and how they came about.

    Attributes:
      tokens: int32 [N, L].
      order: int32 [N, L], each sample's decoding order.
      tokens_per_step: int [steps], decoded in each step.
      diffusion: tokens of the diffusion phase; with the two above it makes the plan.
      tries: int [N], how often each sample was drawn.
      seconds: wall time of decoding, compilation included.
      compile_seconds: of these, spent on tracing and compiling.
    """

    tokens: np.ndarray
    order: np.ndarray
    tokens_per_step: np.ndarray
    diffusion: int
    tries: np.ndarray
    seconds: float
    compile_seconds: float

    @property
    def plan(self) -> Plan:
        """The plan that the samples were decoded along."""
        return Plan(jnp.asarray(self.order), self.tokens_per_step, self.diffusion)


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained or imported model, ready to sample and score.

    Attributes:
      config: the run's.
      step: training steps behind the parameters.
      params: float32 parameters (averaged, unless loaded with ema=False).
      weights: the folded, unstacked weights that sampling and scoring use, in the type asked for.
      mesh: the devices that sampling uses.
      tokenizer: the training data's; None where there is none for the vocabulary (an import).
    """

    config: Config
    step: int
    params: Params
    weights: Weights
    mesh: Mesh
    tokenizer: Tokenizer | None

    def sample(self, num_samples: int, steps: int = 128, alpha_0: float | None = None, top_p: float = 1.0,
               temperature: float = 1.0, seed: int = 0, batch_size: int = 64, *, min_p: float = 0.0,
               plan: str | Plan | None = None, num_tries: int = 1,
               min_entropy: float | None = None) -> Samples:
        """Samples by the family's own sampler, the batch split over the devices.

        Args:
          steps: T, diffusion steps (AR has none).
          alpha_0: expected share of tokens decoded by diffusion; None: the training value. Eso-LMs take any.
          top_p, temperature, min_p: how a token is drawn; see eso_jax.sampling.categorical.Rule.
          batch_size: rows decoded together. Results do not depend on it, but for float32 rounding.
          plan: a policy of eso_jax/sampling/plan.py (None: the family's own), or a plan with an order per sample.
          num_tries: samples whose last 256 tokens have a unigram entropy below `min_entropy` nats are drawn again,
            along the same plan, until they have been drawn this often. 1: none is.

        Raises:
          EsoError: an argument is out of range, or the family cannot follow the plan.
        """
        require(num_samples >= 1, "num_samples", num_samples, "must be at least 1")
        require(batch_size >= 1, "batch_size", batch_size, "must be at least 1")
        require(steps >= 1, "steps", steps, "T must be at least 1")
        require(0 <= seed < 2**32, "seed", seed, "must be in [0, 2**32)")
        require(num_tries >= 1, "num_tries", num_tries, "must be at least 1")
        require((num_tries > 1) == (min_entropy is not None), "min_entropy", min_entropy,
                "goes with num_tries > 1: the nats below which a sample is drawn again")
        require(min_entropy is None or math.isfinite(min_entropy), "min_entropy", min_entropy, "must be finite")
        alpha_0 = self.config.family.alpha_0 if alpha_0 is None else alpha_0
        require(0 <= alpha_0 <= 1, "alpha_0", alpha_0, "must be in [0, 1]")
        rule = Rule(temperature, top_p, min_p)
        plan_key, draw_key = jax.random.split(jax.random.key(seed))
        if not isinstance(plan, Plan):
            policy = {} if plan is None else {"policy": plan}
            plan = families.get(self.config).plan(plan_key, self.config, num_samples, steps, alpha_0, **policy)
        require(plan.order.shape == (num_samples, self.config.model.length), "plan", plan.order.shape,
                f"its order must have shape [{num_samples}, {self.config.model.length}]")

        tokens = np.zeros(plan.order.shape, np.int32)
        tries = np.zeros(num_samples, np.int32)
        with Stopwatch() as watch:
            for attempt in range(num_tries):
                again = np.arange(num_samples)
                if min_entropy is not None and attempt:
                    again = np.flatnonzero(unigram_entropy(tokens) < min_entropy)
                if len(again):
                    self._decode(tokens, plan, jax.random.fold_in(draw_key, attempt), rule, again, batch_size)
                    tries[again] += 1
        return Samples(tokens, np.asarray(plan.order), plan.tokens_per_step, plan.diffused, tries, watch.seconds,
                       watch.compile_seconds)

    def _decode(self, tokens: np.ndarray, plan: Plan, key: Key[Array, ""], rule: Rule, rows: np.ndarray,
                batch_size: int) -> None:
        """Decodes some rows of the plan, batch by batch, into `tokens`."""
        # As few batches as may be, equally large, filling the devices; of the size of all rows' also for a few again.
        samples, devices = len(plan.order), self.mesh.shape["data"]
        size = -(-samples // (-(-samples // batch_size) * devices)) * devices
        with jax.set_mesh(self.mesh):
            for part in likelihood.batches(rows, size):
                tokens[part] = families.sample(self.weights, self.config, plan.rows(part), key, rule, jnp.asarray(part))

    def log_likelihood(self, tokens: np.ndarray, orders: np.ndarray) -> np.ndarray:
        """log p(tokens | order) in nats, float32 [O, B], for tokens [B, L] and orders [O, B, L]; see likelihood.py."""
        return likelihood.log_prob(self.weights, self.config, tokens, orders)

    def plan_log_prob(self, tokens: np.ndarray, plan: Plan, rows: int = 64) -> np.ndarray:
        """log p of each token of [B, L] in nats, in the order, when decoded along the plan: the law of `sample` given
        its plan. One pass per step, `rows` sequences at a time."""
        tokens = np.asarray(tokens)
        likelihood.check_tokens(tokens, self.config)
        require(plan.order.shape == tokens.shape, "plan", plan.order.shape, f"its order must have shape {tokens.shape}")
        out = np.zeros(tokens.shape, np.float32)
        for part in likelihood.batches(np.arange(len(tokens)), min(rows, len(tokens))):
            out[part] = families.plan_log_prob(self.weights, self.config, plan.rows(part),
                                               jnp.asarray(tokens[part], jnp.int32))
        return out


def load(directory: str | Path, ema: bool = True, dtype: str = "float32", tensor: int = 1) -> Model:
    """The model of a work directory, at its newest checkpoint, on all devices.

    Args:
      ema: the averaged parameters rather than the raw ones.
      dtype: of products and cache: "float32", or "bfloat16" (half the bytes per step; `eso-jax check-cache --dtype
        bfloat16` says what it costs in accuracy on this model). Softmax, norms and logits are float32 in either.
      tensor: devices that share one copy of the model; the others hold further copies.

    Raises:
      EsoError: the directory is not a run's, holds no whole checkpoint, or an argument is out of range.
    """
    require(dtype in ("float32", "bfloat16"), "dtype", dtype, "choose float32 or bfloat16")
    config, step, params = read(directory, ema)
    mesh = sharding.sampling_mesh(config.model, tensor)
    weights = transformer.unstack(transformer.fold(config.model, params, jnp.dtype(dtype)))
    return Model(config, step, params, sharding.put_weights(weights, mesh), mesh,
                 kept_tokenizer(Path(directory), config))


def read_config(directory: str | Path) -> Config:
    """The config of a work directory; raises an EsoError where there is none."""
    path = Path(directory) / CONFIG
    require(path.is_file(), "--workdir", str(directory), f"not a work directory (no {CONFIG})")
    return configs.from_file(path)


def read(directory: str | Path, ema: bool = True, mesh: Mesh | None = None) -> tuple[Config, int, Params]:
    """(config, step, float32 parameters) of a work directory's newest whole checkpoint; as `load`.

    Args:
      mesh: where the parameters go, by the rules of eso_jax/sharding.py; None: this process's first device.
    """
    from eso_jax import checkpoint

    config = read_config(directory)
    shapes = jax.eval_shape(lambda: transformer.init(config.model, jax.random.key(0)))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = sharding.placed(shapes, mesh) if mesh is not None else jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
    return config, *checkpoint.load_params(Path(directory), config.model, abstract, ema)


def create(directory: Path, config: Config, params: Params, tokenizer: Tokenizer | None = None) -> None:
    """A new work directory with a config, parameters and a tokenizer if there is one, as an import makes it; an
    existing one is refused."""
    from eso_jax import checkpoint

    require(not directory.exists(), "--out", str(directory), "exists already; nothing was written")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    claim(partial, config, tokenizer)
    checkpoint.save_params(partial, config.model, params)
    partial.rename(directory)
