"""Attention by cuDNN's fused kernels, on NVIDIA GPUs of the Ampere generation and newer.

They compute causal or full attention, in bfloat16; eso_jax/model/fused.py makes the other patterns of these.

Axes: see there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eso_jax import sharding
from eso_jax.model.backend import Task
from eso_jax.model.fused import Fused
from eso_jax.model.masks import Pattern, TwoStreams

LARGEST = 128  # head size; Hopper and newer take 256


@dataclass(frozen=True)
class CuDNN(Fused):
    """cuDNN's attention.

    Attributes:
      implementation: "xla" computes the same by the same construction anywhere, for tests.
    """

    implementation: Literal["cudnn", "xla"] = "cudnn"
    name = "cudnn"
    channels = 8

    def refuse(self, task: Task) -> str | None:
        if self.implementation != "xla" and not sharding.on_gpu():
            return "for NVIDIA GPUs"
        pattern = task.pattern
        extra = 2 * pattern.block if isinstance(pattern, TwoStreams) else 0
        if pattern.block not in (None, 1) or isinstance(pattern, Pattern) and pattern.before:
            return f"its kernels have no blocks of {pattern.block}"
        if self.width(task.head_size + extra) > LARGEST:
            return f"heads of {task.head_size} are too large"
        if self.implementation == "xla":
            return None
        if jax.default_backend() != "gpu":
            return "compiles only where the GPU is"
        capability = str(getattr(jax.devices()[0], "compute_capability", ""))
        if not capability.replace(".", "", 1).isdigit() or float(capability) < 8:
            return "for NVIDIA GPUs of compute capability 8.0 and above"
        return None if task.dtype == jnp.bfloat16 else f"computes in bfloat16, not {jnp.dtype(task.dtype).name}"

    def kernel(self, q: Float[Array, "B S H K"], k: Float[Array, "B L H K"], v: Float[Array, "B L H K"],
               pattern: Pattern, length: Int[Array, " B"] | None, scale: float) -> Float[Array, "B S H K"]:
        # Its causal mask begins at the first slot, so the slots that were left out are put back, as queries of zeros.
        skip = k.shape[1] - q.shape[1]
        q = jnp.pad(q, ((0, 0), (skip, 0), (0, 0), (0, 0)))
        lengths = None if length is None else length.astype(jnp.int32)
        out = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=pattern.block == 1,
                                           key_value_seq_lengths=lengths, implementation=self.implementation)
        return out[:, skip:]
