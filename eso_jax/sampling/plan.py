"""Plans: which tokens are decoded in which step, drawn before any forward pass.

Axes: B batch, L length, S steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from eso_jax import order
from eso_jax.config import EsoError, require


@dataclass(frozen=True)
class Plan:
    """Step s decodes, in parallel, the next `tokens_per_step[s]` tokens of the order.

    Attributes:
      order: int [B, L], each row's own order.
      tokens_per_step: int [S], shared by the batch; at least 1 each, L in all.
    """

    order: Int[Array, "B L"]
    tokens_per_step: Int[np.ndarray, " S"]

    def __post_init__(self) -> None:
        length = self.order.shape[1]
        if (self.tokens_per_step < 1).any() or self.tokens_per_step.sum() != length:
            raise EsoError(f"tokens_per_step: must be positive and sum to {length}, got {self.tokens_per_step}")

    @property
    def nfe(self) -> int:
        """Number of function evaluations: forward passes of the denoiser."""
        return len(self.tokens_per_step)


def binomial(key: Key[Array, ""], batch: int, length: int, steps: int, alpha_0: float) -> Plan:
    """The paper's plan (Algorithm 2): T diffusion steps over about alpha_0 L tokens, then one token per step.

    Going from t to s = t - 1/T, each token still masked is decoded with probability
    (alpha_s - alpha_t) / (1 - alpha_t), alpha_t = alpha_0 (1 - t); steps that decode nothing are dropped. A token is
    then decoded at each step with the same unconditional probability alpha_0 / T, so the counts are drawn at once: each
    of L tokens goes to the diffusion phase with probability alpha_0, and to one of its T steps uniformly. Rows
    share the counts; each has its own random positions, followed by the rest in ascending order.
    E[NFE] = (1 - alpha_0) L + T (1 - (1 - alpha_0 / T)^L), see `expected_nfe`.
    """
    require(steps >= 1, "steps", steps, "T must be at least 1")
    require(0 <= alpha_0 <= 1, "alpha_0", alpha_0, "must be in [0, 1]")
    phase_key, step_key, order_key = jax.random.split(key, 3)
    in_diffusion = np.asarray(jax.random.uniform(phase_key, (length,))) < alpha_0
    step = np.asarray(jax.random.randint(step_key, (length,), 0, steps))[in_diffusion]
    _, counts = np.unique(step, return_counts=True)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(order_key, jnp.arange(batch))
    orders = jax.vmap(lambda k: order.random_then_ascending(k, length, int(in_diffusion.sum())))(keys)
    return Plan(orders, np.concatenate([counts, np.ones(length - len(step), counts.dtype)]))


def left_to_right(batch: int, length: int) -> Plan:
    """One token per step in natural order, as AR decodes."""
    return Plan(jnp.tile(jnp.arange(length), (batch, 1)), np.ones(length, np.int64))


def expected_nfe(length: int, steps: int, alpha_0: float) -> float:
    """E[NFE] of the binomial plan in closed form."""
    return (1 - alpha_0) * length + steps * (1 - (1 - alpha_0 / steps) ** length)
