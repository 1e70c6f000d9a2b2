"""What to change when a training step does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from eso_jax import chips, sharding
from eso_jax.aot import programs, target
from eso_jax.chips import Topology
from eso_jax.config import Config
from eso_jax.errors import EsoError

_REMATS = ("none", "dots", "full")


class Try(NamedTuple):
    """A config that may fit: the one asked for, with some fields overridden, perhaps on a larger slice."""

    overrides: tuple[str, ...]
    config: Config
    topology: Topology
    devices: Sequence[jax.Device]


def first_that_fits(config: Config, topology: Topology, devices: Sequence[jax.Device],
                    say: Callable[[str], None]) -> tuple[Try, programs.Program] | None:
    """The first change to a config that makes it fit, and its program; None if there is none.

    In this order: more rematerialization, smaller micro-batches, more of mesh.fsdp with these, larger slices of the
    same chips. What cannot fit, whatever the batch, is not compiled.

    Args:
      say: told of each try.
    """
    for attempt in _tries(config, topology, devices):
        chip = attempt.topology.chip
        if smallest(attempt.config, attempt.devices) < chip.memory / chip.devices:
            say(f"trying {' '.join(attempt.overrides)} on {attempt.topology.name}")
            program = programs.training(attempt.config, attempt.topology, attempt.devices)
            if program.fits:
                return attempt, program
    return None


def smallest(config: Config, devices: Sequence[jax.Device]) -> int:
    """Bytes of state and gradients on one device, the same whatever the batch."""
    state = programs.state_bytes(config, sharding.mesh(config.mesh, devices))
    return sum(state.values()) + state["parameters"]


def _tries(config: Config, topology: Topology, devices: Sequence[jax.Device]) -> Iterator[Try]:
    def attempt(where: Topology, on: Sequence[jax.Device], *overrides: str) -> list[Try]:
        """One try; none where the batch or the model does not divide so."""
        try:
            changed = config.override(*overrides)
            sharding.check(changed, sharding.mesh(changed.mesh, on))
        except EsoError:
            return []
        return [Try(overrides, changed, where, on)]

    def micro_batches(where: Topology, on: Sequence[jax.Device], *overrides: str) -> list[Try]:
        """Tries with ever smaller micro-batches, down to a row of each loss on a device."""
        counts = [config.train.accumulate * 2**n for n in range(1, config.train.batch_size.bit_length())]
        return [one for count in counts for one in attempt(where, on, *overrides, f"train.accumulate={count}")]

    for remat in _REMATS[_REMATS.index(config.train.remat) + 1:]:
        yield from attempt(topology, devices, f"train.remat={remat}")
    full = [] if config.train.remat == "full" else ["train.remat=full"]
    yield from micro_batches(topology, devices, *full)
    shares = [config.mesh.fsdp * 2**n for n in range(1, len(devices).bit_length())]
    for fsdp in shares:
        mesh = (*full, "mesh.data=None", f"mesh.fsdp={fsdp}")
        yield from attempt(topology, devices, *mesh)
        yield from micro_batches(topology, devices, *mesh)[-1:]
    for where in map(chips.topology, chips.ACCELERATOR_TYPES.values()):
        if where.kind == topology.kind and where.devices > len(devices):
            on = target.devices(where)
            mesh = (*full, "mesh.data=None", f"mesh.fsdp={len(on) // config.mesh.tensor}")
            yield from (micro_batches(where, on, *mesh) or attempt(where, on, *mesh))[-1:]
