"""The work directory of a run, and the model in it as an object.

    model = eso_jax.load("W")
    samples = model.sample(4, steps=64, alpha_0=0.25)
    print(model.tokenizer.decode(samples.tokens[0]))
    log_p = model.log_likelihood(tokens, orders)
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from eso_jax import config as configs
from eso_jax import families, likelihood, transformer
from eso_jax.config import Config, EsoError, require
from eso_jax.sampling.categorical import Rule
from eso_jax.sampling.plan import Plan
from eso_jax.timing import Stopwatch
from eso_jax.transformer import Params, Weights

if TYPE_CHECKING:
    from eso_jax.data.tokenizers import ByteTokenizer

CONFIG = "config.json"
MAY_CHANGE = ("steps", "log_every", "eval_every", "eval_windows", "save_every", "keep")  # of train, when resuming


def claim(directory: Path, config: Config) -> None:
    """Makes a work directory with a config, or checks that the one there is of the same run.

    Raises:
      EsoError: the directory holds another config, or things that are not a run's.
    """
    path = directory / CONFIG
    if path.exists():
        there, here = (dataclasses.asdict(c) for c in (configs.from_file(path), config))
        for section, fields in here.items():
            for name, value in fields.items():
                same = there[section][name] == value or (section == "train" and name in MAY_CHANGE)
                require(same, f"{section}.{name}", value,
                        f"--workdir {directory} holds a run with {there[section][name]!r}; repeat that, or give "
                        "another --workdir")
        return
    try:
        ours = not directory.exists() or directory.is_dir() and all(p.suffix == ".partial" for p in directory.iterdir())
        if not ours:
            raise EsoError(f"--workdir = {str(directory)!r}: exists and is not a run's (no {CONFIG}); give another one")
        directory.mkdir(parents=True, exist_ok=True)
        save_config(directory, config)
    except OSError as error:
        raise EsoError(f"--workdir = {str(directory)!r}: cannot be written ({error.strerror})") from error


def save_config(directory: Path, config: Config) -> None:
    """Writes config.json, whole or not at all."""
    partial = directory / (CONFIG + ".partial")
    partial.write_text(config.to_json())
    partial.replace(directory / CONFIG)


class Samples(NamedTuple):
    """Generated sequences and how they came about.

    Attributes:
      tokens: int32 [N, L].
      order: int32 [N, L], each sample's decoding order.
      tokens_per_step: int [steps], decoded in each step.
      seconds: wall time of decoding, compilation included.
      compile_seconds: of these, spent on tracing and compiling.
    """

    tokens: np.ndarray
    order: np.ndarray
    tokens_per_step: np.ndarray
    seconds: float
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Model:
    """A trained or imported model, ready to sample and score.

    Attributes:
      config: the run's.
      step: training steps behind the parameters.
      params: float32 parameters (averaged, unless loaded with ema=False).
      weights: the folded, unstacked float32 weights that sampling and scoring use.
    """

    config: Config
    step: int
    params: Params
    weights: Weights

    @property
    def tokenizer(self) -> ByteTokenizer | None:
        """The tokenizer of the training data; None where the vocabulary is another's (an import)."""
        from eso_jax.data.tokenizers import get_tokenizer

        tokenizer = get_tokenizer(self.config.data.tokenizer)
        return tokenizer if tokenizer.vocab_size == self.config.model.vocab_size else None

    def sample(self, num_samples: int, steps: int = 128, alpha_0: float | None = None, top_p: float = 1.0,
               temperature: float = 1.0, seed: int = 0, batch_size: int = 64) -> Samples:
        """Samples by the family's own sampler.

        Args:
          steps: T, diffusion steps (AR has none).
          alpha_0: expected share of tokens decoded by diffusion; None: the training value. Eso-LMs take any.
          batch_size: rows decoded together. Results do not depend on it, but for float32 rounding.

        Raises:
          EsoError: an argument is out of range, or the family has no sampler.
        """
        require(num_samples >= 1, "num_samples", num_samples, "must be at least 1")
        require(batch_size >= 1, "batch_size", batch_size, "must be at least 1")
        require(steps >= 1, "steps", steps, "T must be at least 1")
        require(0 <= seed < 2**32, "seed", seed, "must be in [0, 2**32)")
        alpha_0 = self.config.family.alpha_0 if alpha_0 is None else alpha_0
        require(0 <= alpha_0 <= 1, "alpha_0", alpha_0, "must be in [0, 1]")
        rule = Rule(temperature, top_p)
        family = families.get(self.config)
        plan_key, draw_key = jax.random.split(jax.random.key(seed))
        plan = family.plan(plan_key, self.config, num_samples, steps, alpha_0)

        # Batches of one size, so that they share one compilation; rows beyond the last sample are padding.
        batches = -(-num_samples // batch_size)
        rows = -(-num_samples // batches)
        orders = jnp.pad(plan.order, [(0, batches * rows - num_samples), (0, 0)], mode="wrap")

        def decode(low: int) -> np.ndarray:
            part = Plan(orders[low:low + rows], plan.tokens_per_step)
            return np.asarray(families.sample(self.weights, self.config, part, draw_key, rule, low))

        with Stopwatch() as watch:
            tokens = np.concatenate([decode(low) for low in range(0, batches * rows, rows)])[:num_samples]
        return Samples(tokens, np.asarray(plan.order), plan.tokens_per_step, watch.seconds,
                       watch.compile_seconds)

    def log_likelihood(self, tokens: np.ndarray, orders: np.ndarray) -> np.ndarray:
        """log p(tokens | order) in nats, float32 [O, B], for tokens [B, L] and orders [O, B, L]; see likelihood.py."""
        return likelihood.log_prob(self.weights, self.config, tokens, orders)


def load(directory: str | Path, ema: bool = True) -> Model:
    """The model of a work directory, at its newest checkpoint.

    Raises:
      EsoError: the directory is not a run's, or holds no whole checkpoint.
    """
    from eso_jax import checkpoint

    directory = Path(directory)
    require((directory / CONFIG).is_file(), "--workdir", str(directory), f"not a work directory (no {CONFIG})")
    config = configs.from_file(directory / CONFIG)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
                            jax.eval_shape(lambda: transformer.init(config.model, jax.random.key(0))))
    step, params = checkpoint.load_params(directory, config.model, abstract, ema)
    return Model(config, step, params, transformer.unstack(transformer.fold(config.model, params)))


def create(directory: Path, config: Config, params: Params) -> None:
    """A new work directory with a config and parameters, as an import makes it; an existing one is refused."""
    from eso_jax import checkpoint

    require(not directory.exists(), "--out", str(directory), "exists already; nothing was written")
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    claim(partial, config)
    checkpoint.save_params(partial, config.model, params)
    partial.rename(directory)
