"""Orders: their groups, their law, and sorting there and back."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eso_jax.decoding import order
from eso_jax.errors import EsoError

L = 6
ROWS = 3000
Z = 4.5  # standard errors allowed: a false alarm at 1 in 150,000 per comparison, fewer than 100 of which are made


likelihood_orders = jax.jit(order.likelihood_orders, static_argnums=(1, 2, 3, 4))  # compiles faster than op by op


@functools.cache
def keys(seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), ROWS)


def uniform(counts: np.ndarray, total: int, share: float) -> None:
    """Checks that each count is `total * share` within Z standard errors."""
    np.testing.assert_array_less(np.abs(counts - total * share), Z * np.sqrt(total * share * (1 - share)))


def positions_in_time(orders: np.ndarray) -> np.ndarray:
    """[slots, L]: how often each natural position stands at each slot."""
    return np.stack([np.bincount(column, minlength=orders.max() + 1) for column in orders.T])


@pytest.mark.parametrize("shuffle_clean", [False, True])
@pytest.mark.parametrize("shuffle_masked", [False, True])
def test_clean_first_groups_are_shuffled_or_natural(shuffle_clean: bool, shuffle_masked: bool) -> None:
    masked = np.array([True, False, False, True, True, False, False])
    found = np.asarray(order.clean_first(keys(), jnp.tile(masked, (ROWS, 1)), shuffle_clean=shuffle_clean,
                                         shuffle_masked=shuffle_masked))
    for group, positions, shuffled in ((found[:, :4], [1, 2, 5, 6], shuffle_clean),
                                       (found[:, 4:], [0, 3, 4], shuffle_masked)):
        np.testing.assert_array_equal(np.sort(group), np.tile(positions, (ROWS, 1)))
        if shuffled:
            uniform(positions_in_time(group)[:, positions], ROWS, 1 / len(positions))
            orders_seen, counts = np.unique(group, axis=0, return_counts=True)
            assert len(orders_seen) == {3: 6, 4: 24}[len(positions)]
            uniform(counts, ROWS, 1 / len(orders_seen))
        else:
            np.testing.assert_array_equal(group, np.tile(positions, (ROWS, 1)))


@given(st.lists(st.booleans(), min_size=L, max_size=L), st.booleans(), st.booleans(), st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_clean_first_is_a_permutation_with_the_masks_last(masked: list[bool], shuffle_clean: bool,
                                                          shuffle_masked: bool, seed: int) -> None:
    row = np.asarray(order.clean_first(jax.random.split(jax.random.key(seed), 1), jnp.array([masked]),
                                       shuffle_clean=shuffle_clean, shuffle_masked=shuffle_masked))[0]
    assert sorted(row) == list(range(L))
    assert [masked[i] for i in row] == sorted(masked)


def test_clean_first_in_natural_order_at_a_long_length() -> None:
    """Neighbours among 8192 slots keep apart in the float32 ranks."""
    masked = jnp.arange(8192)[None] % 3 == 0
    found = np.asarray(order.clean_first(keys()[:1], masked, shuffle_clean=False, shuffle_masked=False))[0]
    np.testing.assert_array_equal(found, np.concatenate([np.flatnonzero(~masked[0]), np.flatnonzero(masked[0])]))


@pytest.mark.parametrize("num_random", range(L + 1))
def test_random_then_ascending(num_random: int) -> None:
    """A uniform `num_random`-tuple without repetition, then what is left, ascending."""
    found = np.asarray(jax.vmap(lambda key: order.random_then_ascending(key, L, num_random))(keys(num_random)))
    np.testing.assert_array_equal(np.sort(found), np.tile(np.arange(L), (ROWS, 1)))
    assert (np.diff(found[:, num_random:]) > 0).all()
    if num_random:
        uniform(positions_in_time(found)[:num_random], ROWS, 1 / L)
    if num_random == 2:
        pairs, counts = np.unique(found[:, :2], axis=0, return_counts=True)
        assert len(pairs) == L * (L - 1)
        uniform(counts, ROWS, 1 / len(pairs))


@pytest.mark.slow
@pytest.mark.parametrize("alpha_0", [0.0, 0.3, 1.0])
def test_likelihood_orders_are_a_binomial_random_part_then_ascending(alpha_0: float) -> None:
    """The random part's size shows in the last descent only up to chance, so its law is read off the probability that
    the natural position p comes first: it needs p in the random part and first there, or an empty random part."""
    num_orders, batch = 60, 50
    found = np.asarray(likelihood_orders(jax.random.key(1), num_orders, batch, L, alpha_0))
    assert found.shape == (num_orders, batch, L)
    order.check_permutations(found, L)
    flat = found.reshape(-1, L)
    if alpha_0 == 0:
        np.testing.assert_array_equal(flat, np.tile(np.arange(L), (ROWS, 1)))
        return
    empty = (1 - alpha_0) ** L
    for position in range(L):
        uniform(np.sum(flat[:, 0] == position), ROWS, (1 - empty) / L + empty * (position == 0))
    if alpha_0 == 1:
        uniform(positions_in_time(flat), ROWS, 1 / L)


def test_likelihood_orders_have_binomial_sizes() -> None:
    """At L = 400 the last descent bounds the size of the random part to within a few tokens."""
    length, alpha_0 = 400, 0.25
    found = np.asarray(likelihood_orders(jax.random.key(2), 30, 10, length, alpha_0)).reshape(-1, length)
    descents = np.diff(found) < 0
    sizes = length - 1 - np.argmax(descents[:, ::-1], axis=1)  # tokens up to the last descent: the size, or 1 or 2 less
    sd = np.sqrt(length * alpha_0 * (1 - alpha_0))
    slack = 2  # the random part's last tokens may happen to be ascending
    assert abs(sizes.mean() - length * alpha_0) < Z * sd / np.sqrt(len(sizes)) + slack
    assert 0.7 * sd < sizes.std() < 1.3 * sd


def test_likelihood_orders_are_independent_and_keyed_by_order_and_row() -> None:
    """Two random orders of 32 agree in one slot on average; shared randomness would make them agree in all."""
    many = np.asarray(likelihood_orders(jax.random.key(3), 4, 5, 32, 1.0))
    flat = many.reshape(20, 32)
    agreements = (flat[:, None] == flat[None]).sum(-1)[~np.eye(20, dtype=bool)]
    assert agreements.max() < 10 and 0.5 < agreements.mean() < 1.5
    np.testing.assert_array_equal(likelihood_orders(jax.random.key(3), 2, 3, 32, 1.0), many[:2, :3])


@given(st.permutations(range(L)), st.permutations(range(L)))
@settings(deadline=None, max_examples=50)
def test_sort_and_unsort_are_inverse(first: list[int], second: list[int]) -> None:
    orders, x = jnp.array([first, second]), jnp.array([[10, 11, 12, 13, 14, 15], [0, 1, 2, 3, 4, 5]])
    in_order = order.sort(x, orders)
    np.testing.assert_array_equal(in_order, [[10 + i for i in first], second])
    np.testing.assert_array_equal(order.unsort(in_order, orders), x)
    np.testing.assert_array_equal(order.sort(order.unsort(x, orders), orders), x)


@pytest.mark.parametrize("orders, message", [
    (np.zeros((2, 5), int), r"orders: shape \(2, 5\) of int64; must be integers with last axis 6"),
    (np.zeros((2, L)), r"of float64; must be integers"),
    (np.array([[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 4]]), r"orders\[1\]: not a permutation of 0..5"),
    (np.array([[[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]]]), r"orders\[0, 1\]: not a permutation of 0..5"),
    (np.array([[0, 1, 2, 3, 4, -1]]), r"orders\[0\]: not a permutation")])
def test_orders_that_are_not_permutations_are_named(orders: np.ndarray, message: str) -> None:
    with pytest.raises(EsoError, match=message):
        order.check_permutations(orders, L)


def test_permutations_pass() -> None:
    order.check_permutations(np.array([[[2, 0, 1]], [[1, 2, 0]]], np.int32), 3)
