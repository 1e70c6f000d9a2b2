"""The families: what is corrupted, who sees whom, the loss, the bound and the sampler of each.

A family is one module with these functions, pure functions of `weights` (see eso_jax/transformer.py):

  loss(weights, config, tokens [B, L], draws) -> {term: scalar}
      The training loss in nats per token, by term; their sum is minimized.
  nelbo(weights, config, tokens [B, L], draws, alpha_0) -> {term: [B]}
      One Monte Carlo estimate per row, in nats per sequence; the sum over terms is unbiased for the NELBO, an upper
      bound of -log p (for AR, and for an Eso-LM at alpha_0 = 0, -log p itself). The bound's own weights always, no
      dropout. For other alpha_0 see the note on the law behind it in eso_jax/likelihood.py.
  log_likelihood(weights, config, tokens [B, L], order [B, L]) -> [B, L]
      log p of each token given those before it in the order, in the order; exact for the family's one-token-at-a-time
      sampler.
  plan(key, config, batch, steps, alpha_0) -> Plan
  sample(weights, config, plan, key, rule, first_row) -> tokens [B, L]
      Row b draws as row first_row + b, so that a large sample can be decoded batch by batch.

A family that lacks one raises an EsoError that says so. To add a family: write its module and name it in `BY_NAME` and
in `config.FAMILIES`; tests/test_families.py and tests/test_train.py then apply to it.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, Key

from eso_jax.config import Config
from eso_jax.families import ar, bd3lm, esolm, mdlm
from eso_jax.noise import Draws
from eso_jax.sampling.categorical import Rule
from eso_jax.sampling.plan import Plan
from eso_jax.transformer import Weights


@runtime_checkable
class Family(Protocol):
    """The signatures of the functions above."""

    def loss(self, weights: Weights, config: Config, tokens: Int[Array, "B L"],
             draws: Draws) -> dict[str, Float[Array, ""]]: ...

    def nelbo(self, weights: Weights, config: Config, tokens: Int[Array, "B L"], draws: Draws,
              alpha_0: float) -> dict[str, Float[Array, " B"]]: ...

    def log_likelihood(self, weights: Weights, config: Config, tokens: Int[Array, "B L"],
                       order: Int[Array, "B L"]) -> Float[Array, "B L"]: ...

    def plan(self, key: Key[Array, ""], config: Config, batch: int, steps: int, alpha_0: float) -> Plan: ...

    def sample(self, weights: Weights, config: Config, plan: Plan, key: Key[Array, ""],
               rule: Rule, first_row: int = 0) -> Int[Array, "B L"]: ...


BY_NAME: dict[str, Family] = {"esolm": esolm, "esolm_a": esolm, "mdlm": mdlm, "bd3lm": bd3lm, "ar": ar}


def get(config: Config) -> Family:
    """The family of a config."""
    return BY_NAME[config.family.name]
