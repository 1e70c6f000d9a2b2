"""The families: what is corrupted, who sees whom, the loss, the bound and the sampler of each.

A family is one object in one file, with its settings; eso_jax/families/base.py has the interface. To add one: write its
file, and `register` it here; tests/test_families.py, which lists the names, and tests/test_train.py then apply to it. A
family that is registered elsewhere is known to programs that import it, not to the command line.

`sample` and `plan_log_prob` decode and score along a plan by the family's sampler; `plan_log_likelihood` scores in one
pass, with gradients.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from eso_jax import config as config_module
from eso_jax.config import Config
from eso_jax.decoding import decoders, loop
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.decoders import Decoder
from eso_jax.decoding.plan import Plan
from eso_jax.families.ar import AR
from eso_jax.families.base import Family
from eso_jax.families.bd3lm import BD3LM
from eso_jax.families.esolm import EsoLM
from eso_jax.families.mdlm import MDLM
from eso_jax.model import transformer
from eso_jax.model.params import Weights

BY_NAME: dict[str, Family] = {}


def register(family: Family) -> None:
    """Makes a family known, and its settings to configs and the command line, by its name."""
    BY_NAME[family.name] = family
    config_module.register(family.name, family.settings)


for _family in (EsoLM(), EsoLM("esolm_a", "Eso-LM (A)", prefix=True), MDLM(), BD3LM(), AR()):
    register(_family)


def get(config: Config) -> Family:
    """The family of a config."""
    return BY_NAME[config.family.name]


def alpha_0_of(config: Config, alpha_0: float | None) -> float:
    """The share of tokens left to diffusion: the one asked for, or the training value. A family without a choice has
    its one value.

    Raises:
      EsoError: it is not in [0, 1], or the family cannot have it.
    """
    family = get(config)
    if alpha_0 is not None:
        family.check_alpha_0(alpha_0)
    if family.only_alpha_0 is not None:
        return family.only_alpha_0[0]
    return float(config.family.alpha_0) if alpha_0 is None else alpha_0


def sample(weights: Weights, config: Config, plan: Plan, keys: Key[Array, "..."], rule: Rule = Rule(),
           given: Int[Array, "B L"] | None = None, report: loop.Report | None = None,
           done: loop.Done | None = None, record: bool = False,
           watch: loop.Watch | None = None, decoder: Decoder | None = None) -> Any:
    """Decodes a batch along the plan; returns its tokens [B, L] in natural order, or more, as loop.sample does.

    Args:
      keys: one for each row, which alone decides the row's draws; or one, from which they are made by row number.
      given: the tokens that the plan takes as given, by natural position; others are ignored.
      report, done, record, watch: see eso_jax.decoding.loop.sample.
      decoder: chooses how many tokens a pass decodes, in the order of the plan; the result is then a
        `decoders.Decoded`.
    """
    family = get(config)
    family.check_plan(config, plan)
    rest = (rule, given, report, done, record, watch)
    if decoder is None:
        return loop.sample(weights, config.model, family.sampler(config), plan, keys, *rest)
    family.check_decoder(decoder)
    return decoders.sample(weights, config.model, family.sampler(config), plan, keys, decoder, *rest)


def plan_log_prob(weights: Weights, config: Config, plan: Plan, tokens: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """log p of each token [B, L] in nats, along the order, if `tokens` are decoded along the plan: exact for the
    sampler that follows it, one pass per step. 0 for tokens that are given or not decoded. A row's sum is log p of the
    sample given its plan."""
    get(config).check_plan(config, plan)
    return loop.log_prob(weights, config.model, get(config).sampler(config), plan, tokens)


def plan_log_likelihood(weights: Weights, config: Config, plan: Plan, tokens: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """The same as `plan_log_prob`, [B, L], in one pass over 2L slots: a pure function of the weights (params.fold) that
    can be differentiated, for policy gradients. `train.remat` says what the gradient computes again.

    Raises:
      EsoError: a plan that the family cannot follow, or a family that is neither AR nor Eso-LM (B).
    """
    get(config).check_plan(config, plan)
    first = jnp.asarray(plan.step_begins, jnp.int32)
    logp = _plan_log_likelihood(weights, config, tokens, jnp.asarray(plan.order, jnp.int32), first)
    return jnp.where(plan.decoded, logp, 0)


@functools.partial(jax.jit, static_argnames="config")
def _plan_log_likelihood(weights: Weights, config: Config, tokens: Int[Array, "B L"], order: Int[Array, "B L"],
                         first: Int[Array, "#B L"]) -> Float[Array, "B L"]:
    training = transformer.Training(0.0, None, config.train.remat)
    return get(config).plan_log_likelihood(weights, config, tokens, order, first, training)
