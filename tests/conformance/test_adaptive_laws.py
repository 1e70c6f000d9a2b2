"""Decoders that decide as they go draw from the law that each states, to the accuracy of 16,000 samples.

The law is listed in float64 from the joint alone: pass by pass, for every outcome of the passes before. What the
decoders decide with are the oracle's logits (oracle.py).

Axes: B batch, L length, O orders, X tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from eso_jax.config import Config, FamilyConfig
from eso_jax.decoding import decoders, loop
from eso_jax.decoding.adaptive import Confidence, Entropy, Likeliest, Margin
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.decoders import Decoded, Decoder
from eso_jax.decoding.plan import Plan
from test_samplers import ALARM, CERTAIN, p_value

TOKENS, LENGTH, ROWS, ORDERS = 3, 5, 2**14, 4
RULE = Rule(temperature=0.7, top_p=0.85)
# Laws of what is left -> (its order, how many of it are decoded).
Decide = Callable[[list[np.ndarray]], tuple[list[int], int]]


def along(count: Callable[[list[np.ndarray]], int], most: int) -> Decide:
    return lambda laws: (list(range(len(laws))), min(count(laws), most))


def by_entropy(budget: float) -> Callable[[list[np.ndarray]], int]:
    def count(laws: list[np.ndarray]) -> int:
        entropies = [-(law * np.log(law)).sum() for law in laws]
        return max(n for n in range(1, len(laws) + 1)
                   if n == 1 or sum(entropies[:n]) - max(entropies[:n]) <= budget)
    return count


def by_confidence(least: float) -> Callable[[list[np.ndarray]], int]:
    return lambda laws: 1 + sum(1 for _ in itertools.takewhile(lambda law: law.max() >= least, laws[1:]))


def ranked(number: int, certainty: Callable[[np.ndarray], float]) -> Decide:
    return lambda laws: (sorted(range(len(laws)), key=lambda i: -certainty(laws[i])), number)


def margin(law: np.ndarray) -> float:
    return float(np.sort(law)[-1] - np.sort(law)[-2])


DECODERS: dict[str, tuple[Decoder, Decide]] = {
    "entropy": (Entropy(1.0, most=4), along(by_entropy(1.0), 4)),
    "entropy, few": (Entropy(1.7, most=2), along(by_entropy(1.7), 2)),
    "confidence": (Confidence(0.6, most=4), along(by_confidence(0.6), 4)),
    "likeliest, 1": (Likeliest(1), ranked(1, np.max)),
    "likeliest, 2": (Likeliest(2), ranked(2, np.max)),
    "margin, 2": (Margin(2), ranked(2, margin)),
}


def by_rule(law: np.ndarray, rule: Rule) -> np.ndarray:
    law = law ** (1 / rule.temperature) / (law ** (1 / rule.temperature)).sum()
    above = np.array([law[law > each].sum() for each in law])
    law = np.where(above <= rule.top_p, law, 0) if rule.top_p < 1 else law
    return law / law.sum()


def law_of(decide: Decide, p: np.ndarray, order: np.ndarray, given: dict[int, int], rule: Rule = Rule()) -> np.ndarray:
    """The law of samples of this order [L], float64 [X, ..., X], where tokens are given by natural position."""
    found = np.zeros(p.shape)

    def conditional(known: dict[int, int], position: int) -> np.ndarray:
        part = p[tuple(slice(known[i], known[i] + 1) if i in known else slice(None) for i in range(p.ndim))]
        law = part.sum(tuple(i for i in range(p.ndim) if i != position))
        return law / law.sum()

    def visit(known: dict[int, int], rest: list[int], weight: float) -> None:
        if not rest:
            found[tuple(known[i] for i in range(p.ndim))] = weight
            return
        laws = [conditional(known, position) for position in rest]
        places, count = decide(laws)
        chosen = [rest[i] for i in places[:count]]
        drawn = [by_rule(laws[i], rule) for i in places[:count]]
        for tokens in itertools.product(range(len(p)), repeat=len(chosen)):
            share = np.prod([law[token] for law, token in zip(drawn, tokens, strict=True)])
            if share > 0:
                visit({**known, **dict(zip(chosen, tokens, strict=True))}, [rest[i] for i in places[count:]],
                      weight * share)

    visit(given, [int(i) for i in order if i not in given], 1.0)
    return found


def decode(family: str, decoder: Decoder, plan: Plan, given: np.ndarray, rule: Rule = Rule(),
           p: np.ndarray | None = None) -> Decoded:
    p = oracle.joint(TOKENS, LENGTH) if p is None else p
    keys, config = loop.row_keys(jax.random.key(1), jnp.arange(len(given))), config_of(family)
    found = decoders.sample(oracle.weights(p, shifted=False), config.model, oracle.sampler(config), plan, keys, decoder,
                            rule, jnp.asarray(given))
    return jax.tree.map(np.asarray, found)


def config_of(family: str) -> Config:
    return Config(model=oracle.model(TOKENS, LENGTH), family=FamilyConfig(name=family))


def p_value_of(name: str, family: str = "esolm", rule: Rule = Rule(), with_given: bool = False,
               decoder: Decoder | None = None) -> float:
    real, decide = DECODERS[name]
    p, rng, many = oracle.joint(TOKENS, LENGTH), np.random.default_rng(0), np.arange(ROWS) % ORDERS
    orders = rng.permuted(np.tile(np.arange(LENGTH), (ORDERS, 1)), axis=1)
    number = np.array([0, 1, 2, LENGTH - 1]) if with_given else np.zeros(ORDERS, int)
    given = rng.integers(TOKENS, size=orders.shape)
    counts = np.arange(LENGTH) < LENGTH - number[:, None]
    plan = Plan(jnp.asarray(orders[many]), counts[many].astype(int), given=number[many])
    x = decode(family, decoder or real, plan, given[many], rule).tokens
    if (x == TOKENS).any():
        return 0.0
    values = []
    for row, order in enumerate(orders):
        own = {int(i): int(given[row, i]) for i in order[:number[row]]}
        law = law_of(decide, p, order, own, rule)
        np.testing.assert_allclose(law.sum(), 1)
        seen = np.zeros(law.shape, int)
        np.add.at(seen, tuple(x[many == row].T), 1)
        if seen[law == 0].any():
            return 0.0
        values.append(p_value(seen[None], law[None]))
    return min(1.0, ORDERS * min(values))


@pytest.mark.parametrize("name", DECODERS)
def test_samples_follow_the_law(name: str) -> None:
    assert p_value_of(name) > ALARM


@pytest.mark.parametrize("name", ["entropy", "margin, 2"])
def test_samples_follow_the_law_without_a_cache(name: str) -> None:
    assert p_value_of(name, "mdlm") > ALARM


@pytest.mark.parametrize("name", ["entropy", "confidence", "likeliest, 2"])
def test_samples_follow_the_law_of_the_rule_behind_given_tokens(name: str) -> None:
    """What decides is the model's law, what draws is the rule's."""
    assert p_value_of(name, rule=RULE, with_given=True) > ALARM


class WrongSlot(Entropy):
    def fits(self, logits: jax.Array, bound: jax.Array) -> jax.Array:
        return super().fits(jnp.roll(logits, 1, axis=1), bound)


class OfAll(Entropy):
    def fits(self, logits: jax.Array, bound: jax.Array) -> jax.Array:
        return jnp.flip(super().fits(jnp.flip(logits, 1), bound), 1)


class WithTheLargest(Entropy):
    def fits(self, logits: jax.Array, bound: jax.Array) -> jax.Array:
        return jnp.cumsum(jax.scipy.special.entr(jax.nn.softmax(logits)).sum(-1), axis=1) <= bound


class AfterTheRule(Entropy):
    def fits(self, logits: jax.Array, bound: jax.Array) -> jax.Array:
        return super().fits(logits / RULE.temperature, bound)


class NeverFed(Entropy):
    """The keys and values of what the last pass decoded stay those of masks."""

    def one_pass(self, weights: Any, progress: Any, *rest: Any) -> Any:
        found = super().one_pass(weights, progress, *rest)
        return dataclasses.replace(found, clean=found.at)


class OfTheSlotBefore(Confidence):
    def fits(self, logits: jax.Array, bound: jax.Array) -> jax.Array:
        return jnp.roll(super().fits(logits, bound), 1, axis=1)


class LeastLikely(Likeliest):
    def certainty(self, logits: jax.Array) -> jax.Array:
        return -super().certainty(logits)


class InPlace(Likeliest):
    """The order stays as it was: what was found is decoded elsewhere."""

    def one_pass(self, weights: Any, progress: Any, *rest: Any) -> Any:
        found = super().one_pass(weights, progress, *rest)
        state = dataclasses.replace(found.state, positions=progress.state.positions)
        return dataclasses.replace(found, state=state)


MUTANTS: dict[Decoder, str] = {
    WrongSlot(1.0, 4): "entropy", OfAll(1.0, 4): "entropy", WithTheLargest(1.0, 4): "entropy",
    NeverFed(1.0, 4): "entropy", OfTheSlotBefore(0.6, 4): "confidence", LeastLikely(2): "likeliest, 2",
    InPlace(1): "likeliest, 1"}


@pytest.mark.parametrize("wrong", MUTANTS, ids=lambda wrong: type(wrong).__name__)
def test_a_wrong_decoder_is_rejected(wrong: Decoder) -> None:
    assert p_value_of(MUTANTS[wrong], decoder=wrong) < CERTAIN


def test_the_rule_decides_nothing() -> None:
    assert p_value_of("entropy", rule=RULE, decoder=AfterTheRule(1.0, 4)) < CERTAIN


def test_the_bound_itself_is_within_it() -> None:
    """Where all tokens are equally likely, a sum of entropies and a probability meet their bounds exactly."""
    p, given = np.full((TOKENS,) * LENGTH, TOKENS**-LENGTH), np.zeros((2, LENGTH), int)
    plan = Plan(jnp.tile(jnp.arange(LENGTH), (2, 1)), np.ones(LENGTH, int))
    entropy = float(jax.scipy.special.entr(jax.nn.softmax(jnp.zeros(TOKENS))).sum())
    for decoder, passes in ((Entropy(entropy), 3), (Entropy(entropy * (1 - 1e-5)), 5), (Confidence(1 / TOKENS), 1),
                            (Confidence(1 / TOKENS * (1 + 1e-5)), 5)):
        assert (decode("esolm", decoder, plan, given, p=p).step.max(1) + 1 == passes).all(), decoder
