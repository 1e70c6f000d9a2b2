"""BD3-LM: blocks left to right, masked diffusion within a block.

Arriola et al. 2025, arXiv 2503.09573. One pass over [z_t, x]: a block of z_t sees itself and the earlier blocks of x.
Every token may be masked, the first one too, so that the bound covers all L tokens.

Axes: B batch, L length, J blocks of L' tokens.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from eso_jax import noise
from eso_jax.config import Config, FamilyConfig
from eso_jax.decoding.passes import Sampler
from eso_jax.decoding.plan import Counts, Plan, blocks_after_known, join, within_blocks
from eso_jax.errors import require
from eso_jax.families.base import Family, Pass
from eso_jax.model import loss, transformer
from eso_jax.model.masks import Pattern, TwoStreams
from eso_jax.model.params import Weights
from eso_jax.noise import Draws


@dataclass(frozen=True)
class BD3LMConfig(FamilyConfig):
    """The settings of a BD3-LM."""

    block_size: int = 16  # L'
    t_range: tuple[float, float] = (1e-3, 1.0)  # the clipped training range of t; evaluation uses (1e-3, 1)
    only = {**FamilyConfig.only, "loss_weight": ("elbo",)}

    def check(self) -> None:
        require(self.block_size >= 1, "family.block_size", self.block_size, "must be at least 1")
        low, high = self.t_range
        require(0 < low < high <= 1, "family.t_range", self.t_range, "must satisfy 0 < low < high <= 1")

    def check_with(self, config: Config) -> None:
        require(config.model.length % self.block_size == 0, "family.block_size", self.block_size,
                f"must divide model.length = {config.model.length}")


@dataclass(frozen=True)
class BD3LM(Family):
    """Block diffusion."""

    name: str = "bd3lm"
    label: str = "BD3-LM"
    settings = BD3LMConfig

    def loss(self, weights: Weights, config: Config, tokens: Int[Array, "B L"],
             draws: Draws) -> dict[str, Float[Array, ""]]:
        """The weighted loss with t clipped to family.t_range."""
        low, high = config.family.t_range
        return {"diffusion": jnp.mean(_weighted_nll(weights, config, tokens, draws, low, high, train=True))}

    def nelbo(self, weights: Weights, config: Config, tokens: Int[Array, "B L"], draws: Draws,
              alpha_0: float = 1.0) -> dict[str, Float[Array, " B"]]:
        self.check_alpha_0(alpha_0)
        return {"diffusion": _weighted_nll(weights, config, tokens, draws, noise.T_MIN, 1.0, train=False).sum(1)}

    def passes(self, config: Config) -> list[Pass]:
        return [Pass(Fraction(1), self.two_streams(config), sum(config.family.t_range) / 2)]

    def block(self, config: Config) -> int | None:
        return config.family.block_size

    def plan(self, key: Key[Array, "..."], config: Config, batch: int, steps: int, alpha_0: float = 1.0,
             policy: str = "binomial", known: Bool[np.ndarray, "B L"] | None = None) -> Plan:
        """T = `steps` in all, T / J for each of the J blocks; "one-by-one" is the first-hitting sampler."""
        self.check_alpha_0(alpha_0)
        length, block = config.model.length, config.family.block_size
        blocks = length // block
        require(policy == "one-by-one" or steps % blocks == 0 and steps > 0, "steps", steps,
                f"T is shared by {blocks} blocks; give a multiple of {blocks}")
        if known is None:
            return within_blocks(key, batch, length, block, policy, steps // blocks)
        return join([blocks_after_known(*row, block, policy, steps // blocks) for row in zip(key, known, strict=True)])

    def check_known(self, config: Config, known: Bool[np.ndarray, "B L"]) -> None:
        """A block does not see later blocks, so it must be given as a whole where a later one has given tokens."""
        in_block = known.reshape(len(known), -1, config.family.block_size)
        some, whole = np.any(in_block, axis=2), np.all(in_block, axis=2)
        wrong = (some[:, 1:] & ~whole[:, :-1]).any(axis=1)
        require(not bool(wrong.any()), "given", f"row {wrong.argmax()}", f"family.name = {self.name!r} decodes blocks "
                f"of {config.family.block_size} left to right: a block must be given as a whole where a later one has "
                "a given token")

    def check_plan(self, config: Config, plan: Plan) -> None:
        block = config.family.block_size
        ends = plan.first + np.maximum(plan.tokens_per_step, 1) - 1
        require(bool((np.asarray(plan.order) // block == np.arange(plan.length) // block).all())
                and bool((plan.first // block == ends // block).all()), "plan", f"{plan.nfe} steps",
                f"BD3-LM decodes blocks of {block} left to right; no step and no order may leave its block")

    def sampler(self, config: Config) -> Sampler:
        return _sampler(config.family.block_size)

    def pattern(self, config: Config) -> Pattern:
        return Pattern(config.family.block_size)

    def two_streams(self, config: Config) -> TwoStreams:
        return TwoStreams(config.family.block_size)

    def short_label(self, settings: FamilyConfig) -> str:
        return f"{self.label} ({settings.block_size})"

    def describe(self, settings: FamilyConfig) -> str:
        return f"blocks of {settings.block_size}"


def _weighted_nll(weights: Weights, config: Config, tokens: Int[Array, "B L"], draws: Draws, low: float, high: float,
                  train: bool) -> Float[Array, "B L"]:
    t = jnp.repeat(block_times(draws, tokens.shape[1] // config.family.block_size, low, high),
                   config.family.block_size, axis=1)
    masked = noise.draw_masked(draws.per_example(noise.MASK), 1 - t, tokens.shape[1])
    training = transformer.training_of(config, draws, train)
    return masked_nll(weights, config, tokens, masked, (low + high) / 2, training) / t


def block_times(draws: Draws, blocks: int, low: float, high: float) -> Float[Array, "B J"]:
    """One time per block in [low, high]: each row's times are evenly spread, as are each block's over the batch."""
    row = noise.draw_times(draws, 0.0, 1.0)
    return low + (high - low) * ((row[:, None] + jnp.arange(blocks)[None] / blocks) % 1)


def masked_nll(weights: Weights, config: Config, tokens: Int[Array, "B L"], masked: Bool[Array, "B L"],
               share: float = 1.0, training: transformer.Training | None = None) -> Float[Array, "B L"]:
    """-log p of the masked tokens, unweighted, in natural order; 0 on clean tokens. For `share` see
    eso_jax/model/loss.py."""
    return loss.masked_nll(weights, config.model.mask, tokens, masked, transformer.natural_positions(tokens),
                           TwoStreams(config.family.block_size), share, training)


@functools.cache
def _sampler(block: int) -> Sampler:
    def window(plan: Plan) -> tuple[Counts, Counts]:
        """(first slot, slot after the last) of each step's window: this block; in its first step also the block before,
        whose last tokens were decoded in the step before. So no pass only writes the cache."""
        begin = plan.first // block * block
        fresh = plan.first == begin
        return np.where(fresh, np.maximum(begin - block, 0), begin), begin + block

    return Sampler(window, Pattern(block))
