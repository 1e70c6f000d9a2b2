"""Speculation draws from the law of one token a pass, to the accuracy of 16,000 samples.

The oracle's masks know all conditionals, so that a draft is wrong only for what it has not seen. How samples are held
against a law is said in test_samplers.py.

Axes: B batch, L length, O orders, X tokens.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oracle
from eso_jax import families
from eso_jax.config import Config, FamilyConfig
from eso_jax.decoding import categorical, decoders, speculative
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.decoders import Decoded
from eso_jax.decoding.plan import Plan
from eso_jax.decoding.speculative import Memory, Speculative, adapted, verify
from eso_jax.model import masks
from test_samplers import ALARM, CERTAIN, ORDERS, ROWS, p_value

TOKENS, LENGTH = 3, 6
P = oracle.joint(TOKENS, LENGTH)
CONFIG = Config(model=oracle.model(TOKENS, LENGTH), family=FamilyConfig(name="esolm"))
MASK = CONFIG.model.mask
OWN = Speculative(2, by_row=True)


@pytest.fixture(scope="module", autouse=True)
def _short_runs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoders, "PACE", 2)  # few passes do
        jax.clear_caches()
        yield
    jax.clear_caches()


def law(order: np.ndarray, given: np.ndarray, rule: Rule) -> np.ndarray:
    """That of a sample [X, ..., X], decoded one by one in an order [L] behind given tokens [L]: in each slot the rule
    has its way with the exact conditional."""
    total = np.ones((1,) * LENGTH)
    for factor, position in zip(oracle.law_by_slot(P, order, np.ones(LENGTH, int)), order.tolist(), strict=True):
        by_token = np.moveaxis(np.broadcast_to(factor, P.shape), position, -1)
        if given[position] != MASK:
            by_token = np.broadcast_to(np.arange(TOKENS) == given[position], P.shape)
        elif rule != Rule():
            by_token = np.asarray(categorical.law(jnp.log(by_token), rule), np.float64)
        total = total * np.moveaxis(by_token, -1, position)
    return total


def decoded(drafts: int | None, rule: Rule = Rule(), given: np.ndarray | None = None,
            **how: Any) -> tuple[Decoded, Plan]:
    """Samples in O random orders, which the rows take in turn; `given` [O, L] for each. None: a k of each row."""
    given = np.full((ORDERS, LENGTH), MASK) if given is None else given
    keys = jax.random.split(jax.random.key(3), ORDERS)
    plan = families.get(CONFIG).plan(keys, CONFIG, ORDERS, 1, 0.5, "one-by-one", known=given != MASK)
    rows = np.tile(np.arange(ORDERS), ROWS // ORDERS)
    key = jax.random.key(zlib.crc32(f"{drafts} {rule}".encode()))
    decoder = OWN if drafts is None else Speculative(drafts)
    found = decoders.sample(oracle.weights(P, shifted=False), CONFIG.model, oracle.sampler(CONFIG), plan.rows(rows),
                            key, decoder, rule, jnp.asarray(given[rows]), **how)
    return found, plan


def p_value_of(drafts: int | None, rule: Rule = Rule(), given: np.ndarray | None = None) -> float:
    """0 if there is a mask, or what no law allows."""
    found, plan = decoded(drafts, rule, given)
    tokens, none = np.asarray(found.tokens), np.full((ORDERS, LENGTH), MASK)
    if (tokens == MASK).any():
        return 0.0
    laws = np.stack([law(*each, rule) for each in zip(np.asarray(plan.order), none if given is None else given,
                                                      strict=True)])
    np.testing.assert_allclose(laws.reshape(ORDERS, -1).sum(1), 1, rtol=1e-5)
    counts = np.zeros(laws.shape, int)
    np.add.at(counts, (np.arange(ROWS) % ORDERS, *tokens.T), 1)
    if counts[laws == 0].any():
        return 0.0
    return 1.0 if rule.temperature == 0 else p_value(counts, laws)


GIVEN = np.array([[3, 3, 3, 3, 3, 3], [3, 0, 3, 3, 2, 3], [1, 3, 3, 0, 3, 1], [3, 1, 1, 2, 0, 0]])


@pytest.mark.parametrize(("drafts", "rule", "given"), [
    (1, Rule(), None), (2, Rule(top_p=0.7), GIVEN), (3, Rule(temperature=0.6), GIVEN),
    (5, Rule(min_p=0.4, banned=(1,)), None), (None, Rule(top_p=0.7), GIVEN)], ids=str)
def test_the_law_is_that_of_one_token_a_pass(drafts: int | None, rule: Rule, given: np.ndarray | None) -> None:
    assert p_value_of(drafts, rule, given) > ALARM


def test_greedy_is_greedy() -> None:
    assert p_value_of(2, Rule(temperature=0.0)) == 1


def exchanged(laws: jax.Array, drafts: Memory, uniforms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q in place of p, p in place of q."""
    return verify(laws.at[:, :-1].set(drafts.laws), drafts._replace(laws=laws[:, :-1]), uniforms)


def without_a_rest(laws: jax.Array, drafts: Memory, uniforms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Drawn by p where a draft was refused, not by what q has left of it."""
    accepted, _ = verify(laws, drafts, uniforms)
    law, own = (jnp.take_along_axis(x, accepted[:, None, None], axis=1)[:, 0] for x in (laws, uniforms))
    return accepted, categorical.pick(law, own[:, 3:]).astype(jnp.int32)


def of_others(laws: jax.Array, drafts: Memory, uniforms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The law of the draft in the next slot."""
    return verify(laws, drafts._replace(laws=jnp.roll(drafts.laws, 1, axis=1)), uniforms)


class Behind(masks.Drafts):
    """The token that a refused draft was replaced by is not seen."""

    def __call__(self, query: jax.Array, key: jax.Array, clean: jax.Array | int = 0) -> jax.Array:
        first = jnp.maximum(clean, self.drafts + 1)
        return super().__call__(query, key, clean) & ((query < first) | (key != clean - self.drafts - 1))


def beyond_a_rows_own(laws: jax.Array, drafts: Memory, uniforms: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As many drafts as the pass has room for."""
    return verify(laws, drafts._replace(drafted=jnp.full_like(drafts.drafted, drafts.tokens.shape[1])), uniforms)


def by_what_they_are(memory: Memory, wanted: np.ndarray, drafts: int) -> Memory:
    """Drafts that begin with a 0 are dropped."""
    memory = adapted(memory, wanted, drafts)
    return memory._replace(drafted=jnp.where(memory.tokens[:, 0] == 0, 0, memory.drafted))


MUTANTS: dict[str, tuple[str, Any]] = {
    "p and q are exchanged": ("verify", exchanged), "the rest is forgotten": ("verify", without_a_rest),
    "drafts and laws do not belong together": ("verify", of_others),
    "the token decoded last is not seen": ("Drafts", Behind)}
OF_OWN: dict[str, tuple[str, Any]] = {
    "drafts are not a row's own": ("verify", beyond_a_rows_own), "drafts are chosen": ("adapted", by_what_they_are)}


@pytest.mark.parametrize(("name", "wrong"), [*MUTANTS.values(), *OF_OWN.values()], ids=[*MUTANTS, *OF_OWN])
def test_a_wrong_speculation_is_rejected(name: str, wrong: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    jax.clear_caches()
    monkeypatch.setattr(speculative, name, wrong)
    assert p_value_of(None if (name, wrong) in OF_OWN.values() else 2) < CERTAIN
    jax.clear_caches()
