"""Planning a run for accelerators that are not here: does it fit, what does it do, how fast could it be?

`eso-jax plan` compiles the training step and a step of the sampler ahead of time for a slice of TPUs (or hosts with
GPUs), and reads from the compiled programs their memory, operations, memory traffic and communication.

  target.py    devices that are not here       programs.py  the two programs, compiled for them
  hlo.py       what a compiled program does    fit.py       what to change when it does not fit
  report.py    the plan in words and in JSON

Operations are counted in eso_jax/flops.py, peaks kept in eso_jax/chips.py.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import jax

from eso_jax import sharding
from eso_jax.aot import fit, programs, report, target
from eso_jax.chips import Topology
from eso_jax.config import Config
from eso_jax.decoding.categorical import Rule


def plan(config: Config, topology: Topology, say: Callable[[str], None], tensor: int = 1, batch_per_copy: int = 16,
         rule: Rule = Rule(), target_config: str | None = None) -> dict[str, Any]:
    """The plan of a run on a slice, as a dict for JSON; if its training does not fit, also that of the first change
    that does.

    Args:
      topology: of chips.topology; after target.prepare.
      say: told what is found, line by line.
      tensor: devices to a copy of the model, when sampling; doubled until that fits.
      batch_per_copy: sequences that each copy decodes together.
      rule: by which it draws tokens.
      target_config: see target.devices.

    Raises:
      EsoError: the slice is unknown, its compiler not installed, or the config does not divide over it.
    """
    devices = target.devices(topology, target_config)
    mesh = sharding.mesh(config.mesh, devices)
    sharding.check(config, mesh)
    cloud = f" ({topology.accelerator_type})" if topology.accelerator_type else ""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    say(f"{topology.name}{cloud}, {len(devices)} devices, {devices[0].device_kind}; mesh {axes}; train.remat="
        f"{config.train.remat}, train.accumulate={config.train.accumulate}")

    result: dict[str, Any] = {"topology": topology.name, "accelerator_type": topology.accelerator_type,
                             "devices": len(devices), "mesh": dict(mesh.shape), "versions": versions()}
    program = programs.training(config, topology, devices)
    result["training"] = report.training(program, config, topology)
    _say_all(say, report.lines("Training", result["training"]))
    if program.fits is False:
        result["instead"] = None
        if better := fit.first_that_fits(config, topology, devices, say):
            change, program = better
            where = "" if change.topology == topology else f"--topology {change.topology.name} "
            result["instead"] = {"topology": change.topology.name, "overrides": change.overrides,
                                "training": report.training(program, change.config, change.topology)}
            _say_all(say, report.lines(f"With {where}{' '.join(change.overrides)}, training",
                                       result["instead"]["training"]))
        else:
            say("nothing that was tried compiles and fits; use larger chips, or more of mesh.tensor")

    while True:
        step, program = programs.sampling(config, topology, devices, batch_per_copy, tensor, rule)
        result["sampling"] = report.sampling(program, step, topology)
        name = f"Sampling, {step.batch} sequences, a copy of the model to {tensor} device{'s' * (tensor > 1)}, a pass"
        _say_all(say, report.lines(name, result["sampling"]))
        if program.fits is not False or len(devices) % (2 * tensor) or config.model.heads % (2 * tensor):
            return result
        tensor *= 2


def versions() -> dict[str, str]:
    """The versions of what compiles."""
    libtpu = {"libtpu": importlib.metadata.version("libtpu")} if importlib.util.find_spec("libtpu") else {}
    return {"jax": jax.__version__, **libtpu}


def _say_all(say: Callable[[str], None], text: list[str]) -> None:
    for line in text:
        say(line)
