"""The interface of a family of language models: how it trains, what it can score, how it decodes, who sees whom.

A family is one object of a subclass of `Family`, in one file. Its methods are pure functions of `weights` (see
eso_jax/model/params.py). The rest of the project knows a family only through this interface.

Axes: B batch, L length, O orders, D width.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from eso_jax.config import Config, FamilyConfig
from eso_jax.decoding.decoders import Decoder
from eso_jax.decoding.passes import Sampler
from eso_jax.decoding.order import sort
from eso_jax.decoding.plan import Plan
from eso_jax.errors import EsoError, require
from eso_jax.model import transformer, vocabulary
from eso_jax.model.masks import Pattern, TwoStreams
from eso_jax.model.params import Weights
from eso_jax.noise import Draws


class Pass(NamedTuple):
    """One forward pass of the training loss over some rows of the batch.

    Attributes:
      share: of the batch's rows.
      pattern: who sees whom.
      masked: the share of the tokens that have a loss, on average.
    """

    share: Fraction
    pattern: Pattern | TwoStreams
    masked: float


@dataclass(frozen=True)
class Family(ABC):
    """A family of language models.

    Attributes:
      name: the value of `family.name` in a config.
      label: its name in text, tables and pictures.
      settings: the class of its section `family` in a config.
      exact_bound: whether `nelbo` always gives -log p itself, not a bound.
      one_pass: whether `log_likelihood` scores an order in one pass. If not, an order takes L passes of the sampler.
      policies: plans that `check-cache` tries. The last one decodes one token per pass; `eso-jax plan` uses it.
      without_adaln: whether its models may have no AdaLN (model.cond_dim = 0).
    """

    name: str
    label: str
    settings: ClassVar[type[FamilyConfig]]
    exact_bound: ClassVar[bool] = False
    one_pass: ClassVar[bool] = False
    policies: ClassVar[tuple[str, ...]] = ("balanced", "one-by-one")
    without_adaln: ClassVar[bool] = False

    @property
    def only_alpha_0(self) -> tuple[float, ...] | None:
        """The values of alpha_0 that are accepted, if the family has no such setting; the first is used. None: it has
        the setting, and any share is allowed."""
        has_choice = "alpha_0" in {field.name for field in dataclasses.fields(self.settings)}
        return None if has_choice else self.settings.only["alpha_0"]

    def check_alpha_0(self, alpha_0: float) -> None:
        """Raises an EsoError unless alpha_0 is in [0, 1] and a share that the family can have."""
        require(0 <= alpha_0 <= 1, "alpha_0", alpha_0, "must be in [0, 1]")
        require(self.only_alpha_0 is None or alpha_0 in self.only_alpha_0, "alpha_0", alpha_0,
                f"only Eso-LMs have a choice; leave it out for family.name = {self.name!r}")

    @property
    def one_pass_plans(self) -> bool:
        """Whether `plan_log_likelihood` scores a plan in one pass. If not, each step of the sampler takes a pass."""
        return False

    # Training and its bound.

    @abstractmethod
    def loss(self, weights: Weights, config: Config, tokens: Int[Array, "B L"],
             draws: Draws) -> dict[str, Float[Array, ""]]:
        """The training loss in nats per token, by term; the sum of the terms is minimized."""

    def without_skips(self, config: Config, draws: Draws) -> tuple[Family, Bool[Array, ""]] | None:
        """If `loss` leaves out slots that hardly any draw needs: (the family whose loss leaves out none, whether these
        draws need them). None: `loss` leaves out none."""
        return None

    @abstractmethod
    def nelbo(self, weights: Weights, config: Config, tokens: Int[Array, "B L"], draws: Draws,
              alpha_0: float) -> dict[str, Float[Array, " B"]]:
        """One Monte Carlo estimate per row, in nats per sequence, by term.

        The sum over terms is unbiased for the NELBO, an upper bound of -log p (for AR, and for an Eso-LM at
        alpha_0 = 0, -log p itself). It always uses the weights of the bound, and no dropout. For other alpha_0 see the
        note on two laws at the top of eso_jax/likelihood.py.
        """

    @abstractmethod
    def passes(self, config: Config) -> list[Pass]:
        """The forward passes of the loss, for counting operations."""

    # Scores of given tokens.

    def predictors(self, weights: Weights, config: Config, tokens: Int[Array, "B L"],
                   order: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """The hidden states from which each token is predicted, given those before it in the order; along the order.

        Raises:
          EsoError: the family has none (`one_pass` is False).
        """
        raise EsoError(f"family.name = {self.name!r}: the likelihood of an order takes L passes; use "
                       "eso_jax.likelihood.log_prob")

    def log_likelihood(self, weights: Weights, config: Config, tokens: Int[Array, "B L"],
                       order: Int[Array, "B L"]) -> Float[Array, "B L"]:
        """log p of each token given those before it in the order, along the order; in one pass, exact for the sampler
        that decodes one token at a time (paper, eq. 9). Only for orders that `check_orders` accepts."""
        hidden = self.predictors(weights, config, tokens, order)
        return -vocabulary.nll(weights, hidden, sort(tokens, order), config.model.mask)

    def plan_log_likelihood(self, weights: Weights, config: Config, tokens: Int[Array, "B L"], order: Int[Array, "B L"],
                            first: Int[Array, "#B L"],
                            training: transformer.Training | None = None) -> Float[Array, "B L"]:
        """log p of each token, along the order, when the tokens are decoded along a plan; in one pass.

        Args:
          first: for each slot, the first slot of its step.

        Raises:
          EsoError: tokens see later ones, so that each step takes a pass of its own.
        """
        raise EsoError(f"family.name = {self.name!r}: the likelihood of a plan takes a pass per step; use "
                       "eso_jax.likelihood.plan_log_prob")

    def check_orders(self, config: Config, orders: Int[np.ndarray, "O B L"]) -> None:
        """Raises an EsoError for orders that the family cannot score in one pass. (Without `one_pass`, `check_plan`
        says which orders it can follow.)"""

    def block(self, config: Config) -> int | None:
        """The length of the blocks that are decoded one after another: an order finishes a block before the next one.
        None: there are no blocks."""
        return None

    def check_conditionals(self) -> None:
        """Raises an EsoError unless the family has exact conditionals, in one pass."""
        raise EsoError(f"family.name = {self.name!r}: only an Eso-LM (B) or an AR model has exact conditionals")

    def check_given_first(self, orders: Int[np.ndarray, "B L"]) -> None:
        """Raises an EsoError for orders (given tokens, wanted ones, the others) whose conditionals it does not have."""

    # Decoding.

    @abstractmethod
    def plan(self, key: Key[Array, "..."], config: Config, batch: int, steps: int, alpha_0: float = 1.0,
             policy: str = "binomial", known: Bool[np.ndarray, "B L"] | None = None) -> Plan:
        """A plan that the family can follow; see eso_jax/decoding/plan.py.

        Args:
          key: of the plan; with `known`, one for each row, whose plan depends on no other row.
          known: tokens that are known beforehand, by natural position, which `check_known` accepts.
        """

    def check_known(self, config: Config, known: Bool[np.ndarray, "B L"]) -> None:
        """Raises an EsoError for known tokens after which the family cannot follow a plan exactly. By default no token
        may be known."""
        require(not known.any(), "given", f"{known.sum()} tokens", f"family.name = {self.name!r} cannot be given any")

    def check_plan(self, config: Config, plan: Plan) -> None:
        """Raises an EsoError for a plan that the family cannot follow."""

    def check_decoder(self, decoder: Decoder) -> None:
        """Raises an EsoError for a decoder that the family cannot follow exactly. By default there are none."""
        raise EsoError(f"decoder = {decoder}: family.name = {self.name!r} decodes along a plan alone; an Eso-LM (B) "
                       "has decoders")

    @abstractmethod
    def sampler(self, config: Config) -> Sampler:
        """What a step's pass covers and who sees whom in it; see eso_jax/decoding/passes.py."""

    # Who sees whom.

    @abstractmethod
    def pattern(self, config: Config) -> Pattern:
        """Who sees whom in a pass of one stream. Where the pattern has a prefix, its clean slots come first."""

    def two_streams(self, config: Config) -> TwoStreams:
        """Who sees whom in a pass of two streams."""
        return TwoStreams()

    # Labels.

    def short_label(self, settings: FamilyConfig) -> str:
        """The label in a table, with the setting that tells models of the family apart."""
        return self.label

    def describe(self, settings: FamilyConfig) -> str:
        """The settings that tell models of the family apart, in words; empty: there are none."""
        return ""


def check_loss_weight(loss_weight: str) -> None:
    """Raises an EsoError for an unknown weight of a diffusion loss."""
    require(loss_weight in ("elbo", "low_var"), "family.loss_weight", loss_weight, "choose elbo or low_var")


def only_natural(name: str, orders: np.ndarray) -> None:
    """Raises an EsoError unless all orders are 0..L-1."""
    if (np.diff(orders, axis=-1) != 1).any():
        raise EsoError(f"family.name = {name!r}: only the natural order 0..L-1 has an exact likelihood "
                       "(for importance-weighted scores use alpha_0 = 0, or an Eso-LM (B))")
