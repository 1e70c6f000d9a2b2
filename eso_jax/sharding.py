"""Where arrays live: one mesh of three axes, and one table of rules.

  data    copies of the model, each with its own rows; across slices of a pod or nodes, this axis is outermost
  fsdp    devices that share a copy's parameters, averages and optimizer state, each with its own rows
  tensor  devices that share a copy's heads, hidden units, vocabulary and rows

The axes are Auto: XLA chooses the sharding of what is not named here, and inserts the communication. Training, sampling
and planning for machines that are not there (eso_jax/aot) all use these meshes. There is no axis along the sequence: at
the paper's lengths the rows of a batch are enough to keep every device busy.

Axes: B batch, L length, S slots, H heads.
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

Axes = str | tuple[str, ...] | None  # of the mesh: one, several, or none

# Logical axis of a parameter (eso_jax/model/params.py) -> the axes of the mesh that split it. Vocabulary sizes such as
# 50,258 rarely divide by the devices, so the embedding and the head are stored split by width; `route` moves them to
# the layout in which they are used.
RULES: dict[str, Axes] = {
    "layers": None,
    "width": "fsdp",
    "embedding_width": ("tensor", "fsdp"),
    "head_width": ("fsdp", "tensor"),
    "modulated": ("fsdp", "tensor"),
    "vector": None,
    "qkv": None,
    "heads": "tensor",
    "head_size": None,
    "hidden": "tensor",
    "vocab": None,
    "ids": None,
    "frequencies": None,
    "condition_hidden": None,
    "condition": None,
    "modulations": None,
    "head_modulations": None,
}
# Weights for sampling have the same layout, except the head: it is stored split by vocabulary, as it is used.
SAMPLING: dict[str, Axes] = RULES | {"head_width": None, "vocab": "tensor"}


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


def describe(mesh: Mesh) -> str:
    """The devices of a mesh, their processes and its axes, for a message."""
    devices = mesh.devices.flat
    processes = len({device.process_index for device in devices})
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    return (f"{mesh.size} {devices[0].platform} device(s)" + (f" of {processes} processes" if processes > 1 else "")
            + (f" ({axes})" if axes else ""))


def check(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raises an EsoError unless a config's batch and model divide over a mesh."""
    size, model, train = mesh.shape, config.model, config.train
    rows, shards = math.prod(size[axis] for axis in BATCH), size["fsdp"] * size["tensor"]
    least = rows * train.accumulate * config.family.group_size
    require(train.batch_size % least == 0, "train.batch_size", train.batch_size,
            f"must be a multiple of {least}: mesh.data x mesh.fsdp = {rows} devices split the rows, in "
            f"train.accumulate = {train.accumulate} parts, with {config.family.group_reason}; change one of "
            "these (a run that resumes keeps its batch size), or use fewer devices")
    require(model.heads % size["tensor"] == 0, "mesh.tensor", size["tensor"], f"must divide the {model.heads} heads")
    require(model.width % shards == 0, "mesh.fsdp x mesh.tensor", shards,
            f"must divide model.width = {model.width}; use more of mesh.data")


def spec(axes: Sequence[str], rules: dict[str, Axes] = RULES) -> P:
    """The PartitionSpec of an array with these logical axes.

    Raises:
      EsoError: an axis has no rule, or the rules cannot be right together.
    """
    for axis in axes:
        require(axis in rules, "logical axis", axis, "has no rule in eso_jax/sharding.py; add one")
    layout = P(*(rules[axis] for axis in axes))
    used = [axis for entry in layout for axis in (entry if isinstance(entry, tuple) else (entry,)) if axis is not None]
    require(set(used) <= set(AXES), f"rules of {', '.join(axes)}", layout, f"may name only {', '.join(AXES)}")
    require(len(set(used)) == len(used), f"rules of {', '.join(axes)}", layout,
            "names an axis twice; each splits one dimension")
    return layout


def constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """x with its dimensions split over these axes of the mesh in force (jax.set_mesh); x itself where there is no mesh,
    or one device.

    In a compiled function the parts may have unequal sizes (XLA pads); outside one, such an x stays as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.axis_names or mesh.size == 1:
        return x
    even = all(axis is None or size % _size(*((axis,) if isinstance(axis, str) else axis)) == 0
               for size, axis in zip(x.shape, axes, strict=False))
    return jax.lax.with_sharding_constraint(x, P(*axes)) if even or isinstance(x, jax.core.Tracer) else x


def route(axes: Sequence[str], *layouts: P) -> Callable[[Array], Array]:
    """A function that moves a parameter of these logical axes from where it is kept to where it is used, from one of
    `layouts` to the next. Its gradient goes back the same way, without the last layout: the gradients of all rows are
    first added up, so that no device receives more than the part that it stores."""
    @jax.custom_vjp
    def lay_out(w: Array) -> Array:
        for layout in layouts:
            w = constrain(w, *layout)
        return w

    def back(_: None, gradient: Array) -> tuple[Array]:
        for layout in (*reversed(layouts[:-1]), spec(axes)):
            gradient = constrain(gradient, *layout)
        return (gradient,)

    lay_out.defvjp(lambda w: (lay_out(w), None), back)
    return lay_out


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
    """The platform that the program being traced will run on: that of the mesh in force, else the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_gpu() -> bool:
    """Whether the program being traced will run on a GPU."""
    return platform() in ("gpu", "cuda")


def runs_triton() -> bool:
    """Whether the program being traced will run on an NVIDIA GPU of the Ampere generation or newer, for which Triton
    compiles kernels. A GPU that is not here (of `eso-jax plan`) counts as one."""
    capability = getattr(jax.devices()[0], "compute_capability", "8.0")
    return on_gpu() and capability[:1].isdigit() and float(capability) >= 8


def locally(function: Callable[..., Array], heads: tuple[Array, ...], rows: Any) -> Array:
    """function(*heads, rows), computed by every device for its own rows and heads, without communication.

    Args:
      heads: arrays [B, S, H, K]; so is the result.
      rows: a tree of arrays [B or 1].
    """
    batch, _, count, _ = heads[0].shape
    shards, tensor = batch_shards(), tensor_shards()
    if shards * tensor == 1 or batch % shards or count % tensor:
        return function(*heads, rows)
    whole = P(BATCH, None, "tensor", None)
    specs = (*(whole for _ in heads), jax.tree.map(lambda x: P(BATCH if x.shape[0] > 1 else None), rows))
    return jax.shard_map(function, in_specs=specs, out_specs=whole, check_vma=False)(*heads, rows)


@functools.cache  # called for every batch
def rows_of_process(mesh: Mesh, batch_size: int) -> Int[np.ndarray, " R"]:
    """Which rows of a global batch this process's devices hold, ascending."""
    by_device = NamedSharding(mesh, P(BATCH)).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in by_device.values()]))


def put_rows(rows: Shaped[np.ndarray, "R *s"], mesh: Mesh, batch_size: int) -> Shaped[Array, "B *s"]:
    """A global batch of `batch_size` rows from those that this process holds (`rows_of_process`)."""
    numbers, sharding = rows_of_process(mesh, batch_size), NamedSharding(mesh, P(BATCH))
    shape = (batch_size, *rows.shape[1:])
    parts = [jax.device_put(rows[np.searchsorted(numbers, np.arange(batch_size)[index[0]])], device)
             for device, index in sharding.addressable_devices_indices_map(shape).items() if index is not None]
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def fetch(tree: Any) -> Any:
    """A tree of global arrays as whole numpy arrays. All processes must call it."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def inference_mesh(config: ModelConfig, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh for sampling and scoring: all devices (or those given), `tensor` of which share a copy of the model.

    Raises:
      EsoError: `tensor` does not divide the devices or the heads.
    """
    count = len(devices or jax.devices())
    require(tensor >= 1 and count % tensor == 0, "tensor", tensor, f"must divide the {count} devices")
    require(config.heads % tensor == 0, "tensor", tensor, f"must divide the {config.heads} heads")
    return mesh(MeshConfig(tensor=tensor), devices)
