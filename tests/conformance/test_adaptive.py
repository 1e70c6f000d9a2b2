"""Decoders that decide as they go draw from the law that each states, to the accuracy of 16,000 samples.

The law is listed in float64 from the joint alone: pass by pass, for every outcome of the passes before. What the
decoders decide with are the oracle's logits (oracle.py).

Axes: B batch, L length, O orders, X tokens.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from eso_jax import families
from eso_jax.config import Config, FamilyConfig
from eso_jax.decoding import adaptive, loop
from eso_jax.decoding.adaptive import Confidence, Entropy, Likeliest, Margin
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.decoders import Decoder, Progress
from eso_jax.decoding.passes import Shape, Step
from eso_jax.decoding.plan import Plan
from eso_jax.model import transformer
from test_samplers import ALARM, CERTAIN, p_value

TOKENS, LENGTH, ROWS, ORDERS = 3, 5, 2**14, 4
RULE = Rule(temperature=0.7, top_p=0.85)
Decide = Callable[[list[np.ndarray]], tuple[list[int], int]]  # laws of what is left -> (its order, how many are decoded)


@pytest.fixture(scope="module", autouse=True)
def _oracle() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "trunk", oracle.trunk)
        patch.setattr(transformer, "head", oracle.head)
        jax.config.update("jax_disable_most_optimizations", True)
        jax.clear_caches()
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


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
    "likeliest, 2": (Likeliest(2, most=2), ranked(2, np.max)),
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


@functools.partial(jax.jit, static_argnames=("config", "sampler"))
def passes(weights: Any, progress: Progress, decoder: Decoder, source: loop.Draw, end: Any, config: Any,
           sampler: Any) -> Progress:
    def body(progress: Progress, _: None) -> tuple[Progress, None]:
        return decoder.one_pass(weights, progress, source, end, config, sampler), None
    return jax.lax.scan(body, progress, length=config.length)[0]


def decode(family: str, decoder: Decoder, plan: Plan, given: Any, key: Any, rule: Rule = Rule(),
           p: np.ndarray | None = None) -> Any:
    p = oracle.joint(TOKENS, LENGTH) if p is None else p
    config, weights = config_of(family), oracle.weights(p, shifted=False)
    sampler = families.get(config).sampler(config)
    state = loop.start(weights, config.model, sampler, plan, given)
    first = jnp.broadcast_to(jnp.asarray(plan.given, jnp.int32), len(plan.order))
    if sampler.cached:
        state = loop.grow(state, Shape(LENGTH, 1, LENGTH))
        zero = jnp.int32(0)
        _, cache = loop.hidden_of(weights, state, Step(zero, zero, zero, first), sampler, Shape(LENGTH, 1, LENGTH))
        state = dataclasses.replace(state, cache=cache)
    rows = jnp.arange(len(plan.order))
    source = loop.Draw(loop.draw_uniforms(loop.row_keys(key, rows), LENGTH), rule)
    progress = Progress(state, first, first, 0 * first, jnp.full(plan.order.shape, -1, jnp.int32))
    end = jnp.broadcast_to(jnp.asarray(plan.end, jnp.int32), len(plan.order))
    progress = passes(weights, progress, decoder, source, end, config.model, sampler)
    index = jnp.argsort(progress.state.positions, axis=1)
    return np.asarray(jnp.take_along_axis(progress.state.tokens, index, axis=1)), progress


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
    x, progress = decode(family, decoder or real, plan, jnp.asarray(given[many]), jax.random.key(1), rule)
    if (x == TOKENS).any() or (np.asarray(progress.at) != LENGTH).any():
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


@pytest.mark.parametrize("rule", [Rule(), RULE], ids=["plain", "rule"])
@pytest.mark.parametrize("family", ["esolm", "mdlm"])
@pytest.mark.parametrize("name", DECODERS)
def test_samples_follow_the_law(name: str, family: str, rule: Rule) -> None:
    assert p_value_of(name, family, rule, with_given=rule == RULE) > ALARM
