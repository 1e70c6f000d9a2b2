"""The families: what is corrupted, who sees whom, the loss, the bound and the sampler of each.

A family is one module with these functions, pure functions of `weights` (see eso_jax/model/transformer.py):

  loss(weights, config, tokens [B, L], draws) -> {term: scalar}
      The training loss in nats per token, by term; their sum is minimized.
  nelbo(weights, config, tokens [B, L], draws, alpha_0) -> {term: [B]}
      One Monte Carlo estimate per row, in nats per sequence; the sum over terms is unbiased for the NELBO, an upper
      bound of -log p (for AR, and for an Eso-LM at alpha_0 = 0, -log p itself). The bound's own weights always, no
      dropout. For other alpha_0 see the note on the law behind it in eso_jax/likelihood.py.
  log_likelihood(weights, config, tokens [B, L], order [B, L]) -> [B, L]
      log p of each token given those before it in the order, in the order; exact for the family's one-token-at-a-time
      sampler.
  plan(key, config, batch, steps, alpha_0, policy) -> Plan
      A plan that the family can follow; see eso_jax/decoding/plan.py.
  check_plan(config, plan)
      Raises an EsoError for one that it cannot.
  sampler(config) -> Sampler
      What a step's pass covers and who sees whom in it; see eso_jax/decoding/loop.py.

`sample` and `plan_log_prob` below decode and score along a plan by the family's sampler.

A family that lacks one raises an EsoError that says so. To add a family: write its module and name it in `BY_NAME` and
in `config.FAMILIES`; tests/test_families.py and tests/test_train.py then apply to it.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, Key

from eso_jax.config import Config, require
from eso_jax.decoding import loop
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.loop import Sampler
from eso_jax.decoding.plan import Plan
from eso_jax.families import ar, bd3lm, esolm, mdlm
from eso_jax.model.transformer import Weights
from eso_jax.noise import Draws


@runtime_checkable
class Family(Protocol):
    """The signatures of the functions above."""

    def loss(self, weights: Weights, config: Config, tokens: Int[Array, "B L"],
             draws: Draws) -> dict[str, Float[Array, ""]]: ...

    def nelbo(self, weights: Weights, config: Config, tokens: Int[Array, "B L"], draws: Draws,
              alpha_0: float) -> dict[str, Float[Array, " B"]]: ...

    def log_likelihood(self, weights: Weights, config: Config, tokens: Int[Array, "B L"],
                       order: Int[Array, "B L"]) -> Float[Array, "B L"]: ...

    def plan(self, key: Key[Array, ""], config: Config, batch: int, steps: int, alpha_0: float,
             policy: str = "binomial") -> Plan: ...

    def check_plan(self, config: Config, plan: Plan) -> None: ...

    def sampler(self, config: Config) -> Sampler: ...


BY_NAME: dict[str, Family] = {"esolm": esolm, "esolm_a": esolm, "mdlm": mdlm, "bd3lm": bd3lm, "ar": ar}


def get(config: Config) -> Family:
    """The family of a config."""
    return BY_NAME[config.family.name]


# What `--alpha-0` may say where there is no choice. An AR model is alpha_0 = 0; its config has the field's default, 1.
ONLY_ALPHA_0 = {"ar": (0.0, 1.0), "mdlm": (1.0,), "bd3lm": (1.0,)}


def alpha_0_of(config: Config, alpha_0: float | None) -> float:
    """The share of tokens left to diffusion: the one asked for, or the training value, which also stands for no choice.

    Raises:
      EsoError: it is no share, or the family has no such choice.
    """
    if alpha_0 is None:
        return config.family.alpha_0
    require(0 <= alpha_0 <= 1, "alpha_0", alpha_0, "must be in [0, 1]")
    name = config.family.name
    require(alpha_0 in ONLY_ALPHA_0.get(name, (alpha_0,)), "alpha_0", alpha_0,
            f"only Eso-LMs have a choice; leave it out for family.name = {name!r}")
    return config.family.alpha_0 if name in ONLY_ALPHA_0 else alpha_0


def sample(weights: Weights, config: Config, plan: Plan, key: Key[Array, ""], rule: Rule = Rule(),
           rows: Int[Array, " B"] | None = None) -> Int[Array, "B L"]:
    """Decodes a batch along the plan; tokens in natural order. Row b draws as row number rows[b] (b by default), so
    that a large sample can be decoded batch by batch."""
    get(config).check_plan(config, plan)
    return loop.sample(weights, config.model, get(config).sampler(config), plan, key, rule, rows)


def plan_log_prob(weights: Weights, config: Config, plan: Plan, tokens: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """log p of each token, in the order, when `tokens` are decoded along the plan: exact for the sampler that follows
    the plan, at a pass per step. Their sum is the law of a sample given its plan."""
    get(config).check_plan(config, plan)
    return loop.log_prob(weights, config.model, get(config).sampler(config), plan, tokens)
