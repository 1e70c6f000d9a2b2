"""The optimizer: AdamW after a global-norm clip, the learning rate of every step, and averaged weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from eso_jax.config import TrainConfig
from eso_jax.model.params import Params


def optimizer(train: TrainConfig) -> optax.GradientTransformation:
    """The paper's optimizer. Weight decay leaves out norms and biases.

    Its state has the same tree for all settings, except a constant rate without a warm-up, which counts no steps.
    """
    def decay(updates: Params, params: Params | None) -> Params:
        assert params is not None
        return jax.tree_util.tree_map_with_path(
            lambda path, update, w: update + train.weight_decay * w if _decays(path) else update, updates, params)

    # Like optax.adamw, whose mask would change the tree of the state.
    adamw = optax.chain(optax.scale_by_adam(train.beta1, train.beta2, train.eps),
                        optax.stateless(decay) if train.weight_decay else optax.identity(),
                        optax.scale_by_learning_rate(learning_rate(train)))
    return optax.chain(optax.clip_by_global_norm(train.clip_norm), adamw)


def learning_rate(train: TrainConfig) -> optax.Schedule | float:
    """The rate at step n, counted from 0: learning_rate x min(1, n / warmup), and after the warm-up times the factor of
    `train.schedule`, which for "cosine" and "linear" falls to 0 at train.steps."""
    warm = optax.linear_schedule(0.0, train.learning_rate, train.warmup)
    if train.schedule == "constant":
        return warm if train.warmup else train.learning_rate
    rest = train.steps - train.warmup
    after = (optax.cosine_decay_schedule(train.learning_rate, rest) if train.schedule == "cosine" else
             optax.linear_schedule(train.learning_rate, 0.0, rest))
    return optax.join_schedules([warm, after], [train.warmup])


def _decays(path: tuple[Any, ...]) -> bool:
    return not any(word in path[-1].key for word in ("norm", "bias"))


def update_ema(ema: Params, params: Params, updates: Int[Array, ""], decay: float) -> Params:
    """Moving average with the authors' ramp: after n updates the decay is min(decay, (1 + n) / (10 + n))."""
    ramped = jnp.minimum(decay, (1 + updates) / (10 + updates))
    return jax.tree.map(lambda old, new: ramped * old + (1 - ramped) * new, ema, params)
