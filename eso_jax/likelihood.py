"""Exact likelihoods given an order, and importance-weighted bounds from several.

-log p(x) <= -E[logsumexp_k log p(x | order_k) - log K], a bound that tightens with K (paper, eq. 9). Here p is the law
(the distribution) of decoding one token at a time: a masked token sees the clean ones and itself. In the diffusion pass
of the NELBO, and when several tokens are decoded at once, it sees earlier masks as well. So for an Eso-LM the NELBO
bounds the likelihood of a slightly different law, and may lie on either side of the K = 1 value (the paper's tables
show it too).

The functions take an engine (a loaded model is one), which has the devices and the batch size.

Axes: B batch, L length, O orders (the paper's K).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from eso_jax import families, sharding
from eso_jax.config import Config
from eso_jax.decoding.order import check_permutations, sort, unsort
from eso_jax.decoding.plan import Plan
from eso_jax.engine.rows import Engine
from eso_jax.errors import EsoError, require
from eso_jax.model import vocabulary
from eso_jax.model.params import Weights


def log_prob(engine: Engine, tokens: np.ndarray, orders: np.ndarray) -> Float[np.ndarray, "O B"]:
    """log p(tokens[b] | orders[o, b]) in nats, exact for decoding one token at a time.

    Eso-LM and AR take one pass per order. MDLM and BD3-LM have no such pass: the sampler that decodes one token per
    step is run with the tokens given, L passes per order (BD3-LM's orders must keep to its blocks).

    Args:
      tokens: int [B, L], no masks.
      orders: int [O, B, L], permutations.

    Raises:
      EsoError: for tokens or orders that do not fit the model, or a family that has no such likelihood.
    """
    config, tokens, orders = engine.config, np.asarray(tokens), np.asarray(orders)
    check_tokens(tokens, config)
    require(orders.ndim == 3 and len(orders) >= 1 and orders.shape[1:] == tokens.shape, "orders", orders.shape,
            f"must have shape [K, {tokens.shape[0]}, {tokens.shape[1]}]")
    check_permutations(orders, config.model.length)
    family = families.get(config)
    family.check_orders(config, orders)
    flat, batch, law = orders.reshape(-1, orders.shape[-1]).astype(np.int32), len(tokens), config.law()

    def score(weights: Weights, tokens: Array, order: Array) -> Array:
        if family.one_pass:
            return log_prob_in_order(weights, law, tokens, order).sum(axis=1)
        plan = Plan(order, np.ones(order.shape[1], np.int64))
        return families.plan_log_prob(weights, config, plan, tokens).sum(axis=1)

    found: np.ndarray = engine.rows(score, len(flat), lambda rows: (tokens[rows % batch].astype(np.int32), flat[rows]),
                                    "scoring")
    return found.reshape(orders.shape[:2])


@functools.partial(jax.jit, static_argnames="config")
def log_prob_in_order(weights: Weights, config: Config, tokens: Int[Array, "B L"],
                       order: Int[Array, "B L"]) -> Float[Array, "B L"]:
    """`Family.log_likelihood` of the config's family, compiled: log p of each token in nats, in the order."""
    return families.get(config).log_likelihood(weights, config, tokens, order)


def plan_log_prob(engine: Engine, tokens: np.ndarray, plan: Plan) -> Float[np.ndarray, "B L"]:
    """log p of each token in nats, in the order, when tokens [B, L] are decoded along the plan; 0 for those that are
    given, or that it leaves, which may be masks. In one pass where the family has it (Eso-LM (B), AR), elsewhere by the
    sampler's own steps, a pass each."""
    tokens, order = np.asarray(tokens), np.asarray(plan.order)
    require(order.shape == tokens.shape, "plan", order.shape, f"its order must have shape {tokens.shape}")
    mask, is_left = engine.config.model.mask, order.argsort(axis=1) >= np.reshape(plan.end, (-1, 1))
    tokens = np.where(is_left & (tokens == mask), int(mask == 0), tokens)  # any id but the mask
    check_tokens(tokens, engine.config)

    if families.get(engine.config).one_pass_plans:
        log_p, config = families.plan_log_likelihood, engine.config.law()
    else:
        log_p, config = families.plan_log_prob, engine.config

    def score(weights: Weights, tokens: Array, order: Array, rows: Array) -> Array:
        here = dataclasses.replace(plan.rows(sharding.fetch(rows)), order=order)
        return log_p(weights, config, here, tokens)

    found: np.ndarray = engine.rows(score, len(tokens), lambda rows: (tokens[rows].astype(np.int32), order[rows],
                                                                      rows.astype(np.int32)), "scoring")
    return found


class Conditionals(NamedTuple):
    """By natural position.

    Attributes:
      logp: float32 [B, L], log p of each wanted token given the given ones and the wanted ones before it, in nats; 0
        elsewhere.
      greedy: bool [B, L], whether it is the likeliest token there; True elsewhere.
    """

    logp: Float[np.ndarray, "B L"]
    greedy: Bool[np.ndarray, "B L"]


def conditional(engine: Engine, tokens: np.ndarray, given: np.ndarray, wanted: np.ndarray) -> Float[np.ndarray, " B"]:
    """log p(tokens that are wanted | tokens that are given) in nats: the sum over tokens of `conditionals`, which says
    what the arguments [B, L] are."""
    return conditionals(engine, tokens, given, wanted).logp.sum(axis=1, dtype=np.float32)


def conditionals(engine: Engine, tokens: np.ndarray, given: np.ndarray, wanted: np.ndarray,
                 label: str | None = "scoring") -> Conditionals:
    """log p of each wanted token, given the tokens in `given`, exact for an Eso-LM (B): the given ones come first in
    the order, then the wanted ones, both ascending; the others are not used. AR can be given prefixes only.

    Args:
      tokens: int [B, L], no masks. Those neither given nor wanted may be anything.
      given, wanted: bool [B, L], disjoint.
      label: of the progress bar; None: there is none.

    Raises:
      EsoError: arguments that do not fit, or a family without conditionals in one pass.
    """
    config = engine.config
    tokens, given, wanted = (np.asarray(x) for x in (tokens, given, wanted))
    for name, flags in (("given", given), ("wanted", wanted)):
        require(flags.shape == tokens.shape and flags.dtype == bool, name, f"{flags.dtype} {flags.shape}",
                f"must be bool {tokens.shape}")
    require(not (given & wanted).any(), "wanted", "some that are given", "a token is either given or wanted")
    tokens = np.where(given | wanted, tokens, int(config.model.mask == 0))  # the rest: any id but the mask
    check_tokens(tokens, config)
    family = families.get(config)
    family.check_conditionals()
    rank = np.where(given, 0, np.where(wanted, 1, 2))
    orders = np.argsort(rank, axis=1, kind="stable").astype(np.int32)
    family.check_given_first(orders)
    law = config.law()
    logp, likeliest = engine.rows(lambda weights, *arrays: _conditionals(weights, law, *arrays), len(tokens),
                                  lambda rows: (tokens[rows].astype(np.int32), orders[rows]), label)
    return Conditionals(np.where(wanted, logp, np.float32(0)), ~wanted | (likeliest == tokens))


@functools.partial(jax.jit, static_argnames="config")
def _conditionals(weights: Weights, config: Config, tokens: Int[Array, "B L"],
                  order: Int[Array, "B L"]) -> tuple[Float[Array, "B L"], Int[Array, "B L"]]:
    """log p of each token given those before it in the order, and the likeliest token there, by natural position."""
    hidden = families.get(config).predictors(weights, config, tokens, order)
    logp = -vocabulary.nll(weights, hidden, sort(tokens, order), config.model.mask)
    return unsort(logp, order), unsort(vocabulary.likeliest(weights, hidden, config.model.mask), order)


def iw_bound(logp_per_order: Float[np.ndarray, "O B"]) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, " B"]]:
    """The importance-weighted lower bound of log p(x) in nats, and its standard error (nan for one order).

    The error is the delta method's: the relative standard error of the mean likelihood over orders.
    """
    count = len(logp_per_order)
    wide = logp_per_order.astype(np.float64)
    top = wide.max(0)
    likelihood = np.exp(wide - top)
    mean = likelihood.mean(0)
    error = likelihood.std(0, ddof=1) / np.sqrt(count) / mean if count > 1 else np.full(top.shape, np.nan)
    return (top + np.log(mean)).astype(np.float32), error.astype(np.float32)


def check_tokens(tokens: np.ndarray, config: Config) -> None:
    """Raises an EsoError unless tokens are int [B, L] of this model, without masks."""
    model = config.model
    require(tokens.ndim == 2 and np.issubdtype(tokens.dtype, np.integer), "tokens", f"{tokens.dtype} {tokens.shape}",
            "must be integers [B, L]")
    require(tokens.shape[1] == model.length, "tokens", tokens.shape,
            f"the model has length {model.length}; cut or pack the text to it")
    require(len(tokens) >= 1, "tokens", tokens.shape, "there is nothing to score")
    bad = (tokens < 0) | (tokens >= model.vocab_size) | (tokens == model.mask)
    if bad.any():
        row, column = np.argwhere(bad)[0].tolist()
        where, found = f"tokens[{row}, {column}]", int(tokens[row, column])
        require(found != model.mask, where, found, "is the mask, so this text was not decoded to its end (--template, "
                "--max-tokens, --stop); only whole texts are scored")
        raise EsoError(f"{where} = {found}: ids must be in [0, {model.vocab_size})")
