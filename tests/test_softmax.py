"""The kernel that makes -log p and its gradient (interpreted, or run on a GPU), against JAX's own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import INTERPRET
from eso_jax.model import softmax


def test_values_and_slopes_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the mask within, with targets in every part of the row, and with logits whose exponentials overflow."""
    monkeypatch.setattr(softmax, "BLOCK", 128)
    vocab, mask = 300, 150
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((6, vocab)) * [[1], [1], [10], [100], [1e4], [1]], jnp.float32)
    bias = jnp.asarray(rng.standard_normal(vocab), jnp.float32)
    targets = jnp.asarray([0, vocab - 1, 7, vocab // 3, 99, mask])

    def nll(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        all_of_it = jnp.where((jnp.arange(vocab) == mask)[None], softmax.MASK_LOGIT, logits + bias[None])
        total = jax.nn.logsumexp(all_of_it, 1)
        values = total - jnp.take_along_axis(all_of_it, targets[:, None], 1)[:, 0]
        return values.sum(), (values, total)

    slopes, (values, total) = jax.grad(nll, has_aux=True)(logits)
    for dtype, limit in ((jnp.float32, 2e-6), (jnp.bfloat16, 4e-3)):
        ours = jax.jit(softmax.nll_and_slope, static_argnums=(3, 4, 5))(logits, bias, targets, mask, dtype, INTERPRET)
        for mine, right in zip(ours[:2], (values, total), strict=True):
            np.testing.assert_allclose(mine, right, rtol=2e-6, atol=2e-6)
        assert ours[2].dtype == dtype
        np.testing.assert_allclose(np.float32(ours[2]), slopes, rtol=limit, atol=limit)
