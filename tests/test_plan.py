"""Plans: the law of the step counts, their NFE against the paper's Table 13, and the orders."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eso_jax.decoding.plan import POLICIES, Plan, binomial, draw, expected_nfe, left_to_right, within_blocks
from eso_jax.errors import EsoError

L = 1024
TABLE_13 = [  # alpha_0, T and the NFE that the paper prints, L = 1024
    (0.0625, 16, 976), (0.0625, 128, 1010), (0.0625, 1024, 1022), (0.25, 16, 784), (0.25, 128, 879), (0.25, 1024, 994),
    (0.5, 16, 529), (0.5, 128, 639), (0.5, 1024, 913), (1.0, 16, 16), (1.0, 32, 32), (1.0, 64, 64), (1.0, 128, 128),
    (1.0, 256, 251), (1.0, 1024, 646), (1.0, 4096, 906)]


@pytest.mark.parametrize("alpha_0, steps, printed", TABLE_13)
def test_nfe_agrees_with_its_closed_form_and_with_the_papers_table(alpha_0: float, steps: int, printed: int) -> None:
    """The mean of 50 plans is within 3 standard errors (a false alarm in 4% of seeds over the 16 rows; the seed is
    fixed), the closed form within 3 of the table."""
    expected = expected_nfe(L, steps, alpha_0)
    assert abs(expected - printed) <= 3
    nfe = [binomial(jax.random.key(seed), 1, L, steps, alpha_0).nfe for seed in range(50)]
    assert abs(np.mean(nfe) - expected) <= max(3 * np.std(nfe, ddof=1) / np.sqrt(len(nfe)), 0.1)


@pytest.mark.parametrize("length, steps, alpha_0", [(1, 1, 0.5), (64, 1000, 0.5), (64, 3, 1.0)])
def test_counts_are_positive_and_sum_to_the_length(length: int, steps: int, alpha_0: float) -> None:
    for seed in range(5):
        plan = binomial(jax.random.key(seed), 2, length, steps, alpha_0)
        assert plan.tokens_per_step.sum() == length and (plan.tokens_per_step >= 1).all()
        assert plan.nfe == len(plan.tokens_per_step)
        np.testing.assert_array_equal(np.sort(plan.order), np.tile(np.arange(length), (2, 1)))


def chain(length: int, steps: int, alpha_0: float) -> Counter[tuple[int, ...]]:
    """The exact law of tokens_per_step by the sequential binomials of the docstring, t = 1, 1 - 1/T, ..., 1/T."""
    law: Counter[tuple[int, ...]] = Counter()
    for counts in itertools.product(range(length + 1), repeat=steps):
        masked, probability = length, 1.0
        for step, count in enumerate(counts):
            alpha_t, alpha_s = alpha_0 * step / steps, alpha_0 * (step + 1) / steps
            p = (alpha_s - alpha_t) / (1 - alpha_t)
            probability *= math.comb(masked, count) * p**count * (1 - p) ** (masked - count) if count <= masked else 0
            masked -= count
        if probability:
            law[tuple(c for c in counts if c) + (1,) * masked] += probability
    return law


@pytest.mark.slow
@pytest.mark.parametrize("length, steps, alpha_0", [(4, 3, 0.7), (3, 2, 1.0)])
def test_counts_follow_the_sequential_binomial_chain(length: int, steps: int, alpha_0: float) -> None:
    """1200 plans against the exact law: every outcome is possible, and its frequency within 4 standard errors (a false
    alarm in 1 of 15,000 per outcome)."""
    law, draws = chain(length, steps, alpha_0), 1200
    assert abs(sum(law.values()) - 1) < 1e-9
    seen = Counter(tuple(binomial(key, 1, length, steps, alpha_0).tokens_per_step.tolist())
                   for key in jax.random.split(jax.random.key(0), draws))
    assert set(seen) <= set(law)
    for outcome, p in law.items():
        assert abs(seen[outcome] - draws * p) <= 4 * np.sqrt(draws * p * (1 - p)) + 1


def test_order_is_random_as_far_as_diffusion_goes_then_ascending() -> None:
    """At T = 1 the first count is the whole of the diffusion phase."""
    plan = binomial(jax.random.key(0), 200, 60, 1, 0.5)
    count = int(plan.tokens_per_step[0])
    assert 15 < count < 45 and plan.tokens_per_step[1:].tolist() == [1] * (60 - count)
    order = np.asarray(plan.order)
    np.testing.assert_array_equal(np.sort(order), np.tile(np.arange(60), (200, 1)))
    assert (np.diff(order[:, count:]) > 0).all()
    # Each position is in the random part as often as chance says, and rows differ.
    chosen = np.bincount(order[:, :count].ravel(), minlength=60)
    np.testing.assert_array_less(abs(chosen - 200 * count / 60), 4.5 * np.sqrt(200 * count / 60 * (1 - count / 60)))
    assert 0.45 < (np.diff(order[:, :count]) > 0).mean() < 0.55  # neither ascending nor descending
    assert len(np.unique(order, axis=0)) == 200


def test_an_order_is_a_permutation() -> None:
    ones = np.ones(3, np.int64)
    assert Plan(jnp.array([[2, 0, 1], [0, 1, 2]]), ones).nfe == 3
    for wrong in ([[0, 0, 0]], [[0, 1, 2], [0, 1, 1]], [[1, 2, 3]]):
        with pytest.raises(EsoError, match=rf"orders\[{len(wrong) - 1}\]: not a permutation of 0..2"):
            Plan(jnp.array(wrong), ones)


def test_rows_do_not_depend_on_the_batch_size() -> None:
    few, many = (binomial(jax.random.key(5), batch, 20, 4, 0.5) for batch in (2, 5))
    np.testing.assert_array_equal(few.order, many.order[:2])
    np.testing.assert_array_equal(few.tokens_per_step, many.tokens_per_step)
    other = binomial(jax.random.key(6), 2, 20, 4, 0.5)
    assert (other.order != few.order).any()


def test_pure_diffusion_and_pure_sequential() -> None:
    sequential = binomial(jax.random.key(0), 2, 10, 4, 0.0)
    np.testing.assert_array_equal(sequential.order, left_to_right(2, 10).order)
    np.testing.assert_array_equal(sequential.tokens_per_step, left_to_right(2, 10).tokens_per_step)
    assert binomial(jax.random.key(0), 2, 10, 1, 1.0).tokens_per_step.tolist() == [10]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_a_whole_plan(policy: str) -> None:
    plan = draw(policy, jax.random.key(0), 3, 24, 6, 1.0)
    np.testing.assert_array_equal(np.sort(plan.order), np.tile(np.arange(24), (3, 1)))
    assert plan.tokens_per_step.sum() == 24 and plan.nfe == len(plan.first)
    np.testing.assert_array_equal(plan.first, [0, *np.cumsum(plan.tokens_per_step)[:-1]])
    few = draw(policy, jax.random.key(0), 2, 24, 6, 1.0)  # rows do not depend on the batch size
    np.testing.assert_array_equal(few.order, plan.order[:2])


def test_balanced() -> None:
    plan = draw("balanced", jax.random.key(0), 2, 10, 4, 0.7)
    assert sorted(plan.tokens_per_step[:4].tolist()) == [1, 2, 2, 2] and plan.tokens_per_step[4:].tolist() == [1] * 3
    assert plan.diffusion == 7 and (np.diff(plan.order[:, 7:]) > 0).all()
    assert draw("balanced", jax.random.key(0), 1, 3, 8, 1.0).tokens_per_step.tolist() == [1, 1, 1]


def test_one_by_one_is_the_binomial_plan_at_many_steps() -> None:
    """Both decode Binomial(L, alpha_0) tokens by diffusion, one at a time: means of 200 within 4 standard errors."""
    counts = [[draw(policy, jax.random.key(seed), 1, 30, 10**6, 0.3).diffused for seed in range(200)]
              for policy in ("one-by-one", "binomial")]
    assert np.all(np.abs(np.mean(counts, axis=1) - 9) < 4 * np.sqrt(30 * 0.3 * 0.7 / 200))
    assert draw("one-by-one", jax.random.key(0), 1, 30, 1, 0.3).tokens_per_step.tolist() == [1] * 30


def test_strided_groups_are_those_of_the_paper() -> None:
    """L = 1024, parallelism 4: the groups {j, j + 256, j + 512, j + 768}."""
    ascending, shared, by_row = (np.asarray(draw(policy, jax.random.key(0), 3, 1024, 256, 1.0).order)
                                 for policy in ("strided", "strided-shared", "strided-row"))
    for order in (ascending, shared, by_row):
        groups = order.reshape(3, 256, 4)
        np.testing.assert_array_equal(groups, groups[:, :, :1] + np.array([0, 256, 512, 768]))
    np.testing.assert_array_equal(ascending[:, ::4], np.tile(np.arange(256), (3, 1)))
    assert (shared[0] == shared[1]).all() and (shared[0] != ascending[0]).any()
    assert (by_row[0] != by_row[1]).any() and (by_row[1] != by_row[2]).any()


@pytest.mark.parametrize(("policy", "steps"), [("binomial", 2), ("balanced", 3), ("one-by-one", 1)])
def test_plans_within_blocks(policy: str, steps: int) -> None:
    plan = within_blocks(jax.random.key(0), 5, 24, 6, policy, steps)
    order = np.asarray(plan.order)
    np.testing.assert_array_equal(order // 6, np.tile(np.arange(24) // 6, (5, 1)))
    np.testing.assert_array_equal(np.sort(order), np.tile(np.arange(24), (5, 1)))
    assert len(np.unique(order, axis=0)) == 5 and (order[0, :6] != order[0, 6:12] - 6).any()
    ends = np.cumsum(plan.tokens_per_step)
    assert set(range(6, 25, 6)) <= set(ends.tolist())  # a step ends with every block
    if policy != "binomial":
        assert plan.nfe == 4 * (3 if policy == "balanced" else 6)


def test_bd3lm_blocks_take_the_ancestral_law() -> None:
    """The first of T' = 2 steps decodes Binomial(6, 1/2) tokens of each block; 400 blocks, within 4 standard errors."""
    counts = within_blocks(jax.random.key(1), 1, 2400, 6, "binomial", 2).tokens_per_step
    assert abs(len(counts) - 400 * (2 - 2 * 0.5**6)) < 4 * np.sqrt(400 * 2 * 0.5**6)


def test_left_to_right() -> None:
    plan = left_to_right(3, 5)
    np.testing.assert_array_equal(plan.order, [[0, 1, 2, 3, 4]] * 3)
    assert plan.nfe == 5 and plan.tokens_per_step.tolist() == [1] * 5


@pytest.mark.parametrize("length, steps, alpha_0, nfe", [(10, 4, 0.0, 10), (10, 1, 1.0, 1), (2, 2, 1.0, 1.5),
                                                         (1, 3, 0.5, 1), (2, 1, 0.5, 1.75)])
def test_expected_nfe_by_hand(length: int, steps: int, alpha_0: float, nfe: float) -> None:
    assert expected_nfe(length, steps, alpha_0) == pytest.approx(nfe)


@pytest.mark.parametrize("steps, alpha_0, message", [
    (0, 0.5, "steps = 0: T must be at least 1"), (-1, 0.5, "steps = -1"),
    (8, 1.5, r"alpha_0 = 1.5: must be in \[0, 1\]"), (8, -0.1, "alpha_0 = -0.1"), (8, float("nan"), "alpha_0 = nan")])
def test_impossible_plans_are_refused(steps: int, alpha_0: float, message: str) -> None:
    with pytest.raises(EsoError, match=message):
        draw("binomial", jax.random.key(0), 1, 8, steps, alpha_0)


@pytest.mark.parametrize("counts", [[2, 3], [4, 0], [5, -1]])
def test_plan_whose_counts_do_not_fit_the_order_is_refused(counts: list[int]) -> None:
    with pytest.raises(EsoError, match="tokens_per_step: must be positive and sum to at most 4"):
        Plan(jnp.tile(jnp.arange(4), (2, 1)), np.array(counts))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: draw("zigzag", jax.random.key(0), 1, 8, 4, 1.0), "plan = 'zigzag': choose one of binomial"),
    (lambda: draw("strided", jax.random.key(0), 1, 8, 3, 1.0), "steps = 3: .* must divide 8"),
    (lambda: draw("strided", jax.random.key(0), 1, 8, 4, 0.5), "alpha_0 = 0.5"),
    (lambda: within_blocks(jax.random.key(0), 1, 8, 4, "strided", 4), "BD3-LM's plans are"),
    (lambda: Plan(jnp.arange(4)[None], np.array([2, 2]), 5), "diffusion = 5"),
    (lambda: Plan(jnp.arange(4)[None], np.array([2, 2]), 2), "one per step")])
def test_what_makes_no_plan_is_said(make: object, message: str) -> None:
    with pytest.raises(EsoError, match=message):
        make()  # type: ignore[operator]
