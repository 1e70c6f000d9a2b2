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
from eso_jax.config import Config
from eso_jax.decoding import plan as plans
from eso_jax.decoding.loop import Sampler, Step
from eso_jax.decoding.plan import Plan
from eso_jax.errors import require
from eso_jax.families.base import Family, Pass, Visible
from eso_jax.model import loss, masks, transformer
from eso_jax.model.attention import single_stream
from eso_jax.model.params import Weights
from eso_jax.noise import Draws


@dataclass(frozen=True)
class MDLM(Family):
    """Masked diffusion."""

    name: str = "mdlm"
    label: str = "MDLM"

    def loss(self, weights: Weights, config: Config, tokens: Int[Array, "B L"],
             draws: Draws) -> dict[str, Float[Array, ""]]:
        low_var = config.family.loss_weight == "low_var"
        return {"diffusion": jnp.mean(_weighted_nll(weights, config, tokens, draws, low_var, train=True))}

    def nelbo(self, weights: Weights, config: Config, tokens: Int[Array, "B L"], draws: Draws,
              alpha_0: float = 1.0) -> dict[str, Float[Array, " B"]]:
        require(alpha_0 == 1, "alpha_0", alpha_0, "MDLM is all diffusion; leave alpha_0 at 1")
        return {"diffusion": _weighted_nll(weights, config, tokens, draws, low_var=False, train=False).sum(1)}

    def passes(self, config: Config) -> list[Pass]:
        return [Pass(Fraction(1), 1, 0)]

    def plan(self, key: Key[Array, ""], config: Config, batch: int, steps: int, alpha_0: float = 1.0,
             policy: str = "binomial") -> Plan:
        """The binomial plan is the ancestral sampler, "one-by-one" its first-hitting form."""
        require(alpha_0 == 1, "alpha_0", alpha_0, "MDLM is all diffusion; leave alpha_0 at 1")
        return plans.draw(policy, key, batch, config.model.length, steps, 1.0)

    def sampler(self, config: Config) -> Sampler:
        """The ancestral sampler, factored: which tokens are decoded at each step is the plan's (the ancestral law,
        with steps that decode nothing dropped, as they change nothing), and then each takes its token from p(x | z_t).
        A joint draw over tokens and mask has the same law, and float32 Gumbel noise gets its tail wrong. Counts are
        shared by the batch. Each step is a pass over all L tokens."""
        return Sampler(_window, _everyone, cached=False)

    def visible(self, config: Config, clean: Int[Array, "B 1 1"]) -> Visible:
        return masks.everyone


def _weighted_nll(weights: Weights, config: Config, tokens: Int[Array, "B L"], draws: Draws, low_var: bool,
                  train: bool) -> Float[Array, "B L"]:
    t = noise.draw_times(draws)
    masked = noise.draw_masked(draws.per_example(noise.MASK), noise.alpha(t, 1.0)[:, None], tokens.shape[1])
    weight = jnp.ones_like(t) if low_var else noise.elbo_weight(t, 1.0)
    return weight[:, None] * masked_nll(weights, config, tokens, masked,
                                        transformer.training_of(config, draws, train))


def masked_nll(weights: Weights, config: Config, tokens: Int[Array, "B L"], masked: Bool[Array, "B L"],
               training: transformer.Training | None = None) -> Float[Array, "B L"]:
    """-log p of the masked tokens, unweighted, in natural order; 0 on clean tokens."""
    return loss.masked_nll(weights, config.model.mask, tokens, masked, transformer.natural_positions(tokens),
                           single_stream(masks.everyone), 1, training)


def _window(plan: Plan) -> tuple[Int[np.ndarray, " S"], Int[np.ndarray, " S"]]:
    return np.zeros(plan.nfe, np.int64), np.full(plan.nfe, plan.length)


def _everyone(query: Array, key: Array, step: Step) -> Array:
    return masks.everyone(query, key)
