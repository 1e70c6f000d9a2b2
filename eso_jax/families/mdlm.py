"""MDLM: masked diffusion, where every token sees every other one. No cache is possible.

Sahoo et al. 2024, arXiv 2406.07524; the paper's main baseline.

Axes: B batch, L length.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from eso_jax import noise
from eso_jax.config import Config, FamilyConfig
from eso_jax.decoding import plan as plans
from eso_jax.decoding.decoders import Decoder
from eso_jax.decoding.passes import Sampler
from eso_jax.decoding.plan import Plan
from eso_jax.errors import EsoError
from eso_jax.families.base import Family, Pass, check_loss_weight
from eso_jax.model import loss, masks, transformer
from eso_jax.model.masks import Pattern
from eso_jax.model.params import Weights
from eso_jax.noise import Draws


@dataclass(frozen=True)
class MDLMConfig(FamilyConfig):
    """The settings of an MDLM."""

    loss_weight: str = "elbo"  # in training: "elbo", or "low_var" (w = 1)

    def check(self) -> None:
        check_loss_weight(self.loss_weight)


@dataclass(frozen=True)
class MDLM(Family):
    """Masked diffusion."""

    name: str = "mdlm"
    label: str = "MDLM"
    settings = MDLMConfig

    def loss(self, weights: Weights, config: Config, tokens: Int[Array, "B L"],
             draws: Draws) -> dict[str, Float[Array, ""]]:
        low_var = config.family.loss_weight == "low_var"
        return {"diffusion": jnp.mean(_weighted_nll(weights, config, tokens, draws, low_var, train=True))}

    def nelbo(self, weights: Weights, config: Config, tokens: Int[Array, "B L"], draws: Draws,
              alpha_0: float = 1.0) -> dict[str, Float[Array, " B"]]:
        self.check_alpha_0(alpha_0)
        return {"diffusion": _weighted_nll(weights, config, tokens, draws, low_var=False, train=False).sum(1)}

    def passes(self, config: Config) -> list[Pass]:
        return [Pass(Fraction(1), self.pattern(config), noise.masked_share(1.0))]

    def plan(self, key: Key[Array, "..."], config: Config, batch: int, steps: int, alpha_0: float = 1.0,
             policy: str = "binomial", known: Bool[np.ndarray, "B L"] | None = None) -> Plan:
        """The binomial plan is the ancestral sampler, "one-by-one" its first-hitting form."""
        self.check_alpha_0(alpha_0)
        return plans.draw(policy, key, batch, config.model.length, steps, 1.0, known)

    def check_known(self, config: Config, known: Bool[np.ndarray, "B L"]) -> None:
        """Anything can be given: it comes first in the order."""

    def check_decoder(self, decoder: Decoder) -> None:
        """MDLM can follow all decoders but those that need exact conditionals."""
        if decoder.sequential:
            raise EsoError(f"decoder = {decoder}: family.name = {self.name!r} has no exact conditionals to verify "
                           "drafts by; choose another decoder, or an Eso-LM (B)")

    def sampler(self, config: Config) -> Sampler:
        """The ancestral sampler in two parts: the plan draws which tokens each step decodes (without the steps that
        decode nothing, which change nothing), and then each of these is drawn from p(x | z_t). A joint draw over tokens
        and mask has the same law, but float32 Gumbel noise gets its tail wrong. Each step is a pass over all L
        tokens."""
        return Sampler(_window, masks.EVERYONE, cached=False)

    def pattern(self, config: Config) -> Pattern:
        return masks.EVERYONE


def _weighted_nll(weights: Weights, config: Config, tokens: Int[Array, "B L"], draws: Draws, low_var: bool,
                  train: bool) -> Float[Array, "B L"]:
    t = noise.draw_times(draws)
    masked = noise.draw_masked(draws.per_example(noise.MASK), noise.alpha(t, 1.0)[:, None], tokens.shape[1])
    weight = jnp.ones_like(t) if low_var else noise.elbo_weight(t, 1.0)
    return weight[:, None] * masked_nll(weights, config, tokens, masked, noise.masked_share(1.0),
                                        transformer.training_of(config, draws, train))


def masked_nll(weights: Weights, config: Config, tokens: Int[Array, "B L"], masked: Bool[Array, "B L"],
               share: float = 1.0, training: transformer.Training | None = None) -> Float[Array, "B L"]:
    """-log p of the masked tokens, unweighted, in natural order; 0 on clean tokens. For `share` see
    eso_jax/model/loss.py."""
    return loss.masked_nll(weights, config.model.mask, tokens, masked, transformer.natural_positions(tokens),
                           masks.EVERYONE, share, training)


def _window(plan: Plan) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]]:
    return np.zeros(plan.nfe, np.int64), np.full(plan.nfe, plan.length)
