"""What a page needs of a generation besides its tokens and its record, so that it needs no model.

Axes: N samples, S steps, M different tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eso_jax import families
from eso_jax.config import Config
from eso_jax.decoding.plan import Plan

if TYPE_CHECKING:
    from eso_jax.data.tokenizers import Tokenizer
    from eso_jax.decoding.decoders import Decoder
    from eso_jax.decoding.record import Record


class Caption(NamedTuple):
    """Arrays as they are in the .npz of `eso-jax sample --record`.

    Attributes:
      label: str, the family's.
      window: int [S, 2] or [N, S, 2], the first slot that each step's pass computes and the slot after the last;
        earlier slots come from the cache. A draft and a mask of the same slot count as two.
      piece_ids: int [M], every token drawn and every alternative.
      piece_ends: int [M], where the text of each ends in `piece_bytes`; that of a separator is empty.
      piece_bytes: uint8, their text end to end; nothing where there is no tokenizer.
      separator: int, the token between documents; -1 where there is no tokenizer.
      mask: int, the token of a position that was not decoded.
      decoder: str, the name of the decoder that chose the passes; empty: a plan.
    """

    label: Any
    window: Any
    piece_ids: Any
    piece_ends: Any
    piece_bytes: Any
    separator: Any
    mask: Any
    decoder: Any = np.array("")


def caption(config: Config, plan: Plan, tokens: np.ndarray, record: Record, tokenizer: Tokenizer | None,
            decoder: Decoder | None = None) -> Caption:
    """The caption of a sample, whose passes are the plan's steps."""
    family, ids = families.get(config), np.unique(np.concatenate([tokens.ravel(), record.alternatives.ravel()]))
    pieces = [b"" if tokenizer is None else tokenizer.piece(i) for i in ids.tolist()]
    sampler = family.sampler(config)
    start, stop = sampler.window(plan) if decoder is None else decoder.windows(plan, sampler)
    stop = np.where(plan.tokens_per_step > 0, stop, start)  # a row that is done computes nothing of its own
    return Caption(np.array(family.label), np.stack(np.broadcast_arrays(start, stop), axis=-1), ids,
                   np.cumsum([len(piece) for piece in pieces]), np.frombuffer(b"".join(pieces), np.uint8),
                   np.array(-1 if tokenizer is None else tokenizer.separator_id), np.array(config.model.mask),
                   np.array("" if decoder is None else type(decoder).__name__.lower()))
