"""Attention by a fused kernel for one-stream patterns: how the other patterns are made of such calls.

A prefix takes two calls. A query of the prefix sees what is in it, any other what its pattern says; no query needs
both, so that nothing has to be merged.

Two streams take two calls as well, one for each copy. The clean copy is an ordinary stream. A noisy query sees the
clean keys of the blocks before its own, and the noisy keys of its own block, n of them. The latter are no keys of the
kernel's: their scores and values go in by further channels of the head,

  keys     n null keys, then the clean keys but the last block: "blocks up to mine" are now the null keys and the clean
           blocks before mine. A null key is 0, with a 1 in its own channel, where clean keys have 0
  queries  have their score with each key of their own block in these channels, so that the null keys get these scores
  values   a null value is 0, with a 1 in its own channel, where clean values have 0: the kernel's output has there the
           softmax weights of the own block's keys, which `two_streams` multiplies with their values

and a score is given in two parts, so that it has the precision of two numbers of the compute type. Both outputs and
gradients are those of the plain definition, by ordinary differentiation.

Axes: B batch, S query slots, L key slots, H heads, K head size, n slots in a block.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from eso_jax.model.backend import Backend
from eso_jax.model.masks import EVERYONE, Pattern, TwoStreams, View


@dataclass(frozen=True)
class Fused(Backend):
    """A backend with a kernel for one stream."""

    channels: ClassVar[int]  # the head size must be a multiple of this many

    @abstractmethod
    def kernel(self, q: Float[Array, "B S H K"], k: Float[Array, "B L H K"], v: Float[Array, "B L H K"],
               pattern: Pattern, length: Int[Array, " B"] | None, scale: float) -> Float[Array, "B S H K"]:
        """Softmax attention, with scores q.k x scale, of the last S of L slots.

        Args:
          pattern: everyone, or blocks; without a prefix.
          length: no query sees the slots from here on; None: all slots are visible.
        """

    def one_stream(self, q: Float[Array, "B L H K"], k: Float[Array, "B L H K"], v: Float[Array, "B L H K"],
                   view: View) -> Float[Array, "B L H K"]:
        assert isinstance(view.pattern, Pattern)
        return self._stream(q, k, v, view, view.pattern)

    def two_streams(self, q: Float[Array, "B S H K"], k: Float[Array, "B S H K"], v: Float[Array, "B S H K"],
                    view: View) -> Float[Array, "B S H K"]:
        pattern = view.pattern
        assert isinstance(pattern, TwoStreams)
        (q_noisy, q_clean), (k_noisy, k_clean), (v_noisy, v_clean) = (pattern.split(x) for x in (q, k, v))
        noisy = self._noisy(q_noisy, (k_noisy, v_noisy), (k_clean, v_clean), view, pattern.block)
        return jnp.concatenate([noisy, self._stream(q_clean, k_clean, v_clean, view, pattern.clean)], axis=1)

    def _stream(self, q: Array, k: Array, v: Array, view: View, pattern: Pattern) -> Float[Array, "B L H K"]:
        """Any pattern of one stream."""
        batch, length, _, size = q.shape
        lengths = None if view.length is None else jnp.broadcast_to(view.length, batch)
        q, k, v = (self._widen(x) for x in (q, k, v))
        out = self.kernel(q, k, v, Pattern(pattern.block), lengths, size**-0.5)
        if pattern.prefix:
            assert view.clean is not None
            clean = jnp.broadcast_to(view.clean, batch)
            among_clean = self.kernel(q, k, v, EVERYONE, jnp.maximum(clean, 1), size**-0.5)
            out = jnp.where((jnp.arange(length)[None] < clean[:, None])[..., None, None], among_clean, out)
        return out[..., :size]

    def _noisy(self, q: Array, noisy: tuple[Array, Array], clean: tuple[Array, Array], view: View,
               block: int) -> Float[Array, "B S H K"]:
        """The output of the noisy copy; see the top of this file."""
        batch, slots, heads, size = q.shape
        lengths = None if view.length is None else jnp.broadcast_to(view.length, batch) + block
        (k_noisy, v_noisy), (k, v) = noisy, clean
        in_blocks = (batch, slots // block, block, heads, size)
        own_scores = jnp.einsum("bjqhk,bjnhk->bjqhn", q.reshape(in_blocks), k_noisy.reshape(in_blocks),
                                precision="highest", preferred_element_type=jnp.float32)
        own_scores = own_scores.reshape(batch, slots, heads, block)
        high = own_scores.astype(q.dtype)
        low = (own_scores - high.astype(own_scores.dtype)).astype(q.dtype)
        marks = jnp.broadcast_to(jnp.eye(block, dtype=q.dtype)[None, :, None], (batch, block, heads, block))

        def behind_null(x: Array, *channels: Array) -> Array:
            """Null keys or values with a 1 in their channels, then all but the last block of x."""
            null = jnp.concatenate([jnp.zeros((batch, block, heads, size), x.dtype), *channels], axis=-1)
            earlier = jnp.pad(x[:, :-block], [(0, 0)] * 3 + [(0, null.shape[-1] - size)])
            return self._widen(jnp.concatenate([null, earlier], axis=1), size + 2 * block)

        out = self.kernel(self._widen(jnp.concatenate([q, high, low], axis=-1)), behind_null(k, marks, marks),
                          behind_null(v, marks), Pattern(block), lengths, size**-0.5)
        weight = out[..., size:size + block].reshape(batch, -1, block, heads, block)
        of_own_block = jnp.einsum("bjqhn,bjnhk->bjqhk", weight, v_noisy.reshape(in_blocks), precision="highest",
                                  preferred_element_type=jnp.float32)
        return (out[..., :size] + of_own_block.reshape(q.shape)).astype(q.dtype)

    def _widen(self, x: Float[Array, "B S H K"], least: int = 0) -> Float[Array, "B S H _"]:
        """x padded with channels of zeros, to a head size that the kernel takes."""
        return jnp.pad(x, [(0, 0)] * 3 + [(0, self.width(max(x.shape[-1], least)) - x.shape[-1])])

    def width(self, size: int) -> int:
        """`size` rounded up to a head size that the kernel takes."""
        return -(-size // self.channels) * self.channels
