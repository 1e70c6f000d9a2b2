"""The parameters of the denoiser, each declared once, and the weights made of them.

`PARAMETERS` is the declaration: a parameter's name, its logical axes (whose sizes `sizes` knows, and whose places on a
mesh eso_jax/sharding.py), its initializer, and its tensor in the authors' checkpoints. The Flax Linen module
`Parameters` declares what a config has of them; params themselves are a plain dict of float32 arrays by name.

The model computes with `Weights`, which `fold` makes of params. AdaLN is always conditioned on the embedding of sigma 0
(the paper turns time conditioning off), so its shifts, scales and gates are the same for every token: they are folded
into the layer norms and the output projections. Training folds in every step (it costs as much as a few rows of the
batch), and the gradient flows through; inference folds once, when a model is loaded.

Axes: see eso_jax/model/transformer.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int, Key

from eso_jax import sharding
from eso_jax.config import ModelConfig
from eso_jax.errors import require

Params = dict[str, Any]
Initializer = Callable[[ModelConfig], nn.initializers.Initializer]

FREQUENCIES = 256  # width of the timestep embedding, the authors'
GATES = (2, 5)  # of the six modulations of a block: shift, scale and gate of attention, then of the MLP


class Parameter(NamedTuple):
    """The declaration of one parameter.

    Attributes:
      axes: logical axes, in order; "layers" comes first where there is one for every layer.
      init: gives the initializer for a config.
      authors: its tensor's name in the authors' checkpoints; the name within a block, where every layer has one.
      inputs: of a matrix, over how many axes (after "layers") a product with it sums; 0: it is not a matrix. Matrices
        have the compute type, all else stays float32. The authors' matrices are [out, in], ours [in, out].
    """

    axes: tuple[str, ...]
    init: Initializer
    authors: str
    inputs: int = 0

    @property
    def stacked(self) -> bool:
        return self.axes[0] == "layers"

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        return tuple(sizes(config)[axis] for axis in self.axes)


def sizes(c: ModelConfig) -> dict[str, int]:
    """The size of every logical axis."""
    return {
        "layers": c.layers,
        # D, as an axis of a block's matrices, of the embedding, the head, modulations, and of norms and biases
        "width": c.width, "embedding_width": c.width, "head_width": c.width, "modulated": c.width, "vector": c.width,
        "qkv": 3, "heads": c.heads, "head_size": c.head_size, "hidden": 4 * c.width,
        # V: the head's columns; rows of the embedding and biases of the head
        "vocab": c.vocab_size, "ids": c.vocab_size,
        "frequencies": FREQUENCIES, "condition_hidden": c.cond_dim, "condition": c.cond_dim,
        "modulations": 6, "head_modulations": 2,
    }


def _ones(config: ModelConfig) -> nn.initializers.Initializer:
    return nn.initializers.ones


def _zeros(config: ModelConfig) -> nn.initializers.Initializer:
    return nn.initializers.zeros


def _uniform(fan_in: str) -> Initializer:
    """Uniform in +-1/sqrt(size of an axis), PyTorch's default for linear layers."""
    def of(config: ModelConfig) -> nn.initializers.Initializer:
        scale = sizes(config)[fan_in]**-0.5

        def init(key: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
            return jax.random.uniform(key, shape, dtype, -1, 1) * scale

        return init

    return of


def _head(config: ModelConfig) -> nn.initializers.Initializer:
    """Zero in a model with AdaLN, else uniform."""
    return (_zeros if config.cond_dim else _uniform("width"))(config)


# Initialized as the authors'. The order matters: Flax keys the draw of a parameter by its number.
_ALWAYS = {
    "norm1": Parameter(("layers", "vector"), _ones, "norm1.weight"),
    "norm2": Parameter(("layers", "vector"), _ones, "norm2.weight"),
    "qkv": Parameter(("layers", "width", "qkv", "heads", "head_size"), _uniform("width"), "attn_qkv.weight", 1),
    "out": Parameter(("layers", "heads", "head_size", "width"), _uniform("width"), "attn_out.weight", 2),
    "mlp_in_kernel": Parameter(("layers", "width", "hidden"), _uniform("width"), "mlp.0.weight", 1),
    "mlp_in_bias": Parameter(("layers", "hidden"), _uniform("width"), "mlp.0.bias"),
    "mlp_out_kernel": Parameter(("layers", "hidden", "width"), _uniform("hidden"), "mlp.2.weight", 1),
    "mlp_out_bias": Parameter(("layers", "vector"), _uniform("hidden"), "mlp.2.bias"),
    "embedding": Parameter(("ids", "embedding_width"), _uniform("width"), "vocab_embed.embedding"),
    "head_norm": Parameter(("vector",), _ones, "output_layer.norm_final.weight"),
    "head_kernel": Parameter(("head_width", "vocab"), _head, "output_layer.linear.weight", 1),
    "head_bias": Parameter(("ids",), _head, "output_layer.linear.bias"),
}
_ADALN = {
    "sigma_in_kernel": Parameter(("frequencies", "condition_hidden"), _uniform("frequencies"),
                                 "sigma_map.mlp.0.weight", 1),
    "sigma_in_bias": Parameter(("condition_hidden",), _uniform("frequencies"), "sigma_map.mlp.0.bias"),
    "sigma_out_kernel": Parameter(("condition_hidden", "condition"), _uniform("condition"), "sigma_map.mlp.2.weight",
                                  1),
    "sigma_out_bias": Parameter(("condition",), _uniform("condition"), "sigma_map.mlp.2.bias"),
    "adaln_kernel": Parameter(("layers", "condition", "modulations", "modulated"), _zeros, "adaLN_modulation.weight",
                              1),
    "adaln_bias": Parameter(("layers", "modulations", "modulated"), _zeros, "adaLN_modulation.bias"),
    "head_adaln_kernel": Parameter(("condition", "head_modulations", "vector"), _zeros,
                                   "output_layer.adaLN_modulation.weight", 1),
    "head_adaln_bias": Parameter(("head_modulations", "vector"), _zeros, "output_layer.adaLN_modulation.bias"),
}
PARAMETERS = _ALWAYS | _ADALN


def parameters_of(config: ModelConfig) -> dict[str, Parameter]:
    """The parameters that a model of this config has, by name."""
    return PARAMETERS if config.cond_dim else _ALWAYS


class Parameters(nn.Module):
    """Declares the parameters with their logical axes, for Flax's partitioning; a call returns them by name."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Params:
        return {name: self.param(name, nn.with_logical_partitioning(parameter.init(self.config), parameter.axes),
                                 parameter.shape(self.config))
                for name, parameter in parameters_of(self.config).items()}


def init_params(config: ModelConfig, key: Key[Array, ""]) -> Params:
    """Fresh float32 parameters, plain arrays by name."""
    params: Params = nn.unbox(Parameters(config).init(key)["params"])
    return params


# Types are not checked at run time: trees of shapes and of shardings have these classes too.

@no_type_check
@struct.dataclass
class Norm:
    """A layer norm, its modulation folded in.

    Attributes:
      scale, bias: float32 [D].
    """

    scale: Float32[Array, "*N D"]
    bias: Float32[Array, "*N D"]


@no_type_check
@struct.dataclass
class Linear:
    """A linear layer.

    Attributes:
      kernel: [in, out], of the compute type.
      bias: float32 [out].
    """

    kernel: Float[Array, "*N I O"]
    bias: Float32[Array, "*N O"]


@no_type_check
@struct.dataclass
class Block:
    """The weights of one layer, or of all of them, stacked: then every array has N as its first axis.

    Attributes:
      norm1, norm2: before attention, and before the MLP.
      qkv: [D, 3, H, K], makes queries, keys and values; of the compute type.
      out: [H, K, D], the projection after attention, its gate folded in; of the compute type.
      mlp_in: D -> 4D.
      mlp_out: 4D -> D, its gate folded in.
    """

    norm1: Norm
    norm2: Norm
    qkv: Float[Array, "*N D 3 H K"]
    out: Float[Array, "*N H K D"]
    mlp_in: Linear
    mlp_out: Linear


@no_type_check
@struct.dataclass
class Head:
    """The weights that turn hidden states into logits.

    Attributes:
      norm: the last layer norm.
      kernel: [D, V], of the compute type; for inference padded with columns to divide over the devices. The logits of
        the padding are dropped.
      bias: float32 [V].
    """

    norm: Norm
    kernel: Float[Array, "D _"]
    bias: Float32[Array, " V"]


@no_type_check
@struct.dataclass
class Weights:
    """What the model computes with: parameters with the modulation folded in.

    Attributes:
      embedding: float32 [V, D].
      blocks: of all layers in one `Block` (training, which scans over them), or a tuple of N blocks (inference, which
        unrolls them, as the cached pass wants it).
      head: after the last block.
      attention: the name of the backend, of eso_jax/model/attention.py, or "auto". Static.

    Instead of arrays, the fields may hold their shapes or shardings.
    """

    embedding: Float32[Array, "V D"]
    blocks: Block | tuple[Block, ...]
    head: Head
    attention: str = struct.field(pytree_node=False, default="auto")

    @property
    def head_size(self) -> int:
        """K."""
        block = self.blocks if isinstance(self.blocks, Block) else self.blocks[0]
        return block.qkv.shape[-1]


def fold(config: ModelConfig, params: Params, dtype: Any = jnp.float32, attention: str = "auto") -> Weights:
    """The weights made of `params`, stacked over layers. Matrices have type `dtype`; all else, and so the residual
    stream, stays float32."""
    p: Any = Parameters(config).apply({"params": params})
    if config.cond_dim:
        condition = _condition(p)
        modulation = jnp.einsum("c,ncmd->mnd", condition, p["adaln_kernel"]) + jnp.swapaxes(p["adaln_bias"], 0, 1)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation
        norm1, norm2 = _modulate(p["norm1"], shift1, scale1), _modulate(p["norm2"], shift2, scale2)
        out = p["out"] * gate1[:, None, None, :]
        mlp_out = Linear(p["mlp_out_kernel"] * gate2[:, None, :], p["mlp_out_bias"] * gate2)
        shift, scale = jnp.einsum("c,cmd->md", condition, p["head_adaln_kernel"]) + p["head_adaln_bias"]
        head_norm = _modulate(p["head_norm"], shift, scale)
    else:
        norm1, norm2, head_norm = (Norm(p[name], jnp.zeros_like(p[name])) for name in ("norm1", "norm2", "head_norm"))
        out, mlp_out = p["out"], Linear(p["mlp_out_kernel"], p["mlp_out_bias"])
    mlp_in = Linear(p["mlp_in_kernel"], p["mlp_in_bias"])
    weights = Weights(p["embedding"], Block(norm1, norm2, p["qkv"], out, mlp_in, mlp_out),
                      Head(head_norm, p["head_kernel"], p["head_bias"]), attention)
    cast: Weights = jax.tree_util.tree_map_with_path(
        lambda path, w: w.astype(dtype) if _origin(path).inputs else w, weights)
    return cast


def _condition(p: Params) -> Float[Array, " C"]:
    """The conditioning vector: an MLP of the embedding of sigma = 0, whose cosines are 1 and whose sines are 0."""
    sigma = jnp.concatenate([jnp.ones(FREQUENCIES // 2), jnp.zeros(FREQUENCIES // 2)])
    hidden = nn.silu(sigma @ p["sigma_in_kernel"] + p["sigma_in_bias"])
    return nn.silu(hidden @ p["sigma_out_kernel"] + p["sigma_out_bias"])


def _modulate(norm: Array, shift: Array, scale: Array) -> Norm:
    return Norm(norm * (1 + scale), shift)


def _origin(path: tuple[Any, ...]) -> Parameter:
    """The parameter that a weight is made of, by its path in `Weights`: blocks.mlp_in.kernel is made of mlp_in_kernel,
    and both scale and bias of head.norm of head_norm."""
    names = [part.name for part in path if hasattr(part, "name") and part.name != "blocks"]
    return PARAMETERS.get("_".join(names)) or PARAMETERS["_".join(names[:-1])]


def unstack(weights: Weights) -> Weights:
    """Weights whose blocks are a tuple of N, one for each layer."""
    blocks = weights.blocks
    assert isinstance(blocks, Block)
    layers = tuple(jax.tree.map(lambda w: w[i], blocks) for i in range(blocks.qkv.shape[0]))
    return dataclasses.replace(weights, blocks=layers)


def for_inference(config: ModelConfig, params: Params, dtype: Any, mesh: Mesh, attention: str = "auto") -> Weights:
    """Weights for sampling and scoring, from float32 parameters that are laid out on the mesh by the rules of
    eso_jax/sharding.py: folded, unstacked, and created on the devices that use them.

    No device ever holds more than its share of parameters and weights. For that, `params` is emptied, and each array is
    freed after its last use.
    """
    fold_layer, fold_kernel = inference_folds(config, dtype, mesh)
    layers = [jax.block_until_ready(fold_layer(params, layer)) for layer in range(config.layers)]
    blocks, (_, norm, bias) = tuple(block for block, *_ in layers), layers[0]
    embedding, kernel = params["embedding"], params["head_kernel"]
    params.clear()
    return Weights(embedding, blocks, Head(norm, fold_kernel(kernel), bias), attention)


@functools.lru_cache(maxsize=8)  # so that models of one kind are compiled once
def inference_folds(config: ModelConfig, dtype: Any, mesh: Mesh) -> tuple[Any, Any]:
    """The two compiled functions of `for_inference`: (params, layer) -> (that layer's block, the head's norm, the
    head's bias); and the head's kernel -> the same, split by columns and padded to a multiple of the devices that share
    them (`head` drops the logits of the padding). The embedding needs no change."""
    where = jax.tree.map(lambda x: x.sharding, abstract_weights(config, dtype, mesh))

    def fold_layer(params: Params, layer: Int[Array, ""]) -> tuple[Any, Norm, Array]:
        own = {name: jax.lax.dynamic_slice_in_dim(x, layer, 1) if PARAMETERS[name].stacked else x
               for name, x in params.items()}
        weights = fold(dataclasses.replace(config, layers=1), own, dtype)
        return jax.tree.map(lambda w: w[0], weights.blocks), weights.head.norm, weights.head.bias

    def fold_kernel(kernel: Array) -> Array:
        return _pad_columns(kernel.astype(dtype), mesh)

    assert isinstance(where.blocks, tuple)  # all of one layout
    return (jax.jit(fold_layer, out_shardings=(where.blocks[0], where.head.norm, where.head.bias)),
            jax.jit(fold_kernel, out_shardings=where.head.kernel))


def abstract_weights(config: ModelConfig, dtype: Any, mesh: Mesh) -> Weights:
    """The shapes, types and shardings of weights for inference."""
    def make() -> Weights:
        weights = unstack(fold(config, init_params(config, jax.random.key(0)), dtype))
        head = Head(weights.head.norm, _pad_columns(weights.head.kernel, mesh), weights.head.bias)
        return dataclasses.replace(weights, head=head)

    shapes = jax.eval_shape(make)
    abstract: Weights = jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes,
                                     weight_shardings(shapes, mesh))
    return abstract


def _pad_columns(kernel: Array, mesh: Mesh) -> Array:
    """A head's kernel, its columns padded to a multiple of the devices that share them."""
    return jnp.pad(kernel, ((0, 0), (0, -kernel.shape[1] % mesh.shape["tensor"])))


def param_spec(path: tuple[Any, ...], ndim: int) -> P:
    """The PartitionSpec of a parameter, of its average or of its optimizer state, by its path in a tree. Scalars are on
    every device.

    Raises:
      EsoError: no parameter of its name is declared, it has other axes, or their rules cannot be right.
    """
    if ndim == 0:
        return P()
    name = next((str(part.key) for part in reversed(path) if hasattr(part, "key")), "")
    require(name in PARAMETERS, "parameter", jax.tree_util.keystr(path),
            "is not declared in eso_jax/model/params.py; declare it")
    axes = PARAMETERS[name].axes
    require(len(axes) == ndim, f"parameter {name}", axes, f"has other axes than the array's {ndim}")
    return sharding.spec(axes)


def param_shardings(tree: Any, mesh: Mesh) -> Any:
    """The NamedSharding of every array in a tree of parameters, averages or optimizer state (or of its shape)."""
    return jax.tree_util.tree_map_with_path(lambda path, x: NamedSharding(mesh, param_spec(path, x.ndim)), tree)


def with_shardings(tree: Any, mesh: Mesh) -> Any:
    """The shapes, types and shardings of such a tree, without its values."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree,
                        param_shardings(tree, mesh))


def constrain_params(tree: Any) -> Any:
    """A tree of parameters or gradients, constrained to the rules' layout on the mesh in force; the same tree if there
    is no mesh."""
    return jax.tree_util.tree_map_with_path(lambda path, x: sharding.constrain(x, *param_spec(path, x.ndim)), tree)


def weight_shardings(weights: Weights, mesh: Mesh) -> Weights:
    """The NamedSharding of every weight (or of its shape): that of its parameter, where blocks are stacked; else by the
    rules for sampling, for which the columns of the head must divide (`for_inference` pads them)."""
    def of(path: tuple[Any, ...], _: Any) -> NamedSharding:
        parameter = _origin(path)
        if stacked:
            return NamedSharding(mesh, sharding.spec(parameter.axes))
        return NamedSharding(mesh, sharding.spec(parameter.axes[parameter.stacked:], sharding.SAMPLING))

    stacked = isinstance(weights.blocks, Block)
    shardings: Weights = jax.tree_util.tree_map_with_path(of, weights)
    return shardings


# The embedding [V, D] split by width: each device looks up its part of a token's vector.
embedding_split = sharding.route(PARAMETERS["embedding"].axes, P(None, "tensor"))
# The head's kernel [D, V] split by vocabulary (XLA pads uneven parts): no device computes or holds all logits of a row.
# In two steps, exchange and gather: in one step, XLA would gather the whole kernel on every device.
head_split = sharding.route(PARAMETERS["head_kernel"].axes, P("fsdp", "tensor"), P(None, "tensor"))
