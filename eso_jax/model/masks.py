"""Who sees whom: patterns, which are data, and their truth tables.

A `Pattern` says who sees whom in one stream, a `TwoStreams` in a pass over a noisy and a clean copy of the tokens. Both
are hashable: programs are compiled by them, and whoever computes attention (eso_jax/model/attention.py) can ask them
what they are. A `View` is a pattern with its numbers per row.

Indices are slots along the order (in training, natural positions for AR, MDLM and BD3-LM). The functions take integer
arrays that broadcast against each other and say whether the query attends to the key. Their truth tables have a row per
query and a column per key, four slots each.

Families:
  AR                     CAUSAL
  MDLM                   EVERYONE
  Eso-LM (B) diffusion   CAUSAL, along an order with the masks last
  Eso-LM (A) diffusion   PREFIX
  two streams            a clean row sees clean keys by `blocks_up_to` (Eso-LM (A): `prefix`);
                         a noisy row sees clean keys by `blocks_before`, and noisy keys by `own_block`;
                         clean rows never see noisy keys. Eso-LM has blocks of one token, BD3-LM of L'.
  all steps of a plan    `OwnSteps`, for Eso-LM (B): two streams whose blocks are the plan's steps, causal within each
  any token next         `LONE`, for Eso-LM (B): each mask as if it were decoded next
  drafts                 `Drafts`, for Eso-LM (B): a pass that verifies drafts and makes new ones

Axes: B batch, S query slots, L key slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int, Shaped


@dataclass(frozen=True)
class Pattern:
    """Who sees whom in one stream.

    Attributes:
      block: slots in a block; a query sees its own block and the blocks before. 1: causal. None: everyone.
      prefix: all queries see the first `clean` slots of a row.
      before: a query does not see its own block, only those before.
    """

    block: int | None = 1
    prefix: bool = False
    before: bool = False

    def __call__(self, query: Int[Array, "*#s"], key: Int[Array, "*#s"],
                 clean: Int[Array, "..."] | int = 0) -> Bool[Array, "..."]:
        """Whether a query sees a key; the arguments broadcast. `clean` is used if there is a prefix."""
        if self.block is None:
            return everyone(query, key)
        if self.before:
            return blocks_before(query, key, self.block)
        return prefix(query, key, clean, self.block) if self.prefix else blocks_up_to(query, key, self.block)

    @property
    def ordered(self) -> bool:
        """Whether no query sees a block after its own. False for subclasses that do not override it."""
        return type(self) is Pattern and self.block is not None and not self.prefix


EVERYONE, CAUSAL, PREFIX = Pattern(None), Pattern(), Pattern(prefix=True)


@dataclass(frozen=True)
class TwoStreams:
    """Who sees whom in a pass over [noisy copy, clean copy], L slots each. See the top of this file.

    Attributes:
      block: slots in a block.
      prefix: all clean slots see the first `clean` ones of a row.
      skip: how many of the first noisy slots are left out of the pass; a multiple of `block`.
    """

    block: int = 1
    prefix: bool = False
    skip: int = 0

    def length(self, slots: int) -> int:
        """L, of a pass over `slots` slots in all."""
        return (slots + self.skip) // 2

    def split(self, x: Shaped[Array, "B S *s"]) -> tuple[Shaped[Array, "B _ *s"], Shaped[Array, "B _ *s"]]:
        """(the part of the noisy copy [B, L - skip, ...], that of the clean one [B, L, ...])."""
        noisy = x.shape[1] - self.length(x.shape[1])
        return x[:, :noisy], x[:, noisy:]

    @property
    def clean(self) -> Pattern:
        """Clean queries and clean keys."""
        return Pattern(self.block, self.prefix)

    @property
    def noisy(self) -> Pattern:
        """Noisy queries and clean keys. They also see the noisy keys of their own block."""
        return Pattern(self.block, before=True)


@struct.dataclass
class View:
    """Who sees whom in the rows of a batch.

    Attributes:
      pattern: static.
      clean: int [B] or [1], the number of slots in the pattern's prefix; None if the pattern has none. For `OwnSteps`,
        one for each query: int [B or 1, S].
      length: int [B] or [1], at least 1: no query sees the slots from here on. None: all slots are visible.
    """

    pattern: Pattern | TwoStreams = struct.field(pytree_node=False)
    clean: Int[Array, "..."] | None = None  # other shapes only while attention is tiled
    length: Int[Array, "..."] | None = None

    def table(self, pattern: Pattern, queries: Int[Array, "#B S"], keys: Int[Array, " L"]) -> Bool[Array, "_ S L"]:
        """The truth tables of a pattern, [B, S, L], or [1, S, L] if all rows have the same."""
        query, key, clean = queries[:, :, None], keys[None, None], self.clean
        if clean is not None:
            clean = clean[:, None, None] if clean.ndim == 1 else clean[:, queries[0], None]
        sees = pattern(query, key, 0 if clean is None else clean)
        return sees if self.length is None else sees & (key < self.length[:, None, None])


def everyone(query: Int[Array, "*#s"], key: Int[Array, "*#s"]) -> Bool[Array, "*s"]:
    """Every query sees every key.

        1 1 1 1
        1 1 1 1
        1 1 1 1
        1 1 1 1
    """
    return (query >= 0) & (key >= 0)


def causal(query: Int[Array, "*#s"], key: Int[Array, "*#s"]) -> Bool[Array, "*s"]:
    """A query sees itself and the slots before it.

        1 0 0 0
        1 1 0 0
        1 1 1 0
        1 1 1 1
    """
    return key <= query


def prefix(query: Int[Array, "*#s"], key: Int[Array, "*#s"], clean: Int[Array, "*#s"] | int,
           block: int = 1) -> Bool[Array, "*s"]:
    """All queries see the first `clean` slots; otherwise as `blocks_up_to`. With clean = 2 and block = 1:

        1 1 0 0
        1 1 0 0
        1 1 1 0
        1 1 1 1
    """
    return blocks_up_to(query, key, block) | (key < clean)


def blocks_up_to(query: Int[Array, "*#s"], key: Int[Array, "*#s"], block: int) -> Bool[Array, "*s"]:
    """A query sees its own block of `block` slots and the blocks before. With block = 2 (block = 1 is causal):

        1 1 0 0
        1 1 0 0
        1 1 1 1
        1 1 1 1
    """
    return key // block <= query // block


def blocks_before(query: Int[Array, "*#s"], key: Int[Array, "*#s"], block: int) -> Bool[Array, "*s"]:
    """A query sees the blocks before its own. With block = 2, and with block = 1:

        0 0 0 0     0 0 0 0
        0 0 0 0     1 0 0 0
        1 1 0 0     1 1 0 0
        1 1 0 0     1 1 1 0
    """
    return key // block < query // block


def own_block(query: Int[Array, "*#s"], key: Int[Array, "*#s"], block: int) -> Bool[Array, "*s"]:
    """A query sees its own block. With block = 2, and with block = 1:

        1 1 0 0     1 0 0 0
        1 1 0 0     0 1 0 0
        0 0 1 1     0 0 1 0
        0 0 1 1     0 0 0 1
    """
    return key // block == query // block


@dataclass(frozen=True)
class OwnSteps(Pattern):
    """Who sees whom in one pass over [noisy copy, clean copy], `length` slots each, that gives what a sampler with an
    exact cache sees in all steps of a plan: a clean row sees clean keys up to itself; a noisy row sees the clean keys
    before its step, of which there are `clean`, and the noisy keys of its step up to itself. Of steps of 1 and 2 slots:

        1 0 0   0 0 0
        0 1 0   1 0 0
        0 1 1   1 0 0

        0 0 0   1 0 0
        0 0 0   1 1 0
        0 0 0   1 1 1
    """

    length: int = 0

    def __call__(self, query: Int[Array, "*#s"], key: Int[Array, "*#s"],
                 clean: Int[Array, "..."] | int = 0) -> Bool[Array, "..."]:
        slot, noisy = key % self.length, key < self.length
        return causal(query % self.length, slot) & (noisy == ((query < self.length) & (slot >= clean)))


@dataclass(frozen=True)
class Drafts(Pattern):
    """Who sees whom in a pass that verifies drafts (eso_jax/decoding/speculative.py), of a row that has decoded or
    drafted `clean` tokens. With k = `drafts`, the window has k + 1 clean slots, the last of the `clean` ones (or the
    first, if there are fewer), then 2k + 1 masks. All queries see the slots before the window. A clean slot sees clean
    ones up to itself. Mask m < k sees itself and the clean tokens except the last k - m. Mask m >= k sees itself, all
    clean tokens, and the masks k, ..., m - 1. With k = 1:

        1 0   0 0 0
        1 1   0 0 0

        1 0   1 0 0
        1 1   0 1 0
        1 1   0 1 1
    """

    drafts: int = 1

    def __call__(self, query: Int[Array, "*#s"], key: Int[Array, "*#s"],
                 clean: Int[Array, "..."] | int = 0) -> Bool[Array, "..."]:
        first = jnp.maximum(clean, self.drafts + 1)  # mask
        mask = query - first
        own = (key >= first + self.drafts) | (key == query)
        return causal(query, key) & ((mask < 0) | (key < clean - jnp.maximum(self.drafts - mask, 0)) | own)


@dataclass(frozen=True)
class Lone(Pattern):
    """A query among the first `clean` slots sees the slots up to itself; a later one sees these first slots and itself.
    With clean = 2:

        1 0 0 0
        1 1 0 0
        1 1 1 0
        1 1 0 1
    """

    def __call__(self, query: Int[Array, "*#s"], key: Int[Array, "*#s"],
                 clean: Int[Array, "..."] | int = 0) -> Bool[Array, "..."]:
        return causal(query, key) & ((key < clean) | (key == query))


LONE = Lone()
