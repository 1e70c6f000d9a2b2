"""The programs of a plan, compiled for devices that need not be there, and what the compiler says of each.

Whether a program fits is the compiler's word: XLA for TPUs lays out the memory as it compiles and refuses what exceeds
it. (XLA for GPUs only warns; there the sum of what it says is compared with the published size.) It may also fail for
want of the chip's own memory, in which a kernel works: then nobody knows whether the program fits.

Axes: B batch, L length.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from eso_jax import families, flops, sharding
from eso_jax.aot import hlo
from eso_jax.chips import Topology
from eso_jax.config import Config
from eso_jax.decoding import loop, passes
from eso_jax.decoding.categorical import Rule
from eso_jax.model import cache as kv
from eso_jax.model.params import abstract_weights
from eso_jax.run import train

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Program:
    """One program on one device.

    Attributes:
      memory: bytes by part. What goes in is counted from sharded shapes; "temporaries" and "program" are the
        compiler's, and missing where it refused.
      fits: whether the compiler found room; None where it failed before it knew.
      failure: its words then.
      asked, available: bytes that it wanted and had, where it refused.
      model_flops: our own count, without what is computed twice, all devices together.
      cost: what the compiled program does; None where there is none.
      unbounded: its loops without a known trip count.
      compile_seconds: on this machine.
    """

    memory: dict[str, int]
    fits: bool | None
    failure: str | None
    asked: int | None
    available: int | None
    model_flops: float
    cost: hlo.Cost | None
    unbounded: list[str]
    compile_seconds: float

    @property
    def total(self) -> int:
        """Bytes of memory in all."""
        return self.asked or sum(self.memory.values())


def training(config: Config, topology: Topology, devices: Sequence[jax.Device]) -> Program:
    """The training step of a config on its mesh of the devices.

    Raises:
      EsoError: the mesh, the batch or the model does not divide over them.
    """
    mesh = sharding.mesh(config.mesh, devices)
    sharding.check(config, mesh)
    begun = time.perf_counter()
    return _compiled(train.lower_step(config, mesh), state_bytes(config, mesh), topology,
                     sum(flops.training_step(config, topology.devices // config.mesh.tensor).values()), begun)


def state_bytes(config: Config, mesh: Mesh) -> dict[str, int]:
    """What one device holds of the training state, and its rows of the batch."""
    state = train.abstract_state(config, mesh)
    rows = config.train.batch_size // math.prod(mesh.shape[axis] for axis in sharding.BATCH)
    return {"parameters": _held(state.params), "averages": _held(state.ema), "optimizer": _held(state.optimizer),
            "batch": 4 * rows * config.model.length}


@dataclass(frozen=True)
class Sampling:
    """A step of the decoding loop to plan for.

    Attributes:
      batch: sequences decoded together, all devices together.
      tensor: devices to a copy of the model.
      shape: of the step.
      cache: who keeps the keys and values; None without any.
      read: bytes of weights and cache that a device cannot but read once; of the head, its share of the vocabulary.
    """

    batch: int
    tensor: int
    shape: passes.Shape
    cache: str | None
    read: int


def sampling(config: Config, topology: Topology, devices: Sequence[jax.Device], batch_per_copy: int,
             tensor: int, rule: Rule = Rule()) -> tuple[Sampling, Program]:
    """The last step of decoding one token per pass, where the cache is full, in the training's compute type."""
    model, dtype = config.model, jnp.dtype(config.train.compute_dtype)
    mesh = sharding.inference_mesh(model, tensor, devices)
    batch, family = batch_per_copy * (len(devices) // tensor), families.get(config)
    plan = family.plan(jax.random.key(0), config, 1, model.length, families.alpha_0_of(config, None),
                       family.policies[-1])
    sampler = family.sampler(config)
    plan = plan.rows(np.zeros(batch, int))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # shapes depend on the platform and on the batch
        run = passes.schedule(plan, sampler, row=passes.row_cost(model))[-1]
        shape, weights = run.shape, abstract_weights(model, dtype, mesh)
        state = jax.eval_shape(lambda weights: loop.grow(loop.start(weights, model, sampler, plan), shape), weights)

    def everywhere(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P()))

    def rows(x: Any, *axes: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P(sharding.BATCH, *axes)))

    def split(x: Any, axes: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, kv.spec(axes)))

    state = dataclasses.replace(state, tokens=rows(state.tokens), positions=rows(state.positions),
                                cache=state.cache and state.cache.map(split))
    uniforms: Any = rows(jax.ShapeDtypeStruct((batch, model.length, 2), jnp.float32))
    begun = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = loop.decode_run.lower(weights, state, jax.tree.map(everywhere, run.steps), loop.Draw(uniforms, rule),
                                        model, sampler, shape)
    memory = {"weights": _held((weights.blocks, weights.head)), "embedding": _held(weights.embedding),
              "cache": _held(state.cache),
              "tokens": _held((state.tokens, state.positions, uniforms))}
    read = memory["weights"] + memory["cache"]
    step = Sampling(batch, tensor, shape, state.cache and state.cache.backend.name, read)
    return step, _compiled(lowered, memory, topology,
                           sum(flops.sampling_step(model, batch, *shape).values()), begun, hlo.turn)


def _compiled(lowered: jax.stages.Lowered, memory: dict[str, int], topology: Topology, model_flops: float,
              begun: float, cost: Callable[[str], hlo.Cost] = hlo.cost) -> Program:
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        asked, available = _refused(str(error))
        failure = _on_chip(str(error)) if asked is None else None
        return Program(memory, None if failure else False, failure, asked, available, model_flops, None, [],
                       time.perf_counter() - begun)
    seconds = time.perf_counter() - begun
    found, text = compiled.memory_analysis(), compiled.as_text()
    assert found is not None and text is not None  # JAX's own types allow it
    # The state is donated: what comes out lies where it came in.
    extra = found.output_size_in_bytes - found.alias_size_in_bytes
    memory = {**memory, "temporaries": found.temp_size_in_bytes + max(0, extra),
              "program": found.generated_code_size_in_bytes}
    room = topology.chip.memory / topology.chip.devices
    fits = topology.chip.platform == "tpu" or sum(memory.values()) <= room
    return Program(memory, fits, None, None, None, model_flops, cost(text), hlo.unbounded(text), seconds)


def _refused(message: str) -> tuple[int | None, int | None]:
    """Bytes that the compiler wanted and had, from "Used 37.00G of 15.75G hbm" or "temporaries (310.71G) exceeds
    available HBM (15.75G)"."""
    found = (re.search(r"Used ([\d.]+)([KMG]?) of ([\d.]+)([KMG]?) hbm", message)
             or re.search(r"\(([\d.]+)([KMG]?)\) exceeds available HBM \(([\d.]+)([KMG]?)\)", message))
    if found is None:
        return None, None
    return int(float(found[1]) * _UNITS[found[2]]), int(float(found[3]) * _UNITS[found[4]])


def _on_chip(message: str) -> str | None:
    """The compiler's words in one line, where a kernel wanted more of a TPU's own memory (vmem, smem) than there is."""
    return " ".join(message.split()) if re.search(r"space[ =][vs]mem\b", message) else None


def _held(tree: Any) -> int:
    """Bytes of a tree's arrays that one device holds."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
