"""The denoiser's parts that have gradients of their own, and what they are for."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import Array

from conftest import USUAL
from eso_jax import sharding
from eso_jax.config import ModelConfig
from eso_jax.model import masks, rotary, transformer
from eso_jax.model.params import fold, init_params

POSITIONS = jnp.array([[3, 0, 7, 1], [2, 5, 5, 6]])
QK = jax.random.normal(jax.random.key(0), (2, 4, 2, 3, 8))


def as_complex(x: Array) -> Array:
    """Rotation as it is defined: each pair (x_j, x_{j + K/2}) is a number of the plane, turned by position x 10^4
    to the power -2j/K."""
    angles = POSITIONS[:, :, None, None, None] * (1e4 ** (-jnp.arange(0, 8, 2) / 8))[None, None, None, None]
    turned = jax.lax.complex(x[..., :4], x[..., 4:]) * jnp.exp(1j * angles)
    return jnp.concatenate([turned.real, turned.imag], -1)


def rotated(x: Array) -> Array:
    return rotary.rotate(x, rotary.rotary_table(POSITIONS, 8))


def of_one_column(x: Array) -> Array:
    return transformer.gelu_linear(x, jnp.ones((1, 1), x.dtype))


@pytest.mark.parametrize("ours, plain, x", [
    (rotated, as_complex, QK), (of_one_column, nn.gelu, jnp.linspace(-6.0, 6.0, 99)[:, None])], ids=["rotate", "gelu"])
def test_gradients_are_those_of_the_definition(ours: Callable[[Array], Array], plain: Callable[[Array], Array],
                                               x: Array) -> None:
    """In float64, whose rounding is none of the difference."""
    gradient = jax.random.normal(jax.random.key(1), x.shape)
    value, pull = jax.vjp(ours, x)
    with jax.enable_x64(True):
        wanted, exact = jax.vjp(plain, x.astype(jnp.float64))
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(pull(gradient)[0], exact(gradient.astype(jnp.float64))[0], rtol=1e-5, atol=2e-6)
    assert jax.vjp(ours, x.astype(jnp.bfloat16))[1](gradient.astype(jnp.bfloat16))[0].dtype == jnp.bfloat16


def test_tpus_rotate_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """They swap a head's halves by a product."""
    table = rotary.rotary_table(POSITIONS, 8)
    for dtype in (jnp.float32, jnp.bfloat16):
        with monkeypatch.context() as patch:
            patch.setattr(sharding, "platform", lambda: "tpu")
            text = str(jax.make_jaxpr(rotary.rotate)(QK.astype(dtype), table))
            ours = rotary.rotate(QK.astype(dtype), table)
        assert "dot_general" in text
        assert jnp.array_equal(ours, rotary.rotate(QK.astype(dtype), table))


@pytest.mark.slow
def test_cpus_make_what_all_layers_share_once() -> None:
    """Sines and cosines one time each, and tanh one time in a layer, forward and backward: no second one is fused into
    what uses it, and no sigmoid of the backward pass stands for one that would be kept."""
    config = ModelConfig(length=8, width=16, layers=2, heads=2, cond_dim=0, vocab_size=16, dropout=0.0)
    tokens = jnp.zeros((2, 8), jnp.int32)

    def loss(params: dict[str, Array]) -> Array:
        training = transformer.Training(0.0, None, "none")
        view = masks.View(masks.CAUSAL, None)
        return transformer.trunk(fold(config, params), tokens, transformer.natural_positions(tokens), view,
                                 training=training)[0].sum()

    text = jax.jit(jax.grad(loss)).lower(init_params(config, jax.random.key(0))).compile(USUAL).as_text()
    assert text is not None
    assert text.count(" cosine(") == text.count(" sine(") == 1 and text.count(" tanh(") == config.layers
