"""An oracle in place of the denoiser, and the exact law of what a sampler must then draw.

The oracle knows a joint distribution over sequences so short that all can be listed. Its trunk attends once, evenly
over everything that the sampler lets a slot see, and reads off which token was seen at which position; its logits are
the true log p(this slot's token | those tokens). A sampler driven by it errs only by what it shows, or draws, wrongly.
Which *masks* a slot sees is left free: they tell the oracle nothing.

The law of a sample is known as well. A step draws its tokens independently, each given all tokens of earlier steps:

    law(x) = prod over steps, over slots i of the step, of p(x_i | tokens of earlier steps)

The two meet in nothing but `joint`: the oracle looks conditionals up by what was seen, in float32 under `jit`, while
the law sums axes of the joint away in float64.

Axes: B batch, L length, S slots of a pass, V vocabulary with the mask as its last id, X = V - 1 tokens,
E = V^L states of knowledge (per position: a token, or nothing), K = L V (position, id) pairs, rounded up to even.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from eso_jax import families
from eso_jax.config import Config, ModelConfig
from eso_jax.decoding.passes import Sampler
from eso_jax.model import attention, cache as kv
from eso_jax.model.masks import View
from eso_jax.model.params import Head, Norm, Weights
from eso_jax.model.transformer import MASK_LOGIT


@functools.cache
def joint(tokens: int, length: int) -> np.ndarray:
    """p(x), float64 [X, ..., X] (L axes): random couplings between every two positions.

    In a Markov chain a token hides what lies beyond it, and a sampler could lose sight of that unnoticed. Here each
    token tells about each other one, whatever else is known.
    """
    rng = np.random.default_rng(length)
    x = np.indices((tokens,) * length)
    couplings = rng.normal(scale=1.6 / length ** 0.5, size=(length, length, tokens, tokens))
    p = np.exp(sum(couplings[i, j][x[i], x[j]] for j in range(length) for i in range(j)))
    return p / p.sum()


def law_by_slot(p: np.ndarray, order: np.ndarray, tokens_per_step: np.ndarray) -> list[np.ndarray]:
    """p(x_i | tokens of earlier steps) for each slot i, as arrays that broadcast against p."""
    def marginal(kept: set[int]) -> np.ndarray:
        return p.sum(axis=tuple(set(range(p.ndim)) - kept), keepdims=True)

    factors: list[np.ndarray] = []
    clean: set[int] = set()
    for step in np.split(order, np.cumsum(tokens_per_step)[:-1]):
        factors += [marginal(clean | {int(position)}) / marginal(clean) for position in step]
        clean.update(step.tolist())
    return factors


def law(p: np.ndarray, order: np.ndarray, tokens_per_step: np.ndarray) -> np.ndarray:
    """The law of a sample of this order [L] and these steps, float64 [X, ..., X]."""
    return functools.reduce(np.multiply, law_by_slot(p, order, tokens_per_step))


def sampler(config: Config, **changes: Any) -> Sampler:
    """The family's, with this file for its denoiser."""
    return families.get(config).sampler(config)._replace(denoiser=sys.modules[__name__], **changes)


def model(tokens: int, length: int) -> ModelConfig:
    """A model of the oracle's shape: one layer with one head, of a channel per (position, id) pair."""
    pairs = length * (tokens + 1)
    return ModelConfig(length=length, vocab_size=tokens + 1, width=pairs + pairs % 2, layers=1, heads=1)


def weights(p: np.ndarray, shifted: bool) -> Weights:
    """What `trunk` needs to know: as the head's kernel [E, L X] every conditional of p, as the embedding the place
    values [L, 1] that number the states of knowledge.

    Args:
      shifted: whether the input at position i is the token of position i - 1 and the first one is no token (AR). It is
        then place values alone that move.
    """
    place = (p.shape[0] + 1) ** np.arange(p.ndim)
    if shifted:
        place = np.concatenate([[0], place[:-1]])
    table = _conditionals(p)
    none = jnp.zeros(1)
    return Weights(jnp.asarray(place, jnp.float32)[:, None], (),
                   Head(Norm(none, none), jnp.asarray(table.reshape(len(table), -1), jnp.float32), none))


def _conditionals(p: np.ndarray) -> np.ndarray:
    """log p(x_i = token | knowledge) [E, L, X]; NaN where x_i itself is known, so that a leak does not go unnoticed.

    Position i of the knowledge has place value V^i; its digit is 0 if nothing was seen there, else the token's id + 1.
    """
    known = p.transpose()  # so that flat indices have those place values
    for axis in range(p.ndim):
        known = np.concatenate([known.sum(axis, keepdims=True), known], axis)
    table = np.full((*known.shape, p.ndim, p.shape[0]), np.nan)
    for position in range(p.ndim):
        own = p.ndim - 1 - position  # its axis in `known`
        digits = np.moveaxis(known, own, -1)
        np.moveaxis(table, own, 0)[0, ..., position, :] = np.log(digits[..., 1:] / digits[..., :1])
    return table.reshape(-1, p.ndim, p.shape[0])


def trunk(weights: Weights, tokens: jax.Array, positions: jax.Array, view: View, cache: kv.KVCache | None = None,
          offset: jax.Array | int = 0, training: None = None) -> tuple[jax.Array, kv.KVCache | None]:
    """log p of each slot's token given the tokens that it sees, [B, S, X]: in place of `transformer.trunk`.

    A slot whose view is not a set of distinct positions (a slot never written to, or a position twice) gets NaN.
    """
    place = weights.embedding[:, 0].astype(jnp.int32)
    table = weights.head.kernel.reshape(len(weights.head.kernel), len(place), -1)
    length, ids = table.shape[1], table.shape[2] + 1
    value = jax.nn.one_hot(positions * ids + tokens, length * ids + length * ids % 2)[:, :, None]
    nothing, still = jnp.zeros_like(value), (jnp.ones(()), jnp.zeros(()))
    if cache is None:
        average = attention.attend(nothing, nothing, value, view)
    else:
        average, cache = kv.attend(cache, 0, jnp.stack([nothing, nothing, value], 2), still, view, offset)
    share = average[:, :, 0, :length * ids].reshape(*tokens.shape, length, ids)
    seen = share > 0
    evenly = jnp.abs(share * seen.sum((2, 3), keepdims=True) - seen) < 0.01
    sound = evenly.all((2, 3)) & (seen.sum(3) <= 1).all(2)
    number = (jnp.arange(1, ids + 1) % ids)[None, None, None]  # the mask's is 0, as that of an unseen position
    digits = (seen * number).sum(3)
    log_p = table[(digits * place[None, None]).sum(2), positions]
    return jnp.where(sound[..., None], log_p, jnp.nan), cache


def head(weights: Weights, hidden: jax.Array, mask_id: int) -> jax.Array:
    """Logits [B, S, V]: in place of `transformer.head`."""
    return jnp.pad(hidden, ((0, 0), (0, 0), (0, 1)), constant_values=MASK_LOGIT)
