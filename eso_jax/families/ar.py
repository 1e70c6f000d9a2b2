"""AR: the causal language model, with AdaLN (the paper's fair baseline) or without (model.cond_dim = 0).

The input is the sequence shifted by one after a start token (family.start_id; by default the mask, which AR does not
use otherwise), so that all L tokens have a likelihood.

Axes: B batch, L length.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from eso_jax.config import Config, FamilyConfig
from eso_jax.decoding.passes import Sampler
from eso_jax.decoding.plan import Counts, Plan, draw
from eso_jax.errors import EsoError, require
from eso_jax.families.base import Family, Pass, only_natural
from eso_jax.model import masks, transformer, vocabulary
from eso_jax.model.masks import Pattern, View
from eso_jax.model.params import Weights
from eso_jax.noise import Draws


@dataclass(frozen=True)
class ARConfig(FamilyConfig):
    """The settings of an AR model."""

    start_id: int | None = None  # the token before the first; None: the mask id
    # alpha_0 is 0; configs of earlier versions have 1, the former default of the field.
    only = {**FamilyConfig.only, "alpha_0": (0.0, 1.0), "loss_weight": ("elbo",)}

    def check_with(self, config: Config) -> None:
        require(self.start_id is None or 0 <= self.start_id < config.model.vocab_size, "family.start_id",
                self.start_id, f"must be in [0, {config.model.vocab_size})")


@dataclass(frozen=True)
class AR(Family):
    """The causal language model."""

    name: str = "ar"
    label: str = "AR"
    exact_bound = True
    one_pass = True
    policies = ("left-to-right",)
    settings = ARConfig
    without_adaln = True

    def loss(self, weights: Weights, config: Config, tokens: Int[Array, "B L"],
             draws: Draws) -> dict[str, Float[Array, ""]]:
        training = transformer.training_of(config, draws, train=True)
        return {"sequential": jnp.mean(next_token_nll(weights, config, shift(config, tokens), tokens, training))}

    def nelbo(self, weights: Weights, config: Config, tokens: Int[Array, "B L"], draws: Draws,
              alpha_0: float = 1.0) -> dict[str, Float[Array, " B"]]:
        """-log p itself. AR has no alpha_0, whose value here is ignored."""
        return {"sequential": next_token_nll(weights, config, shift(config, tokens), tokens).sum(1)}

    def passes(self, config: Config) -> list[Pass]:
        return [Pass(Fraction(1), self.pattern(config), 1.0)]

    def predictors(self, weights: Weights, config: Config, tokens: Int[Array, "B L"],
                   order: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """The hidden states of the shifted input; the order must be the natural one (see check_orders)."""
        return _trunk(weights, shift(config, tokens))

    @property
    def one_pass_plans(self) -> bool:
        return True

    def plan_log_likelihood(self, weights: Weights, config: Config, tokens: Int[Array, "B L"], order: Int[Array, "B L"],
                            first: Int[Array, "#B L"],
                            training: transformer.Training | None = None) -> Float[Array, "B L"]:
        """log p of each token: there is only one plan, left to right."""
        return -next_token_nll(weights, config, shift(config, tokens), tokens, training)

    def check_orders(self, config: Config, orders: Int[np.ndarray, "O B L"]) -> None:
        only_natural(self.name, orders)

    def check_conditionals(self) -> None:
        """AR has the conditionals that follow a prefix."""

    def check_given_first(self, orders: Int[np.ndarray, "B L"]) -> None:
        if (orders != np.arange(orders.shape[1])).any():
            raise EsoError(f"family.name = {self.name!r}: the given tokens must be a prefix, and the wanted ones what "
                           "follows it")

    def plan(self, key: Key[Array, "..."], config: Config, batch: int, steps: int, alpha_0: float = 1.0,
             policy: str = "left-to-right", known: Bool[np.ndarray, "B L"] | None = None) -> Plan:
        """Left to right, one token per step: AR has no choice, and `steps` and `alpha_0` are ignored."""
        require(policy == "left-to-right", "plan", policy, "AR decodes left to right; leave it out")
        return draw(policy, key, batch, config.model.length, 1, 0.0, known)

    def check_known(self, config: Config, known: Bool[np.ndarray, "B L"]) -> None:
        wrong = (np.diff(known.astype(int), axis=1) > 0).any(axis=1)
        require(not bool(wrong.any()), "given", f"row {wrong.argmax()}", f"family.name = {self.name!r} can be given a "
                "prefix alone: nothing behind an unknown token")

    def check_plan(self, config: Config, plan: Plan) -> None:
        natural = (np.asarray(plan.order) == np.arange(plan.length)).all()
        require(bool(natural and plan.tokens_per_step.max(initial=0) <= 1), "plan", f"{plan.nfe} steps",
                "AR decodes one token per step, left to right")

    def sampler(self, config: Config) -> Sampler:
        return Sampler(_window, masks.CAUSAL, start_id=start_id(config))

    def pattern(self, config: Config) -> Pattern:
        return masks.CAUSAL


def shift(config: Config, tokens: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """The inputs: the start token, then all tokens but the last."""
    return jnp.concatenate([jnp.full_like(tokens[:, :1], start_id(config)), tokens[:, :-1]], axis=1)


def next_token_nll(weights: Weights, config: Config, inputs: Int[Array, "B L"], targets: Int[Array, "B L"],
                   training: transformer.Training | None = None) -> Float[Array, "B L"]:
    """-log p(targets[i] | inputs[<= i]) in nats, [B, L]."""
    return vocabulary.nll(weights, _trunk(weights, inputs, training), targets, config.model.mask)


def _trunk(weights: Weights, inputs: Int[Array, "B L"],
           training: transformer.Training | None = None) -> Float[Array, "B L D"]:
    positions = transformer.natural_positions(inputs)
    return transformer.trunk(weights, inputs, positions, View(masks.CAUSAL), training=training)[0]


def start_id(config: Config) -> int:
    return config.model.mask if config.family.start_id is None else config.family.start_id


def _window(plan: Plan) -> tuple[Counts, Counts]:
    """(first slot, slot after the last) of each step's window: the token decoded last, which AR's shifted input has in
    this step's slot."""
    return plan.first, plan.first + 1
