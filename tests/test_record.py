"""The record of a generation: what was known of each token when it was drawn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conftest import brief, engine, random_weights, tiny_config
from eso_jax import families, likelihood
from eso_jax.decoding import record
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.plan import Plan
from eso_jax.engine.model import Model

LENGTH, VOCABULARY = 8, 9
RULES = {"top_p": 0.8, "temperature": 0.7, "min_p": 0.05}


@pytest.mark.parametrize("name", brief(families.BY_NAME, "esolm", "mdlm", "bd3lm"))
def test_a_record_is_the_law_of_its_plan(name: str) -> None:
    config = tiny_config(name, LENGTH, VOCABULARY, **({"block_size": 4} if name == "bd3lm" else {}))
    made = engine(config, random_weights(config.model))
    model = Model(config, made.weights, made.mesh, 2, step=0, tokenizer=None)
    alpha_0 = 0.5 if name.startswith("esolm") else None
    plain = model.sample(3, 2, alpha_0, seed=1, **RULES)
    samples = model.sample(3, 2, alpha_0, seed=1, record=True, **RULES)
    assert plain.record is None and samples.record is not None
    np.testing.assert_array_equal(samples.tokens, plain.tokens)
    found, order = samples.record, samples.order

    along = np.take_along_axis(found.step, order, axis=1)
    assert (along == np.repeat(np.arange(len(samples.tokens_per_step)), samples.tokens_per_step)).all()
    expected = likelihood.plan_log_prob(model, samples.tokens, samples.plan)
    np.testing.assert_allclose(np.take_along_axis(found.logp, order, axis=1), expected, atol=1e-5)
    assert found.alternatives.shape == found.alternatives_logp.shape == (3, LENGTH, record.ALTERNATIVES)
    assert (np.diff(found.alternatives_logp) <= 0).all() and (found.alternatives < VOCABULARY - 1).all()
    row, position, rank = np.nonzero(found.alternatives == samples.tokens[..., None])
    assert len(row) > LENGTH
    np.testing.assert_array_equal(found.alternatives_logp[row, position, rank], found.logp[row, position])
    assert (found.logp_rule <= 0).all() and (found.logp_rule != found.logp).any()


def test_given_tokens_have_no_step() -> None:
    config = tiny_config("ar", LENGTH, VOCABULARY)
    made = engine(config, random_weights(config.model))
    model = Model(config, made.weights, made.mesh, 2, step=0, tokenizer=None)
    given = np.full((2, LENGTH), config.model.mask)
    given[0, :3] = 1, 2, 3
    samples = model.sample(1, given=given, record=True)
    assert samples.record is not None and ((samples.record.step == -1) == (given != config.model.mask)).all()
    expected = likelihood.plan_log_prob(model, samples.tokens, samples.plan)  # 0 for given ones
    np.testing.assert_allclose(np.take_along_axis(samples.record.logp, samples.order, axis=1), expected, atol=1e-5)
    text = samples.show()
    assert '"phase":[0,0,0,2,2,2,2,2]' in text and '"phase":[2,2,2,2,2,2,2,2]' in text


@pytest.mark.parametrize("rule", [Rule(), Rule(temperature=0.5, top_p=0.7), Rule(min_p=0.2), Rule(temperature=0.0)])
def test_facts_of_logits(rule: Rule) -> None:
    logits = np.random.default_rng(0).normal(0, 2, (4, 3, 7)).astype(np.float32)
    logits[..., -1] = -1e6  # the mask
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
    for token in range(2):
        tokens = np.argsort(-logits, axis=-1)[..., 0 if rule.temperature == 0 else token]
        found = record.facts(jnp.asarray(logits), jnp.asarray(tokens), rule)
        np.testing.assert_allclose(found.entropy, entropy, rtol=1e-5)
        np.testing.assert_allclose(found.logp, np.log(np.take_along_axis(p, tokens[..., None], -1))[..., 0], rtol=1e-5)
        np.testing.assert_array_equal(found.alternatives, np.argsort(-logits, axis=-1)[..., :5])
    # Under the rule, the probabilities of what it keeps add up to one.
    every = jnp.broadcast_to(jnp.arange(6)[:, None, None], (6, 4, 3))
    by_rule = np.stack([record.facts(jnp.asarray(logits), tokens, rule).logp_rule for tokens in every])
    if rule.temperature == 0:
        assert (by_rule == 0).all()
        return
    tempered = p ** (1 / rule.temperature)
    tempered /= tempered.sum(-1, keepdims=True)
    down = np.sort(tempered, axis=-1)[..., ::-1]
    inside = np.cumsum(down, -1) - down <= rule.top_p
    least = np.maximum(np.where(inside, down, 1).min(-1), rule.min_p * down[..., 0])
    kept = np.moveaxis(tempered >= least[..., None] * (1 - 1e-6), -1, 0)[:6]
    np.testing.assert_allclose((np.exp(by_rule) * kept).sum(0), 1, rtol=1e-5)


def test_steps_of_rows_that_differ() -> None:
    """A row whose first tokens are given has fewer to decode; a step may decode nothing in it."""
    plan = Plan(jnp.asarray([[2, 0, 1, 3], [3, 2, 1, 0]]), np.array([1, 3]))
    np.testing.assert_array_equal(record.steps(plan), [[1, 1, 0, 1], [1, 1, 1, 0]])
    plan = Plan(plan.order, np.array([[1, 1, 2], [2, 0, 1]]), given=np.array([0, 1]))
    np.testing.assert_array_equal(record.steps(plan), [[1, 2, 0, 2], [2, 0, 0, -1]])


def test_without_a_record_the_program_holds_no_more() -> None:
    """Nothing is sorted or kept unless it is asked for."""
    config = tiny_config("esolm", LENGTH, VOCABULARY)
    plan = families.get(config).plan(jax.random.key(0), config, 1, 4, 0.5)

    def text(asked: bool) -> str:
        return str(jax.make_jaxpr(lambda weights: families.sample(weights, config, plan, jax.random.key(0),
                                                                 record=asked))(random_weights(config.model)))

    assert "top_k" in text(True) and "top_k" not in text(False)
