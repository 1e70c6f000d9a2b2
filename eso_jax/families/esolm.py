"""Eso-LM (B), "Eso-LM" in the paper, and its ablation Eso-LM (A): diffusion, then sequential, in one transformer.

A share alpha_0 of the tokens is decoded by diffusion, in random order and in parallel; the rest left to right, one at a
time. Both passes attend along an order, clean tokens first, so that keys and values can be cached. (A) lets the clean
tokens see each other, which trains better and caches less. Paper, eqs. 7 and 24-32 for (B), 35-41 for (A).

Axes: B batch, L length.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

from eso_jax import noise
from eso_jax.config import Config, FamilyConfig
from eso_jax.decoding import plan as plans
from eso_jax.decoding.decoders import Decoder
from eso_jax.decoding.passes import Sampler
from eso_jax.decoding.order import clean_first, sort
from eso_jax.decoding.plan import Counts, Plan
from eso_jax.errors import require
from eso_jax.families.base import Family, Pass, check_loss_weight, only_natural
from eso_jax.model import loss, masks, transformer, vocabulary
from eso_jax.model.masks import OwnSteps, Pattern, TwoStreams, View
from eso_jax.model.params import Weights
from eso_jax.noise import Draws


@dataclass(frozen=True)
class EsoLMConfig(FamilyConfig):
    """The settings of an Eso-LM."""

    alpha_0: float = 1.0  # share of tokens left to diffusion; 1: all diffusion, 0: all sequential
    alpha_0_range: tuple[float, float] | None = None  # from it training draws one per row; alpha_0 is for all else
    kappa: float | None = None  # share of the batch on the diffusion loss; None: 1 at alpha_0 = 1, 0 at 0, else 1/2
    loss_weight: str = "elbo"  # training weight of the diffusion term: "elbo", or "low_var" (w = 1)

    def check(self) -> None:
        require(0 <= self.alpha_0 <= 1, "family.alpha_0", self.alpha_0, "must be in [0, 1]")
        require(self.kappa is None or 0 <= self.kappa <= 1, "family.kappa", self.kappa, "must be in [0, 1]")
        low, high = self.alpha_0_range or (self.alpha_0, self.alpha_0)
        require(self.alpha_0_range is None or 0 < low < high <= 1, "family.alpha_0_range", self.alpha_0_range,
                "must satisfy 0 < low < high <= 1")
        require(low <= self.alpha_0 <= high, "family.alpha_0", self.alpha_0, "evaluation and sampling take it where no "
                f"other is asked for: must be in family.alpha_0_range = {self.alpha_0_range}")
        both = low < high or 0 < self.alpha_0 < 1
        require(self.kappa is None or (0 < self.kappa < 1 if both else self.kappa == self.alpha_0), "family.kappa",
                self.kappa, f"alpha_0 = {self.alpha_0_range or self.alpha_0} needs "
                f"{'both losses' if both else 'its one loss'}; leave family.kappa unset")
        require(0 < self.split < 1 or not both, "family.kappa", self.kappa,
                "must leave each loss at least a 64th of the batch")
        check_loss_weight(self.loss_weight)

    @property
    def split(self) -> Fraction:
        """kappa as a fraction with a small denominator, so that a batch divides into equal groups."""
        if self.kappa is not None:
            return Fraction(self.kappa).limit_denominator(64)
        one_loss = self.alpha_0_range is None and self.alpha_0 in (0, 1)
        return Fraction(self.alpha_0) if one_loss else Fraction(1, 2)

    @property
    def moments(self) -> tuple[float, float]:
        """The mean of alpha_0 in training, and of its square."""
        if self.alpha_0_range is None:
            return self.alpha_0, self.alpha_0**2
        low, high = self.alpha_0_range
        return (high - low) / math.log(high / low), (high**2 - low**2) / (2 * math.log(high / low))

    @property
    def group_size(self) -> int:
        """Each of the two losses has its own rows, the same share of every group. A device needs at least one row of
        each loss, or the layers would communicate."""
        return self.split.denominator

    @property
    def group_reason(self) -> str:
        return f"rows shared by kappa = {self.split}"


@dataclass(frozen=True)
class EsoLM(Family):
    """An Eso-LM.

    Attributes:
      prefix: whether all clean tokens see each other (A), not only those before them in the order (B).
      skips: whether the loss leaves out most clean tokens of the noisy copy: they have no loss, and no token sees them.
    """

    name: str = "esolm"
    label: str = "Eso-LM (B)"
    prefix: bool = False
    skips: bool = True
    settings = EsoLMConfig
    one_pass = True

    def loss(self, weights: Weights, config: Config, tokens: Int[Array, "B L"],
             draws: Draws) -> dict[str, Float[Array, ""]]:
        """Both halves of the hybrid loss, each over its own share of the batch and its own tokens (paper,
        Algorithm 1)."""
        kappa, mean = config.family.split, config.family.moments[0]
        terms = {}
        if kappa > 0:
            rows, row_draws = _share(tokens, 0, kappa), _share_draws(draws, 0, kappa)
            # Times are spread over the diffusion rows alone.
            total = draws.total * kappa.numerator // kappa.denominator
            t = noise.draw_times(Draws(draws.key, diffusion_rank(row_draws.index, kappa), total))
            alpha_0 = _alpha_0(config, row_draws)
            weight = noise.elbo_weight(t, alpha_0) if config.family.loss_weight == "elbo" else jnp.ones_like(t)
            nll = self._diffusion(weights, config, rows, row_draws, t, alpha_0, mean, True)
            terms["diffusion"] = jnp.mean(weight[:, None] * nll)
        if kappa < 1:
            rows, row_draws = _share(tokens, kappa, 1), _share_draws(draws, kappa, 1)
            terms["sequential"] = jnp.mean(self._sequential(weights, config, rows, row_draws,
                                                            _alpha_0(config, row_draws), mean, True))
        return terms

    def without_skips(self, config: Config, draws: Draws) -> tuple[Family, Bool[Array, ""]] | None:
        kappa, length, skip = config.family.split, config.model.length, self.skip(config)
        if kappa == 1 or skip == 0:
            return None
        rows = _share_draws(draws, kappa, 1)
        masked = _masked_at_0(rows, _alpha_0(config, rows), length)
        return dataclasses.replace(self, skips=False), masked.sum(1).max() > length - skip

    def skip(self, config: Config) -> int:
        """How many clean tokens of the noisy copy the sequential loss leaves out: as many as even rows of the smallest
        alpha_0 nearly always have."""
        length, least = config.model.length, (config.family.alpha_0_range or (config.family.alpha_0,))[0]
        return length - loss.slots_for(1 - least, length) if self.skips else 0

    def nelbo(self, weights: Weights, config: Config, tokens: Int[Array, "B L"], draws: Draws,
              alpha_0: float) -> dict[str, Float[Array, " B"]]:
        """Both terms of eq. 7 for every row, at any alpha_0."""
        terms = {}
        if alpha_0 > 0:
            t = noise.draw_times(draws)
            nll = self._diffusion(weights, config, tokens, draws, t, alpha_0, alpha_0, False)
            terms["diffusion"] = noise.elbo_weight(t, alpha_0) * nll.sum(1)
        if alpha_0 < 1:
            terms["sequential"] = self._sequential(weights, config, tokens, draws, alpha_0, alpha_0, False).sum(1)
        return terms

    def _diffusion(self, weights: Weights, config: Config, tokens: Int[Array, "B L"], draws: Draws,
                   t: Float[Array, " B"], alpha_0: noise.Share, mean: float, train: bool) -> Float[Array, "B L"]:
        """`diffusion_nll` of masks drawn at the times t. `mean`: the mean of alpha_0."""
        masked = noise.draw_masked(draws.per_example(noise.MASK), noise.alpha(t, alpha_0)[:, None], tokens.shape[1])
        order = clean_first(draws.per_example(noise.ORDER), masked, shuffle_clean=True, shuffle_masked=True)
        return self.diffusion_nll(weights, config, tokens, masked, order, noise.masked_share(mean),
                                  transformer.training_of(config, draws, train))

    def _sequential(self, weights: Weights, config: Config, tokens: Int[Array, "B L"], draws: Draws,
                    alpha_0: noise.Share, mean: float, train: bool) -> Float[Array, "B L"]:
        """`sequential_nll` of masks drawn at t = 0. `mean`: the mean of alpha_0."""
        masked = _masked_at_0(draws, alpha_0, tokens.shape[1])
        order = clean_first(draws.per_example(noise.ORDER_0), masked, shuffle_clean=not self.prefix,
                            shuffle_masked=False)
        return self.sequential_nll(weights, config, tokens, masked, order, 1 - mean,
                                   self.skip(config) if train else 0, transformer.training_of(config, draws, train))

    def diffusion_nll(self, weights: Weights, config: Config, tokens: Int[Array, "B L"], masked: Bool[Array, "B L"],
                      order: Int[Array, "B L"], share: float = 1.0,
                      training: transformer.Training | None = None) -> Float[Array, "B L"]:
        """-log p of the masked tokens in one diffusion pass, unweighted and along the order; 0 on clean tokens.

        A masked token sees the clean ones, the masked ones before it in the order, and itself. For `share` see
        eso_jax/model/loss.py.
        """
        return loss.masked_nll(weights, config.model.mask, sort(tokens, order), sort(masked, order), order,
                               self.pattern(config), share, training)

    def sequential_nll(self, weights: Weights, config: Config, tokens: Int[Array, "B L"], masked: Bool[Array, "B L"],
                       order: Int[Array, "B L"], share: float = 1.0, skip: int = 0,
                       training: transformer.Training | None = None) -> Float[Array, "B L"]:
        """-log p of each masked token given the tokens before it in the order, along the order; 0 on clean tokens.

        Two streams, z_0 and x: the z_0 copy of a token sees itself and the x copies before it. No shift by one. The
        first `skip` of the order, all of which must be clean, have no z_0 copy. For `share` see eso_jax/model/loss.py.
        """
        return loss.masked_nll(weights, config.model.mask, sort(tokens, order), sort(masked, order), order,
                               self.two_streams(config, skip), share, training)

    def passes(self, config: Config) -> list[Pass]:
        """The share kappa in one stream (diffusion), the rest in two."""
        kappa = config.family.split
        mean = config.family.moments[0]
        both = (Pass(kappa, self.pattern(config), noise.masked_share(mean)),
                Pass(1 - kappa, self.two_streams(config, self.skip(config)), 1 - mean))
        return [each for each in both if each.share]

    def predictors(self, weights: Weights, config: Config, tokens: Int[Array, "B L"],
                   order: Int[Array, "B L"]) -> Float[Array, "B L D"]:
        """The hidden states of one sequential pass with every token masked.

        In (A) clean tokens see each other in both directions, so its conditionals do not multiply to the likelihood of
        a random order; along the natural order (alpha_0 = 0) they do.
        """
        all_masked = jnp.ones_like(tokens, bool)
        return loss.masked_hidden(weights, config.model.mask, sort(tokens, order), all_masked, order,
                                  self.two_streams(config))

    @property
    def one_pass_plans(self) -> bool:
        return not self.prefix

    def plan_log_likelihood(self, weights: Weights, config: Config, tokens: Int[Array, "B L"], order: Int[Array, "B L"],
                            first: Int[Array, "#B L"],
                            training: transformer.Training | None = None) -> Float[Array, "B L"]:
        """In one pass over the masks of all steps and all clean tokens: in (B), whose cache is exact, the steps of the
        sampler see just these."""
        if self.prefix:
            return super().plan_log_likelihood(weights, config, tokens, order, first, training)
        mask, x, length = config.model.mask, sort(tokens, order), tokens.shape[1]
        view = View(OwnSteps(length=length), jnp.concatenate([first, first], 1))
        hidden, _ = transformer.trunk(weights, jnp.concatenate([jnp.full_like(x, mask), x], 1),
                                      jnp.concatenate([order, order], 1), view, training=training)
        return -vocabulary.nll(weights, hidden[:, :length], x, mask)

    def check_orders(self, config: Config, orders: Int[np.ndarray, "O B L"]) -> None:
        if self.prefix:
            only_natural(self.name, orders)

    def check_conditionals(self) -> None:
        if self.prefix:
            super().check_conditionals()

    def plan(self, key: Key[Array, "..."], config: Config, batch: int, steps: int, alpha_0: float = 1.0,
             policy: str = "binomial", known: Bool[np.ndarray, "B L"] | None = None) -> Plan:
        return plans.draw(policy, key, batch, config.model.length, steps, alpha_0, known)

    def check_known(self, config: Config, known: Bool[np.ndarray, "B L"]) -> None:
        """Anything can be given: it comes first in the order."""

    def check_decoder(self, decoder: Decoder) -> None:
        """(B) can follow every decoder, (A) none."""
        if self.prefix:
            super().check_decoder(decoder)

    def sampler(self, config: Config) -> Sampler:
        """(B) caches in both phases. (A) computes the tokens decoded by diffusion again in each step of that phase,
        since they see each other, and caches in the sequential phase (described in the paper, but not in its code)."""
        return Sampler(_window_a if self.prefix else _window, self.pattern(config))

    def pattern(self, config: Config) -> Pattern:
        return masks.PREFIX if self.prefix else masks.CAUSAL

    def two_streams(self, config: Config, skip: int = 0) -> TwoStreams:
        return TwoStreams(prefix=self.prefix, skip=skip)

    def short_label(self, settings: FamilyConfig) -> str:
        return self.label if self.prefix else "Eso-LM"

    def describe(self, settings: FamilyConfig) -> str:
        trained = settings.alpha_0_range and " from {:g} to {:g}".format(*settings.alpha_0_range)
        return "alpha_0" + (trained or f" = {settings.alpha_0:g}")


def _alpha_0(config: Config, draws: Draws) -> noise.Share:
    """The alpha_0 of training: one for all rows, or one for each, [B]."""
    limits = config.family.alpha_0_range
    return config.family.alpha_0 if limits is None else noise.draw_alpha_0(draws, *limits)


def _masked_at_0(draws: Draws, alpha_0: noise.Share, length: int) -> Bool[Array, "B L"]:
    """The tokens that are left to the sequential phase; each token is drawn independently."""
    keep = jnp.full(draws.index.shape, alpha_0)[:, None]
    return noise.draw_masked(draws.per_example(noise.MASK_0), keep, length)


def _window(plan: Plan) -> tuple[Counts, Counts]:
    """(first slot, slot after the last) of each step's window: the tokens decoded last, whose keys and values in the
    cache are still those of masks, then this step's."""
    first = plan.first
    return np.concatenate([first[..., :1], first[..., :-1]], axis=-1), first + plan.tokens_per_step


def _window_a(plan: Plan) -> tuple[Counts, Counts]:
    """The same for (A): all tokens from the first, given ones too, up to and including the first sequential step; then
    as (B)."""
    start, stop = _window(plan)
    return np.where(plan.first <= np.asarray(plan.diffused)[..., None], 0, start), stop


def diffusion_rank(index: Int[Array, " B"], kappa: Fraction) -> Int[Array, " B"]:
    """Which of the global batch's diffusion rows a row is, from its index in the batch."""
    return index // kappa.denominator * kappa.numerator + index % kappa.denominator


def _share(x: Shaped[Array, "B *s"], low: Fraction | int, high: Fraction | int) -> Shaped[Array, "_ *s"]:
    """Rows low to high (fractions of the batch), the same share of every few consecutive rows.

    With kappa = 1/2, rows 0, 2, 4, ... and 1, 3, 5, ...: no row leaves the device that holds it.
    """
    groups = max(Fraction(low).denominator, Fraction(high).denominator)
    grouped = x.reshape(-1, groups, *x.shape[1:])
    return grouped[:, int(low * groups):int(high * groups)].reshape(-1, *x.shape[1:])


def _share_draws(draws: Draws, low: Fraction | int, high: Fraction | int) -> Draws:
    """The draws of these rows."""
    return dataclasses.replace(draws, index=_share(draws.index, low, high))
