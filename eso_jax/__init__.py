"""Esoteric language models in JAX: any-order diffusion language models with an exact key-value cache.

    import eso_jax
    model = eso_jax.load("W")        # a work directory, trained or imported
    model.sample(4, steps=64, alpha_0=0.25)
    model.log_likelihood(tokens, orders)

Underneath are pure functions of weights; start with eso_jax/model/params.py and eso_jax/families. docs/reading.md is a
guide to the code.
"""

__version__ = "0.1.0"

from eso_jax.config import Config, DataConfig, FamilyConfig, ModelConfig, TrainConfig
from eso_jax.engine.model import Model, Samples, load
from eso_jax.errors import EsoError
from eso_jax.xla import without_absent_tpu, without_ynn_fusions

without_ynn_fusions()
without_absent_tpu()

__all__ = ["Config", "DataConfig", "EsoError", "FamilyConfig", "Model", "ModelConfig", "Samples", "TrainConfig", "load"]
