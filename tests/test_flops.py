"""Our count of operations against XLA's, on models whose layers are unrolled (as they are on CPU)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from eso_jax import families, flops
from eso_jax.config import Config, FamilyConfig, ModelConfig, TrainConfig
from eso_jax.decoding import loop
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.plan import left_to_right
from eso_jax.model.params import fold, init_params, unstack
from eso_jax.run.train import init_state, train_step

pytestmark = pytest.mark.usefixtures("no_shape_checks")

FAMILIES: list[dict[str, Any]] = [
    dict(name="esolm", alpha_0=0.25), dict(name="esolm", alpha_0=1.0), dict(name="esolm", alpha_0=0.0),
    dict(name="esolm", alpha_0=0.5, kappa=0.75), dict(name="esolm_a", alpha_0=0.25), dict(name="mdlm"),
    dict(name="bd3lm", block_size=16), dict(name="bd3lm", block_size=128), dict(name="ar")]


def wide(accumulate: int = 1, **family: Any) -> Config:
    """A model whose products are nearly all of the work."""
    model = ModelConfig(length=128, vocab_size=2048, width=512, layers=2, heads=2, cond_dim=64, dropout=0.0)
    return Config(model, FamilyConfig(**family),
                  train=TrainConfig(batch_size=8, accumulate=accumulate, compute_dtype="float32"))


def ident(fields: dict[str, Any]) -> str:
    return " ".join(map(str, fields.values()))


def xla_count(config: Config) -> float:
    state = jax.eval_shape(functools.partial(init_state, config))
    tokens = jax.ShapeDtypeStruct((config.train.batch_size, config.model.length), jnp.int32)
    found = jax.jit(functools.partial(train_step, config)).lower(state, tokens).cost_analysis()
    return float(found["flops"])


@pytest.mark.parametrize("family", FAMILIES, ids=ident)
def test_a_training_step_is_what_xla_counts(family: dict[str, Any]) -> None:
    config = wide(**family)
    ours, xla = sum(flops.training_step(config).values()), xla_count(config)
    # XLA counts elementwise work as well, and leaves nothing out.
    assert 0.98 < ours / xla < 1


def test_parts() -> None:
    """Each grows with what it should, and only it."""
    base = flops.training_step(wide(name="mdlm"))
    assert base["qkv"] == 3 * base["out"] and base["mlp_in"] == base["mlp_out"] == 4 * base["out"]
    assert base["head"] == 6 * 8 * 128 * 512 * 2048
    assert base["attention"] == 3 * 2 * 2 * (2 * 8 * 128 * 128 * 512)  # scores and values, two layers
    plain = flops.training_step(dataclasses.replace(wide(name="ar"), model=ModelConfig(
        length=128, vocab_size=2048, width=512, layers=2, heads=2, cond_dim=0)))
    assert plain == {**base, "adaln": 0}
    assert flops.training_step(wide(4, name="mdlm")) == {**base, "adaln": 4 * base["adaln"]}  # folded per micro-batch
    two = flops.training_step(wide(name="bd3lm", block_size=16))
    assert two["qkv"] == 2 * base["qkv"] and two["head"] == base["head"]
    assert two["attention"] == base["attention"] * (2 * 128 + 16) // 128
    mixed = flops.training_step(wide(name="esolm", alpha_0=0.5, kappa=0.75))
    assert mixed["mlp_in"] == base["mlp_in"] * 5 // 4 and mixed["head"] == base["head"]


def test_six_per_parameter_and_token() -> None:
    """The rule of thumb, of the parameters that are multiplied with (the embedding is looked up)."""
    config = wide(name="ar")
    params = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
    multiplied = sum(params[name].size for name in ("qkv", "out", "mlp_in_kernel", "mlp_out_kernel", "head_kernel"))
    found = flops.training_step(config)
    assert sum(found.values()) - found["attention"] - found["adaln"] == 6 * multiplied * 8 * 128


@pytest.mark.parametrize("name", ["esolm", "mdlm", "ar"])
def test_a_sampling_step_is_what_xla_counts(name: str) -> None:
    config, batch = wide(name=name), 8
    plan = left_to_right(batch, config.model.length)
    sampler = families.get(config).sampler(config)
    run = loop.schedule(plan, sampler)[-1]
    weights = jax.eval_shape(lambda: unstack(fold(config.model, init_params(
        config.model, jax.random.key(0)))))
    state = jax.eval_shape(lambda: loop.grow(loop.start(weights, config.model, sampler, plan.order), run.shape))
    uniforms = jax.ShapeDtypeStruct((batch, config.model.length, 2), jnp.float32)
    lowered = loop.decode_run.lower(weights, state, run.steps, loop.Draw(uniforms, Rule(temperature=0.0)),
                                    config.model, sampler, run.shape)
    ours = sum(flops.sampling_step(config.model, batch, *run.shape).values())
    assert 0.9 < ours / float(lowered.cost_analysis()["flops"]) < 1  # drawing is a larger part
