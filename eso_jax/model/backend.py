"""The interface of an attention backend: a way to compute attention, for some patterns on some platforms.

Scores and softmax are float32 whatever the compute type.

Axes: B batch, S slots of a pass, L length, H heads, K head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Array, Float

from eso_jax.model.masks import Pattern, TwoStreams, View


class Task(NamedTuple):
    """An attention that is to be computed.

    Attributes:
      pattern: who sees whom.
      length: L, the keys of a row.
      head_size: K.
      dtype: of queries, keys and values.
    """

    pattern: Pattern | TwoStreams
    length: int
    head_size: int
    dtype: Any


@dataclass(frozen=True)
class Backend(ABC):
    """A way to compute attention.

    Attributes:
      name: for people.
    """

    name: ClassVar[str]

    @abstractmethod
    def refuse(self, task: Task) -> str | None:
        """Why it cannot compute a task on the platform in use, for a message; None: it can."""

    @abstractmethod
    def one_stream(self, q: Float[Array, "B L H K"], k: Float[Array, "B L H K"], v: Float[Array, "B L H K"],
                   view: View) -> Float[Array, "B L H K"]:
        """Attention within one copy of the tokens."""

    @abstractmethod
    def two_streams(self, q: Float[Array, "B S H K"], k: Float[Array, "B S H K"], v: Float[Array, "B S H K"],
                    view: View) -> Float[Array, "B S H K"]:
        """Attention of [noisy copy, clean copy]; see masks.TwoStreams."""
