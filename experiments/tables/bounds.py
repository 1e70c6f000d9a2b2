"""Likelihood bounds of runs on their test text, for the tables made of them.

Axes: M windows, O orders.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from jaxtyping import Float

from eso_jax import families, likelihood
from eso_jax.engine import importance, perplexity
from eso_jax.engine.model import Model
from eso_jax.evaluation.diversity import Estimate, mean
from lab import Lab


def nelbo_per_window(lab: Lab, run: str, most: int | None = None,
                     samples: int | None = None) -> Float[np.ndarray, " M"]:
    """The NELBO of each test window in nats per token, at the run's own alpha_0 (for AR, -log p itself).

    Args:
      most: windows; 2048 at smoke scale, else all.
      samples: Monte Carlo draws for each; 4 at smoke scale, else 1.
    """
    most = most or (2048 if lab.smoke else 10**9)
    samples = samples or (4 if lab.smoke else 1)

    def compute(model: Model) -> list[float]:
        terms = perplexity.nelbo_per_window(model, lab.test_windows(run, most), families.alpha_0_of(model.config, None),
                                            jax.random.key(0), samples)
        return np.sum(list(terms.values()), axis=0).tolist()

    return np.array(lab.measure(run, "nelbo", {"windows": most, "samples": samples}, compute))


def log_prob(lab: Lab, run: str, orders: int, most: int) -> Float[np.ndarray, "O M"]:
    """log p(window | order) in nats under `orders` random orders of each of `most` test windows.

    The paper shares an order among 32 windows; here each has its own.
    """
    partial = lab.workdir(run) / f"orders-{most}.partial"

    def compute(model: Model) -> list[list[float]]:
        alpha_0 = families.alpha_0_of(model.config, None)
        logp = importance.log_prob(model, lab.test_windows(run, most), orders, alpha_0, 0, partial)
        return logp[:orders].tolist()

    logp = np.array(lab.measure(run, "log-prob", {"windows": most, "orders": orders}, compute))
    partial.unlink(missing_ok=True)
    return logp


def bound_per_window(logp: Float[np.ndarray, "O M"], length: int) -> Float[np.ndarray, " M"]:
    """The importance-weighted bound on -log p of each window, in nats per token."""
    return -likelihood.iw_bound(logp)[0] / length


def perplexity_of(nats: Float[np.ndarray, " M"]) -> Estimate:
    """exp(nats per token), with its standard error over windows."""
    value, error = mean(nats)
    return Estimate(math.exp(value), math.exp(value) * error)
