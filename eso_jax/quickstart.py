"""The quickstart's run: `eso-jax train quickstart --workdir W`, from any directory. See experiments/quickstart.py."""

from __future__ import annotations

import jax

from eso_jax.config import Config, FamilyConfig, ModelConfig, TrainConfig

# On CPU, micro-batches halve a step's temporaries, which the system has to give it as fresh pages in every call.
CPU = jax.default_backend() == "cpu"

config = Config(
    model=ModelConfig(length=128, width=128, layers=4, heads=2, cond_dim=32, dropout=0.0),
    family=FamilyConfig(name="esolm", alpha_0=0.25),
    train=TrainConfig(steps=900, batch_size=32, learning_rate=3e-3, warmup=100, log_every=20, eval_every=150,
                      eval_windows=512, save_every=150,
                      accumulate=2 if CPU else 1, compute_dtype="float32" if CPU else "bfloat16"))
