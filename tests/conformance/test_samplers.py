"""Every sampler draws from the law that its plan states, to the accuracy of 16,000 samples.

An oracle that knows all conditionals of a small joint distribution (oracle.py) takes the denoiser's place; the plans,
the loop, the cache, the attention and the draws are the real ones. The law of what is then drawn is known, and the
counts of all sequences are held against it by a chi-square test.

A new sampler is tested by adding one line to `SAMPLERS`.

A correct sampler is rejected with probability 1e-4 (`ALARM`), some line of the table with at most 1e-4 per line, under
half a percent in all. Seeds are fixed, so a false alarm can only come with a change to what is drawn, and stays.

Left to tests/test_sampling.py, where a step must equal the family's training pass: which masks a slot sees, which tell
the oracle nothing, and numbers closer than samples can tell.

Axes: B batch, L length, O orders, X tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2

import oracle
from conftest import brief
from eso_jax import families
from eso_jax.config import Config, FamilyConfig
from eso_jax.decoding import loop, passes
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.plan import Plan
from eso_jax.model import masks
from eso_jax.model.params import Weights

ROWS, ORDERS = 2**14, 4  # samples, and the orders that they share
ALARM = 1e-4  # the p-value under which a sampler is rejected
CERTAIN = 1e-20  # and that which a wrong one must not reach

SHORT, LONG = (3, 6), (2, 9)  # tokens, length; above a length of 8 windows and widths are rounded up


class Case(NamedTuple):
    """A line of the table.

    Attributes:
      family: its name.
      policy: a plan's name; or the tokens per step of a plan that is given, with random orders.
      steps, alpha_0: of the plan.
      options: of the family's config.
      shape: tokens and length.
    """

    family: str
    policy: str | tuple[int, ...]
    steps: int = 3
    alpha_0: float = 1.0
    options: dict[str, Any] = {}
    shape: tuple[int, int] = SHORT

    def __str__(self) -> str:
        policy = self.policy if isinstance(self.policy, str) else "+".join(map(str, self.policy))
        options = [f"{name}={value}" for name, value in self.options.items()]
        return "-".join([self.family, policy, f"T={self.steps}", f"alpha_0={self.alpha_0}", *options,
                         f"L={self.shape[1]}"])


SAMPLERS = [
    Case("esolm", "binomial", alpha_0=0.0),
    Case("esolm", "binomial", alpha_0=0.5),
    Case("esolm", "binomial"),
    Case("esolm", "balanced", alpha_0=0.0),
    Case("esolm", "balanced", steps=2, alpha_0=0.5),
    Case("esolm", "balanced"),
    Case("esolm", "one-by-one", alpha_0=0.0),
    Case("esolm", "one-by-one", alpha_0=0.5),
    Case("esolm", "one-by-one"),
    Case("esolm", "strided"),
    Case("esolm", "strided-shared"),
    Case("esolm", "strided-row"),
    Case("esolm", "left-to-right"),
    Case("esolm", (3, 3, 3), shape=LONG),
    Case("esolm_a", "binomial", alpha_0=0.0),
    Case("esolm_a", "binomial"),
    Case("esolm_a", "balanced", steps=2, alpha_0=0.7),
    Case("esolm_a", "one-by-one", alpha_0=0.5),
    Case("esolm_a", "strided-row"),
    Case("ar", "left-to-right"),
    Case("ar", "left-to-right", options={"start_id": 0}),
    Case("mdlm", "binomial"),
    Case("mdlm", "one-by-one"),
    Case("bd3lm", "binomial", steps=6, options={"block_size": 2}),
    Case("bd3lm", "binomial", steps=4, options={"block_size": 3}),
    Case("bd3lm", "one-by-one", options={"block_size": 2}),
    Case("bd3lm", "one-by-one", options={"block_size": 3}),
    Case("bd3lm", "one-by-one", options={"block_size": 3}, shape=LONG),
]


@pytest.fixture(scope="module", autouse=True)
def _short_parts() -> Iterator[None]:
    """At the longer length the cache grows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "PART", 8)
        yield


def config_of(case: Case) -> Config:
    return Config(model=oracle.model(*case.shape), family=FamilyConfig(name=case.family, **case.options))


def weights_of(case: Case) -> Weights:
    return oracle.weights(oracle.joint(*case.shape), shifted=case.family == "ar")


def plan_of(case: Case, rows: int) -> Plan:
    """The case's plan for O orders, which the rows take in turn."""
    config = config_of(case)
    if isinstance(case.policy, tuple):
        orders = np.random.default_rng(0).permuted(np.tile(np.arange(config.model.length), (ORDERS, 1)), axis=1)
        plan = Plan(jnp.asarray(orders), np.array(case.policy))
    else:
        plan = families.get(config).plan(jax.random.key(0), config, ORDERS, case.steps, case.alpha_0, case.policy)
    return Plan(jnp.tile(plan.order, (rows // ORDERS, 1)), plan.tokens_per_step, plan.diffusion)


def laws_of(case: Case, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """The law of each distinct order, [O, X, ..., X], and which of them each row has, [B]."""
    orders, which = np.unique(plan.order, axis=0, return_inverse=True)
    laws = [oracle.law(oracle.joint(*case.shape), order, plan.tokens_per_step) for order in orders]
    return np.stack(laws), which.reshape(-1)


def p_value(counts: np.ndarray, laws: np.ndarray) -> float:
    """Chi-square of counts [O, X, ..., X], each order's against its own law, so that a row decoded along another row's
    order is noticed. The sequences that an order is expected to give less than 5 times make up one cell."""
    statistic = freedom = 0.0
    for observed, law in zip(counts.reshape(len(counts), -1), laws.reshape(len(laws), -1), strict=True):
        expected = observed.sum() * law
        cell = np.where(expected < 5, 0, 1 + np.arange(len(law)))
        observed, expected = (np.bincount(cell, weights=n) for n in (observed, expected))
        used = expected > 0
        statistic += ((observed - expected)[used] ** 2 / expected[used]).sum()
        freedom += used.sum() - 1
    return float(chi2.sf(statistic, freedom))


def p_value_of(case: Case, rule: Rule = Rule(), **changes: Any) -> float:
    """That of the case's samples under the law of their plan; 0 if they hold a mask, which no law allows.

    Args:
      changes: to fields of the sampler.
    """
    config, plan = config_of(case), plan_of(case, ROWS)
    key = jax.random.key(zlib.crc32(str(case).encode()))
    x = np.asarray(loop.sample(weights_of(case), config.model, oracle.sampler(config, **changes), plan, key, rule))
    if (x == config.model.mask).any():
        return 0.0
    laws, which = laws_of(case, plan)
    counts = np.zeros(laws.shape, int)
    np.add.at(counts, (which, *x.T), 1)
    return p_value(counts, laws)


def first_of_each(cases: list[Case]) -> list[Any]:
    """Those that the short run keeps: one of each policy of a family."""
    return brief(cases, *{(case.family, case.policy): case for case in reversed(cases)}.values())


@pytest.mark.parametrize("case", first_of_each(SAMPLERS), ids=str)
def test_samples_follow_the_law(case: Case) -> None:
    assert p_value_of(case) > ALARM


@pytest.mark.parametrize("case", SAMPLERS, ids=str)
def test_scores_are_the_law(case: Case) -> None:
    config, plan, p = config_of(case), plan_of(case, 2 * ORDERS), oracle.joint(*case.shape)
    x = np.random.default_rng(1).integers(len(p), size=plan.order.shape)
    scores = loop.log_prob(weights_of(case), config.model, oracle.sampler(config), plan, jnp.asarray(x, jnp.int32))
    for row, order in enumerate(np.asarray(plan.order)):
        factors = oracle.law_by_slot(p, order, plan.tokens_per_step)
        law = [np.broadcast_to(factor, p.shape)[tuple(x[row])] for factor in factors]
        np.testing.assert_allclose(scores[row], np.log(law), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", SAMPLERS, ids=str)
def test_only_parallel_steps_leave_the_joint(case: Case) -> None:
    """One token per step is exact in any order. With more, samples of the joint itself would be rejected by far."""
    plan = plan_of(case, ORDERS)
    laws, _ = laws_of(case, plan)
    joint = np.broadcast_to(oracle.joint(*case.shape), laws.shape)
    np.testing.assert_allclose(laws.reshape(len(laws), -1).sum(1), 1, rtol=1e-12)
    if plan.nfe == plan.length:
        np.testing.assert_allclose(laws, joint, rtol=1e-12)
    else:
        assert p_value(ROWS / len(laws) * joint, laws) < CERTAIN


GIVEN = [
    Case("esolm", "binomial", alpha_0=0.5),
    Case("esolm", "balanced"),
    Case("esolm", "one-by-one", alpha_0=0.0),
    Case("esolm", "left-to-right", shape=LONG),
    Case("esolm_a", "binomial"),
    Case("esolm_a", "one-by-one", alpha_0=0.0),
    Case("ar", "left-to-right"),
    Case("ar", "left-to-right", options={"start_id": 0}),
    Case("mdlm", "binomial"),
    Case("bd3lm", "binomial", steps=6, options={"block_size": 2}),
    Case("bd3lm", "one-by-one", options={"block_size": 3}),
    Case("bd3lm", "one-by-one", options={"block_size": 3}, shape=LONG),
]


def given_of(case: Case) -> tuple[np.ndarray, Plan]:
    """What O rows are given (a different number of tokens each, the mask where none is), and their plan."""
    config, (tokens, length) = config_of(case), case.shape
    rng = np.random.default_rng(2)
    known = rng.permuted(np.arange(length) < np.array([0, 1, 2, length - 2])[:, None], axis=1)
    if case.family == "ar":
        known = np.sort(known, axis=1)[:, ::-1]
    if case.family == "bd3lm":  # whole blocks, then one of the tokens of the next
        block = case.options["block_size"]
        known = np.arange(length) < np.array([0, 0, block, length - block])[:, None]
        known[[1, 3], [1, length - 1]] = True
    keys = jax.random.split(jax.random.key(3), ORDERS)
    plan = families.get(config).plan(keys, config, ORDERS, case.steps, case.alpha_0, case.policy, known=known)
    return np.where(known, rng.integers(tokens, size=known.shape), config.model.mask), plan


def p_value_given(case: Case, order: jax.Array | None = None) -> float:
    """That of samples with tokens given, under the conditional law of the others; 0 if what was given has changed.

    Args:
      order: to decode in, if not the plan's.
    """
    given, plan = given_of(case)
    if order is not None:
        plan = dataclasses.replace(plan, order=order)
    config, many = config_of(case), np.arange(ROWS) % ORDERS
    key = jax.random.key(zlib.crc32(str(case).encode()))
    x = np.asarray(loop.sample(weights_of(case), config.model, oracle.sampler(config), plan.rows(many), key,
                               given=jnp.asarray(given[many])))
    laws, counts, p = [], [], oracle.joint(*case.shape)
    for row, (own, steps, number) in enumerate(zip(given, plan.tokens_per_step, plan.given, strict=True)):
        known, mine = own != config.model.mask, x[many == row]
        if (mine[:, known] != own[known]).any() or (mine == config.model.mask).any():
            return 0.0
        factors = oracle.law_by_slot(p, given_of(case)[1].order[row], np.concatenate([[number], steps[steps > 0]]))
        at = tuple(int(token) if clean else slice(None) for token, clean in zip(own, known, strict=True))
        law = np.broadcast_to(functools.reduce(np.multiply, factors[number:]), p.shape)[at]
        seen = np.zeros(law.shape, int)
        np.add.at(seen, tuple(mine[:, ~known].T), 1)
        laws.append(law)
        counts.append(seen)
    values = [p_value(seen[None], law[None]) for seen, law in zip(counts, laws, strict=True)]
    return min(1.0, len(values) * min(values))


@pytest.mark.parametrize("case", first_of_each(GIVEN), ids=str)
def test_samples_follow_the_conditional_law(case: Case) -> None:
    assert p_value_given(case) > ALARM


@pytest.mark.parametrize("case", GIVEN, ids=str)
def test_scores_are_the_conditional_law(case: Case) -> None:
    (given, plan), config = given_of(case), config_of(case)
    p, rng = oracle.joint(*case.shape), np.random.default_rng(1)
    x = np.where(given == config.model.mask, rng.integers(len(p), size=given.shape), given)
    scores = loop.log_prob(weights_of(case), config.model, oracle.sampler(config), plan, jnp.asarray(x, jnp.int32))
    for row, (steps, number) in enumerate(zip(plan.tokens_per_step, plan.given, strict=True)):
        factors = oracle.law_by_slot(p, plan.order[row], np.concatenate([[number], steps[steps > 0]]))
        law = [np.broadcast_to(factor, p.shape)[tuple(x[row])] for factor in factors[number:]]
        np.testing.assert_allclose(scores[row], np.log([1] * number + law), atol=1e-5, rtol=0)


def test_given_tokens_that_do_not_pass_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass over them that ends a slot too early, at the length where it is not rounded up."""
    real = passes.over_given

    def short(plan: Plan, stop: int, live: int) -> passes.Run:
        run = real(plan, stop, live)
        return run._replace(shape=run.shape._replace(window=stop - 1))

    monkeypatch.setattr(passes, "over_given", short)
    assert p_value_given(Case("esolm", "one-by-one", alpha_0=0.0)) < CERTAIN
    assert p_value_given(Case("ar", "left-to-right")) < CERTAIN


def test_given_tokens_that_do_not_come_first_are_noticed() -> None:
    case = Case("esolm", "one-by-one", alpha_0=0.0)
    assert p_value_given(case, given_of(case)[1].order[:, ::-1]) < CERTAIN


class Blind(masks.Pattern):
    """A pattern that hides the first slot."""

    def __call__(self, query: jax.Array, key: jax.Array, clean: jax.Array | int = 0) -> jax.Array:
        return super().__call__(query, key - 1, clean)


# What is wrong, where, and by which fields of its Sampler.
MUTANTS: dict[str, tuple[Case, dict[str, Any]]] = {
    "the tokens decoded last are never fed": (
        Case("esolm", "balanced"), {"window": lambda plan: (plan.first, plan.first + plan.tokens_per_step)}),
    "slots are seen that were never written": (
        Case("esolm", "balanced"), {"pattern": masks.EVERYONE}),
    "the first token is never seen": (
        Case("mdlm", "one-by-one"), {"pattern": Blind(None)}),
    "the last token of a block is never fed": (
        Case("bd3lm", "one-by-one", options={"block_size": 3}),
        {"window": lambda plan: (plan.first // 3 * 3, plan.first // 3 * 3 + 3)}),
    "the input is not shifted": (Case("ar", "left-to-right"), {"start_id": None}),
}


@pytest.mark.parametrize(("case", "changes"), MUTANTS.values(), ids=list(MUTANTS))
def test_a_wrong_sampler_is_rejected(case: Case, changes: dict[str, Any]) -> None:
    assert p_value_of(case, **changes) < CERTAIN


@pytest.mark.parametrize("rule", [Rule(temperature=0.8), Rule(top_p=0.95)], ids=str)
def test_a_wrong_draw_is_rejected(rule: Rule) -> None:
    assert p_value_of(Case("esolm", "balanced"), rule) < CERTAIN
