"""BD3-LM: blocks left to right, masked diffusion within a block.

Arriola et al. 2025, arXiv 2503.09573. One pass over [z_t, x]: a block of z_t sees itself and the earlier blocks of x.
Every token may be masked, the first one too, so that the bound covers all L tokens.

Axes: B batch, L length, J blocks of L' tokens.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from eso_jax import noise, transformer
from eso_jax.attention import two_streams
from eso_jax.config import Config, EsoError, require
from eso_jax.noise import Draws
from eso_jax.sampling.categorical import Rule
from eso_jax.sampling.plan import Plan
from eso_jax.transformer import Weights


def loss(weights: Weights, config: Config, tokens: Int[Array, "B L"], draws: Draws) -> dict[str, Float[Array, ""]]:
    """The weighted loss with t clipped to family.t_range."""
    low, high = config.family.t_range
    return {"diffusion": jnp.mean(_weighted_nll(weights, config, tokens, draws, low, high, train=True))}


def nelbo(weights: Weights, config: Config, tokens: Int[Array, "B L"], draws: Draws,
          alpha_0: float = 1.0) -> dict[str, Float[Array, " B"]]:
    require(alpha_0 == 1, "alpha_0", alpha_0, "BD3-LM is all diffusion; leave alpha_0 at 1")
    return {"diffusion": _weighted_nll(weights, config, tokens, draws, noise.T_MIN, 1.0, train=False).sum(1)}


def _weighted_nll(weights: Weights, config: Config, tokens: Int[Array, "B L"], draws: Draws, low: float, high: float,
                  train: bool) -> Float[Array, "B L"]:
    t = jnp.repeat(block_times(draws, tokens.shape[1] // config.family.block_size, low, high),
                   config.family.block_size, axis=1)
    masked = noise.draw_masked(draws.per_example(noise.MASK), 1 - t, tokens.shape[1])
    dropout = transformer.dropout_of(config.model, draws, train)
    return masked_nll(weights, config, tokens, masked, dropout) / t


def block_times(draws: Draws, blocks: int, low: float, high: float) -> Float[Array, "B J"]:
    """One time per block in [low, high]: each row's times are evenly spread, as are each block's over the batch."""
    row = noise.draw_times(draws, 0.0, 1.0)
    return low + (high - low) * ((row[:, None] + jnp.arange(blocks) / blocks) % 1)


def masked_nll(weights: Weights, config: Config, tokens: Int[Array, "B L"], masked: Bool[Array, "B L"],
               dropout: transformer.Dropout = None) -> Float[Array, "B L"]:
    """-log p of the masked tokens, unweighted, in natural order; 0 on clean tokens."""
    zt = jnp.where(masked, config.model.mask, tokens)
    positions = transformer.natural_positions(tokens)
    hidden, _ = transformer.trunk(weights, jnp.concatenate([zt, tokens], 1), jnp.concatenate([positions, positions], 1),
                                  two_streams(config.family.block_size), dropout=dropout)
    return jnp.where(masked, transformer.nll(weights, hidden[:, :tokens.shape[1]], tokens, config.model.mask), 0)


def log_likelihood(weights: Weights, config: Config, tokens: Int[Array, "B L"],
                   order: Int[Array, "B L"]) -> Float[Array, "B L"]:
    raise EsoError("family.name = 'bd3lm': the likelihood of an order takes a pass per token of a block and is not "
                   "available; use eso-jax eval for the NELBO")


def plan(key: Key[Array, ""], config: Config, batch: int, steps: int, alpha_0: float = 1.0) -> Plan:
    raise EsoError("family.name = 'bd3lm': there is no sampler for BD3-LM yet; use eso-jax eval for the NELBO")


def sample(weights: Weights, config: Config, plan: Plan, key: Key[Array, ""], rule: Rule,
           first_row: int = 0) -> Int[Array, "B L"]:
    raise EsoError("family.name = 'bd3lm': there is no sampler for BD3-LM yet; use eso-jax eval for the NELBO")
