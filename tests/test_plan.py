"""Plans: the law of the step counts, their NFE against the paper's Table 13, and the orders."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eso_jax.config import EsoError
from eso_jax.sampling.plan import Plan, binomial, draw, expected_nfe, left_to_right

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


@pytest.mark.parametrize("counts", [[2, 1], [2, 3], [4, 0], [5, -1]])
def test_plan_whose_counts_do_not_cover_the_order_is_refused(counts: list[int]) -> None:
    with pytest.raises(EsoError, match="tokens_per_step: must be positive and sum to 4"):
        Plan(jnp.tile(jnp.arange(4), (2, 1)), np.array(counts))
