"""The gradient of layer normalization by a kernel (interpreted, or run on a GPU), against that of the definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import INTERPRET
from eso_jax.model import norm as norms
from eso_jax.model.params import Norm


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "width"), [(70, 24), (64, 32), (3, 5)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_those_of_the_definition(rows: int, width: int, dtype: jnp.dtype) -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    x = 3 * jax.random.normal(keys[0], (rows, width)) + 1
    norm = Norm(jax.random.normal(keys[1], (width,)), jax.random.normal(keys[2], (width,)))
    sent = jax.random.normal(keys[3], (rows, width)), jax.random.normal(keys[4], (rows, width)).astype(dtype)
    out, back = jax.vjp(lambda x, norm: norms._fused(x, norm, dtype, INTERPRET), x, norm)
    right, right_back = jax.vjp(lambda x, norm: (x, norms.layer_norm(x, norm, dtype)), x, norm)
    for one, other in zip(jax.tree.leaves((out, back(sent))), jax.tree.leaves((right, right_back(sent))), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=1e-5, atol=2e-5)
