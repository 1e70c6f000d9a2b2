"""Accelerators: their published peaks, and the names of their slices.

A peak is what the vendor's documentation states for one chip; no program reaches it. Figures that the vendor states
with sparsity are halved. For a chip that is not listed there is no MFU and no plan: add its line, with its source.

A slice of TPUs has two names: libtpu's topology, kind:AxBxC in chips ("v5p:8x8x8"), and the cloud's accelerator type,
which counts TensorCores for v4 and v5p ("v5p-1024") and chips for v5e and v6e ("v5litepod-8", "v6e-256"). A host with
eight GPUs is "h100:8", four such hosts are "h100:4x8".
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from eso_jax.errors import EsoError, require

GIB = 2.0**30


@dataclass(frozen=True)
class Chip:
    """One chip's published peaks.

    Attributes:
      kinds: what jax.Device.device_kind says of it.
      flops: dense bfloat16 operations per second.
      memory: bytes.
      bandwidth: of its memory, bytes per second.
      network: bytes per second that it sends over all its links to its neighbours (half the two-way figure).
      devices: that JAX sees in one chip; each has an equal part of it.
      platform: tpu or cuda.
    """

    kinds: tuple[str, ...]
    flops: float
    memory: float
    bandwidth: float
    network: float
    devices: int = 1
    platform: str = "tpu"


CHIPS: dict[str, Chip] = {
    # docs.cloud.google.com/tpu/docs/v4; the links: 2,400 Gb/s, "Introducing Cloud TPU v5p", Google Cloud blog, Dec 2023
    "v4": Chip(("TPU v4",), 275e12, 32 * GIB, 1200e9, 300e9),
    # docs.cloud.google.com/tpu/docs/v5e
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 200e9),
    # docs.cloud.google.com/tpu/docs/v5p
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95 * GIB, 2765e9, 600e9),
    # docs.cloud.google.com/tpu/docs/v6e
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1638e9, 400e9),
    # docs.cloud.google.com/tpu/docs/tpu7x
    "tpu7x": Chip(("TPU7x",), 2307e12, 192 * GIB, 7380e9, 600e9, devices=2),
    # NVIDIA A100 Tensor Core GPU datasheet, the SXM parts
    "a100-40gb": Chip(("NVIDIA A100-SXM4-40GB",), 312e12, 40e9, 1555e9, 300e9, platform="cuda"),
    "a100": Chip(("NVIDIA A100-SXM4-80GB",), 312e12, 80e9, 2039e9, 300e9, platform="cuda"),
    # NVIDIA H100 Tensor Core GPU datasheet, the SXM part (1,979 TFLOPS with sparsity)
    "h100": Chip(("NVIDIA H100 80GB HBM3",), 989.5e12, 80e9, 3350e9, 450e9, platform="cuda"),
    # NVIDIA H200 Tensor Core GPU datasheet, the SXM part (1,979 TFLOPS with sparsity)
    "h200": Chip(("NVIDIA H200",), 989.5e12, 141e9, 4800e9, 450e9, platform="cuda"),
    # NVIDIA HGX B200: 36 PFLOPS with sparsity, 1.4 TB and 14.4 TB/s of NVLink for eight; 8 TB/s of memory each
    "b200": Chip(("NVIDIA B200",), 2250e12, 180e9, 8000e9, 900e9, platform="cuda"),
    # NVIDIA L4 Tensor Core GPU datasheet (242 TFLOPS with sparsity; PCIe of 64 GB/s, both ways)
    "l4": Chip(("NVIDIA L4",), 121e12, 24e9, 300e9, 32e9, platform="cuda"),
}

# The cloud's accelerator types, and the shape that each gets where none is asked for.
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8", 1024: "8x8x8",
          2048: "8x8x16", 4096: "8x16x16"}
_LARGEST = {8192: "16x16x16", 12288: "16x16x24"}
ACCELERATOR_TYPES: dict[str, str] = {
    f"{prefix}-{count}": f"{kind}:{shape}"
    for prefix, kind, shapes in (("v4", "v4", _CUBES), ("v5litepod", "v5e", _FLAT), ("v5p", "v5p", _CUBES | _LARGEST),
                                 ("v6e", "v6e", _FLAT)) for count, shape in shapes.items()}


@dataclass(frozen=True)
class Topology:
    """A slice: chips of one kind in a grid of `shape`."""

    kind: str
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def name(self) -> str:
        """libtpu's name."""
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def accelerator_type(self) -> str | None:
        """The cloud's name, where this is the shape that it stands for."""
        return next((cloud for cloud, name in ACCELERATOR_TYPES.items() if name == self.name), None)

    @property
    def devices(self) -> int:
        """Devices that JAX sees."""
        return math.prod(self.shape) * self.chip.devices


def topology(name: str) -> Topology:
    """The slice with this name, a topology or an accelerator type.

    Raises:
      EsoError: for a name that is neither.
    """
    match = re.fullmatch(r"([a-z0-9-]+):(\d+(?:x\d+)*)", ACCELERATOR_TYPES.get(name.lower(), name.lower()))
    if match is None:
        prefix = name.lower().rpartition("-")[0]
        examples = [cloud for cloud in ACCELERATOR_TYPES if cloud.rpartition("-")[0] == prefix] or \
            ["v5p:8x8x8", "v5p-1024", "v5litepod-8", "v6e:16x16", "h100:8"]
        raise EsoError(f"--topology = {name!r}: not a slice; give kind:AxBxC, in chips, or an accelerator type, such "
                       f"as {', '.join(examples)}")
    kind, shape = match[1], tuple(map(int, match[2].split("x")))
    require(kind in CHIPS, "--topology", name, f"no such kind; known are {', '.join(CHIPS)}")
    axes = {"tpu": 2 if kind in ("v5e", "v6e") else 3, "cuda": len(shape)}[CHIPS[kind].platform]
    require(len(shape) == axes and min(shape) > 0, "--topology", name,
            f"{kind} comes in {'x'.join('ABC'[:axes])}, such as {kind}:{'x'.join('4' * axes)}")
    require(CHIPS[kind].platform == "tpu" or len(shape) <= 2, "--topology", name,
            f"give {kind}:GPUS, or {kind}:HOSTSxGPUS")
    return Topology(kind, shape)


def of_device(device_kind: str) -> Chip | None:
    """The chip of a `jax.Device.device_kind`; None for one whose peaks are not listed (a CPU, for example)."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.kinds), None)
