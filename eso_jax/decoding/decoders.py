"""Placeholder of what w-spec brings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from flax import struct

from eso_jax.config import ModelConfig
from eso_jax.decoding import loop
from eso_jax.decoding.passes import Sampler
from eso_jax.model.params import Weights


@struct.dataclass
class Progress:
    state: loop.State
    at: Any
    clean: Any
    passes: Any
    step: Any
    memory: Any = None


class Decoder(ABC):
    name: str
    most: int
    law: str

    @abstractmethod
    def one_pass(self, weights: Weights, progress: Progress, source: loop.Draw, end: Any, config: ModelConfig,
                 sampler: Sampler) -> Progress: ...
