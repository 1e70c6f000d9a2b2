"""The NELBO of a model on held-out windows, with its standard error.

Axes: M windows, B windows of a batch, L length, S Monte Carlo samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from eso_jax import families, sharding
from eso_jax.config import Config
from eso_jax.data import Tokenizer, Windows
from eso_jax.engine.rows import Engine
from eso_jax.errors import require
from eso_jax.model.params import Weights
from eso_jax.noise import RANK, Draws


class Perplexity(NamedTuple):
    """A bound on -log p (for AR -log p itself).

    Attributes:
      nats_per_token: mean over tokens.
      standard_error: of nats_per_token, over windows and their Monte Carlo draws. It ignores that times are spread
        evenly over all draws, so it is too large.
      terms: nats per token by term.
      bits_per_byte: total bits divided by the bytes of the text (separators cost bits but count no bytes); None if it
        is not known how many bytes the tokens stand for.
      bytes_of: which bytes are counted (Tokenizer.bytes_of).
      perplexity: exp(nats_per_token), at most exp(700).
      windows: how many.
    """

    nats_per_token: float
    standard_error: float
    terms: dict[str, float]
    bits_per_byte: float | None
    bytes_of: str
    perplexity: float
    windows: int

    @property
    def bits(self) -> str:
        """bits_per_byte in words."""
        of = "" if self.bytes_of == "text" else f" of {self.bytes_of}"
        return "unknown bits per byte" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f} bits per byte{of}"

    def to_json(self) -> dict[str, Any]:
        return self._asdict()


def nelbo(engine: Engine, windows: Windows, tokenizer: Tokenizer, alpha_0: float, key: Key[Array, ""],
          samples: int = 1) -> Perplexity:
    """The NELBO on windows [M, L] at any alpha_0, `samples` Monte Carlo draws per window.

    Batch size, devices and processes do not change the result, except for rounding. Each process reads its own windows.
    """
    by_term, num_bytes = _per_window(engine, windows, alpha_0, key, samples, tokenizer.num_bytes)
    per_window = np.sum(list(by_term.values()), axis=0)
    mean = float(per_window.mean())
    error = float(per_window.std(ddof=1) / math.sqrt(len(windows))) if len(windows) > 1 else math.nan
    tokens = len(windows) * engine.config.model.length
    bits = None if num_bytes is None else mean * tokens / math.log(2) / num_bytes
    if bits is None:
        _say_unknown(tokenizer.name)
    terms = {term: float(x.mean()) for term, x in by_term.items()}
    return Perplexity(mean, error, terms, bits, tokenizer.bytes_of, math.exp(min(mean, 700)), len(windows))


@functools.cache  # once for each tokenizer
def _say_unknown(tokenizer: str) -> None:
    from eso_jax.console import say

    say(f"bits_per_byte = null: of some tokens of data.tokenizer = {tokenizer!r}, such as unknown words, it is not "
        "known how many bytes of text they stand for; nats per token and perplexity are right")


def nelbo_per_window(engine: Engine, windows: Windows, alpha_0: float, key: Key[Array, ""],
                     samples: int = 1) -> dict[str, Float[np.ndarray, " M"]]:
    """Each term of the NELBO of each of the windows [M, L] in nats per token, float64, from `samples` Monte Carlo draws
    of each."""
    return _per_window(engine, windows, alpha_0, key, samples, lambda _: 0)[0]


def _per_window(engine: Engine, windows: Windows, alpha_0: float, key: Key[Array, ""], samples: int,
                num_bytes: Callable[[np.ndarray], int | None]) -> tuple[dict[str, Float[np.ndarray, " M"]], int | None]:
    """(each term by window, in nats per token; the bytes of text of all windows, or None if those of a window are not
    known)."""
    require(len(windows) > 0, "windows", 0, "nothing to evaluate")
    ranks, law = time_ranks(key, len(windows), samples), engine.config.law()

    def read(numbers: np.ndarray) -> tuple[np.ndarray, ...]:
        tokens = windows[numbers].astype(np.int32)
        # The bytes come along, since only the process that reads a window can count them.
        sizes = np.array([-1 if (size := num_bytes(row)) is None else size for row in tokens], np.int32)
        return tokens, numbers.astype(np.int32), ranks[numbers], sizes

    def estimate(weights: Weights, tokens: Array, numbers: Array, ranks: Array,
                 num_bytes: Array) -> tuple[Any, Array]:
        found = [_estimate(weights, law, tokens, numbers + sample * len(windows), ranks[:, sample],
                           samples * len(windows), alpha_0, key) for sample in range(samples)]
        return {term: jnp.stack([one[term] for one in found], axis=1) for term in found[0]}, num_bytes

    found, sizes = engine.rows(estimate, len(windows), read, "evaluating")
    length = engine.config.model.length
    by_term = {term: x.astype(np.float64).mean(axis=1) / length for term, x in found.items()}
    return by_term, None if (sizes < 0).any() else int(sizes.sum(dtype=np.int64))


def time_ranks(key: Key[Array, ""], windows: int, samples: int) -> Int[np.ndarray, "M S"]:
    """Each draw's place among the evenly spread times of all draws.

    A window's samples are spread over all times, one in each S-th of them. Where in it is random: otherwise early
    windows of a corpus would always have early times.
    """
    keys = [jax.random.fold_in(jax.random.fold_in(key, RANK), sample) for sample in range(samples)]
    return np.stack([sample * windows + np.asarray(jax.random.permutation(keys[sample], windows), np.int32)
                     for sample in range(samples)], axis=1)


@functools.partial(jax.jit, static_argnames=("config", "alpha_0"))
def _estimate(weights: Weights, config: Config, tokens: Int[Array, "B L"], numbers: Int[Array, " B"],
              ranks: Int[Array, " B"], total: Int[Array, ""] | int, alpha_0: float,
              key: Key[Array, ""]) -> dict[str, Float[Array, " B"]]:
    """Each term of one draw per window, in nats, [B]. `numbers`: the draws' numbers among all `total` draws."""
    return families.get(config).nelbo(weights, config, sharding.constrain(tokens, sharding.BATCH),
                                      Draws(key, numbers, total, ranks), alpha_0)
