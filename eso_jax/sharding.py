"""Where arrays live: one mesh of three axes, and one table of rules.

  data    copies of the model, each with its own rows; across slices of a pod or nodes, this axis is outermost
  fsdp    devices that share a copy's parameters, averages and optimizer state, each with its own rows
  tensor  devices that share a copy's heads, hidden units, vocabulary and rows

The axes are Auto: XLA places what is not said here, and inserts the communication. Training, sampling and planning for
machines that are not there (eso_jax/aot) all use these meshes. There is no axis along the sequence: at the
paper's lengths the rows of a batch are enough to keep every device busy.

Axes: B batch, L length, S slots, H heads; of parameters see eso_jax/model/transformer.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, Shaped

from eso_jax.config import Config, MeshConfig, ModelConfig
from eso_jax.errors import require

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that split the rows of a batch

# Parameter -> who holds which part. Averages and optimizer state follow their parameter. Vocabularies such as 50,258
# divide by nothing, so the embedding and the head are kept split by width; `head_split` is how the head is used.
RULES: dict[str, P] = {
    "embedding": P(None, ("tensor", "fsdp")),
    "qkv": P(None, "fsdp", None, "tensor", None),
    "out": P(None, "tensor", None, "fsdp"),
    "mlp_in_kernel": P(None, "fsdp", "tensor"),
    "mlp_in_bias": P(None, "tensor"),
    "mlp_out_kernel": P(None, "tensor", "fsdp"),
    "mlp_out_bias": P(),
    "norm1": P(),
    "norm2": P(),
    "adaln_kernel": P(None, None, None, ("fsdp", "tensor")),
    "adaln_bias": P(None, None, ("fsdp", "tensor")),
    "sigma_in_kernel": P(),
    "sigma_in_bias": P(),
    "sigma_out_kernel": P(),
    "sigma_out_bias": P(),
    "head_norm": P(),
    "head_kernel": P(("fsdp", "tensor"), None),
    "head_bias": P(),
    "head_adaln_kernel": P(),
    "head_adaln_bias": P(),
}


def mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of all devices, or of those given (which may be of a topology that is not there).

    Slices of a pod are joined along "data" alone, so that only gradients go between them.

    Raises:
      EsoError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    count, model = len(devices), config.fsdp * config.tensor
    require(count % model == 0, "mesh.fsdp x mesh.tensor", model, f"must divide the number of devices, {count}")
    data = count // model if config.data is None else config.data
    require(data * model == count, "mesh.data", config.data,
            f"times fsdp = {config.fsdp} and tensor = {config.tensor} must be the number of devices, {count}; leave it "
            "unset")
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    require(data % slices == 0, "mesh.data", data, f"must be a multiple of the {slices} slices")
    shape = (data // slices, config.fsdp, config.tensor)
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(shape, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def described(mesh: Mesh) -> str:
    """The devices of a mesh, their processes and its axes, for people."""
    devices = mesh.devices.flat
    processes = len({device.process_index for device in devices})
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    return (f"{mesh.size} {devices[0].platform} device(s)" + (f" of {processes} processes" if processes > 1 else "")
            + (f" ({axes})" if axes else ""))


def check(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raises an EsoError unless a config's batch and model divide over a mesh."""
    size, model, train = mesh.shape, config.model, config.train
    rows, shards = math.prod(size[axis] for axis in BATCH), size["fsdp"] * size["tensor"]
    # Each of an Eso-LM's two losses has its own rows; with less than one of each on a device, layers would communicate.
    least = rows * train.accumulate * config.family.split.denominator
    require(train.batch_size % least == 0, "train.batch_size", train.batch_size,
            f"must be a multiple of {least}: mesh.data x mesh.fsdp = {rows} devices split the rows, in "
            f"train.accumulate = {train.accumulate} parts, by kappa = {config.family.split}")
    require(model.heads % size["tensor"] == 0, "mesh.tensor", size["tensor"], f"must divide the {model.heads} heads")
    require(model.width % shards == 0, "mesh.fsdp x mesh.tensor", shards,
            f"must divide model.width = {model.width}; use more of mesh.data")


def spec(path: tuple[Any, ...], ndim: int) -> P:
    """The rule of a parameter, or of its average or optimizer state, by its path in a tree. Scalars are everywhere.

    Raises:
      EsoError: no rule has its name, or the rule cannot be right.
    """
    if ndim == 0:
        return P()
    name = next((str(part.key) for part in reversed(path) if hasattr(part, "key")), "")
    require(name in RULES, "parameter", jax.tree_util.keystr(path), "has no rule in eso_jax/sharding.py; add one")
    rule = RULES[name]
    axes = [axis for entry in rule for axis in (entry if isinstance(entry, tuple) else (entry,)) if axis is not None]
    require(len(rule) <= ndim, f"rule of {name}", rule, f"has more axes than the parameter's {ndim}")
    require(set(axes) <= set(AXES), f"rule of {name}", rule, f"may name only {', '.join(AXES)}")
    require(len(set(axes)) == len(axes), f"rule of {name}", rule, "names an axis twice; each splits one dimension")
    return rule


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The NamedSharding of every leaf of a tree of parameters, averages or optimizer state (arrays or their shapes)."""
    return jax.tree_util.tree_map_with_path(lambda path, x: NamedSharding(mesh, spec(path, x.ndim)), tree)


def placed(tree: Any, mesh: Mesh) -> Any:
    """The shapes, types and shardings of a tree as above, without its values."""
    return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree,
                        shardings(tree, mesh))


def constrain_params(tree: Any) -> Any:
    """A tree such as gradients, laid out by the rules on the mesh in force; itself where there is none."""
    return jax.tree_util.tree_map_with_path(lambda path, x: constrain(x, *spec(path, x.ndim)), tree)


def constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """x laid out over these axes of the mesh in force (jax.set_mesh); x itself where there is none, or one device.

    Inside a compiled function the parts may be of unequal size (XLA pads); outside, such an x stays as it is.
    """
    here = jax.sharding.get_abstract_mesh()
    if not here.axis_names or here.size == 1:
        return x
    even = all(axis is None or size % _size(*((axis,) if isinstance(axis, str) else axis)) == 0
               for size, axis in zip(x.shape, axes, strict=False))
    return jax.lax.with_sharding_constraint(x, P(*axes)) if even or isinstance(x, jax.core.Tracer) else x


def _used(name: str, *layouts: P) -> Callable[[Array], Array]:
    """Lays a parameter out for its use, from where it is kept by way of `layouts`; its gradient goes back the same way,
    but for the last layout, whose parts are first added up over the rows: so no device gets more than it keeps."""
    @jax.custom_vjp
    def used(w: Array) -> Array:
        for layout in layouts:
            w = constrain(w, *layout)
        return w

    def back(_: None, gradient: Array) -> tuple[Array]:
        for layout in (*reversed(layouts[:-1]), RULES[name]):
            gradient = constrain(gradient, *layout)
        return (gradient,)

    used.defvjp(lambda w: (used(w), None), back)
    return used


# The embedding [V, D] split by width: each device looks its part of a token's vector up.
embedding_split = _used("embedding", P(None, "tensor"))
# The head's kernel [D, V] split by vocabulary (unevenly, if need be; XLA pads): no device makes or keeps all logits of
# a row. In two steps, exchange and gather: in one, XLA would gather all of it everywhere.
head_split = _used("head_kernel", P("fsdp", "tensor"), P(None, "tensor"))


def batch_shards() -> int:
    """Into how many parts the mesh in force splits the rows of a batch."""
    return _size(*BATCH)


def tensor_shards() -> int:
    """Into how many parts the mesh in force splits heads and vocabulary."""
    return _size("tensor")


def _size(*axes: str) -> int:
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in axes)


def platform() -> str:
    """What the program being traced will run on: the platform of the mesh in force, else the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def locally(function: Callable[..., Array], heads: tuple[Array, ...], masks: tuple[Array, ...]) -> Array:
    """function(*heads, *masks), computed by every device for its own rows and heads, without communication.

    Args:
      heads: arrays [B, S, H, K]; so is the result.
      masks: arrays [B or 1, S, L].
    """
    batch, _, count, _ = heads[0].shape
    rows, tensor = batch_shards(), tensor_shards()
    if rows * tensor == 1 or batch % rows or count % tensor:
        return function(*heads, *masks)
    whole = P(BATCH, None, "tensor", None)
    specs = (*(whole for _ in heads), *(P(BATCH if mask.shape[0] > 1 else None) for mask in masks))
    return jax.shard_map(function, in_specs=specs, out_specs=whole, check_vma=False)(*heads, *masks)


@functools.cache  # asked for every batch
def rows_of_process(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " R"]:
    """Which rows of a global batch this process's devices hold, ascending."""
    held = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held.values()]))


def put_rows(rows: Shaped[np.ndarray, "R *s"], mesh: Mesh, batch_size: int) -> Shaped[Array, "B *s"]:
    """A global batch of `batch_size` rows from those that this process holds (`rows_of_process`)."""
    held, shape, where = rows_of_process(mesh, batch_size), (batch_size, *rows.shape[1:]), NamedSharding(mesh, P(BATCH))
    parts = [jax.device_put(rows[np.searchsorted(held, np.arange(batch_size)[index[0]])], device)
             for device, index in where.addressable_devices_indices_map(shape).items() if index is not None]
    return jax.make_array_from_single_device_arrays(shape, where, parts)


def fetch(tree: Any) -> Any:
    """A tree of global arrays as whole numpy arrays; of several processes, all must ask."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def inference_mesh(config: ModelConfig, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices (or those given), `tensor` of them to a copy of the model."""
    count = len(devices or jax.devices())
    require(tensor >= 1 and count % tensor == 0, "tensor", tensor, f"must divide the {count} devices")
    require(config.heads % tensor == 0, "tensor", tensor, f"must divide the {config.heads} heads")
    return mesh(MeshConfig(tensor=tensor), devices)


def weight_shardings(weights: Any, mesh: Mesh) -> Any:
    """The NamedSharding of every folded weight (or its shape): that of the parameter it comes from, and norms
    everywhere. Unstacked weights, of inference, have no axis of layers, and their head is split by vocabulary, as it is
    used (params.for_inference makes it divide)."""
    unstacked = isinstance(weights["blocks"], tuple)

    def of(path: tuple[Any, ...], _: Any) -> NamedSharding:
        name = "_".join(str(part.key) for part in path if hasattr(part, "key"))
        rule = RULES.get(name.removeprefix("blocks_"), P())
        if unstacked:
            rule = P(None, "tensor") if name == "head_kernel" else P(*rule[1:]) if name.startswith("blocks_") else rule
        return NamedSharding(mesh, rule)

    return jax.tree_util.tree_map_with_path(of, weights)
