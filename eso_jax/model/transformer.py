"""The denoiser: a diffusion transformer whose modulation is constant.

One axis legend for the whole project:
  B batch   L length   S slots of a pass (L, 2L with two streams, a few when sampling)   V vocabulary, mask included
  D width   H heads    K head size   N layers   T diffusion steps   O orders   C slots of the cache

Parameters live in a Flax Linen module, `Denoiser`; everything else is a function. AdaLN is conditioned on the
embedding of sigma = 0 always (the paper turns time conditioning off), so its shifts, scales and gates are the same for
every token: `Denoiser.apply` folds them into the layer norms and the output projections, and returns *weights*, a plain
dict that `trunk` and `head` take. Training folds in every step (it costs as much as a few rows of the batch) and the
gradient flows through; inference folds once, at load.

Weights (stacked over layers, or unstacked into a tuple by `unstack`):
  embedding [V, D]
  blocks    norm1, norm2: scale, bias [N, D];  qkv [N, D, 3, H, K];  out [N, H, K, D]
            mlp_in: kernel [N, D, 4D], bias [N, 4D];  mlp_out: kernel [N, 4D, D], bias [N, D]
  head      norm: scale, bias [D];  kernel [D, V] (for inference padded to what divides over the devices);  bias [V]
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from eso_jax import noise, sharding
from eso_jax.config import Config, ModelConfig
from eso_jax.model import attention, cache as kv
from eso_jax.model.masks import View

Params = dict[str, Any]
Weights = dict[str, Any]

MASK_LOGIT = -1e6
FREQUENCIES = 256  # width of the timestep embedding, the authors'
GATES = (2, 5)  # of the six modulations of a block: shift, scale and gate of attention, then of the MLP
UNROLLED = 12  # layers in one turn of the scan, on CPU


class Training(NamedTuple):
    """What a training pass does that others do not.

    Attributes:
      dropout: the rate.
      keys: one per row; None if the rate is 0.
      remat: what the backward pass computes again, train.remat.
    """

    dropout: float
    keys: Key[Array, " B"] | None
    remat: str


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


def init(config: ModelConfig, key: Key[Array, ""]) -> Params:
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
        weights = unstack(fold(config, init(config, jax.random.key(0)), dtype))
        return {**weights, "head": {**weights["head"], "kernel": _padded(weights["head"]["kernel"], mesh)}}

    shapes = jax.eval_shape(folded)
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes,
                        sharding.weight_shardings(shapes, mesh))


def _padded(kernel: Array, mesh: Mesh) -> Array:
    return jnp.pad(kernel, ((0, 0), (0, -kernel.shape[1] % mesh.shape["tensor"])))


def trunk(weights: Weights, tokens: Int[Array, "B S"], positions: Int[Array, "B S"], view: View,
          cache: kv.KVCache | None = None, offset: Int[Array, ""] | int = 0,
          training: Training | None = None) -> tuple[Float[Array, "B S D"], kv.KVCache | None]:
    """Everything but the head.

    Args:
      weights: of `fold`, stacked or unstacked.
      tokens: ids in [0, V).
      positions: natural positions in [0, L), for the rotary embedding.
      view: who sees whom.
      cache: the tokens are then its slots from `offset` on (needs unstacked weights).
      training: dropout and rematerialization of a training pass.

    Returns:
      The hidden states after the last normalization, and the cache.
    """
    head_size = weights["blocks"][0]["qkv"].shape[-1] if isinstance(weights["blocks"], tuple) \
        else weights["blocks"]["qkv"].shape[-1]
    rotary = rotary_table(positions, head_size)

    def drop(x: Array, layer: Any, site: int) -> Array:
        if training is None or training.keys is None:
            return x
        keys = jax.vmap(lambda key: jax.random.fold_in(key, 2 * layer + site))(training.keys)
        return noise.dropout(x, training.dropout, keys)

    def block(carry: tuple[Array, Any], scanned: tuple[Any, Any]) -> tuple[tuple[Array, Any], None]:
        (x, cache), (layer, w) = carry, scanned
        qkv = linear(_layer_norm(x, w["norm1"]).astype(w["qkv"].dtype), w["qkv"])
        q, k, v = (qkv[:, :, i] for i in range(3))
        with jax.named_scope("attention"):
            q, k = rotate(q, rotary), rotate(k, rotary)
            if cache is None:
                out = attention.attend(q, k, v, view)
            else:
                out, cache = kv.attend(cache, layer, q, k, v, view, offset)
        x = x + drop(linear(out, w["out"], axes=2), layer, 0)
        hidden = linear(_layer_norm(x, w["norm2"]).astype(w["qkv"].dtype), w["mlp_in"]["kernel"])
        hidden = nn.gelu(hidden + over(w["mlp_in"]["bias"], hidden).astype(hidden.dtype), approximate=True)
        x = x + drop(linear(hidden, w["mlp_out"]["kernel"]) + over(w["mlp_out"]["bias"], x), layer, 1)
        return (sharding.constrain(x, sharding.BATCH), cache), None

    block = jax.named_scope("block")(block)
    carry = (sharding.constrain(sharding.embedding_split(weights["embedding"])[tokens], sharding.BATCH), cache)
    if isinstance(weights["blocks"], tuple):
        for scanned in enumerate(weights["blocks"]):
            carry, _ = block(carry, scanned)
    else:
        count, remat = weights["blocks"]["qkv"].shape[0], "none" if training is None else training.remat
        # Unrolled, a step is 30-60% faster on CPU; scanned, it compiles in half the time on TPU, and however deep the
        # model is. Rematerialization saves memory under a scan alone.
        unroll = 1
        if remat != "none":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else None
            block = jax.checkpoint(block, policy=policy, prevent_cse=False)
        elif sharding.platform() == "cpu":
            unroll = max(n for n in range(1, UNROLLED + 1) if count % n == 0)
        carry, _ = jax.lax.scan(block, carry, (jnp.arange(count), weights["blocks"]), unroll=unroll)
    x, cache = carry
    return _layer_norm(x, weights["head"]["norm"]).astype(weights["head"]["kernel"].dtype), cache


def head(weights: Weights, hidden: Float[Array, "*s D"], mask_id: int) -> Float[Array, "*s V"]:
    """Float32 logits of hidden states, the mask's set to MASK_LOGIT."""
    return logits_of(sharding.head_split(weights["head"]["kernel"]), weights["head"]["bias"], hidden, mask_id)


def logits_of(kernel: Float[Array, "D _"], bias: Float[Array, " V"], hidden: Float[Array, "*s D"],
              mask_id: int) -> Float[Array, "*s V"]:
    """As `head`, by a kernel that is laid out for its use (sharding.head_split); columns beyond V are padding."""
    with jax.named_scope("head"):
        logits = linear(hidden, kernel, dtype=jnp.float32)
        logits = sharding.constrain(logits, sharding.BATCH, *[None] * (logits.ndim - 2), "tensor")
        logits = logits[..., :len(bias)] + over(bias, logits)
        return jnp.where(over(jnp.arange(len(bias)) == mask_id, logits), MASK_LOGIT, logits)


def linear(x: Float[Array, "*rows"], w: Float[Array, "*w"], axes: int = 1, dtype: Any = None) -> Float[Array, "*out"]:
    """Contracts the last `axes` axes of x with the first of w.

    Float32 is multiplied as float32 on every backend; bfloat16 costs no more for it. Rows are flattened first: on CPU
    the gradient of a product with one row axis is 2.5 times as fast as with two.
    """
    rows = x.shape[:x.ndim - axes]
    out = jnp.tensordot(x.reshape(-1, *x.shape[x.ndim - axes:]), w, axes, precision="highest",
                        preferred_element_type=dtype)
    return out.reshape(*rows, *w.shape[axes:])


def training_of(config: Config, draws: noise.Draws, train: bool) -> Training | None:
    """What is special about a training pass; None for others."""
    rate = config.model.dropout
    return Training(rate, draws.per_example(noise.DROPOUT) if rate else None, config.train.remat) if train else None


def natural_positions(tokens: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """0..L-1 in every row."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


def rotary_table(positions: Int[Array, "B S"],
                 head_size: int) -> tuple[Float[Array, "B S 1 J"], Float[Array, "B S 1 J"]]:
    """Cosines and sines of position x frequency, base 10^4, float32; J = K / 2."""
    frequencies = 1e4 ** -(np.arange(0, head_size, 2, dtype=np.float32) / head_size)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies[None, None, None]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "B S H K"], rotary: tuple[Array, Array]) -> Float[Array, "B S H K"]:
    """Rotates the pairs (x_j, x_{j + K/2}) by their angles, in float32."""
    cos, sin = rotary
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _layer_norm(x: Float[Array, "B S D"], norm: dict[str, Array]) -> Float[Array, "B S D"]:
    """Layer normalization in float32, epsilon 1e-5."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    normal = centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-5)
    return normal * over(norm["scale"], x) + over(norm["bias"], x)


def over(w: Array, x: Array) -> Array:
    """w with as many axes as x, to be repeated over the first ones."""
    return jnp.expand_dims(w, range(x.ndim - w.ndim))
