"""Tokens that are given, and rows with steps of their own: exact, and the same in any company."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import brief, engine, random_tokens, random_weights
from eso_jax import families
from eso_jax.decoding import passes as passes_of_plans
from eso_jax.decoding.categorical import Rule
from eso_jax.decoding.order import sort
from eso_jax.decoding.passes import schedule
from eso_jax.decoding.plan import Plan, join, left_to_right
from eso_jax.engine.model import Model
from eso_jax.errors import EsoError
from test_sampling import BLOCK, CONFIG, CONFIGS, CUTS, LENGTH, NAMES, WEIGHTS, any_cuts, logits_pair, plan_of

MASK = CONFIG.model.mask


def model_of(name: str, layers: int = 2) -> Model:
    config = CONFIGS[name].override(f"model.layers={layers}")
    weights = WEIGHTS if layers == 2 else random_weights(config.model)
    return Model(config, weights, engine(config, weights).mesh, step=0, tokenizer=None)


def behind(plan: Plan, steps: int) -> Plan:
    """What is left of a plan when its first steps are done, their tokens given."""
    given = int(plan.tokens_per_step[:steps].sum())
    return Plan(plan.order, plan.tokens_per_step[steps:], max(plan.diffused - given, 0), given)


def prompts(name: str) -> np.ndarray:
    """Rows that are given nothing, something, and everything, as the family can follow."""
    tokens = np.asarray(random_tokens(CONFIG, 5, 3))
    known = np.random.default_rng(0).random(tokens.shape) < np.array([0, 0.3, 0.6, 2, 0.1])[:, None]
    if name in ("ar", "bd3lm"):
        known = np.arange(LENGTH) < np.array([0, 3, 7, LENGTH, 1])[:, None]
        known[4, :BLOCK] = [name == "ar", name == "bd3lm", 0, name == "bd3lm"]
    return np.where(known, tokens, MASK)


@st.composite
def parts_of_plans(draw: st.DrawFn, name: str) -> tuple[list[Plan], list[int]]:
    """Plans of one row each, and how many of their first steps are given; of Eso-LM (A), whose given tokens see each
    other, only those of the diffusion phase."""
    plans, steps = [], []
    for _ in range(draw(st.integers(1, 4))):
        plan = plan_of(name, draw(st.integers(0, 99)), 1, draw(any_cuts()), draw(st.sampled_from([0.0, 0.5, 1.0])))
        most = int((plan.first <= plan.diffused).sum()) - 1 if name == "esolm_a" else plan.nfe
        plans.append(plan)
        steps.append(draw(st.integers(0, most)))
    return plans, steps


@pytest.mark.slow
@settings(max_examples=3, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", NAMES)
def test_given_tokens_are_as_good_as_decoded_ones(name: str, data: st.DataObject) -> None:
    """Rows that differ in how much is given, and in their steps: each token has the log p that it has where the given
    ones were decoded, row by row; and cached logits are those without a cache."""
    plans, steps = data.draw(parts_of_plans(name))
    whole, part = join(plans), join([behind(plan, some) for plan, some in zip(plans, steps, strict=True)])
    tokens = random_tokens(CONFIG, len(plans))
    ours = families.plan_log_prob(WEIGHTS, CONFIGS[name], part, tokens)
    first = np.arange(LENGTH) < np.reshape(part.given, (-1, 1))
    theirs = families.plan_log_prob(WEIGHTS, CONFIGS[name], whole, tokens)
    np.testing.assert_allclose(ours, np.where(first, 0, theirs), atol=2e-5)
    for cached, uncached in logits_pair(name, part, sort(tokens, part.order)):
        np.testing.assert_allclose(cached, uncached, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", brief(NAMES, "esolm"))
def test_a_row_is_the_same_in_any_company(name: str) -> None:
    """Given nothing, something or everything: alone, twice, among others, in another order, in batches of any size.
    A layer is enough: the rows would meet in it."""
    model, given = model_of(name, layers=1), prompts(name)
    rule = {"temperature": 0.8, "top_p": 0.9, "steps": 6, "seed": 5}
    found = model.sample(2, given=given, **rule)
    assert found.tokens.max() < MASK and (found.tokens[found.given] == np.repeat(given, 2, axis=0)[found.given]).all()
    assert (found.given == (np.repeat(given, 2, axis=0) != MASK)).all()
    backwards = model.sample(2, given=given[::-1], **rule, batch_size=3)
    np.testing.assert_array_equal(backwards.tokens.reshape(5, 2, LENGTH)[::-1].reshape(10, LENGTH), found.tokens)
    for row in (1, 4):
        alone = model.sample(1, given=given[row:row + 1], **rule)
        np.testing.assert_array_equal(alone.tokens[0], found.tokens[2 * row])
    np.testing.assert_array_equal(model.sample(2, **rule).tokens, found.tokens[:2])  # given nothing: as without others
    assert (found.tokens[2] != found.tokens[3]).any()
    again = model.sample(1, given=np.where(found.given, found.tokens, MASK), plan=found.plan, **rule)
    np.testing.assert_array_equal(again.tokens, found.tokens)


@pytest.mark.slow
def test_what_is_drawn_by() -> None:
    """Temperature, nucleus, seed and the prompt itself change what is drawn behind a prompt."""
    model, given = model_of("esolm"), prompts("esolm")[1:2]
    usual = model.sample(8, given=given, steps=6).tokens
    for other in ({"temperature": 0.3}, {"top_p": 0.2}, {"min_p": 0.8}, {"seed": 1}):
        assert (model.sample(8, given=given, steps=6, **other).tokens != usual).any(), other
    assert len(np.unique(usual, axis=0)) > 4


@pytest.mark.parametrize(("name", "steps", "most"), [("ar", 0, 33), ("esolm", 0, 33), ("esolm", 64, 50),
                                                         ("esolm_a", 64, 74)])
def test_prompts_of_all_lengths_share_their_programs(name: str, steps: int, most: int) -> None:
    """Of a model of length 1024, each prompt alone; half of what is left by diffusion. A pass over the prompt and loops
    behind it for each of the lengths would be thousands. Passes that decode nothing are few."""
    found, passes, needed = set[Any](), 0, 0
    sampler = families.get(CONFIGS[name]).sampler(CONFIGS[name])
    for length in range(0, 1025, 16):
        left = 1024 - length
        counts = np.diff(np.unique(np.arange(steps + 1) * (left // 2) // max(1, steps)))
        steps_of = np.append(counts, np.ones(left - counts.sum(), int))
        plan = Plan(jnp.arange(1024)[None], steps_of, int(counts.sum()), length)
        runs = schedule(plan, sampler)
        found |= {(run.shape, len(run.steps.first)) for run in runs}
        passes, needed = passes + sum(len(run.steps.first) for run in runs), needed + plan.nfe
    assert len(found) <= most and passes <= 1.05 * needed


def test_given_tokens_pass_once_though_somebody_watches() -> None:
    sampler = families.get(CONFIG).sampler(CONFIG)
    plan = Plan(jnp.arange(64)[None], np.ones(24, int), given=40)
    first, *rest = passes_of_plans.cut(schedule(plan, sampler), 8)
    assert first.steps.count.tolist() == [0] and {len(run.steps.count) for run in rest} == {8}


@pytest.mark.parametrize("name", ["esolm", "ar"])
def test_every_length_of_a_prompt(name: str) -> None:
    model, tokens = model_of(name), np.asarray(random_tokens(CONFIG, 1))
    given = np.where(np.arange(LENGTH) < np.arange(LENGTH + 1)[:, None], tokens, MASK)
    whole = model.sample(1, given=given, temperature=0.0, steps=LENGTH)
    assert whole.tokens.max() < MASK and (whole.tokens[-1] == tokens).all()
    for length in range(LENGTH + 1):
        np.testing.assert_array_equal(whole.tokens[length, :length], tokens[0, :length])
    assert not model.sample(2, given=tokens).tokens_per_step.size  # there is nothing to do


@pytest.mark.parametrize(("name", "known", "message"), [
    ("ar", [0, 2], "given = 'row 1': family.name = 'ar' can be given a prefix alone"),
    ("bd3lm", [BLOCK], "given = 'row 1': family.name = 'bd3lm' decodes blocks of 4 left to right: a block must"),
    ("bd3lm", [0, 1, BLOCK], "a block must be given as a whole")])
def test_what_a_family_cannot_be_given(name: str, known: list[int], message: str) -> None:
    given = np.full((2, LENGTH), MASK)
    given[1, known] = 0
    with pytest.raises(EsoError, match=message):
        model_of(name).sample(1, given=given)


@pytest.mark.parametrize(("given", "plan", "message"), [
    (np.zeros((1, LENGTH + 1), int), None, r"given = \(1, 13\): the model has length 12"),
    (np.zeros((1, LENGTH)), None, "given = 'float64"),
    (np.full((1, LENGTH), MASK + 1), None, r"given\[0, 0\] = 9: ids must be in \[0, 9\)"),
    (np.full((1, LENGTH), MASK), Plan(left_to_right(1, LENGTH).order, np.full(2, 5), given=2), "takes other tokens"),
    (np.zeros((1, LENGTH), int), left_to_right(1, LENGTH), "given = 'row 0': the plan takes other tokens for given")])
def test_what_nobody_can_be_given(given: np.ndarray, plan: Plan | None, message: str) -> None:
    with pytest.raises(EsoError, match=message):
        model_of("esolm").sample(1, given=given, plan=plan)


@pytest.mark.parametrize(("counts", "numbers", "message"), [
    ([[2, 1], [2, 2]], {"given": np.array([1, 1])}, "must be positive and sum to at most 4 less what"),
    ([[2, 0, 1], [3, 0, 0]], {"given": 1}, "must be positive"),
    ([[2, 1]], {"given": 1}, r"tokens_per_step = \(1, 2\): must be of shape \[steps\], or \[2, steps\]"),
    ([3], {"given": np.ones(3, int)}, "given = .*: must be one number, or 2"),
    ([4], {"given": 5}, r"given = 5: must be in \[0, 4\]"),
    ([[1, 2], [2, 1]], {"given": 1, "diffusion": np.array([1, 2])}, "the tokens after it must come one per step"),
    ([3], {"given": 1, "diffusion": 4}, r"diffusion = 4: must be in \[0, 4\] less what is given")])
def test_plans_behind_given_tokens_are_checked(counts: Any, numbers: dict[str, Any], message: str) -> None:
    order = jnp.tile(jnp.arange(4), (2, 1))
    assert Plan(order, np.array([[3, 0], [1, 1]]), given=np.array([1, 2])).first.tolist() == [[1, 4], [2, 3]]
    with pytest.raises(EsoError, match=message):
        Plan(order, np.array(counts), **numbers)


@pytest.mark.parametrize("name", brief(["esolm", "ar"], "esolm"))
def test_a_plan_behind_given_tokens_is_scored_in_one_pass(name: str) -> None:
    """As its steps score it."""
    plans = [plan_of(name, seed, 1, CUTS, 0.5) for seed in range(3)]
    plan = join([behind(one, steps) for steps, one in enumerate(plans)])
    tokens = random_tokens(CONFIG, 3)
    stepwise = families.plan_log_prob(WEIGHTS, CONFIGS[name], plan, tokens)
    in_one = families.plan_log_likelihood(WEIGHTS, CONFIGS[name], plan, tokens)
    np.testing.assert_allclose(in_one, stepwise, atol=1e-5)


@pytest.mark.parametrize("name", ["esolm", "ar", "esolm_a", "mdlm", "bd3lm"])
def test_a_model_scores_a_plan_in_one_pass_where_it_can(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And by its steps elsewhere."""
    one_pass, plan, tokens = name in ("esolm", "ar"), plan_of(name, 0, 3, CUTS, 0.5), random_tokens(CONFIG, 3)
    stepwise = families.plan_log_prob(WEIGHTS, CONFIGS[name], plan, tokens)
    with monkeypatch.context() as patch:
        patch.delattr(families, "plan_log_prob" if one_pass else "plan_log_likelihood")
        found = model_of(name).plan_log_prob(np.asarray(tokens), plan)
    np.testing.assert_allclose(found, stepwise, atol=1e-5)
    assert families.get(CONFIGS[name]).one_pass_plans == one_pass


@pytest.mark.slow
@pytest.mark.parametrize("name", brief(["esolm", "ar"], "esolm"))
def test_what_a_plan_leaves_is_not_scored(name: str) -> None:
    """It may be masks; neither the steps nor the one pass count it."""
    model = model_of(name)
    found = model.sample(2, 4, given=prompts(name)[:2], max_tokens=5)
    logp = model.plan_log_prob(found.tokens, found.plan)
    assert (np.count_nonzero(logp, axis=1) == 5).all()
    tokens = jnp.asarray(np.where(found.tokens == MASK, 0, found.tokens))
    stepwise = families.plan_log_prob(WEIGHTS, CONFIGS[name], found.plan, tokens)
    np.testing.assert_allclose(stepwise, logp, atol=1e-5)
    with pytest.raises(EsoError, match="is the mask"):
        model.plan_log_prob(np.full_like(found.tokens, MASK), found.plan)


@pytest.mark.slow
def test_a_loop_ends_when_all_rows_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is asked about a run while the next one is at work, and that one is all that is in vain."""
    monkeypatch.setattr(passes_of_plans, "PART", 2)  # many runs
    monkeypatch.setattr(passes_of_plans, "PARTS", 8)
    plan, key, asked = left_to_right(3, LENGTH), jax.random.key(0), list[np.ndarray]()

    def done(tokens: np.ndarray, known: np.ndarray) -> np.ndarray:
        asked.append(tokens)
        return (tokens[:, :4] != MASK).all(axis=1)

    whole = families.sample(WEIGHTS, CONFIG, plan, key)
    found = np.asarray(families.sample(WEIGHTS, CONFIG, plan, key, done=done))
    sampler = families.get(CONFIG).sampler(CONFIG)
    ends = np.cumsum([int(run.steps.count.sum()) for run in schedule(plan, sampler)]).tolist()
    assert len(ends) > 4
    last = next(at for at, end in enumerate(ends) if end >= 4)
    assert [int((tokens[0] != MASK).sum()) for tokens in asked] == ends[:last + 1]
    known = np.arange(LENGTH) < ends[last + 1]
    np.testing.assert_array_equal(found, np.where(known, whole, MASK))
    never = families.sample(WEIGHTS, CONFIG, plan, key, Rule(), done=lambda *_: np.zeros(3, bool))
    np.testing.assert_array_equal(never, whole)
    assert model_of("esolm").sample(3, alpha_0=0.0, done=lambda *_: np.ones(3, bool)).tokens.max() == MASK
