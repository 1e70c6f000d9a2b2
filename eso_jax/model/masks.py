"""Who sees whom: one function of (query, key) per pattern.

Indices are slots along the order (natural positions for AR, MDLM and BD3-LM). A function takes integer arrays that
broadcast against each other and says whether the query attends to the key. The truth tables have a row per query and a
column per key, four slots each.

Families:
  AR                     causal
  MDLM                   everyone
  Eso-LM (B) diffusion   causal, along an order with the masks last
  Eso-LM (A) diffusion   prefix
  two streams            a clean row sees clean keys by `blocks_up_to` (Eso-LM (A): `prefix`);
                         a noisy row sees clean keys by `blocks_before`, and noisy keys by `own_block`;
                         clean rows never see noisy keys. Eso-LM has blocks of one token, BD3-LM of L'.
"""

from __future__ import annotations

from jaxtyping import Array, Bool, Int


def everyone(query: Int[Array, "*#s"], key: Int[Array, "*#s"]) -> Bool[Array, "*s"]:
    """Every query sees every key.

        1 1 1 1
        1 1 1 1
        1 1 1 1
        1 1 1 1
    """
    return (query >= 0) & (key >= 0)


def causal(query: Int[Array, "*#s"], key: Int[Array, "*#s"]) -> Bool[Array, "*s"]:
    """A query sees itself and what comes before it.

        1 0 0 0
        1 1 0 0
        1 1 1 0
        1 1 1 1
    """
    return key <= query


def prefix(query: Int[Array, "*#s"], key: Int[Array, "*#s"], clean: Int[Array, "*#s"] | int) -> Bool[Array, "*s"]:
    """The first `clean` slots see each other; the rest is causal. With clean = 2:

        1 1 0 0
        1 1 0 0
        1 1 1 0
        1 1 1 1
    """
    return (key <= query) | (key < clean)


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
