"""Parameters as they are declared, and the weights made of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from conftest import random_params, tiny_config
from eso_jax import sharding
from eso_jax.config import MeshConfig
from eso_jax.errors import EsoError
from eso_jax.model.params import Block, Parameters, fold, init_params, param_shardings, sizes, unstack


@pytest.mark.slow
def test_a_key_draws_what_it_always_drew() -> None:
    """The last parameters that are drawn, with AdaLN and without: Flax numbers them, so that another order of the
    declaration would change them."""
    model = tiny_config().model
    found = init_params(model, jax.random.key(7))["sigma_out_bias"][:2]
    assert found.tolist() == pytest.approx([-0.2550822, -0.2482196], abs=1e-6)
    found = init_params(tiny_config().override("model.cond_dim=0").model, jax.random.key(7))["head_bias"][:2]
    assert found.tolist() == pytest.approx([-0.047229, 0.1988987], abs=1e-6)


@pytest.mark.parametrize("cond_dim", [0, 8])
def test_matrices_take_the_compute_type(cond_dim: int) -> None:
    model = tiny_config().override(f"model.cond_dim={cond_dim}").model
    weights = fold(model, random_params(model), jnp.bfloat16)
    assert isinstance(weights.blocks, Block)
    matrices = (weights.blocks.qkv, weights.blocks.out, weights.blocks.mlp_in.kernel, weights.blocks.mlp_out.kernel,
                weights.head.kernel)
    assert all(w.dtype == jnp.bfloat16 for w in matrices)
    assert sum(w.dtype == jnp.float32 for w in jax.tree.leaves(weights)) == len(jax.tree.leaves(weights)) - 5
    layers = unstack(weights).blocks
    assert isinstance(layers, tuple) and len(layers) == model.layers
    assert (layers[1].mlp_out.bias == weights.blocks.mlp_out.bias[1]).all()


@pytest.mark.parametrize("cond_dim", [0, 8])
def test_rules_are_what_flax_makes_of_the_declaration(cond_dim: int) -> None:
    """Flax reads the logical axes off the module; parameters themselves are plain arrays."""
    model, mesh = tiny_config().override(f"model.cond_dim={cond_dim}").model, sharding.mesh(MeshConfig())
    boxed = jax.eval_shape(Parameters(model).init, jax.random.key(0))
    flax = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed)["params"], mesh, list(sharding.RULES.items()))
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    assert all(type(x) is jax.ShapeDtypeStruct for x in params.values())
    assert param_shardings(params, mesh) == flax


@pytest.mark.parametrize("name, shape, message", [
    ("norm3", (2, 16), r"parameter = \"\['norm3'\]\": is not declared in eso_jax/model/params.py"),
    ("norm1", (16,), r"parameter norm1 = \('layers', 'vector'\): has other axes than the array's 1"),
    ("norm1", (2, 16, 1), r"parameter norm1 = \('layers', 'vector'\): has other axes than the array's 3")])
def test_parameters_that_are_not_declared_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(EsoError, match=message):
        param_shardings({name: jnp.zeros(shape)}, sharding.mesh(MeshConfig()))


def test_every_axis_has_a_size() -> None:
    assert set(sizes(tiny_config().model)) == set(sharding.RULES)
