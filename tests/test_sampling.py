"""The decoding loop: an exact cache, a compiled loop that equals a plain one, and draws that know only their row."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import random_tokens, random_weights, tiny_config
from eso_jax import families
from eso_jax.order import random_then_ascending, sort
from eso_jax.sampling import categorical, check, loop
from eso_jax.sampling.categorical import Rule
from eso_jax.sampling.plan import Plan, binomial, left_to_right

LENGTH = 12
CONFIG = tiny_config(length=LENGTH)
WEIGHTS = random_weights(CONFIG.model)


def random_plan(seed: int, batch: int, alpha_0: float, counts: list[int] | None = None) -> Plan:
    if counts is None:
        return binomial(jax.random.key(seed), batch, LENGTH, 4, alpha_0)
    keys = jax.random.split(jax.random.key(seed), batch)
    orders = jnp.stack([random_then_ascending(key, LENGTH, int(alpha_0 * LENGTH)) for key in keys])
    return Plan(orders, np.array(counts))


def any_counts() -> st.SearchStrategy[list[int]]:
    """Step sizes that sum to LENGTH: where to cut, or not, between slots."""
    def cut(flags: list[bool]) -> list[int]:
        edges = [0, *(i + 1 for i, flag in enumerate(flags) if flag), LENGTH]
        return np.diff(edges).tolist()

    return st.lists(st.booleans(), min_size=LENGTH - 1, max_size=LENGTH - 1).map(cut)


@settings(max_examples=20, deadline=None)
@given(counts=any_counts(), batch=st.integers(1, 8), alpha_0=st.sampled_from([0.0, 0.25, 1.0]),
       seed=st.integers(0, 99))
def test_cached_logits_equal_uncached(counts: list[int], batch: int, alpha_0: float, seed: int) -> None:
    plan = random_plan(seed, batch, alpha_0, counts)
    x = sort(random_tokens(CONFIG, batch, seed), plan.order)
    pairs = zip(check.forced_logits(WEIGHTS, CONFIG.model, "esolm", plan, x),
                check.uncached_logits(WEIGHTS, CONFIG.model, "esolm", plan, x), strict=True)
    for step, (cached, uncached) in enumerate(pairs):
        assert cached.shape == (batch, counts[step], CONFIG.model.vocab_size)
        np.testing.assert_allclose(cached, uncached, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["ar", "mdlm"])
def test_ar_and_mdlm_steps_equal_whole_passes(kind: loop.Kind) -> None:
    plan = left_to_right(3, LENGTH) if kind == "ar" else random_plan(0, 3, 1.0)
    x = sort(random_tokens(CONFIG, 3), plan.order)
    for ours, theirs in zip(check.forced_logits(WEIGHTS, CONFIG.model, kind, plan, x),
                            check.uncached_logits(WEIGHTS, CONFIG.model, kind, plan, x), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_one_token_per_step_chains_into_the_exact_likelihood() -> None:
    """The sampler's and the scorer's laws are one: log p summed over cached steps is the two-stream pass's."""
    plan = random_plan(1, 4, 1.0, [1] * LENGTH)
    tokens = random_tokens(CONFIG, 4)
    x = sort(tokens, plan.order)
    logits = jnp.concatenate(list(check.forced_logits(WEIGHTS, CONFIG.model, "esolm", plan, x)), axis=1)
    stepwise = jnp.take_along_axis(jax.nn.log_softmax(logits), x[..., None], -1)[..., 0]
    exact = families.get(CONFIG).log_likelihood(WEIGHTS, CONFIG, tokens, plan.order)
    np.testing.assert_allclose(stepwise, exact, atol=1e-5, rtol=1e-5)


def python_loop(kind: loop.Kind, plan: Plan, key: jax.Array, rule: Rule) -> np.ndarray:
    """The sampler without a cache, a compiled loop, windows or runs."""
    length = plan.order.shape[1]
    x = np.full(plan.order.shape, CONFIG.model.mask, np.int32)
    keys = [jax.random.fold_in(key, row) for row in range(len(x))]
    first = 0
    for step, count in enumerate(plan.tokens_per_step.tolist()):
        passes = check.uncached_logits(WEIGHTS, CONFIG.model, kind, plan, jnp.asarray(x))
        logits = next(logits for index, logits in enumerate(passes) if index == step)
        for row, slot in np.ndindex(len(x), count):
            uniforms = jax.random.uniform(jax.random.fold_in(keys[row], first + slot), (2,))
            x[row, first + slot] = categorical.draw(logits[row, slot], uniforms, rule)
        first += count
    assert first == length
    out = np.zeros_like(x)
    np.put_along_axis(out, np.asarray(plan.order), x, axis=1)
    return out


@pytest.mark.parametrize(("kind", "alpha_0", "rule"), [
    ("esolm", 0.0, Rule()), ("esolm", 0.5, Rule(temperature=0.7, top_p=0.9)), ("esolm", 1.0, Rule()),
    ("mdlm", 1.0, Rule(top_p=0.8)), ("ar", 0.0, Rule()), ("esolm", 0.5, Rule(temperature=0.0))])
def test_compiled_loop_equals_a_python_loop(kind: loop.Kind, alpha_0: float, rule: Rule) -> None:
    plan = left_to_right(3, LENGTH) if kind == "ar" else random_plan(5, 3, alpha_0)
    key = jax.random.key(7)
    np.testing.assert_array_equal(loop.sample(WEIGHTS, CONFIG.model, kind, plan, key, rule),
                                  python_loop(kind, plan, key, rule))


def test_rows_do_not_know_their_batch() -> None:
    plan, key = random_plan(2, 6, 0.5), jax.random.key(3)
    whole = loop.sample(WEIGHTS, CONFIG.model, "esolm", plan, key)
    part = Plan(plan.order[4:], plan.tokens_per_step)
    np.testing.assert_array_equal(whole[4:], loop.sample(WEIGHTS, CONFIG.model, "esolm", part, key, first_row=4))


@settings(max_examples=50, deadline=None)
@given(counts=any_counts(), kind=st.sampled_from(["esolm", "ar", "mdlm"]))
def test_schedule_covers_every_step(counts: list[int], kind: loop.Kind) -> None:
    """Each window holds what its step needs: for Eso-LM the tokens decoded last, and always the slots decoded now."""
    if kind == "ar":
        counts = [1] * LENGTH
    steps, runs = loop.schedule(np.array(counts), kind)
    assert [step for run in runs for step in range(run.low, run.high)] == list(range(len(counts)))
    first = 0
    for run in runs:
        for index in range(run.low, run.high):
            step = jax.tree.map(lambda x, i=index: x[i], steps)
            start, end = int(step.start), int(step.start) + run.shape.window
            taken = int(loop.taken_from(step, run.shape))
            before = counts[index - 1] if index and kind == "esolm" else 0
            assert (int(step.first), int(step.count)) == (first, counts[index])
            assert 0 <= start <= max(first - before, 0) and first + counts[index] <= end <= LENGTH
            assert start <= taken <= first and first + counts[index] <= taken + run.shape.width <= end
            assert end <= run.shape.live <= LENGTH
            first += counts[index]


def test_plans_share_their_programs() -> None:
    """Compilation is per shape: many plans, of other numbers of steps, need few programs between them."""
    key, before = jax.random.key(0), loop.decode_run._cache_size()
    plans = [random_plan(seed, 3, 0.5) for seed in range(12)]
    assert len({plan.nfe for plan in plans}) > 3
    for plan in plans:
        loop.sample(WEIGHTS, CONFIG.model, "esolm", plan, key, Rule(temperature=0.9))
    shapes = {run.shape for plan in plans for run in loop.schedule(plan.tokens_per_step, "esolm")[1]}
    assert loop.decode_run._cache_size() - before == len(shapes) <= 10


def test_positions_matter_not_slots() -> None:
    """The same tokens in the same order at other positions give other logits: rotary angles follow the order."""
    x = random_tokens(CONFIG, 1)
    natural = Plan(jnp.arange(LENGTH)[None], np.ones(LENGTH, int))
    reversed_ = Plan(natural.order[:, ::-1], natural.tokens_per_step)
    logits = [list(check.forced_logits(WEIGHTS, CONFIG.model, "esolm", plan, x)) for plan in (natural, reversed_)]
    assert float(jnp.abs(logits[0][3] - logits[1][3]).max()) > 1e-2


def test_ar_start_token() -> None:
    config = dataclasses.replace(CONFIG, family=dataclasses.replace(CONFIG.family, name="ar", start_id=2))
    family, plan, rule = families.get(config), left_to_right(64, LENGTH), Rule()
    tokens = family.sample(WEIGHTS, config, plan, jax.random.key(0), rule)
    other = dataclasses.replace(config, family=dataclasses.replace(config.family, start_id=3))
    assert (tokens[:, 0] != family.sample(WEIGHTS, other, plan, jax.random.key(0), rule)[:, 0]).any()
    assert int(tokens.max()) < CONFIG.model.mask
