"""Text to batches of tokens.

corpora     where documents come from, and which split each belongs to
tokenizers  bytes to token ids and back
packing     documents to windows of equal length
pipeline    windows to shuffled, resumable training batches (the only file that needs grain, so not imported here)
bigram      the baseline that every language model should beat
"""

import numpy as np

from eso_jax.config import Config, require
from eso_jax.data.bigram import Bigram
from eso_jax.data.corpora import SPLITS, documents
from eso_jax.data.packing import pack
from eso_jax.data.tokenizers import ByteTokenizer, get_tokenizer

__all__ = ["SPLITS", "Bigram", "ByteTokenizer", "documents", "get_tokenizer", "pack", "windows_of"]


def windows_of(config: Config, split: str, source: str | None = None) -> np.ndarray:
    """The packed windows of one split of a config's data, or of another source: uint16 [windows, model.length].

    Raises:
      EsoError: the source cannot be read or is too short, or the tokenizer does not fit the model.
    """
    tokenizer = get_tokenizer(config.data.tokenizer)
    require(tokenizer.vocab_size == config.model.vocab_size and tokenizer.mask_id == config.model.mask,
            "model.vocab_size", config.model.vocab_size, f"data.tokenizer = {tokenizer.name!r} needs "
            f"{tokenizer.vocab_size}, with mask {tokenizer.mask_id}")
    return pack(documents(source or config.data.source, split), tokenizer, config.model.length)
