"""The loss over the vocabulary: its gradient is the same in any number of chunks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eso_jax import sharding
from eso_jax.model import softmax, vocabulary
from eso_jax.model.params import Head, Norm, Weights

BATCH, LENGTH, WIDTH, VOCAB = 8, 512, 64, 512
MASK = VOCAB - 1


def problem(dtype: jnp.dtype) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Kernel, hidden states (of numbers that bfloat16 has), bias, targets and weights of their losses."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.standard_normal((WIDTH, VOCAB)) * WIDTH**-0.5, jnp.bfloat16).astype(dtype)
    hidden = jnp.asarray(rng.standard_normal((BATCH, LENGTH, WIDTH)), jnp.bfloat16).astype(dtype)
    targets = jnp.asarray(rng.integers(0, MASK, (BATCH, LENGTH)), jnp.int32).at[0, 0].set(MASK)  # its logit is constant
    return (kernel, hidden, jnp.asarray(rng.standard_normal(VOCAB), jnp.float32), targets,
            jnp.asarray(rng.random((BATCH, LENGTH)), jnp.float32))


def head_alone(kernel: jax.Array, bias: jax.Array) -> Weights:
    """Weights of which only the head is there."""
    none = jnp.zeros(1)
    return Weights(none[None], (), Head(Norm(none, none), kernel, bias))


def gradients(dtype: jnp.dtype) -> list[np.ndarray]:
    kernel, hidden, bias, targets, weights = problem(dtype)

    def loss(kernel: jax.Array, bias: jax.Array, hidden: jax.Array) -> jax.Array:
        return (weights * vocabulary.nll(head_alone(kernel, bias), hidden, targets, MASK)).sum()

    return [np.asarray(x.astype(jnp.float32), np.float64) for x in jax.grad(loss, (0, 1, 2))(kernel, bias, hidden)]


def plain() -> list[np.ndarray]:
    """The same by JAX's own derivatives of a plain loss, in float32."""
    kernel, hidden, bias, targets, weights = problem(jnp.float32)

    def loss(kernel: jax.Array, bias: jax.Array, hidden: jax.Array) -> jax.Array:
        logits = jnp.matmul(hidden, kernel, precision="highest") + bias[None, None]
        logp = jax.nn.log_softmax(jnp.where(jnp.arange(VOCAB)[None, None] == MASK, -1e6, logits))
        return -(weights * jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]).sum()

    return [np.asarray(x, np.float64) for x in jax.grad(loss, (0, 1, 2))(kernel, bias, hidden)]


@pytest.mark.parametrize("chunks", [1, 8, 512])
def test_gradients_in_chunks(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 to rounding; in bfloat16 to 0.5%, where sums in bfloat16 would be 3% off at 512 chunks."""
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", BATCH * LENGTH * VOCAB // chunks)
    assert vocabulary.chunks(problem(jnp.float32)[1], VOCAB) == chunks
    for dtype, limit in ((jnp.float32, 1e-5), (jnp.bfloat16, 5e-3)):
        for ours, right in zip(gradients(dtype), plain(), strict=True):
            assert np.linalg.norm(ours - right) <= limit * np.linalg.norm(right), dtype


@pytest.mark.slow
def test_gradients_by_the_kernel_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """In two chunks, whose gradients by the logits are kept, of a head that is padded."""
    monkeypatch.setattr(sharding, "on_gpu", lambda: True)
    monkeypatch.setattr(softmax, "nll_and_slope", functools.partial(softmax.nll_and_slope, interpret=True))
    monkeypatch.setattr(vocabulary, "LOGITS_ON_GPU", BATCH * LENGTH * VOCAB // 2)
    for dtype, limit in ((jnp.float32, 1e-5), (jnp.bfloat16, 5e-3)):
        for ours, right in zip(gradients(dtype), plain(), strict=True):
            assert np.linalg.norm(ours - right) <= limit * np.linalg.norm(right), dtype


@pytest.mark.parametrize("masked", [0.3, 0.8])  # there is room for 0.66 of the tokens
@pytest.mark.parametrize("chunks", [1, 8])
def test_masked_tokens_alone(chunks: int, masked: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients are those of logits of all tokens, whether there is room for the masked ones or not."""
    kernel, hidden, bias, targets, slopes = problem(jnp.float32)
    chosen = jax.random.bernoulli(jax.random.key(1), masked, targets.shape)
    assert vocabulary.room(BATCH, LENGTH, 0.5) == 2816
    monkeypatch.setattr(vocabulary, "LOGITS_AT_ONCE", 2816 * VOCAB // chunks)

    def loss(function: Callable[[Weights, jax.Array], jax.Array]) -> Any:
        def total(kernel: jax.Array, bias: jax.Array, hidden: jax.Array) -> Any:
            values = function(head_alone(kernel, bias), hidden)
            return (slopes * values).sum(), values

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(kernel, bias, hidden)

    ours = loss(lambda weights, hidden: vocabulary.masked_nll(weights, hidden, targets, MASK, chosen, 0.5))
    theirs = loss(lambda weights, hidden: jnp.where(chosen, vocabulary.nll(weights, hidden, targets, MASK), 0))
    for mine, right in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-5, atol=1e-5)
