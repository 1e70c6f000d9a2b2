"""Devices that are not here: a slice of TPUs as libtpu describes it, or hosts with GPUs as XLA's plugin for CUDA does.

Programs for them compile on any machine, but cannot run.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import jax

from eso_jax import xla
from eso_jax.chips import Topology
from eso_jax.errors import EsoError, require

# libtpu reads these as it loads: without them it asks the cloud's metadata server what it is part of, and lets in one
# process at a time.
_FOR_LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
               "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
_FOR_CUDA = {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}  # no driver is looked for


def prepare(topology: Topology) -> None:
    """Settings of JAX for compiling for a slice, to be made before anything else uses JAX.

    What runs here (drawing a decoding plan) runs on the CPU. The cache of compiled programs is off: what was compiled
    for devices that are not there cannot be read back from it.
    """
    tpu = topology.chip.platform == "tpu"
    for variable, value in (_FOR_LIBTPU if tpu else _FOR_CUDA).items():
        os.environ.setdefault(variable, value)
    if not tpu:
        xla.add_flag("--xla_gpu_autotune_level=0")  # no kernel is timed on a GPU that is not there
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)


def devices(topology: Topology, target_config: str | None = None) -> Sequence[jax.Device]:
    """The devices of a slice, to make a mesh of; after `prepare`.

    Args:
      target_config: of GPUs, a file with XLA's description of one; None: ours, of those of the Hopper generation.

    Raises:
      EsoError: what describes the devices is missing, or knows no such slice.
    """
    from jax.experimental import topologies

    tpu = topology.chip.platform == "tpu"
    options: dict[str, Any] = {}
    if tpu:
        require(importlib.util.find_spec("libtpu") is not None, "--topology", topology.name,
                "libtpu, which compiles for TPUs, is not installed: pip install -e '.[tpu]' (it needs no TPU)")
        name = topology.name
        if topology.kind == "v4":
            options["chip_config_name"] = "megacore"  # or each of its two cores would be a device
        if topology.shape == (1, 1):
            options["chips_per_host_bounds"] = (1, 1, 1)
    else:
        plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
        require(any(importlib.util.find_spec(plugin) for plugin in plugins), "--topology", topology.name,
                "JAX's plugin for CUDA, which compiles for GPUs, is not installed: pip install -e '.[cuda]'")
        hosts, gpus = topology.shape if len(topology.shape) == 2 else (1, topology.shape[0])
        name, options = topology.kind, {"topology": f"1x{hosts}x{gpus}",
                                        "target_config": _description(topology, target_config)}
    try:
        return topologies.get_topology_desc(platform=topology.chip.platform, topology_name=name, **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError) as error:
        raise EsoError(f"--topology = {topology.name!r}: no such slice ({' '.join(str(error).split())[:200]})"
                       ) from error


def _description(topology: Topology, target_config: str | None) -> str:
    """XLA's description of a GPU."""
    if target_config is None and topology.kind in ("h100", "h200"):  # one processor, with other memory
        chip, text = topology.chip, (Path(__file__).parent / "hopper.txtpb").read_text("utf-8")
        return Template(text).substitute(name=chip.kinds[0], memory=int(chip.memory), bandwidth=int(chip.bandwidth))
    require(target_config is not None and Path(target_config).is_file(), "--target-config", target_config,
            "give XLA's description of the GPU, a .txtpb of xla/backends/gpu/target_config/specs in openxla/xla")
    assert target_config is not None
    return Path(target_config).read_text("utf-8")
