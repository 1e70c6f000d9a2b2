"""Attention in tiles equals attention at once, and so do its gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eso_jax import attention


@pytest.mark.parametrize("own", [False, True])  # one mask for all rows, or one for each
@pytest.mark.parametrize("tile", [1, 2 * 12, 2 * 12 * 4, 2 * 12 * 12 * 2])  # a query, two, some, two rows
def test_tiles(tile: int, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, length, heads, size = 4, 12, 2, 6
    q, k, v = jax.random.normal(jax.random.key(0), (3, batch, length, heads, size))
    mask = jax.random.bernoulli(jax.random.key(1), 0.6, (batch if own else 1, length, length)) | (jnp.eye(length) > 0)

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out = attention.dense(q, attention.keys_last(k), attention.heads_first(v), mask)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    whole = jax.value_and_grad(run, (0, 1, 2), has_aux=True)(q, k, v)
    monkeypatch.setitem(attention.TILE, "cpu", tile)
    monkeypatch.setattr(attention, "FEW_QUERIES", 0)
    tiled = jax.value_and_grad(run, (0, 1, 2), has_aux=True)(q, k, v)
    for ours, theirs in zip(jax.tree.leaves(tiled), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)
    scores = np.einsum("bshk,blhk->bhsl", q, k) / np.sqrt(size)
    weights = np.exp(scores) * np.asarray(mask)[:, None]
    plain = np.einsum("bhsl,blhk->bshk", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(tiled[0][1], plain, atol=1e-5)
