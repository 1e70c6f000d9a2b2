"""The schedule, the times, the corruption, and keys that do not depend on how the batch is cut."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from eso_jax import noise

N = 64  # rows of the global batch


def draws(index: object = range(N), seed: int = 0, total: int = N) -> noise.Draws:
    return noise.Draws(jax.random.key(seed), jnp.array(index), total)


@pytest.mark.parametrize("alpha_0", [0.0, 0.25, 1.0])
def test_schedule_at_both_ends(alpha_0: float) -> None:
    ends = jnp.array([0.0, 1.0])
    np.testing.assert_allclose(noise.alpha(ends, alpha_0), [alpha_0, alpha_0 * 1e-3], rtol=1e-4)
    last = alpha_0 * 0.999 / (1 - alpha_0 * 1e-3)
    np.testing.assert_allclose(noise.elbo_weight(ends[1:], alpha_0), [last], rtol=1e-6)
    if alpha_0 == 1:  # w = 1 / t: at t = 1e-3 alpha is 1 - 0.999e-3, and the weight 1000
        np.testing.assert_allclose(noise.elbo_weight(jnp.array([1e-3]), 1.0), [1000], rtol=1e-3)


@pytest.mark.parametrize("alpha_0", [0.0625, 0.5, 1.0])
def test_weight_is_minus_the_schedules_slope_over_the_masked_share(alpha_0: float) -> None:
    t = jnp.linspace(0.01, 1, 30)
    slope = jax.vmap(jax.grad(lambda t: noise.alpha(t, alpha_0)))(t)
    np.testing.assert_allclose(noise.elbo_weight(t, alpha_0), -slope / (1 - noise.alpha(t, alpha_0)), rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_each_stratum_of_time_holds_exactly_one_row(seed: int) -> None:
    t = np.asarray(noise.draw_times(draws(seed=seed)))
    assert t.min() >= noise.T_MIN and t.max() <= 1
    strata = (t - noise.T_MIN) / (1 - noise.T_MIN) * N
    np.testing.assert_array_equal(np.floor(np.sort(strata)), np.arange(N))
    np.testing.assert_allclose(np.diff(np.sort(strata)), 1, atol=1e-4)  # evenly spread, by one shift for all


def test_times_are_uniform_over_seeds() -> None:
    """Row 0 covers the first stratum: mean and variance within 4.5 standard errors over 2000 seeds, and a share of
    0.1 in each tenth."""
    keys = jax.random.split(jax.random.key(0), 2000)
    t = np.asarray(jax.vmap(lambda key: noise.draw_times(noise.Draws(key, jnp.arange(2), 2), 0.2, 0.6))(keys))
    for row, low in ((0, 0.2), (1, 0.4)):
        counts, _ = np.histogram(t[:, row], bins=np.linspace(low, low + 0.2, 11))
        assert counts.sum() == 2000
        np.testing.assert_array_less(np.abs(counts - 200), 4.5 * np.sqrt(2000 * 0.1 * 0.9))


def test_alpha_0_is_spread_evenly_and_says_nothing_of_the_time() -> None:
    """By its logarithm; of each row alone it is uniform over the whole range, and independent of the row's time."""
    keys = jax.random.split(jax.random.key(0), 2000)
    both = [noise.Draws(key, jnp.arange(N), N) for key in keys]
    place = np.stack([1 + np.log2(noise.draw_alpha_0(each, 0.25, 1.0)) / 2 for each in both[:50]])
    np.testing.assert_allclose(np.diff(np.sort(place), axis=1), 1 / N, atol=1e-4)
    place, t = (np.asarray(jax.vmap(lambda key: draw(noise.Draws(key, jnp.arange(N), N)))(keys))
                for draw in (lambda d: 1 + jnp.log2(noise.draw_alpha_0(d, 0.25, 1.0)) / 2, noise.draw_times))
    for row in (0, 7):
        counts, _ = np.histogram(place[:, row], bins=np.linspace(0, 1, 11))
        assert counts.sum() == 2000
        np.testing.assert_array_less(np.abs(counts - 200), 4.5 * np.sqrt(2000 * 0.1 * 0.9))
    for step in range(20):  # in one batch as well the two go their own ways
        assert abs(np.corrcoef(place[step], t[step])[0, 1]) < 0.3


QUANTITIES: dict[str, Callable[[noise.Draws], jax.Array]] = {
    "times": noise.draw_times,
    "alpha_0": lambda d: noise.draw_alpha_0(d, 0.0625, 1.0),
    "keys": lambda d: jax.random.key_data(d.per_example(noise.MASK)),
    "masked": lambda d: noise.draw_masked(d.per_example(noise.MASK), jnp.full((len(d.index), 1), 0.5), 10),
    "dropout": lambda d: noise.dropout(jnp.ones((len(d.index), 5, 4)), 0.5, d.per_example(noise.DROPOUT)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", QUANTITIES)
def test_draws_do_not_depend_on_how_the_batch_is_cut(name: str) -> None:
    """Devices, hosts and micro-batches hold subsets of the rows, in any order."""
    quantity = QUANTITIES[name]
    whole = np.asarray(quantity(draws()))
    for part in (range(N - 16, N), range(1, N, 4), range(15, -1, -1)):
        np.testing.assert_array_equal(quantity(draws(part)), whole[np.array(part)])
    assert (np.asarray(quantity(draws(seed=1))) != whole).any()


def test_keys_differ_between_rows_purposes_and_steps() -> None:
    purposes = [noise.TIME, noise.MASK, noise.ORDER, noise.MASK_0, noise.ORDER_0, noise.DROPOUT]
    data = [jax.random.key_data(draws(seed=s).per_example(p)) for s in range(3) for p in purposes]
    assert len(np.unique(np.concatenate(data), axis=0)) == 3 * len(purposes) * N


def test_masked_share_and_independence() -> None:
    """400,000 tokens: shares within 4.5 standard errors, and pairs of neighbours masked together as often as chance."""
    rows, length = 1000, 400
    keep = np.tile([0.0, 0.1, 0.7, 1.0], rows // 4).astype(np.float32)
    keys = draws(range(rows), total=rows).per_example(noise.MASK)
    masked = np.asarray(noise.draw_masked(keys, jnp.asarray(keep)[:, None], length))
    for value in np.unique(keep):
        group = masked[keep == value]
        error = 4.5 * np.sqrt(value * (1 - value) / group.size)
        assert abs(group.mean() - (1 - value)) <= error
        for other in (group[:, 1:] & group[:, :-1], group[1:] & group[:-1]):
            assert abs(other.mean() - (1 - value) ** 2) <= 2 * error + 1e-6


def test_masking_rate_may_vary_along_a_row() -> None:
    """As BD3-LM's blocks have it."""
    keep = jnp.repeat(jnp.array([[0.0, 1.0], [1.0, 0.0]]), 3, axis=1)
    masked = noise.draw_masked(draws([0, 1]).per_example(noise.MASK), keep, 6)
    np.testing.assert_array_equal(masked, keep == 0)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(rate: float) -> None:
    x = jnp.full((N, 50, 40), 2.0)
    out = np.asarray(noise.dropout(x, rate, draws().per_example(noise.DROPOUT)))
    np.testing.assert_allclose(np.unique(out), [0, 2 / (1 - rate)], rtol=1e-6)
    assert abs((out == 0).mean() - rate) < 4.5 * np.sqrt(rate * (1 - rate) / out.size)
    for axis in (0, 1):  # and independently: the shares of an entry over rows, and of a row, spread as binomials do
        shares = (out == 0).reshape(N, -1).mean(axis)
        spread = rate * (1 - rate) * shares.size / out.size
        assert abs(shares.var() / spread - 1) < 4.5 * np.sqrt(2 / shares.size)


def test_entries_are_dropped_without_regard_to_others() -> None:
    """Rows of 256 x 48 entries: how often two entries of a row are dropped together, at every distance; two rows at
    every shift; and a row at two steps. All are normal, with the spread of independent draws."""
    rows, rate = 32, 0.1

    def dropped(step: int) -> np.ndarray:
        keys = draws(range(rows), step, rows).per_example(noise.DROPOUT)
        out = noise.dropout(jnp.ones((rows, 256, 48)), rate, keys)
        return ((np.asarray(out) == 0).reshape(rows, -1) - rate) / np.sqrt(rate * (1 - rate))

    one, other = dropped(0), dropped(1)
    size = one.shape[1]
    spectrum = np.fft.rfft(one, 2 * size)
    pairs = np.fft.irfft(np.abs(spectrum)**2)[:, 1:size // 2] / np.sqrt(size - np.arange(1, size // 2))
    shifts = np.fft.irfft(spectrum[:-1] * spectrum[1:].conj())[:, :size // 2]
    shifts /= np.sqrt(size - np.arange(size // 2))
    for each, most in ((pairs, 7.0), (pairs.mean(0) * np.sqrt(rows), 5.5), (shifts, 7.0),
                       (shifts.mean(0) * np.sqrt(rows - 1), 5.5), ((one * other).sum(1) / np.sqrt(size), 4.5)):
        assert abs(each.std() - 1) < 0.05 + 4.5 / np.sqrt(2 * each.size) and np.abs(each).max() < most


def test_gradients_are_dropped_alike() -> None:
    keys = draws([0, 1]).per_example(noise.DROPOUT)
    x = jax.random.normal(jax.random.key(0), (2, 30, 4))
    gradient = jax.grad(lambda x: (noise.dropout(x, 0.5, keys) * x).sum())(x)
    np.testing.assert_allclose(gradient, 2 * noise.dropout(x, 0.5, keys), rtol=1e-6)


def test_dropout_of_nothing_is_the_identity() -> None:
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    np.testing.assert_array_equal(noise.dropout(x, 0.0, draws([0, 1]).per_example(noise.DROPOUT)), x)
