"""The NELBO of a model on held-out windows, with its standard error."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from eso_jax import families, sharding
from eso_jax.config import Config, require
from eso_jax.data import Tokenizer
from eso_jax.noise import Draws
from eso_jax.transformer import Weights


class Perplexity(NamedTuple):
    """A bound on the negative log-likelihood (for AR the thing itself).

    Attributes:
      nats_per_token: mean over tokens.
      standard_error: of nats_per_token, over windows and their Monte Carlo draws. Times are spread evenly over a
        batch, which the estimate ignores: it is an upper one.
      terms: nats per token by term.
      bits_per_byte: total bits over the bytes of the text (separators cost bits and are no bytes).
      perplexity: exp(nats_per_token), at most exp(700).
      windows: how many.
    """

    nats_per_token: float
    standard_error: float
    terms: dict[str, float]
    bits_per_byte: float
    perplexity: float
    windows: int

    def to_json(self) -> dict[str, Any]:
        return self._asdict()


def nelbo(weights: Weights, config: Config, windows: np.ndarray, tokenizer: Tokenizer, alpha_0: float,
          key: Key[Array, ""], rows: int = 64, samples: int = 1) -> Perplexity:
    """The NELBO on windows [M, L] at any alpha_0, `samples` Monte Carlo draws per window."""
    by_term = nelbo_per_window(weights, config, windows, alpha_0, key, rows, samples)
    per_window = np.sum(list(by_term.values()), axis=0)
    mean = float(per_window.mean())
    error = float(per_window.std(ddof=1) / math.sqrt(len(windows))) if len(windows) > 1 else math.nan
    bits = mean * windows.size / math.log(2) / tokenizer.num_bytes(windows)
    terms = {term: float(x.mean()) for term, x in by_term.items()}
    return Perplexity(mean, error, terms, bits, math.exp(min(mean, 700)), len(windows))


def nelbo_per_window(weights: Weights, config: Config, windows: np.ndarray, alpha_0: float, key: Key[Array, ""],
                     rows: int = 64, samples: int = 1) -> dict[str, Float[np.ndarray, " M"]]:
    """Each term of the NELBO of each of the windows [M, L] in nats per token, float64, from `samples` Monte Carlo draws
    of `rows` windows at a time."""
    require(len(windows) > 0, "windows", 0, "nothing to evaluate")
    totals: list[dict[str, np.ndarray]] = []
    for low in range(0, len(windows), rows):
        tokens = np.asarray(windows[low:low + rows], np.int32)
        keys = jax.random.split(jax.random.fold_in(key, low), samples)
        estimates = [_per_row(weights, config, tokens, alpha_0, draw) for draw in keys]
        totals.append({term: np.mean([np.asarray(e[term], np.float64) for e in estimates], axis=0)
                       for term in estimates[0]})
    return {term: np.concatenate([total[term] for total in totals]) / config.model.length for term in totals[0]}


@functools.partial(jax.jit, static_argnames=("config", "alpha_0"))
def _per_row(weights: Weights, config: Config, tokens: Int[Array, "B L"], alpha_0: float,
             key: Key[Array, ""]) -> dict[str, Float[Array, " B"]]:
    draws = Draws(key, jnp.arange(len(tokens)), len(tokens))
    terms = families.get(config).nelbo(weights, config, sharding.constrain(tokens, sharding.BATCH), draws, alpha_0)
    return {term: sharding.constrain(x) for term, x in terms.items()}  # every process sees all rows
