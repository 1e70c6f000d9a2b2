"""An imported model's logits against stored ones."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from eso_jax import families
from eso_jax.config import Config
from eso_jax.decoding.order import check_permutations
from eso_jax.errors import EsoError, require
from eso_jax.model import transformer
from eso_jax.model.masks import View
from eso_jax.model.params import Params, fold

MOST = 0.05  # of the largest logit: bfloat16 products stay well below it, another model does not


def worst_difference(config: Config, params: Params, path: Path) -> float:
    """The largest difference between our logits and stored ones, those of the mask left out.

    Args:
      path: an .npz of arrays, all along the order: `tokens` int [B, L], the input of the denoiser, masks included; or
        int [B, 2L] for a pass of two streams (Eso-LM's sequential pass, BD3-LM), the clean one second; `logits` float
        [B, L, V]; and `order` int [B, L], natural positions, where it isn't the natural order.

    Raises:
      EsoError: the file has another form, or the logits differ so much that they are another model's.
    """
    try:
        with np.load(path) as arrays:
            tokens, logits = arrays["tokens"], arrays["logits"]
            batch, length, _ = logits.shape
            order = arrays["order"] if "order" in arrays else np.tile(np.arange(length), (batch, 1))
    except Exception as error:  # numpy's and zipfile's own, of many kinds
        raise EsoError(f"--check = {str(path)!r}: not a readable .npz of tokens [B, L] and logits [B, L, V] "
                       f"({type(error).__name__})") from error
    two_streams = tokens.shape == (batch, 2 * length)
    fits = (two_streams or tokens.shape == (batch, length)) and logits.shape[2] == config.model.vocab_size
    fits = fits and np.issubdtype(tokens.dtype, np.integer) and tokens.min() >= 0 and tokens.max() < logits.shape[2]
    require(bool(fits), "--check", str(path), f"tokens {tokens.shape} and logits {logits.shape} must be ids [B, L] or "
            f"[B, 2L] and float [B, L, {config.model.vocab_size}]")
    check_permutations(order, length)

    weights = fold(config.model, params)
    family, clean = families.get(config), jnp.asarray((tokens[:, :length] != config.model.mask).sum(1))
    view = View(family.two_streams(config) if two_streams else family.pattern(config), clean)
    hidden, _ = transformer.trunk(weights, jnp.asarray(tokens), jnp.asarray(np.tile(order, 1 + two_streams)), view)
    ours = transformer.head(weights, hidden[:, :length], config.model.mask)
    difference = jnp.abs(ours - logits).at[..., config.model.mask].set(0)
    worst, largest = float(difference.max()), float(np.abs(np.delete(logits, config.model.mask, -1)).max())
    require(worst <= MOST * largest, "--check", str(path), f"logits differ by {worst:.3g}, where the largest is "
            f"{largest:.3g}: they are of another model, family or pass")
    return worst
