"""The optimizer: AdamW behind a global-norm clip, a linear warm-up then a constant rate, and averaged weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from eso_jax.config import TrainConfig
from eso_jax.model.params import Params


def optimizer(train: TrainConfig) -> optax.GradientTransformation:
    """The paper's optimizer; the rate at step n is learning_rate x min(1, n / warmup)."""
    rate = optax.linear_schedule(0.0, train.learning_rate, train.warmup) if train.warmup else train.learning_rate
    return optax.chain(optax.clip_by_global_norm(train.clip_norm),
                       optax.adamw(rate, train.beta1, train.beta2, train.eps, weight_decay=train.weight_decay))


def update_ema(ema: Params, params: Params, updates: Int[Array, ""], decay: float) -> Params:
    """Moving average with the authors' ramp: after n updates the decay is min(decay, (1 + n) / (10 + n))."""
    ramped = jnp.minimum(decay, (1 + updates) / (10 + updates))
    return jax.tree.map(lambda old, new: ramped * old + (1 - ramped) * new, ema, params)
