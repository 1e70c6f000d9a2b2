"""Our count of operations against XLA's, on models whose layers are unrolled (as they are on CPU)."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import brief
from eso_jax import families, flops, noise
from eso_jax.config import Config, FamilyConfig, ModelConfig, TrainConfig
from eso_jax.decoding import loop, passes
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.plan import left_to_right
from eso_jax.families.esolm import EsoLM
from eso_jax.model import vocabulary
from eso_jax.model.masks import TwoStreams
from eso_jax.model.params import fold, init_params, unstack
from eso_jax.run.train import init_state, train_step

pytestmark = pytest.mark.usefixtures("no_shape_checks")

FAMILIES: list[dict[str, Any]] = [
    dict(name="esolm", alpha_0=0.25), dict(name="esolm", alpha_0=1.0), dict(name="esolm", alpha_0=0.0),
    dict(name="esolm", alpha_0=0.5, kappa=0.75), dict(name="esolm", alpha_0_range=(0.25, 1.0)),
    dict(name="esolm_a", alpha_0=0.25), dict(name="mdlm"),
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


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a condition, XLA counts the costlier branch: the one that draws hardly ever need. Here they never do."""
    monkeypatch.setattr(vocabulary, "if_fits", lambda fits, some, every: some())
    monkeypatch.setattr(EsoLM, "without_skips", lambda *_: None)


@pytest.mark.usefixtures("usual")
@pytest.mark.parametrize("family", brief(FAMILIES, *(FAMILIES[n] for n in (0, 5, 6, 8))), ids=ident)
def test_a_training_step_is_what_xla_counts(family: dict[str, Any]) -> None:
    config = wide(**family)
    ours, xla = sum(flops.training_step(config).values()), xla_count(config)
    # XLA counts elementwise work as well, and leaves nothing out.
    assert 0.98 < ours / xla < 1


def test_parts() -> None:
    """Each grows with what it should, and only it."""
    base = flops.training_step(wide(name="mdlm"))
    assert base["qkv"] == 3 * base["out"] and base["mlp_in"] == base["mlp_out"] == 4 * base["out"]
    assert base["head"] == 2 * 768 * (3 * 512 + 8) * 2048  # room for half of 8 x 128, and some
    assert base["attention"] == 3 * 2 * 2 * (2 * 8 * 128 * 128 * 512)  # scores and values, two layers
    plain = flops.training_step(dataclasses.replace(wide(name="ar"), model=ModelConfig(
        length=128, vocab_size=2048, width=512, layers=2, heads=2, cond_dim=0)))
    assert plain == {**base, "adaln": 0, "head": base["head"] * 8 * 128 // 768}
    # Folded in every micro-batch, whose few rows need room for all of their tokens.
    assert flops.training_step(wide(4, name="mdlm")) == {**plain, "adaln": 4 * base["adaln"]}
    two = flops.training_step(wide(name="bd3lm", block_size=16))
    assert two["qkv"] == 2 * base["qkv"] and two["head"] == base["head"]
    assert two["attention"] == base["attention"] * (2 * 128 + 16) // 128
    mixed = flops.training_step(wide(name="esolm", alpha_0=0.5, kappa=0.75))
    assert mixed["mlp_in"] == base["mlp_in"] * (3 * 128 + 1 * (128 + 112)) // (4 * 128)  # half of 128, six deviations


@pytest.mark.parametrize("family", FAMILIES, ids=ident)
def test_what_the_loss_needs(family: dict[str, Any]) -> None:
    """Pairs, slots and tokens with a loss, counted one by one in the masks of many drawn rows."""
    config, rows, length = wide(**family), 512, 128
    settings, t = config.family, np.linspace(1 / 1024, 1 - 1 / 1024, rows)[:, None]
    uniform = np.random.default_rng(0).random((rows, length))
    share = np.arange(length) // getattr(settings, "block_size", length) * 0.37  # a time for each block
    query, key = np.arange(length)[:, None], np.arange(length)[None]
    pairs = slots = losses = 0.0
    for each in families.get(config).passes(config):
        two, alpha_0 = isinstance(each.pattern, TwoStreams), families.alpha_0_of(config, None)
        if getattr(settings, "alpha_0_range", None):
            draws = noise.Draws(jax.random.key(0), jnp.arange(rows), rows)
            alpha_0 = np.array(noise.draw_alpha_0(draws, *settings.alpha_0_range))[:, None]
        sequential = two and settings.name.startswith("esolm")
        masked = uniform >= (alpha_0 if sequential else alpha_0 * (1 - (t + share) % 1))
        stream = each.pattern.clean if two else each.pattern
        for row in masked:  # an Eso-LM's are sorted: masked ones last
            clean = length - int(row.sum())
            seen = stream(query, key, clean).sum()
            noisy = np.arange(length) >= clean if sequential else np.ones(length, bool)
            if two:
                own = query // each.pattern.block == key // each.pattern.block
                seen += ((each.pattern.noisy(query, key) | own) & noisy[:, None]).sum()
            weight = float(each.share) / rows * config.train.batch_size
            pairs, losses = pairs + weight * seen, losses + weight * row.sum()
            slots += weight * (length + two * noisy.sum())
    expected = {**flops.layers(config.model, round(slots)), "attention": flops.attention(config.model, 1, round(pairs)),
                "head": flops.head(config.model, round(losses)), "adaln": flops.fold(config.model)}
    assert flops.needed(config) == pytest.approx({name: 3 * count for name, count in expected.items()}, rel=0.02)


def test_six_per_parameter_and_token() -> None:
    """The rule of thumb, of the parameters that are multiplied with (the embedding is looked up)."""
    config = wide(name="ar")
    params = jax.eval_shape(lambda: init_params(config.model, jax.random.key(0)))
    multiplied = sum(params[name].size for name in ("qkv", "out", "mlp_in_kernel", "mlp_out_kernel", "head_kernel"))
    found = flops.training_step(config)
    bias = 2 * 8 * config.model.vocab_size * 8 * 128  # its gradient, a product with eight rows
    assert sum(found.values()) - found["attention"] - found["adaln"] - bias == 6 * multiplied * 8 * 128


@pytest.mark.parametrize("name", ["esolm", "mdlm", "ar"])
def test_a_sampling_step_is_what_xla_counts(name: str) -> None:
    config, batch = wide(name=name), 8
    plan = left_to_right(batch, config.model.length)
    sampler = families.get(config).sampler(config)
    run = passes.schedule(plan, sampler)[-1]
    weights = jax.eval_shape(lambda: unstack(fold(config.model, init_params(
        config.model, jax.random.key(0)))))
    state = jax.eval_shape(lambda: loop.grow(loop.start(weights, config.model, sampler, plan), run.shape))
    uniforms = jax.ShapeDtypeStruct((batch, config.model.length, 2), jnp.float32)
    lowered = loop.decode_run.lower(weights, state, run.steps, loop.Draw(uniforms, Rule(temperature=0.0)),
                                    config.model, sampler, run.shape)
    ours = sum(flops.sampling_step(config.model, batch, *run.shape).values())
    assert 0.9 < ours / float(lowered.cost_analysis()["flops"]) < 1  # drawing is a larger part
