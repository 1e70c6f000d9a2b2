"""The parameters of the denoiser, and the weights made of them.

Parameters live in a Flax Linen module, `Denoiser`; everything else is a function. AdaLN is conditioned on the
embedding of sigma = 0 always (the paper turns time conditioning off), so its shifts, scales and gates are the same for
every token: `Denoiser.apply` folds them into the layer norms and the output projections, and returns *weights*, a plain
dict that `trunk` and `head` (transformer.py) take. Training folds in every step (it costs as much as a few rows of the batch) and the
gradient flows through; inference folds once, at load.

Weights (stacked over layers, or unstacked into a tuple by `unstack`):
  embedding [V, D]
  blocks    norm1, norm2: scale, bias [N, D];  qkv [N, D, 3, H, K];  out [N, H, K, D]
            mlp_in: kernel [N, D, 4D], bias [N, 4D];  mlp_out: kernel [N, 4D, D], bias [N, D]
  head      norm: scale, bias [D];  kernel [D, V] (for inference padded to what divides over the devices);  bias [V]

Axes: see eso_jax/model/transformer.py.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from eso_jax import sharding
from eso_jax.config import ModelConfig

Params = dict[str, Any]
Weights = dict[str, Any]

FREQUENCIES = 256  # width of the timestep embedding, the authors'
GATES = (2, 5)  # of the six modulations of a block: shift, scale and gate of attention, then of the MLP


class Denoiser(nn.Module):
    """Declares the parameters (float32) and folds the modulation: apply({"params": params}) -> weights.

    Initialized as the authors': uniform in +-1/sqrt(fan-in), with zero AdaLN and, where there is AdaLN, a zero head.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Weights:
        c = self.config
        n, d, h, k, v = c.layers, c.width, c.heads, c.head_size, c.vocab_size
        head_init = nn.initializers.zeros if c.cond_dim else _uniform(d)
        blocks = {
            "norm1": {"scale": self.param("norm1", nn.initializers.ones, (n, d))},
            "norm2": {"scale": self.param("norm2", nn.initializers.ones, (n, d))},
            "qkv": self.param("qkv", _uniform(d), (n, d, 3, h, k)),
            "out": self.param("out", _uniform(d), (n, h, k, d)),
            "mlp_in": {"kernel": self.param("mlp_in_kernel", _uniform(d), (n, d, 4 * d)),
                       "bias": self.param("mlp_in_bias", _uniform(d), (n, 4 * d))},
            "mlp_out": {"kernel": self.param("mlp_out_kernel", _uniform(4 * d), (n, 4 * d, d)),
                        "bias": self.param("mlp_out_bias", _uniform(4 * d), (n, d))},
        }
        embedding = self.param("embedding", _uniform(d), (v, d))
        head = {"norm": {"scale": self.param("head_norm", nn.initializers.ones, (d,))},
                "kernel": self.param("head_kernel", head_init, (d, v)),
                "bias": self.param("head_bias", head_init, (v,))}
        if c.cond_dim:
            zeros = nn.initializers.zeros
            condition = self._condition()
            kernel = self.param("adaln_kernel", zeros, (n, c.cond_dim, 6, d))
            bias = self.param("adaln_bias", zeros, (n, 6, d))
            modulation = jnp.einsum("c,ncmd->mnd", condition, kernel) + jnp.swapaxes(bias, 0, 1)
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation
            blocks["norm1"] = _modulate(blocks["norm1"]["scale"], shift1, scale1)
            blocks["norm2"] = _modulate(blocks["norm2"]["scale"], shift2, scale2)
            blocks["out"] *= gate1[:, None, None, :]
            blocks["mlp_out"] = {"kernel": blocks["mlp_out"]["kernel"] * gate2[:, None, :],
                                 "bias": blocks["mlp_out"]["bias"] * gate2}
            kernel = self.param("head_adaln_kernel", zeros, (c.cond_dim, 2, d))
            bias = self.param("head_adaln_bias", zeros, (2, d))
            shift, scale = jnp.einsum("c,cmd->md", condition, kernel) + bias
            head["norm"] = _modulate(head["norm"]["scale"], shift, scale)
        else:
            for norm in (blocks["norm1"], blocks["norm2"], head["norm"]):
                norm["bias"] = jnp.zeros_like(norm["scale"])
        return {"embedding": embedding, "blocks": blocks, "head": head}

    def _condition(self) -> Float[Array, " C"]:
        """The conditioning vector: the embedding of sigma = 0, cosines (all 1) then sines (all 0), through an MLP."""
        c = self.config.cond_dim
        sigma = jnp.concatenate([jnp.ones(FREQUENCIES // 2), jnp.zeros(FREQUENCIES // 2)])
        hidden = sigma @ self.param("sigma_in_kernel", _uniform(FREQUENCIES), (FREQUENCIES, c))
        hidden = nn.silu(hidden + self.param("sigma_in_bias", _uniform(FREQUENCIES), (c,)))
        hidden = hidden @ self.param("sigma_out_kernel", _uniform(c), (c, c))
        return nn.silu(hidden + self.param("sigma_out_bias", _uniform(c), (c,)))


def _uniform(fan_in: int) -> nn.initializers.Initializer:
    """Uniform in +-1/sqrt(fan_in), PyTorch's default for linear layers."""

    def init(key: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -1, 1) * fan_in**-0.5

    return init


def _modulate(norm: Array, shift: Array, scale: Array) -> dict[str, Array]:
    return {"scale": norm * (1 + scale), "bias": shift}


def init_params(config: ModelConfig, key: Key[Array, ""]) -> Params:
    """Fresh float32 parameters."""
    return Denoiser(config).init(key)["params"]


def fold(config: ModelConfig, params: Params, dtype: Any = jnp.float32) -> Weights:
    """The weights of `params`; see the top of this file.

    Those that are multiplied with (qkv, out, the kernels) take the compute type; the embedding, norms and biases stay
    float32, and so does the residual stream.
    """
    def cast(path: tuple[Any, ...], w: Array) -> Array:
        return w.astype(dtype) if path[-1].key in ("qkv", "out", "kernel") else w

    return jax.tree_util.tree_map_with_path(cast, Denoiser(config).apply({"params": params}))


def unstack(weights: Weights) -> Weights:
    """Weights whose blocks are a tuple of N dicts: the layers are then unrolled, as the cached pass wants them."""
    count = weights["blocks"]["qkv"].shape[0]
    return {**weights, "blocks": tuple(jax.tree.map(lambda w: w[i], weights["blocks"]) for i in range(count))}


def for_inference(config: ModelConfig, params: Params, dtype: Any, mesh: Mesh) -> Weights:
    """Weights for sampling and scoring, from float32 parameters that are laid out on the mesh by the rules of
    eso_jax/sharding.py: folded, unstacked, and born where they are used.

    No device ever holds more than its share of parameters and weights. For that `params` is emptied, and what it held
    is freed once it is used.
    """
    fold_blocks, fold_kernel = inference_folds(config, dtype, mesh)
    weights = jax.block_until_ready(fold_blocks(params))
    embedding, kernel = params["embedding"], params["head_kernel"]
    params.clear()
    return {**weights, "embedding": embedding, "head": {**weights["head"], "kernel": fold_kernel(kernel)}}


@functools.lru_cache(maxsize=8)  # so that models of one kind are compiled once
def inference_folds(config: ModelConfig, dtype: Any, mesh: Mesh) -> tuple[Any, Any]:
    """The compiled functions behind `for_inference`: from parameters to all weights but the embedding (which is the
    parameter) and the kernel of the head; and from the parameter of the latter to the kernel, whose columns are padded
    to a multiple of the devices that share it, and split. `head` drops their logits."""
    where = jax.tree.map(lambda x: x.sharding, abstract_weights(config, dtype, mesh))
    head = {name: x for name, x in where["head"].items() if name != "kernel"}

    def fold_blocks(params: Params) -> Weights:
        weights = unstack(fold(config, params, dtype))
        return {"blocks": weights["blocks"], "head": {name: weights["head"][name] for name in head}}

    def fold_kernel(kernel: Array) -> Array:
        return _padded(kernel.astype(dtype), mesh)

    return (jax.jit(fold_blocks, out_shardings={"blocks": where["blocks"], "head": head}),
            jax.jit(fold_kernel, out_shardings=where["head"]["kernel"]))


def abstract_weights(config: ModelConfig, dtype: Any, mesh: Mesh) -> Weights:
    """The shapes, types and shardings of weights for inference."""
    def folded() -> Weights:
        weights = unstack(fold(config, init_params(config, jax.random.key(0)), dtype))
        return {**weights, "head": {**weights["head"], "kernel": _padded(weights["head"]["kernel"], mesh)}}

    shapes = jax.eval_shape(folded)
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes,
                        sharding.weight_shardings(shapes, mesh))


def _padded(kernel: Array, mesh: Mesh) -> Array:
    return jnp.pad(kernel, ((0, 0), (0, -kernel.shape[1] % mesh.shape["tensor"])))
